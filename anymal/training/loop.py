"""The training loop, and nothing but the loop. Both stages run it; they differ in what is trainable and in their data.

    stream ──▶ prefetch ──micro-batches──▶ forward, backward: gradient accumulation ──▶ optimizer step ──▶ save

Between the first forward pass of a step and the optimizer's the host reads nothing off the GPU, and so runs ahead of
it. In the time that this leaves it reads and starts what comes next. (Under ZeRO 3 DeepSpeed waits of its own accord.)

Where the rest of a step is: AdamW and the learning rate schedule in `anymal.training.optimizer`, data parallel ranks
and ZeRO in `anymal.training.engine`; gradient clipping is DeepSpeed's (``optim.clip``); mixed precision (bfloat16 on a
GPU) is the model's autocast.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from anymal import signals
from anymal.config.schema import Config
from anymal.data.stream import Stream, merge_bookmarks
from anymal.model.flops import StepFlops
from anymal.sample import Batch
from anymal.training.engine import Engine, scale_of, step
from anymal.training.meter import Meter
from anymal.training.optimizer import set_learning_rate
from anymal.training.prefetch import Feed, Prefetcher
from anymal.training.ranks import gather, sum_over_ranks
from anymal.training.recovery import refuse_nonfinite
from anymal.training.tracking import Tracker

STOPPED = "stopped, since it was asked to; start the same command again to go on"


def train(
    engine: Engine,
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

    The loss of a step is the sum over the answer tokens of all its micro-batches on all data parallel ranks, divided by
    their number: one process with eight micro-batches and eight processes with one do the same.

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
    model = engine.module
    signals.note_signals()
    meter = Meter(step_flops, peak_tflops=config.run.peak_tflops)
    feed = Feed(stream, Prefetcher(model), config.optim.gradient_accumulation, meter)
    done, last, bookmark = start, config.optim.steps, stream.bookmark
    if done < last:
        feed.begin()
    answers, _ = _over_ranks(feed)
    while done < last:
        _seed(config.run.seed, done, rank)
        rates = set_learning_rate(engine.optimizer.param_groups, done, config.optim)
        following = feed.bookmark
        applied, trained = _optimizer_step(engine, feed, answers, read=done + 1 < last)
        if not applied:
            feed.end()
            tracker.note(refuse_nonfinite(model, stream, bookmark, micro_batches=feed.micro_batches, step=done + 1))
            feed.begin()
            answers, _ = _over_ranks(feed)
            continue
        done, bookmark = done + 1, following
        for batch, per_group in trained:
            meter.add(batch, per_group)
        answers, stop = _over_ranks(feed)
        if done % config.run.log_every == 0 or done == last:
            tracker.log(done, meter.figures(**rates, **_norm(engine)))
        if done % config.run.save_every == 0 or done == last or stop:
            save(done, merge_bookmarks(gather(bookmark)))
        if stop and done < last:
            tracker.note(STOPPED)
            break
    tracker.summary(meter.summary())
    return done == last


def _optimizer_step(engine: Engine, feed: Feed, answers: int, *, read: bool) -> tuple[bool, list[tuple[Batch, Tensor]]]:
    """Gradient accumulation over the micro-batches of one step, then the optimizer.

    Args:
        engine: The DeepSpeed engine.
        feed: Has the step's micro-batches.
        answers: The step's answer tokens on all ranks.
        read: Whether there is a step after this one, to be read meanwhile.

    Returns:
        Whether the step was applied (not if a loss or a gradient is not finite); and each micro-batch, with its [G, 2]
        losses and answer tokens by group.
    """
    trained: list[tuple[Batch, Tensor]] = []
    applied = False
    for _ in range(feed.micro_batches):
        batch, features = feed.take()
        total, per_group = engine(batch, features)
        del features  # the backward pass frees them as it goes
        trained.append((batch, per_group.detach()))
        engine.backward(total * scale_of(total, answers, engine.world_size), scale_wrt_gas=False)
        batch.media = {}  # of encoders that learn
        del total  # at 8 bits bitsandbytes hangs the inputs of all layers onto its graph
        feed.advance(read=read)  # a GPU is busy with the backward pass from here to the step, which waits for it
        applied = step(engine)
    return applied, trained


def _over_ranks(feed: Feed) -> tuple[int, bool]:
    """The answer tokens of the next step on all ranks, and whether any of them was asked to stop."""
    answers, stops = sum_over_ranks([feed.answers, int(signals.stop_requested())])
    return answers, stops > 0


def _seed(seed: int, step: int, rank: int) -> None:
    """Dropout of a step depends on the step alone, so that a resumed run draws the same."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


def _norm(engine: Engine) -> dict[str, float]:
    """The gradient norm before gradient clipping; without ZeRO, DeepSpeed does not say it."""
    norm = engine.get_global_grad_norm()
    return {} if norm is None else {"grad_norm": float(norm)}
