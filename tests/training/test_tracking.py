"""One curve through kill and resume, in metrics.jsonl and in W&B; the meter's sums."""

import json
import os
import pty
import signal
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from anymal.config.schema import RunConfig
from anymal.sample import Batch
from anymal.training.meter import Meter
from anymal.training.tracking import Tracker


def _batch(tokens: int, groups: list[str]) -> Batch:
    nothing = torch.zeros(0, dtype=torch.int64)
    row = torch.zeros(1, tokens, dtype=torch.int64)
    return Batch(
        ids=row,
        positions=row,
        lengths=[tokens],
        offsets=nothing,
        answer_positions=nothing,
        targets=nothing,
        answer_groups=nothing,
        groups=groups,
        media={},
        media_positions={},
        counts={},
        skips={},
        keys=[],
    )


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_meter_adds_up_per_group():
    meter = Meter()
    meter.add(_batch(100, ["image", "audio"]), torch.tensor([[6.0, 3.0], [8.0, 2.0]]))
    meter.add(_batch(60, ["image", "text"]), torch.tensor([[2.0, 1.0], [0.0, 0.0]]), padding=40)
    with meter.waiting():
        time.sleep(0.05)
    figures = meter.figures(lr=1e-3, grad_norm=0.5)
    assert figures["loss"] == pytest.approx(16 / 6)
    assert figures["loss/image"] == pytest.approx(8 / 4)
    assert figures["loss/audio"] == pytest.approx(4)
    assert "loss/text" not in figures, "no answer token, no loss"
    assert figures["padding_share"] == pytest.approx(0.25)
    assert figures["tokens_per_s"] / figures["answer_tokens_per_s"] == pytest.approx(160 / 6)
    assert 0.05 < figures["wait_share"] <= 1
    assert 0.01 < figures["memory_gb"] < 1000
    assert (figures["lr"], figures["grad_norm"]) == (1e-3, 0.5)
    assert "loss" not in meter.figures(), "the second line starts from nothing"


_RANK = """
import sys
import torch, torch.distributed as dist
from anymal.training.meter import Meter
from tests_batch import batch
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
meter = Meter()
meter.add(batch(10, [["image"], ["audio"]][rank]), torch.tensor([[[3.0, 1.0]], [[5.0, 3.0]]][rank]))
figures = meter.figures()
assert figures["loss"] == 2.0 and figures["loss/image"] == 3.0 and abs(figures["loss/audio"] - 5 / 3) < 1e-9, figures
dist.destroy_process_group()  # left to the interpreter's end, gloo's threads now and then abort the process
"""


HERE = Path(__file__).parents[:2]


def test_meter_adds_up_over_ranks_that_saw_different_groups(tmp_path):
    (tmp_path / "tests_batch.py").write_text(
        f"import sys; sys.path[:0] = {list(map(str, HERE))!r}\nfrom test_tracking import _batch as batch\n"
    )
    (tmp_path / "rank.py").write_text(_RANK)
    command = [sys.executable, str(tmp_path / "rank.py")]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path / "meeting")], env=_environment()) for rank in (0, 1)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}


