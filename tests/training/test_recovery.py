"""A sample whose loss is not finite costs one sample: the run is the one in which it had been bad from the start."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

import anymal.adapters
from anymal.adapters import REGISTRY
from anymal.adapters.projectors import PROJECTORS
from anymal.checkpoints import checkpoint
from anymal.checkpoints.state import load_training_state
from anymal.config.schema import Config
from anymal.config.settings import load
from anymal.errors import UserError
from anymal.modality import Modality
from anymal.model.registry import ProjectorKind
from anymal.training.run import run_stage
from small_runs import deepspeed, go_back, losses, settings
from streams import listed
from toys import ToyEncoder, ToyOptions

OVERFLOWS = 100.0  # its exponential is beyond float32
STEEP = 5.0  # its exponential is more than any other's


class ExpEncoder(ToyEncoder):
    """Finite media, features that need not be."""

    def forward(self, media):
        return super().forward(media.exp())


class SteepProjector(nn.Module):
    """A linear layer, and nothing but an infinite gradient for what is larger than 50."""

    def __init__(self, config, options, fit):
        super().__init__()
        self.tokens, self.linear = 3, nn.Linear(4, fit.llm_width)
        self.zero = nn.Parameter(torch.zeros(1))

    def forward(self, features):
        return self.linear(features / 100) + torch.sqrt(self.zero * features[features > 50]).sum()


TOY = Modality(name="toy", suffixes=("toy.bin",), options=ToyOptions, load=lambda *_: ExpEncoder())


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """The recipe's modality `toy`: one number."""
    monkeypatch.setitem(anymal.adapters.MODALITIES, "toy", TOY)
    monkeypatch.setitem(PROJECTORS, "steep", ProjectorKind(make=SteepProjector))


def write(folder: Path, bad: bytes, *numbers: int) -> str:
    """24 samples, of which those with these numbers have `bad` for a medium."""
    folder.mkdir()
    with wds.TarWriter(str(folder / "a.tar")) as tar:
        for i in range(24):
            medium = bad if i in numbers else np.float32(i / 24).tobytes()
            tar.write({"__key__": f"{i:02d}", "toy.bin": medium, "txt": f"a {'red' if i % 3 else 'blue'} one"})
    return str(folder)


@pytest.fixture
def run(tiny_llm, tmp_path):
    """Run stage 1 over a folder; returns the run's folder."""

    def start(name: str, shards: str, **more) -> Path:
        run_stage(
            load(Config, None, given(tiny_llm, tmp_path / name, shards, **more), ["train=[projectors]"]), REGISTRY
        )
        return tmp_path / name

    return start


def given(llm: Path, run: Path, shards: str, **more) -> list[str]:
    """The settings of a run."""
    defaults = {"data__features": "never", "data__batch_size": 4, "data__max_bad_share": 0.5, "run__save_every": 2}
    return settings(llm, Path("x"), run, shards, ["toy"], **defaults | more)


@pytest.mark.parametrize(("zero", "workers"), [(0, 0), (1, 2), (2, 0), (3, 0)])
def test_a_loss_that_is_not_finite_costs_its_sample(run, tmp_path, zero, workers):
    hostile = write(tmp_path / "hostile", np.float32(OVERFLOWS).tobytes(), 5, 17)
    broken = write(tmp_path / "broken", b"no number", 5, 17)
    more = {"engine__zero": zero, "data__workers": workers, "optim__steps": 12, "optim__gradient_accumulation": 2}
    found, wanted = run("found", hostile, **more), run("wanted", broken, **more)
    assert losses(found) == losses(wanted) and sorted(losses(found)) == list(range(1, 13))
    named = {entry["key"]: entry["reason"] for entry in listed(found / "quarantine.jsonl")}
    assert named == dict.fromkeys(["05", "17"], "its loss is nan, which is not finite")
    states = [json.loads((folder / "checkpoints/latest/training/state.json").read_text()) for folder in (found, wanted)]
    assert states[0]["bookmark"] == states[1]["bookmark"]
    assert [place[:3] for place in states[0]["refused"]] == [[0, 0, 5], [0, 0, 17]]
    go_back(found, 10)  # in a later epoch: what was refused before is passed over without being tried
    assert load_training_state(checkpoint.existing(found)).refused == states[0]["refused"]
    run("found", hostile, **more)
    assert losses(found) == losses(wanted)


