"""What version 0.1.0 wrote is read, and goes on exactly: recipes, runs, checkpoints, features, identities, a bookmark.

`written_by_0_1/README.md` says what is there and how it was made. A setting, a file or a key that is renamed still has
to be understood under the name that it has there; warnings are welcome.
"""

import io
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict
from functools import partial
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import anymal.evaluation.run
import anymal.features.encode
import anymal.serving.chat
import streams
import tiny_encoders
from anymal.adapters import REGISTRY
from anymal.checkpoints.build import load_encoder
from anymal.config.schema import DatasetConfig, ModalityConfig, ProjectorConfig
from anymal.config.stages import Recipe, load_stages
from anymal.data.feature_codec import identity
from anymal.data.stream import Stream
from anymal.errors import BadSample
from anymal.sample import Sample, Tokens
from small_runs import losses, metrics, pretrain_here
from toys import build_projector

WRITTEN = Path(__file__).with_name("written_by_0_1")
RUNS = {"pretrain": 2, "finetune": 1, "joint": 1, "cross": 1}
"""Name of each run, and the step that it stopped after."""
PRECISIONS = ("float32", "bf16", "int8")
TAR_TIME = 1_600_000_000_000_000_000
"""When each tar was changed last, in ns: features are those of a tar of this size and time. Git keeps no times."""
NEAR = {"rel": 1e-5, "abs": 1e-7}
"""How far a figure may be off on another machine."""

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of settings that have other names by now


def read(name: str) -> Any:
    return json.loads((WRITTEN / name).read_text())


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """A copy of the folder in which 0.1.0 worked, to work in: its recipes and checkpoints name what is in it."""
    folder = Path(shutil.copytree(WRITTEN / "work", tmp_path / "work", symlinks=True))
    for tar in folder.glob("data/*/*.tar"):
        os.utime(tar, ns=(TAR_TIME, TAR_TIME))
    monkeypatch.chdir(folder)
    return folder


def program(module: ModuleType, *arguments: str) -> str:
    """What a program prints, run in this process."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(said):
        patched.setattr(sys, "argv", ["program", *arguments])
        module.main("", REGISTRY)
    return said.getvalue()


# -------------------------------------------------------------------------------------------------------- recipes


def leaves(value: Any) -> Iterator[Any]:
    """Every value in nested dicts and lists that is none itself."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    else:
        yield str(value)


