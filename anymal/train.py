"""The loop, and nothing but the loop. Both stages run it; they differ in what is trainable and in their data."""

import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from anymal.ahead import Ahead
from anymal.config import Config
from anymal.cost import Cost
from anymal.engine import gather, learning_rate, set_learning_rate, sum_over_ranks
from anymal.errors import UserError
from anymal.meter import Meter
from anymal.model import AnyMAL
from anymal.sample import Batch
from anymal.stream import merge_bookmarks
from anymal.tracking import Tracker

STOPPED = "stopped by a signal; start the same command again to go on"


def train(
    engine: Any,
    batches: Iterator[Batch],
    *,
    config: Config,
    start: int,
    rank: int,
    tracker: Tracker,
    save: Callable[[int, dict], None],
    cost: Cost | None = None,
) -> bool:
    """Run optimizer steps until ``optim.steps`` are done.

    The loss of a step is the sum over the answer tokens of all its micro-batches on all ranks, divided by their
    number: one process with eight micro-batches and eight processes with one do the same.

    Args:
        engine: A DeepSpeed engine around the model.
        batches: This rank's endless stream.
        config: The settings.
        start: How many steps are done already.
        rank: This process's rank.
        tracker: Where figures go.
        save: Writes a checkpoint, given the number of steps done and the stream's bookmark; called on every rank, every
            ``run.save_every`` steps and after the last.
        cost: Counts what the batches cost, for the figures of throughput.

    Returns:
        Whether all steps were done; False after SIGTERM or SIGUSR1, once the state was saved.
    """
    model: AnyMAL = engine.module
    stop = _StopSignal()
    meter = Meter(cost, peak_tflops=config.run.peak_tflops)
    ahead = Ahead(model)
    following = _fetch(batches, config, meter) if start < config.optim.steps else []
    if following:
        ahead.start(following[0])
    done = start
    for step in range(start, config.optim.steps):
        _seed(config.run.seed, step, rank)
        micro_batches = following
        answers = sum(len(batch.targets) for batch in micro_batches)
        answers = sum_over_ranks(torch.tensor(answers, device=model.device)).item()
        rate = learning_rate(step, config)
        set_learning_rate(engine, rate)
        for number in range(1, len(micro_batches) + 1):
            batch, features = ahead.take()
            total, per_group = engine(batch, features)
            _require_finite(total, batch, step)
            # DeepSpeed averages gradients over ranks; times the world size, that is the sum we want.
            engine.backward(total * (engine.world_size / answers), scale_wrt_gas=False)
            # A GPU is busy with the backward pass from here to engine.step, which waits for it.
            if number < len(micro_batches):
                ahead.start(micro_batches[number])
            elif step + 1 < config.optim.steps:
                following = _fetch(batches, config, meter)
                ahead.start(following[0])
            engine.step()
            meter.add(batch, per_group)
        done = step + 1
        stopping = sum_over_ranks(torch.tensor(stop.asked, device=model.device)).item() > 0
        if done % config.run.log_every == 0 or done == config.optim.steps:
            tracker.log(done, meter.figures(lr=rate, **_norm(engine)))
        if done % config.run.save_every == 0 or done == config.optim.steps or stopping:
            save(done, merge_bookmarks(gather(micro_batches[-1].bookmark)))
        if stopping and done < config.optim.steps:
            tracker.note(STOPPED)
            break
    tracker.summary(meter.summary())
    return done == config.optim.steps


def _fetch(batches: Iterator[Batch], config: Config, meter: Meter) -> list[Batch]:
    """The micro-batches of one optimizer step."""
    with meter.waiting():
        return [next(batches) for _ in range(config.optim.accumulate)]


class _StopSignal:
    """Notes SIGTERM and SIGUSR1 (Slurm's warnings), for the loop to finish its step, save and stop on all ranks."""

    asked = 0  # of the process: one that comes as a stage ends stops the next

    def __init__(self):
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, *_):
        _StopSignal.asked = 1


def _seed(seed: int, step: int, rank: int) -> None:
    """Dropout of a step depends on the step alone, so that a resumed run draws the same."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


def _require_finite(total: torch.Tensor, batch: Batch, step: int) -> None:
    if not torch.isfinite(total):
        raise UserError(
            f"the loss of step {step + 1} is {total.item()}; nothing of this step was applied. "
            f"Lower optim.lr, or look at the samples {', '.join(batch.keys)}"
        )


def _norm(engine: Any) -> dict[str, float]:
    """The gradient norm before clipping; without ZeRO, DeepSpeed does not say it."""
    norm = engine.get_global_grad_norm()
    return {} if norm is None else {"grad_norm": float(norm)}