def test_samples_are_not_blamed_for_a_step_in_which_none_is_finite(run, tmp_path):
    hostile = write(tmp_path / "hostile", np.float32(OVERFLOWS).tobytes(), *range(24))
    with pytest.raises(UserError, match=r"loss of step 1, .* each sample's is so alone; nothing .* optim\.lr"):
        run("run", hostile, optim__steps=2)
    assert not (tmp_path / "run" / "quarantine.jsonl").exists()


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_gradient_that_is_not_finite_is_never_applied(run, tmp_path, zero):
    more = {
        "engine__zero": zero,
        "optim__steps": 6,
        "optim__clip": 0,
        "model__modalities__toy__projector__kind": "steep",
    }
    steep = write(tmp_path / "steep", np.float32(STEEP).tobytes(), 5)
    if zero == 3:  # nobody is found, but nothing is applied either
        with pytest.raises(UserError, match=r"or its gradient, is not finite, and no sample's is so alone"):
            run("found", steep, **more)
        return
    broken = write(tmp_path / "broken", b"no number", 5)
    assert losses(run("found", steep, **more)) == losses(run("wanted", broken, **more))
    assert listed(tmp_path / "found" / "quarantine.jsonl")[0]["reason"] == "the gradient of its loss is not finite"


@pytest.mark.parametrize("train", ["projectors", "llm"])
def test_samples_are_tried_with_the_memory_of_training(tiny_llm, tmp_path, train):
    """Layers recompute what they recompute in training, or a sample that just fits there would not fit here."""
    modes = set()

    def note(module: nn.Module, _: tuple) -> None:
        if isinstance(module, GradientCheckpointingLayer) and torch.is_grad_enabled():
            modes.add(module.training)

    more = {"optim__steps": 2, "model__llm__checkpointing": "full", "model__llm__bits": 32}
    shards = write(tmp_path / "hostile", np.float32(OVERFLOWS).tobytes(), *range(0, 24, 6))
    config = load(Config, None, given(tiny_llm, tmp_path / "run", shards, **more), [f"train=[projectors,{train}]"])
    hook = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        run_stage(config, REGISTRY)
    finally:
        hook.remove()
    assert listed(tmp_path / "run" / "quarantine.jsonl") and modes == {True}


PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
import anymal.adapters
from anymal.training.run import main
sys.path.insert(0, {here!r})
from test_recovery import TOY
anymal.adapters.MODALITIES["toy"] = TOY
sys.exit(main("", anymal.adapters.REGISTRY, ["train=[projectors]"]))
"""


@pytest.mark.slow
def test_ranks_do_a_step_again_together(tiny_llm, tmp_path):
    """The culprit is one rank's; the others go back as well."""
    hostile = write(tmp_path / "hostile", np.float32(OVERFLOWS).tobytes(), 5)
    broken = write(tmp_path / "broken", b"no number", 5)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(tests=str(Path(__file__).parents[1]), here=str(Path(__file__).parent)))
    stages = [
        {"name": name, "engine": {"zero": zero}, "data": {"shards": shards}, "model": {"checkpoint": None}}
        for name, zero, shards in (("zero1", 1, hostile), ("zero3", 3, hostile), ("wanted", 1, broken))
    ]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"stages": stages}))
    rest = [setting for setting in given(tiny_llm, tmp_path / "two", "", optim__steps=6) if "shards" not in setting]
    deepspeed(2, str(program), recipe, *rest)
    wanted = losses(tmp_path / "two" / "wanted")
    for name in ("zero1", "zero3"):
        assert losses(tmp_path / "two" / name) == pytest.approx(wanted, rel=1e-5)
    named = [entry for path in (tmp_path / "two" / "zero3").glob("quarantine*.jsonl") for entry in listed(path)]
    assert {entry["key"] for entry in named} == {"05"}
