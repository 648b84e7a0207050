"""DeepSpeed's engine and the real loop: what the host reads and waits for in a step, what a resumed run repeats."""

import copy
import queue
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from anymal.checkpoints.process import process_as_found
from anymal.config.schema import Config
from anymal.environment import swapped
from anymal.training.engine import engine_of, processes
from anymal.training.loop import train
from anymal.training.prefetch import Prefetcher
from gpu import programs
from gpu.measure import Clock, Scale
from gpu.models import random_model, settings
from gpu.steps import RaggedRows, travelling
from host_reads import HostReads

ACCUMULATED = 4
COUNTED = 5  # optimizer steps in which waits are counted: DeepSpeed's timers begin with the third
DECODING = 0.5  # share of a micro-batch's time that the stream takes for a row


def run(scale: Scale, clock: Clock) -> dict[str, Any]:
    """The stage's figures."""
    figures: dict[str, Any] = {}
    for zero in (0, 1):
        clock.within(figures, f"zero_{zero}", 90, lambda zero=zero: loop(scale, zero, figures))
    for wanted in (True, False):
        name = "resume_difference_deterministic" if wanted else "resume_difference"
        clock.within(figures, name, 60, lambda name=name, wanted=wanted: {name: resume_difference(wanted)})
    return figures


def loop(scale: Scale, zero: int, figures: dict[str, Any]) -> dict[str, Any]:
    """A step's host reads, and steps with and without a stream that takes its time."""
    with process_as_found(), tempfile.TemporaryDirectory() as folder, processes():
        steps = ACCUMULATED * scale.steps
        more = [f"engine.zero={zero}", f"optim.gradient_accumulation={ACCUMULATED}", f"optim.steps={scale.steps + 2}"]
        config = settings("8b", Path(folder), replace(scale, llms={"8b": smaller(scale.llms["8b"])}), *more)
        model = random_model(config, scale)
        encoder = model.encoders["image"]
        stream = RaggedRows(scale, scale.rows[-1], tuple(encoder.shape), travelling(encoder, scale), cached=False)
        with engine_of(model, config) as engine:
            reads = count_reads(engine, stream, config)
        with engine_of(model, config) as engine:
            free = steps_of(engine, stream, config)
        row = free["seconds"] / steps
        with engine_of(model, config) as engine:
            busy = steps_of(engine, Decoding(stream, DECODING * row), config)
    found = {
        f"zero_{zero}_host_reads": reads,
        f"zero_{zero}_seconds_a_step": free["seconds"] / scale.steps,
        f"zero_{zero}_slower_with_decoding": busy["seconds"] / free["seconds"],
        f"zero_{zero}_wait_share": busy["wait_share"],
    }
    worst = {"host_reads": reads, "wait_share": busy["wait_share"]}
    return found | {name: max(value, figures.get(name, 0)) for name, value in worst.items()}


def smaller(llm: Mapping[str, Any]) -> dict[str, Any]:
    """An LLM of few layers: the engine is to be looked at, not the LLM."""
    return {**llm, "num_hidden_layers": min(4, llm["num_hidden_layers"])}


class Decoding:
    """A stream whose rows take some time each, in a thread that is a few rows ahead, as workers are.

    Args:
        stream: Has the rows.
        seconds: That each takes.
    """

    def __init__(self, stream: RaggedRows, seconds: float):
        self.stream, self.seconds, self.bookmark = stream, seconds, stream.bookmark

    def __iter__(self) -> Iterator[Any]:
        ready: queue.Queue[Any] = queue.Queue(maxsize=4)
        over = threading.Event()

        def decode() -> None:
            for row in self.stream:
                time.sleep(self.seconds)
                while not over.is_set():
                    try:
                        ready.put(row, timeout=0.1)
                        break
                    except queue.Full:
                        continue
                if over.is_set():
                    return

        thread = threading.Thread(target=decode, daemon=True)
        thread.start()
        try:
            while True:
                yield ready.get()
        finally:
            over.set()
            thread.join()


class Figures:
    """Keeps what the loop reports, in place of `anymal.training.tracking.Tracker`."""

    def __init__(self) -> None:
        self.logged: list[tuple[float, Mapping[str, float]]] = []

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """A line of figures, and when it came."""
        self.logged.append((time.perf_counter(), figures))

    def note(self, text: str) -> None:
        """Not kept."""

    def summary(self, figures: Mapping[str, Any]) -> None:
        """Not kept."""


def steps_of(engine: Any, stream: Any, config: Config) -> dict[str, float]:
    """Seconds, and the share of them that was waited for data, of `anymal.training.loop`'s steps but the first and the
    last: the one warms up, the other reads nothing ahead."""
    kept: Any = Figures()
    train(engine, stream, config=config, start=0, rank=0, tracker=kept, save=lambda *_: None)
    times = [moment for moment, _ in kept.logged]
    waits = [figures["wait_share"] for _, figures in kept.logged[1:-1]]
    return {"seconds": times[-2] - times[0], "wait_share": sum(waits) / len(waits)}


def count_reads(engine: Any, stream: Any, config: Config) -> int:
    """How often the host waits for the device in a micro-batch: from its forward pass to the next one's, or to the
    optimizer."""
    prefetcher, rows, counts = Prefetcher(engine.module), iter(stream), []
    for number in range(1, COUNTED * config.optim.gradient_accumulation + 1):
        row = next(rows)
        prefetcher.start(row)
        batch, features = prefetcher.take()
        with reads_counted(engine.module.device) as count:
            total, _ = engine(batch, features)
            engine.backward(total / row.answers, scale_wrt_gas=False)
            if number % config.optim.gradient_accumulation:
                engine.step()
        if not number % config.optim.gradient_accumulation:
            engine.step()
        counts.append(count["reads"])
    return max(counts[config.optim.gradient_accumulation :])  # the first step warms up


@contextmanager
def reads_counted(device: torch.device) -> Iterator[dict[str, int]]:
    """Inside, ``reads`` are counted: what torch is asked to do, and on a GPU what torch itself warns of."""
    found, synchronized = {"reads": 0}, []
    with (
        warnings.catch_warnings(record=True) as caught,
        swapped(torch.cuda, "synchronize", lambda *_: synchronized.append(1)),  # which no mode sees, nor warns of
        HostReads() as asked,
    ):
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchroniz" in str(warning.message) for warning in caught)
    found["reads"] = max(sum(asked.found.values()), waits) + len(synchronized)  # most reads are seen twice


def resume_difference(deterministic: bool) -> float:
    """The largest difference of a step's loss between a run and the same run gone on with from its third step."""
    with tempfile.TemporaryDirectory() as name:
        given = programs.settings(Path(name), words=150)  # flash attention adds up over blocks of 64 to 128 tokens
        given += [f"run.dir={name}/run", f"run.save_every={programs.SAVED}", f"optim.steps={programs.STEPS}"]
        given += [f"run.deterministic={deterministic}"]
        code, said = programs.start("pretrain", *given)
        first = copy.copy(programs.lines(Path(name) / "run"))
        programs.go_back(Path(name) / "run")
        again_code, again_said = programs.start("pretrain", *given)
        again = programs.lines(Path(name) / "run")
    if code or again_code or len(again) != len(first):
        raise RuntimeError(f"anymal pretrain failed: {(said + again_said)[-2000:]}")
    return max(abs(one["loss"] - other["loss"]) for one, other in zip(first, again, strict=True))
