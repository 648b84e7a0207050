"""A GPU's check, rehearsed: every stage runs on tiny shapes, and a planted fault makes its line say ``missed``.

What is judged here are a CPU's figures, by goals of a CPU. A rehearsal that people start claims nothing.
"""

import json
import signal
import sys
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

import gpu_check
from anymal.estimation import peak
from anymal.model import attention, multimodal
from gpu import engine, measure, programs, steps
from gpu.measure import GOALS, REHEARSAL, Clock, judge, line

CPU_GOALS: dict[str, measure.Goals] = GOALS | {
    "probe": {"matmul_error": ("<=", 1e-4)},
    "attention": {"error": ("<=", 1e-4), "norm_error": ("<=", 1e-4)},
    "nf4": {"error": ("<=", 0.15)},
    "8b": {"cached_tokens_per_s": (">=", 20), "estimate_error": ("<=", 0.06), "wait_share": ("<=", 0.5)},
    "70b": {"fits": (">=", 1), "hardware_share": (">=", 1e-6), "estimate_error": ("<=", 0.06)},
    "engine": {"host_reads": ("<=", 0), "wait_share": ("<=", 0.9), "resume_difference_deterministic": ("<=", 0)},
}
STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
SCALE = replace(REHEARSAL, rows=(64,), steps=1, matrix=64, tokens=(64,), goals=CPU_GOALS)


def said(stage: str, seconds: float = 300) -> tuple[str, dict[str, Any]]:
    """The line of a stage, as a GPU's would be judged; and its figures."""
    figures, goal = gpu_check.measured(stage, SCALE, seconds)
    print(*figures.get("failures", {}).values())
    return line(stage, "cpu", figures, SCALE.goals[stage], goal), figures


@pytest.fixture(autouse=True)
def as_found(monkeypatch):
    """A CPU, and no ranks of an earlier test; signal handlers, which programs leave behind, as before."""
    handlers = {number: signal.getsignal(number) for number in STOPS}
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    if torch.distributed.is_initialized():
        import deepspeed

        deepspeed.comm.destroy_process_group()
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("stage", ["probe", "attention", "nf4", "70b", "8b"])
def test_a_stage_that_does_well(stage):
    text, figures = said(stage)
    assert text.endswith("goal=met"), (text, figures)
    assert text.startswith(f"stage={stage} device=cpu ") and all(name in text for name in CPU_GOALS[stage])


def test_a_wrong_product(monkeypatch):
    whole = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: whole(a, b) * (1.01 if a.dtype == torch.float32 else 1)
    )
    assert said("probe")[0].endswith("goal=missed")


def test_attention_across_samples(monkeypatch):
    def leaks(module, query, key, value, mask, lengths, offsets):
        return whole(module, query, key, value, mask, [sum(lengths)], offsets[[0, -1]])

    whole = attention.packed_attention
    monkeypatch.setattr(attention, "packed_attention", leaks)
    assert said("attention")[0].endswith("goal=missed")


def test_a_matrix_that_is_dequantised_wrongly(monkeypatch):
    from bitsandbytes.nn import Linear4bit

    whole = Linear4bit.forward
    monkeypatch.setattr(Linear4bit, "forward", lambda layer, x: 1.3 * whole(layer, x))
    assert said("nf4")[0].endswith("goal=missed")


def test_a_wrong_estimate(monkeypatch):
    def more(*given: Any, **named: Any) -> peak.Prediction:
        predicted = peak.predict(*given, **named)
        return replace(predicted, tensors=round(1.2 * predicted.tensors))

    monkeypatch.setattr(steps, "predict", more)
    text, figures = said("70b")
    assert text.endswith("goal=missed") and figures["estimate_error"] == pytest.approx(0.2, abs=0.06)


def test_a_slow_step(monkeypatch):
    def slow(*given: Any) -> Any:
        time.sleep(0.2)  # for a row of 64 tokens
        return whole(*given)

    whole = multimodal.AnyMAL.forward
    monkeypatch.setattr(multimodal.AnyMAL, "forward", slow)
    goals = CPU_GOALS | {"8b": {"cached_tokens_per_s": (">=", 400)}}
    figures, goal = gpu_check.measured("8b", replace(SCALE, goals=goals), 300)
    assert goal == "missed" and 0 < figures["cached_tokens_per_s"] < 400


