"""The loop, and nothing but the loop. Both stages run it; they differ in what is trainable and in their data."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from anymal import signals
from anymal.config.schema import Config
from anymal.data.stream import Stream, merge_bookmarks
from anymal.model.flops import StepFlops
from anymal.model.multimodal import AnyMAL
from anymal.sample import Batch
from anymal.training.engine import gather, learning_rate, scale_of, set_learning_rate, step, sum_over_ranks
from anymal.training.meter import Meter
from anymal.training.prefetch import Ahead
from anymal.training.recovery import refuse_culprits
from anymal.training.tracking import Tracker

STOPPED = "stopped, since it was asked to; start the same command again to go on"


def train(
    engine: Any,
    stream: Stream,
    *,
    config: Config,
    start: int,
    rank: int,
    tracker: Tracker,
    save: Callable[[int, dict], None],
    step_flops: StepFlops | None = None,
) -> bool:
    """Run optimizer steps until ``optim.steps`` are done.

    The loss of a step is the sum over the answer tokens of all its micro-batches on all ranks, divided by their
    number: one process with eight micro-batches and eight processes with one do the same.

    Args:
        engine: A DeepSpeed engine around the model.
        stream: This rank's batches.
        config: The settings.
        start: How many steps are done already.
        rank: This process's rank.
        tracker: Where figures go.
        save: Writes a checkpoint, given the number of steps done and the stream's bookmark; called on every rank, every
            ``run.save_every`` steps and after the last.
        step_flops: Counts the batches' FLOPs, for the figures of throughput.

    Returns:
        Whether all steps were done; False once it was asked to stop (see `anymal.signals`) and the state was saved.

    Raises:
        UserError: The loss is not finite, and it is not single samples that make it so.
    """
    model: AnyMAL = engine.module
    signals.note_signals()
    meter = Meter(step_flops, peak_tflops=config.run.peak_tflops)
    ahead, done, place = Ahead(model), start, stream.bookmark
    batches = iter(stream)
    following = _fetch(batches, config, meter, ahead) if done < config.optim.steps else []
    while done < config.optim.steps:
        _seed(config.run.seed, done, rank)
        micro_batches, losses = following, []
        answers = sum(len(batch.targets) for batch in micro_batches)
        answers = sum_over_ranks(torch.tensor(answers, device=model.device)).item()
        rate = learning_rate(done, config)
        set_learning_rate(engine, rate)
        for number in range(1, len(micro_batches) + 1):
            batch, features = ahead.take()
            total, per_group = engine(batch, features)
            losses.append(per_group.detach())
            engine.backward(total * scale_of(total, answers, engine.world_size), scale_wrt_gas=False)
            # A GPU is busy with the backward pass from here to the step, which waits for it.
            if number < len(micro_batches):
                ahead.start(micro_batches[number])
            elif done + 1 < config.optim.steps:
                following = _fetch(batches, config, meter, ahead)
            applied = step(engine)
        if not applied:
            batches.close()
            tracker.note(refuse_culprits(model, stream, place, rows=len(micro_batches), step=done + 1))
            batches = iter(stream)
            following = _fetch(batches, config, meter, ahead)
            continue
        done, place = done + 1, micro_batches[-1].bookmark
        for batch, per_group in zip(micro_batches, losses, strict=True):
            meter.add(batch, per_group)
        stop = sum_over_ranks(torch.tensor(int(signals.asked()), device=model.device)).item() > 0
        if done % config.run.log_every == 0 or done == config.optim.steps:
            tracker.log(done, meter.figures(lr=rate, **_norm(engine)))
        if done % config.run.save_every == 0 or done == config.optim.steps or stop:
            save(done, merge_bookmarks(gather(place)))
        if stop and done < config.optim.steps:
            tracker.note(STOPPED)
            break
    tracker.summary(meter.summary())
    return done == config.optim.steps


def _fetch(batches: Iterator[Batch], config: Config, meter: Meter, ahead: Ahead) -> list[Batch]:
    """The micro-batches of one optimizer step, the first of them on its way."""
    with meter.waiting():
        found = [next(batches) for _ in range(config.optim.accumulate)]
    ahead.start(found[0])
    return found


def _seed(seed: int, step: int, rank: int) -> None:
    """Dropout of a step depends on the step alone, so that a resumed run draws the same."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


def _norm(engine: Any) -> dict[str, float]:
    """The gradient norm before clipping; without ZeRO, DeepSpeed does not say it."""
    norm = engine.get_global_grad_norm()
    return {} if norm is None else {"grad_norm": float(norm)}
