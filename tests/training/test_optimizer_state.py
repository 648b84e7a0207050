"""The optimizer's moments where a run goes on: read by rank 0 alone, held by no rank, every rank's slice exact."""

import gc
from pathlib import Path

import pytest
import torch

import anymal.training.loop
from anymal.config.schema import Config
from anymal.config.settings import load
from anymal.model.trainable import select_trainable
from anymal.training.engine import engine_of, processes
from anymal.training.meter import Meter
from anymal.training.optimizer_state import full_moments, restore_moments
from small_runs import go_back, losses, make_encoders, pretrain_here, python, settings, write_pairs, zero_stages
from toys import toy_model

LEARNS = "train=[projectors,llm]"
STATE = "training/optimizer.safetensors"
HELD: list[int] = []


class Scale(Meter):
    """A meter that also weighs, after each step, all tensors that are alive."""

    def add(self, *arguments, **more):
        super().add(*arguments, **more)
        gc.collect()
        storages = [o.untyped_storage() for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        HELD.append(sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr()}.values()))  # no shapes alone


def same(run: Path, whole: Path) -> bool:
    """Whether the last step of a run that went on left what that of one did which never stopped: to the bit."""
    again = run / "checkpoints/step-00000002"
    files = [STATE, "llm/model.safetensors", "adapters/image/model.safetensors"]
    return all((again / name).read_bytes() == (whole / name).read_bytes() for name in files)


@pytest.fixture
def given(tiny_llm, tmp_path) -> list[str]:
    shards = write_pairs(tmp_path / "pairs", ["image"], shards=1)
    encoders = make_encoders(tmp_path / "encoders")
    more = {"model__llm__bits": 16, "optim__steps": 2, "run__save_every": 1, "optim__lr": 1e-3}
    run = settings(tiny_llm, encoders, Path("run"), shards, ["image"], **more)
    return [*run, LEARNS]


@pytest.mark.parametrize("zero", [1, 3])
def test_a_run_that_goes_on_holds_what_one_does_that_never_stopped(given, tmp_path, monkeypatch, zero):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(anymal.training.loop, "Meter", Scale)
    HELD.clear()
    pretrain_here(None, *given, f"engine.zero={zero}")
    never_stopped = HELD[-1]
    last = Path("run/checkpoints/step-00000002").rename("whole")
    go_back(Path("run"), 1)
    pretrain_here(None, *given, f"engine.zero={zero}")
    assert len(HELD) == 3 and abs(HELD[-1] - never_stopped) < (last / STATE).stat().st_size / 20
    assert "optimizer.safetensors" not in Path("/proc/self/maps").read_text()
    assert same(Path("run"), last)


def test_a_moment_that_is_not_there_is_not_left_out(tiny_llm):
    model, _ = toy_model(tiny_llm, one=3)
    select_trainable(model, ["projectors"])
    config = load(Config, None, ["model.llm.name=x", "data.shards=x", "engine.zero=1"])
    with processes(), engine_of(model, config) as engine, pytest.raises(RuntimeError, match="has no exp_avg of llm"):
        restore_moments(engine, lambda _: torch.zeros(()), 0)
        next(model.llm.parameters()).requires_grad_(True)  # too late: the optimizer does not know of it
        full_moments(engine)


@pytest.mark.slow
def test_two_ranks_go_on_exactly_though_only_rank_0_has_the_optimizers_file(given, tmp_path):
    """Gates of cross-attention are single numbers: ZeRO 3 cannot cut them evenly. Each group is sharded by itself."""
    here = "model.modalities.image.projector"
    more = [f"{here}.kind=cross_attention", f"{here}.heads=2", f"{here}.options.every=1"]
    more += ["optim.groups={llm: {lr: 1e-4, weight_decay: 0.1}, projectors: {lr: 1e-2}}"]
    recipe = zero_stages(tmp_path / "recipe.yaml", 0, 3)
    python("tests/two_ranks.py", str(tmp_path), str(recipe), *given, *more)
    for zero in (0, 3):
        run = tmp_path / "0" / "run" / f"zero{zero}"
        assert sorted(losses(run)) == [1, 2] and same(run, run / "whole")