@pytest.mark.parametrize("path", sorted((WRITTEN / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_states_what_it_stated(path, monkeypatch):
    """Whatever its settings are called by now, none of their values is lost."""
    monkeypatch.setenv("ANYMAL_CACHE", "/cache")
    text = path.read_text()
    left_open = [name for name in ("data.shards", "model.checkpoint") if f"{name.split('.')[1]}: ???" in text]
    stages = load_stages(Recipe, path, [f"{name}=x" for name in left_open])
    common = OmegaConf.load(path)
    parts = common.pop("stages", [{"name": ""}])
    assert [stage.stage for stage in stages] == [part.pop("name") for part in parts]
    for stage, part in zip(stages, parts, strict=True):
        stated = leaves(OmegaConf.to_container(OmegaConf.merge(common, part), resolve=True))
        assert set(stated) - set(leaves(asdict(stage))) <= {"???"}


# ----------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize(("name", "step"), RUNS.items())
def test_a_run_goes_on_in_mid_epoch(work, name, step):
    run = work / "runs" / name
    before = metrics(run)
    assert [line["step"] for line in before] == list(range(1, step + 1))
    pretrain_here(work / f"{name}.yaml")
    assert metrics(run)[:step] == before, "it went on, and did not begin anew"
    assert losses(run) == pytest.approx(of_steps(read("expected.json")["losses"][name]), **NEAR)


def test_a_run_from_the_start_is_the_same(work):
    pretrain_here(work / "pretrain.yaml", "run.dir=runs/anew")
    assert losses(work / "runs/anew") == pytest.approx(of_steps(read("expected.json")["losses"]["pretrain"]), **NEAR)


def of_steps(found: dict[str, float]) -> dict[int, float]:
    return {int(step): loss for step, loss in found.items()}


def answers(out: Path) -> dict[str, Any]:
    """What the checkpoint with a LoRA says, and how likely it finds what is right, in the present folder."""
    asked = ["--image", "picture.png", "is it", "--audio", "tone.flac", "?"]
    said = {
        bits: program(anymal.serving.chat, "checkpoint=runs/finetune", f"bits={bits}", "max_new_tokens=8", *asked)
        for bits in (4, 32)
    }
    given = ["checkpoint=runs/finetune", "sets.talks=data/conversations", f"out={out / 'evaluation'}", "bits=[4,32]"]
    program(anymal.evaluation.run, *given, "max_new_tokens=2", "workers=0", "media=0")
    evaluation = json.loads((out / "evaluation" / "evaluation.json").read_text())
    found = {}
    for bits, sets in evaluation["precisions"].items():
        for condition in ("own", "blank", "shuffled"):
            found |= {f"{bits} {condition} {key}": sets["talks"][condition][key] for key in ("loss", "accuracy")}
    return {"chat": {str(bits): text for bits, text in said.items()}, "evaluation": found}


def test_a_checkpoint_with_a_lora_answers_as_it_did(work, tmp_path):
    found, expected = answers(tmp_path), read("expected.json")
    assert found["chat"] == expected["chat"]
    assert found["evaluation"] == pytest.approx(expected["evaluation"], **NEAR)


# ----------------------------------------------------------------------------------------------------- projectors

GRID = [(16, 12)]
TWO = [(4, 12), (16, 8)]
PROJECTORS: dict[str, tuple[dict, list[tuple[int, int]]]] = {
    "linear": ({"tokens": 4}, GRID),
    "mlp": ({"tokens": 4, "layers": 3, "width": 10}, GRID),
    "resampler": ({"tokens": 4, "layers": 2, "heads": 2}, GRID),
    "qformer": ({"tokens": 4, "layers": 2, "heads": 2}, GRID),
    "abstractor": ({"tokens": 4, "layers": 1}, GRID),
    "pixel_shuffle": ({"tokens": 0}, GRID),
    "each": ({"tokens": 0, "layers": 1, "options": {"tags": True}}, TWO),
    "mining": ({"tokens": 0}, TWO),
    "cross_attention": ({"tokens": 4, "layers": 1, "heads": 2, "options": {"every": 2}}, GRID),
}
"""By kind: settings, and the features that it takes."""


def projected(kind: str) -> dict[str, Any]:
    """The tensors of a projector by the names under which a checkpoint holds them, and some of what it computes."""
    settings, parts = PROJECTORS[kind]
    projector = build_projector(ProjectorConfig(kind=kind, **settings), parts, llm_width=16, llm_layers=4)
    with_plain_weights(projector).eval()
    with torch.no_grad():
        made = projector(plain(2, sum(count for count, _ in parts), max(width for _, width in parts)))
    shapes = {name: list(tensor.shape) for name, tensor in sorted(projector.state_dict().items())}
    return {"tensors": shapes, "shape": list(made.shape), "some": made.flatten()[:: max(1, made.numel() // 8)].tolist()}


@pytest.mark.parametrize("kind", PROJECTORS)
def test_a_projector_is_held_and_computed_as_it_was(kind):
    found, expected = projected(kind), read("projectors.json")[kind]
    assert found["tensors"] == expected["tensors"]
    assert found["shape"] == expected["shape"]
    assert found["some"] == pytest.approx(expected["some"], rel=1e-4, abs=1e-5)


# ------------------------------------------------------------------------------------------------------- features


def blind(tar: Path) -> None:
    """Zeros in the place of every picture of a tar, whose size and time stay: only cached features can be read."""
    with tarfile.open(tar) as file:
        pictures = [(member.offset_data, member.size) for member in file if member.name.endswith(".png")]
    with tar.open("r+b") as file:
        for offset, size in pictures:
            file.seek(offset)
            file.write(bytes(size))
    os.utime(tar, ns=(TAR_TIME, TAR_TIME))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_cached_features_are_read(work, precision):
    blind(work / "data/encoded/000.tar")
    pretrain_here(work / "encoded.yaml", f"data.features={precision}")
    expected = read("expected.json")["losses_from_features"][precision]
    assert losses(work / "runs/encoded") == pytest.approx(of_steps(expected), **NEAR)


def test_what_is_encoded_is_not_encoded_again(work):
    blind(work / "data/encoded/000.tar")  # it would be a tar of bad media

    def held() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in work.glob("data/encoded/features/*/*.tar")}

    before = held()
    assert len(before) == len(PRECISIONS)
    for precision in PRECISIONS:
        program(anymal.features.encode, "encoded.yaml", f"data.features={precision}")
    assert held() == before


Maker = tuple[str, Any, dict]
ENCODERS: dict[str, Maker] = {
    f"{modality} {kind}": (modality, make, tiny_encoders.OPTIONS.get(modality, {}))
    for modality, makers in tiny_encoders.ENCODERS.items()
    for kind, make in makers.items()
} | {
    "image layer": ("image", tiny_encoders.clip, {"layer": -1}),
    "image max_pixels": ("image", tiny_encoders.clip, {"max_pixels": 1000}),
    "video frames": ("video", tiny_encoders.clip, {"frames": 4, "pool": 4}),
    "imu units": ("imu", tiny_encoders.imu, {"rate": 100.0, "acceleration": "g", "rotation": "deg/s"}),
}
"""Modality, maker and options of every tiny encoder, by what it is."""


def plain(*shape: int, start: int = 0) -> torch.Tensor:
    """Numbers that are the same on every machine, which random ones need not be; exact in bfloat16."""
    return ((torch.arange(prod(shape)) * 7 + start) % 13 - 6).reshape(shape) / 8


def with_plain_weights(network: nn.Module) -> nn.Module:
    """The network with such weights, by the order of their names."""
    for number, (_, tensor) in enumerate(sorted(network.state_dict().items())):
        if tensor.is_floating_point():
            tensor.copy_(plain(*tensor.shape, start=number))
    return network


@pytest.mark.parametrize("name", ENCODERS)
def test_the_identity_of_cached_features_is_the_same(name, tmp_path):
    """If transformers was changed, and not our code: its networks are others to the cache, and are encoded again."""
    modality, make, options = ENCODERS[name]
    config = ModalityConfig(encoder=make(tmp_path / "encoder"), options=options)
    assert identity(with_plain_weights(load_encoder(REGISTRY, modality, config))) == read("identities.json")[name]


# ------------------------------------------------------------------------------------------------------- bookmark


def prepare(sample: Sample) -> Tokens:
    """Samples of 1 to 11 tokens, and a bad one."""
    number = int(sample.answer())
    if number == 5:
        raise BadSample("five")
    ids = [1 + number] * (1 + number * 7 % 11)
    return Tokens(key=sample.key, ids=ids, labels=ids, runs=[], media=[torch.tensor([number])])


def numbers(place: Path, *, rank: int, world: int, bookmark: dict | None = None) -> Stream:
    """Rows of at most 12 tokens of two datasets: samples 0 to 20 in three shards, and 100 to 109 in two."""
    if not place.is_dir():
        place.mkdir()
        streams.folder(place / "many", 7, 5, 9)
        (place / "few").mkdir()
        for shard, (first, count) in enumerate([(100, 4), (104, 6)]):
            streams.write(place / "few" / f"{shard:03d}.tar", streams.numbered(first, count))
    datasets = {name: DatasetConfig(shards=str(place / name), ratio=r) for name, r in (("many", 2), ("few", 1.5))}
    given = {"seed": 11, "shuffle": 6, "row_tokens": 12, "max_tokens": 12, "packing_buffer": 3}
    return streams.stream(datasets, rank=rank, world=world, bookmark=bookmark, with_=prepare, **given)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_bookmark_is_followed_by_what_it_was_followed_by(world, tmp_path):
    open_stream = partial(numbers, tmp_path / "numbers", world=world, bookmark=read("bookmark.json"))
    found = [streams.keys(open_stream(rank=rank), 12 // world) for rank in range(world)]
    assert found == read("expected.json")["next_keys"][str(world)]