def test_a_row_that_does_not_fit(monkeypatch):
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(multimodal.AnyMAL, "forward", full)
    text, figures = said("70b")
    assert "fits=0" in text and text.endswith("goal=missed")
    assert figures["rows"] == [{"out_of_memory": "CUDA out of memory. Tried to allocate 2.00 GiB."}]


def test_a_stream_that_is_too_slow_is_waited_for(monkeypatch):
    def slow(rows: steps.RaggedRows) -> Any:
        for row in whole(rows):
            time.sleep(0.5)
            yield row

    whole = steps.RaggedRows.__iter__
    monkeypatch.setattr(steps.RaggedRows, "__iter__", slow)
    text, figures = said("8b")
    assert figures["wait_share"] > 0.5 and text.endswith("goal=missed")


@pytest.mark.slow
def test_engine():
    text, figures = said("engine")
    assert text.endswith("goal=met"), (text, figures)
    assert figures["resume_difference"] == 0, "on a CPU"


def test_a_read_by_the_host_and_a_loop_that_waits(monkeypatch):
    def reads(*given: Any) -> Any:
        total, per_group = whole(*given)
        assert total.item() > 0
        return total, per_group

    whole = multimodal.AnyMAL.forward
    monkeypatch.setattr(multimodal.AnyMAL, "forward", reads)
    monkeypatch.setattr(engine, "DECODING", 10.0)
    monkeypatch.setattr(engine, "ACCUMULATED", 1)
    figures = engine.loop(SCALE, 0, {})
    assert figures["host_reads"] >= 1 and figures["wait_share"] > 0.5
    assert judge(figures, {"host_reads": ("<=", 0)}) == judge(figures, {"wait_share": ("<=", 0.5)}) == "missed"


@pytest.mark.slow
def test_programs():
    text, figures = said("programs")
    assert text.endswith("failed=0 resumed=1 goal=met"), (text, figures)


def test_a_program_that_fails(monkeypatch):
    monkeypatch.setattr(programs, "make_clip", lambda folder: folder.mkdir())
    text, figures = said("programs")
    assert "failed=5" in text and text.endswith("goal=missed")
    assert "clip" in figures["failures"]["pretrain"]


def test_what_is_missing_or_has_no_time_left_is_said(monkeypatch):
    assert said("probe", seconds=0) == (
        "stage=probe device=cpu skipped='product: no time left; copies: no time left; attention: no time left' "
        "goal=not_measured",
        said("probe", seconds=0)[1],
    )
    monkeypatch.setitem(measure.NEEDS, "probe", ["torch", "no_such_package"])
    assert said("probe")[0] == "stage=probe device=cpu skipped='not installed: no_such_package' goal=skipped"


def test_a_stage_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 0.5)
    monkeypatch.setattr("gpu.probe.matmul_peak", lambda _: time.sleep(30))
    monkeypatch.setattr(Clock, "left", lambda _: 100)
    text, figures = said("probe", seconds=0)
    assert text.endswith("failed='product' goal=missed")
    assert "TimeoutError: it took more than 0 s" in figures["failures"]["product"]


def test_a_part_that_fails_costs_the_others_nothing():
    figures: dict[str, Any] = {}
    Clock(60).within(figures, "one", 1, lambda: {"x": 1 / 0})
    Clock(60).within(figures, "two", 1, lambda: {"y": 2})
    assert figures["y"] == 2 and "ZeroDivisionError" in figures["failures"]["one"]
    assert judge(figures, {"y": (">=", 1)}) == "missed"


def test_a_rehearsal_claims_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "probe", "--rehearse"])
    assert gpu_check.main() == 0
    out, err = capsys.readouterr()
    assert out.startswith("stage=probe device=cpu-rehearsal ") and out.endswith(" goal=not_measured\n")
    assert "nothing is measured on a GPU" in err
    (written,) = (tmp_path / "results").iterdir()
    found = json.loads(written.read_text())
    assert found["device"] == "cpu-rehearsal" and found["goal"] == "not_measured" and found["matmul_tflops"] > 0
