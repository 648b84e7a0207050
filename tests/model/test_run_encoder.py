"""The one way through a frozen encoder: in chunks, outside of autocast; and what media travel as to it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from tqdm import tqdm

import tiny_encoders as tiny
from anymal.adapters import REGISTRY
from anymal.checkpoints.build import build, load_encoder
from anymal.checkpoints.built import Built
from anymal.config.schema import Config, ModalityConfig
from anymal.config.settings import load
from anymal.data import shards
from anymal.data.packing import Item, Row
from anymal.data.parse import parse
from anymal.errors import UserError
from anymal.estimation.memory import MemoryTracker
from anymal.evaluation.evaluate import evaluate, prepare_held_out
from anymal.features.encode import Encode
from anymal.model.generate import embed_prompt
from anymal.model.multimodal import freeze_encoder, run_encoder
from anymal.sample import Sample, Viewable, Views
from anymal.training.prefetch import Prefetcher
from small_runs import make_encoders, settings, write_pairs

CPU = torch.device("cpu")


def loaded(name: str, folder: str, size: int, **options) -> nn.Module:
    """An encoder with an ``encoder_batch_size``, as programs have it."""
    config = ModalityConfig(encoder=folder, options=tiny.OPTIONS.get(name, {}) | options, encoder_batch_size=size)
    encoder = load_encoder(REGISTRY, name, config)
    freeze_encoder(encoder, CPU)
    return encoder


def sizes(module: nn.Module) -> list[int]:
    """How many inputs `module` gets at a time from now on, in a list that grows."""
    seen: list[int] = []
    module.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    return seen


# ---------------------------------------------------------------------------------------------------------- chunks


@pytest.mark.parametrize(("size", "chunks"), [(0, [7]), (3, [3, 3, 1]), (7, [7]), (1, [1] * 7), (256, [7])])
def test_pictures_are_encoded_so_many_at_a_time(size, chunks, tmp_path):
    encoder = loaded("image", tiny.clip(tmp_path), size)
    media = torch.stack([encoder.decode(tiny.picture(size=(32 + i, 32))) for i in range(7)])
    seen = sizes(encoder)
    features = run_encoder(encoder, media, CPU)
    assert seen == chunks
    assert torch.equal(features, torch.cat([encoder(chunk) for chunk in media.split(chunks[0])]))
    assert torch.allclose(features, encoder(media), atol=1e-5)


@pytest.mark.parametrize(
    ("size", "clips", "frames"), [(256, [4], [12]), (7, [2, 2], [6, 6]), (2, [1] * 4, [2, 1] * 4), (0, [4], [12])]
)
def test_a_clip_counts_as_its_frames(size, clips, frames, tmp_path):
    encoder = loaded("video", tiny.clip(tmp_path), size, frames=3, pool=4)
    media = torch.rand(4, *encoder.shape)
    expected, clips_seen, frames_seen = encoder(media), sizes(encoder), sizes(encoder.encoder)
    features = run_encoder(encoder, media, CPU)
    assert (clips_seen, frames_seen) == (clips, frames)
    assert torch.allclose(features, expected, atol=1e-5)
    frames_seen.clear()
    with torch.enable_grad():  # as where it learns
        encoder(media)
    assert frames_seen == [12]


def test_a_video_networks_clips_are_counted_by_their_frames_too(tmp_path):
    encoder = loaded("video", tiny.videomae(tmp_path), 9)
    seen = sizes(encoder)
    run_encoder(encoder, torch.rand(5, *encoder.shape), CPU)
    assert seen == [2, 2, 1], "of 4 frames each"


@pytest.mark.parametrize("name", ["audio", "imu"])
def test_sounds_and_windows_are_chunked_as_well(name, tmp_path):
    encoder = loaded(name, next(iter(tiny.ENCODERS[name].values()))(tmp_path), 2)
    seen = sizes(encoder)
    run_encoder(encoder, torch.rand(5, *encoder.shape), CPU)
    assert seen == [2, 2, 1]


def test_chunks_bound_the_memory(tmp_path):
    encoder, media, peaks = loaded("image", tiny.clip(tmp_path), 0), torch.rand(64, 3, 32, 32), []
    for size in (0, 8):
        encoder.encoder_batch_size = size
        with MemoryTracker() as tracker:
            features = run_encoder(encoder, media, CPU)
        peaks.append(tracker.peaks["step"].total() - features.nbytes)
    assert peaks[1] < 0.2 * peaks[0]


def test_an_encoder_of_somebody_elses_needs_to_know_nothing_of_it():
    class Theirs(nn.Module):
        tokens, width, license, shape = 1, 4, "none", (4,)

        def forward(self, media: Tensor) -> Tensor:
            return media[:, None]

    encoder, media = Theirs(), torch.rand(5, 4)
    assert torch.equal(run_encoder(encoder, media, CPU), media[:, None])
    encoder.encoder_batch_size = 2
    assert torch.equal(run_encoder(encoder, media, CPU), media[:, None])
    assert torch.equal(run_encoder(encoder, torch.arange(8).reshape(2, 4), CPU), torch.arange(8).reshape(2, 1, 4))


def test_a_size_below_zero_is_refused():
    with pytest.raises(UserError, match="encoder_batch_size is -1; it is at least 1, or 0 for all at once"):
        ModalityConfig(encoder="x", encoder_batch_size=-1)


# -------------------------------------------------------------------------------------------------- one rule for all


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_of_the_caller_changes_nothing(dtype, tmp_path):
    encoder = loaded("image", tiny.clip(tmp_path), 4).to(dtype)
    media = torch.rand(6, *encoder.shape)
    expected = run_encoder(encoder, media, CPU)
    with torch.autocast("cpu", torch.bfloat16):
        found = run_encoder(encoder, media, CPU)
    assert found.dtype == dtype and torch.equal(found, expected)


@pytest.fixture
def run(tiny_llm, tmp_path) -> tuple[Built, Config]:
    """A model that sees pictures, one at a time, and a tar of four."""
    data = write_pairs(tmp_path / "data", ["image"], shards=1, per_shard=4)
    more = {"model__llm__bits": 32, "model__modalities__image__encoder_batch_size": 1}
    given = settings(tiny_llm, make_encoders(tmp_path / "encoders"), tmp_path / "run", data, ["image"], **more)
    config = load(Config, None, given, ["train=[projectors]"])
    return build(config, CPU, REGISTRY), config


def samples_of(config: Config) -> tuple[shards.Index, list[Sample]]:
    index = shards.index(str(Path(config.data.shards) / "000.tar"))
    read = [shards.read(index.path, *index.place(i)) for i in range(len(index))]
    return index, [parse(index.path, key, members, REGISTRY.suffixes()) for key, members in read]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "within autocast"])
def test_training_evaluation_chat_and_the_cache_give_the_same_features(run, dtype, autocast):
    """To the bit, since their chunks are equal: of one picture each."""
    built, config = run
    model, encoder, prepare = built.model, built.model.encoders["image"].to(dtype), built.prepare
    model.projectors.to(dtype)
    index, samples = samples_of(config)
    expected = run_encoder(encoder, torch.stack([prepare(sample).media[0] for sample in samples]), CPU)
    blank = encoder(torch.zeros(1, *encoder.shape, dtype=dtype))
    seen: list[Tensor] = []
    encoder.register_forward_hook(lambda module, given, made: seen.append(made.detach()))

    def train() -> None:
        prefetcher = Prefetcher(model)
        prefetcher.start(Row(items=[Item(position=0, dataset="", tokens=prepare(sample)) for sample in samples]))
        assert torch.equal(prefetcher.take()[1]["image"], expected)

    def chat() -> None:
        for sample in samples:
            embed_prompt(model, prepare.question(sample))

    def hold_out() -> None:
        held_out = [prepare_held_out(prepare, sample) for sample in samples]
        assert len(list(evaluate(model, built.tokenizer, held_out, max_new_tokens=0, batch_size=4))) == 12
        assert torch.equal(seen.pop(0), blank), "the control: what its network sees is zero, not black"

    def encode() -> None:
        cache = Encode(config.data, {"image": encoder}, REGISTRY.suffixes(), CPU)
        encoder.to(dtype)
        assert cache.write(index, tqdm(disable=True), wait=False)

    for program in (train, chat, hold_out, encode):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            program()
        assert torch.equal(torch.cat(seen), expected), program.__name__
        seen.clear()


# ------------------------------------------------------------------------------------------------ media on their way


def test_floating_media_travel_as_their_frozen_encoder_computes(run, tmp_path):
    """bfloat16 where the arithmetic is, as on a GPU: the same features to the bit. On a CPU nothing is cast."""
    built, _ = run
    assert built.prepare.dtypes == {}
    encoder = loaded("imu", tiny.imu(tmp_path / "imu"), 0).to(torch.bfloat16)
    built.prepare.decoders["imu"], data = encoder.decode, tiny.npy(tiny.motion())

    def medium(dtypes: dict) -> Tensor:
        built.prepare.dtypes = dtypes
        sample = parse("s.tar", "k", {"imu.npy": data, "txt": b"x"}, REGISTRY.suffixes())
        return built.prepare.decode(sample).media()[0].content

    exact, half = medium({}), medium({"imu": torch.bfloat16})
    assert (exact.dtype, half.dtype) == (torch.float32, torch.bfloat16) and half.nbytes * 2 == exact.nbytes
    assert torch.equal(run_encoder(encoder, half[None], CPU), run_encoder(encoder, exact[None], CPU))


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, torch.bfloat16), (torch.uint8, torch.uint8)])
def test_views_travel_so_too(run, dtype, expected):
    built, _ = run
    views = Views(tensor=torch.ones(2, 3).to(dtype), skipped=(False, True, False))
    built.prepare.decoders["image"] = lambda data: Viewable(choices=(2,), views=lambda count: views)
    built.prepare.dtypes = {"image": torch.bfloat16}
    sample = parse("s.tar", "k", {"png": b"", "txt": b"x"}, REGISTRY.suffixes())
    cut = built.prepare.decode(sample).media()[0].content.views(2)
    assert cut.tensor.dtype == expected and cut.skipped == views.skipped
