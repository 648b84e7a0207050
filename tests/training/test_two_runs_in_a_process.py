"""Two runs in one process: the second sees the files of now, and whoever called finds the process as it was."""

import atexit
import logging
import multiprocessing
import os
import signal
import warnings
from pathlib import Path

import pytest
import torch
import webdataset as wds

import anymal.config.command_line
from anymal import signals
from anymal.checkpoints import checkpoint
from anymal.config.schema import DataConfig, LLMConfig, RunConfig
from anymal.config.settings import load
from anymal.data import manifest
from anymal.data.feature_cache import FeatureTar
from anymal.data.quarantine import Quarantine
from anymal.data.stream import samples_once
from anymal.errors import UserError
from anymal.features.report import report
from anymal.model.llm import load_llm
from anymal.training.tracking import Tracker
from small_runs import make_encoders, pretrain_here, settings, write_pairs


@pytest.fixture(scope="module")
def given(tiny_llm, tmp_path_factory):
    """Overrides of a run of two steps, given its folder."""
    folder = tmp_path_factory.mktemp("given")
    encoders, pairs = make_encoders(folder / "encoders"), write_pairs(folder / "pairs", ["imu"])
    return lambda run, **more: settings(tiny_llm, encoders, run, pairs, ["imu"], **{"optim__steps": 2} | more)


def state() -> dict[str, object]:
    """What a run may change in a process."""
    own = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
    return {
        "signals": [signal.getsignal(number) for number in signals._SIGNALS],
        "environment": {name: os.environ.get(name) for name in own},
        "group": torch.distributed.is_initialized(),
        "random": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "linear": torch.nn.functional.linear,
        "children": multiprocessing.active_children(),
        "tars": [path for path in map(os.path.realpath, Path("/proc/self/fd").iterdir()) if path.endswith(".tar")],
    }


@pytest.fixture
def alone(monkeypatch):
    """A process of which no test before has made a rank, and in which none has left a tar open."""
    manifest.forget()
    if torch.distributed.is_initialized():
        import deepspeed

        deepspeed.comm.destroy_process_group()
    for name in state()["environment"]:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("alone")
def test_runs_leave_the_process_as_it_was(given, tmp_path):
    before = state()
    for run in ("first", "second"):
        pretrain_here(None, *given(tmp_path / run, run__samples=2))
        assert state() == before


@pytest.mark.usefixtures("alone")
def test_so_does_one_that_fails(given, tmp_path, monkeypatch):
    """Its traceback, which a notebook keeps, holds the iteration over the workers, and the engine."""
    monkeypatch.setattr(checkpoint, "save", lambda *_: 1 / 0)
    before = state()
    with pytest.raises(ZeroDivisionError) as kept:
        pretrain_here(None, *given(tmp_path / "run", data__workers=2, engine__zero=3))
    assert state() == before
    assert kept.tb is not None


def test_a_signal_at_the_end_of_a_run_does_not_stop_the_next(given, tmp_path, monkeypatch):
    def save(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return whole(*arguments)

    whole = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", save)
    pretrain_here(None, *given(tmp_path / "first"))
    monkeypatch.undo()
    pretrain_here(None, *given(tmp_path / "second"))


def test_a_tar_that_was_replaced_is_read_anew(tmp_path):
    """Another process has indexed the new one, which has as many samples."""
    path = tmp_path / "000.tar"

    def write(text: str) -> None:
        with wds.TarWriter(str(tmp_path / "new")) as tar:
            for i in range(3):
                tar.write({"__key__": f"{i}", "txt": text, "imu.npy": bytes(600 * len(text))})
        (tmp_path / "new").rename(path)
        other = multiprocessing.get_context("fork").Process(target=manifest.survey, args=([str(path)],))
        other.start()
        other.join()

    def texts() -> list[str]:
        data = load(DataConfig, None, [f"shards={path}", "workers=0"])
        quarantine = Quarantine(None, max_in_a_row=0, max_share=0)
        parts = {"suffixes": {"imu.npy": "imu"}, "prepare": lambda sample: sample.answer(), "quarantine": quarantine}
        return list(samples_once(data, **parts))

    write("old")
    assert texts() == ["old"] * 3
    write("another")
    assert texts() == ["another"] * 3


def test_a_checkpoint_that_rots_in_between_is_noticed(given, tmp_path):
    run = tmp_path / "run"
    pretrain_here(None, *given(run))
    weights = checkpoint.existing(run) / "adapters" / "imu" / "model.safetensors"
    before, data = weights.stat(), bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))  # a disk that forgets a bit leaves the time
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        pretrain_here(None, *given(run, optim__steps=3))


def test_a_recipe_is_written_down_as_it_is_not_as_an_earlier_one_was(given, tmp_path, monkeypatch):
    monkeypatch.setenv("LICENSE_OF_DATA", "a licence of some length")
    pretrain_here(None, *given(tmp_path / "first"), "run.data_license=${oc.env:LICENSE_OF_DATA}")
    pretrain_here(None, *given(tmp_path / "second"), "run.data_license=a licence of some length")
    assert "data_license: ${oc.env:LICENSE_OF_DATA}\n" in (tmp_path / "first" / "recipe.yaml").read_text()
    assert "data_license: a licence of some length\n" in (tmp_path / "second" / "recipe.yaml").read_text()


def test_each_run_says_that_an_index_cannot_be_written(given, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ANYMAL_CACHE", str(tmp_path / "file"))
    pairs = Path(write_pairs(tmp_path / "pairs", ["imu"], shards=1))
    for beside in ("000.tar.index.json", "anymal.index.json"):
        (pairs / beside).mkdir()  # where even root cannot write a file
    for run in ("first", "second"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            pretrain_here(None, *given(tmp_path / run, data__shards=pairs))
        assert "could not be written" in caplog.text, run


def test_programs_add_no_filter_of_warnings_and_register_once():
    filters, registered = list(warnings.filters), atexit._ncallbacks()
    for _ in range(2):
        with pytest.raises(SystemExit):
            anymal.config.command_line.run_program(lambda: 0)
    assert warnings.filters == filters and atexit._ncallbacks() == registered


def test_progress_bars_are_as_before(tiny_llm):
    from transformers.utils import logging as bars

    bars.enable_progress_bar()
    load_llm(LLMConfig(name=str(tiny_llm), bits=32), torch.device("cpu"))
    assert bars.is_progress_bar_enabled()


def test_a_report_that_fails_leaves_the_threads(tmp_path):
    gone = FeatureTar(path=str(tmp_path / "gone.tar"), header={"encoders": {"imu": ""}, "media": {}})
    torch.set_num_threads(2)
    try:
        with pytest.raises(UserError, match="cannot be read"):
            report({gone.path: gone}, {}, {}, "bf16")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_a_wandb_run_of_the_caller_stays_its_own(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    theirs = wandb.init(mode="offline", dir=tmp_path, id="theirs")
    with Tracker(RunConfig(dir=str(tmp_path / "run"), wandb="offline"), {}, rank=0, steps=1) as tracker:
        tracker.log(1, {"loss": 1.0})
        assert tracker._wandb.id == tracker.run_id != theirs.id
    assert wandb.run is theirs
    theirs.log({"loss": 2.0})  # finished, it would raise
    assert theirs.summary["loss"] == 2.0
    theirs.finish()