_KILLED = """
import os, signal, sys
from anymal.config.schema import RunConfig
from anymal.training.tracking import Tracker
tracker = Tracker(RunConfig(dir=sys.argv[1]), {}, rank=0, steps=10)
for step in range(1, 8):
    tracker.log(step, {"loss": 1 / step})
    tracker.table("samples", ["said"], [["word"]], step)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_one_curve_after_kill_and_resume(tmp_path):
    killed = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path)], env=_environment(), check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [line["step"] for line in _lines(tmp_path / "metrics.jsonl")] == list(range(1, 8)), "nothing was lost"
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # a machine that loses power can leave half a line

    with Tracker(RunConfig(dir=str(tmp_path)), {}, rank=0, steps=10, start=5) as tracker:
        for step in range(6, 11):
            tracker.log(step, {"loss": 1 / step})
            tracker.table("samples", ["said"], [["another"]], step)
    lines = _lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert all(line["loss"] == 1 / line["step"] and line["time"] > 0 for line in lines)
    samples = _lines(tmp_path / "samples.jsonl")
    assert [line["rows"][0][0] for line in samples] == ["word"] * 5 + ["another"] * 5
    assert not list(tmp_path.glob("*.new"))


def test_other_ranks_write_nothing(tmp_path, capfd):
    with Tracker(RunConfig(dir=str(tmp_path / "run"), wandb="offline"), {}, rank=1, steps=2) as tracker:
        tracker.log(1, {"loss": 1.0})
        tracker.table("samples", ["said"], [["word"]], 1)
        tracker.note("hello")
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr() == ("", "")


def test_without_a_terminal_progress_is_a_few_plain_lines(tmp_path, capfd):
    with Tracker(RunConfig(dir=str(tmp_path)), {}, rank=0, steps=500) as tracker:
        tracker.note("module  parameters")
        for step in range(1, 501):
            tracker.log(step, {"loss": 2.0, "lr": 1e-4, "tokens_per_s": 123.4, "wait_share": 0.02})
    out, err = capfd.readouterr()
    assert out == "module  parameters\n"
    assert "\r" not in err
    first, *_, last = err.splitlines()
    assert len(err.splitlines()) < 5
    assert first.startswith("1/500 [")
    assert last.startswith("500/500 [")
    assert last.endswith("loss 2.000, lr 1.0e-04, 123 tok/s, wait 2%]")


def _wandb_records(path: Path) -> list:
    """The records of a .wandb file: a LevelDB log (7-byte file header, blocks unused here) of protobufs."""
    from wandb.proto import wandb_internal_pb2

    data, at, record, records = path.read_bytes(), 7, b"", []
    while at < len(data):
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            records.append(wandb_internal_pb2.Record.FromString(record))
            record = b""
    return records


def _wandb_history(path: Path) -> list[dict]:
    lines = []
    for record in _wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            lines.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return lines


_SHOWN = """
import sys
from anymal.config.schema import RunConfig
from anymal.training.tracking import Tracker
with Tracker(RunConfig(dir=sys.argv[1]), {}, rank=0, steps=40, start=10) as tracker:
    for step in range(11, 41):
        tracker.log(step, {"loss": 2.0, "lr": 1e-4})
        if step == 20:
            tracker.note("a note")
"""


def test_on_a_terminal_progress_is_one_bar(tmp_path):
    # A new pty has 0 columns and rows, as terminals in containers may have.
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", _SHOWN, str(tmp_path)], env=_environment(), stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # a pty's way of saying that the other side has closed it
        while piece := os.read(ours, 65536):
            shown += piece
    os.close(ours)
    assert process.wait(timeout=60) == 0
    text = shown.decode()
    assert "10/40 [" in text, "the bar begins where the run resumes"
    assert "40/40 [" in text
    assert "loss 2.000, lr 1.0e-04" in text
    assert "a note\r\n" in text
    assert text.count("\n") == 2, "the note, and the end of the bar"


@pytest.mark.slow
def test_wandb_offline_resumes_under_one_id(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = RunConfig(dir=str(tmp_path), wandb="offline")
    with Tracker(run, {"optim": {"lr": 1e-4}}, rank=0, steps=4) as tracker:
        for step in (1, 2, 3):
            tracker.log(step, {"loss": 1 / step, "loss/image": 2.0})
        tracker.table("samples", ["question", "said"], [["what is it?", "a cat"]], 3)
    time.sleep(1.1)  # W&B names its folders by the second
    with Tracker(run, {"optim": {"lr": 1e-4}}, rank=0, steps=4, start=2, run_id=tracker.run_id) as resumed:
        for step in (3, 4):
            resumed.log(step, {"loss": 1 / step, "loss/image": 2.0})

    assert resumed.run_id == tracker.run_id
    pieces = sorted(tmp_path.glob(f"wandb/offline-run-*/run-{tracker.run_id}.wandb"))
    assert len(pieces) == 2
    patience = time.monotonic() + 20  # finish() returns before W&B's own process has written its last block
    while any(len(_wandb_history(piece)) < 2 for piece in pieces) and time.monotonic() < patience:
        time.sleep(0.05)
    for piece, steps in zip(pieces, ([1, 2, 3], [3, 4]), strict=True):
        losses = {line["step"]: line["loss"] for line in _wandb_history(piece) if "loss" in line}
        assert losses == pytest.approx({step: 1 / step for step in steps})
        records = _wandb_records(piece)
        assert [r.run.resume for r in records if r.HasField("run")] == [True], "a sync appends to the run of this id"
        assert [r.metric.step_metric for r in records if r.HasField("metric") and r.metric.glob_name] == ["step"]
    assert any("samples/path" in line for line in _wandb_history(pieces[0]))
    assert [line["step"] for line in _lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_wandb_is_not_imported_when_disabled(tmp_path):
    code = (
        "import sys\nfrom anymal.config.schema import RunConfig\nfrom anymal.training.tracking import Tracker\n"
        f"with Tracker(RunConfig(dir={str(tmp_path)!r}), {{}}, rank=0, steps=1) as t: t.log(1, {{'loss': 1.0}})\n"
        "assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=_environment())
