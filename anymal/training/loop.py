"""The training loop, and nothing but the loop. Both stages run it; they differ in what is trainable and in their data.

    stream ──micro-batches──▶ prefetch ──▶ forward, backward: gradient accumulation ──▶ optimizer step ──▶ checkpoint

Where the rest of a step is: AdamW and the learning rate schedule in `anymal.training.optimizer`, data parallel ranks
and ZeRO in `anymal.training.engine`; gradient clipping is DeepSpeed's (``optim.clip``); mixed precision (bfloat16 on a
GPU) is the model's autocast.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from anymal import signals
from anymal.config.schema import Config
from anymal.data.stream import Stream, merge_bookmarks
from anymal.model.flops import StepFlops
from anymal.sample import Batch
from anymal.training.engine import Engine, gather, scale_of, step, sum_over_ranks
from anymal.training.meter import Meter
from anymal.training.optimizer import set_learning_rate
from anymal.training.prefetch import Prefetcher
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
    prefetcher, batches = Prefetcher(model), iter(stream)
    done, last, bookmark = start, config.optim.steps, stream.bookmark

    def fetch() -> list[Batch]:
        return _fetch(batches, config.optim.gradient_accumulation, meter, prefetcher)

    micro_batches = fetch() if done < last else []
    while done < last:
        _seed(config.run.seed, done, rank)
        rates = set_learning_rate(engine.optimizer.param_groups, done, config.optim)
        fetch_next = fetch if done + 1 < last else None
        applied, losses, following = _optimizer_step(engine, micro_batches, prefetcher, fetch_next)
        if not applied:
            batches.close()
            tracker.note(refuse_nonfinite(model, stream, bookmark, micro_batches=len(micro_batches), step=done + 1))
            batches = iter(stream)
            micro_batches = fetch()
            continue
        done, bookmark = done + 1, micro_batches[-1].bookmark
        for batch, per_group in zip(micro_batches, losses, strict=True):
            meter.add(batch, per_group)
        micro_batches = following
        stop = sum_over_ranks(torch.tensor(int(signals.stop_requested()), device=model.device)).item() > 0
        if done % config.run.log_every == 0 or done == last:
            tracker.log(done, meter.figures(**rates, **_norm(engine)))
        if done % config.run.save_every == 0 or done == last or stop:
            save(done, merge_bookmarks(gather(bookmark)))
        if stop and done < last:
            tracker.note(STOPPED)
            break
    tracker.summary(meter.summary())
    return done == last


def _optimizer_step(
    engine: Engine, micro_batches: list[Batch], prefetcher: Prefetcher, fetch_next: Callable[[], list[Batch]] | None
) -> tuple[bool, list[Tensor], list[Batch]]:
    """Gradient accumulation over the micro-batches of one step, then the optimizer.

    Args:
        engine: The DeepSpeed engine.
        micro_batches: This rank's; the first was started in `prefetcher`.
        prefetcher: The others are started in it while the GPU works on the one before.
        fetch_next: Fetches the micro-batches of the next step and starts the first; None after the last step.

    Returns:
        Whether the step was applied (not if a loss or a gradient is not finite), for each micro-batch its [G, 2] losses
        and answer tokens by group, and the micro-batches of the next step.
    """
    device = engine.module.device
    answers = sum(len(batch.targets) for batch in micro_batches)
    answers = int(sum_over_ranks(torch.tensor(answers, device=device)).item())
    losses: list[Tensor] = []
    following: list[Batch] = []
    applied = False
    for number in range(1, len(micro_batches) + 1):
        total, per_group = engine(*prefetcher.take())
        losses.append(per_group.detach())
        engine.backward(total * scale_of(total, answers, engine.world_size), scale_wrt_gas=False)
        # A GPU is busy with the backward pass from here to the step, which waits for it.
        if number < len(micro_batches):
            prefetcher.start(micro_batches[number])
        elif fetch_next is not None:
            following = fetch_next()
        applied = step(engine)
    return applied, losses, following


def _fetch(batches: Iterator[Batch], count: int, meter: Meter, prefetcher: Prefetcher) -> list[Batch]:
    """The micro-batches of one optimizer step; prefetching of the first has begun."""
    with meter.waiting():
        micro_batches = [next(batches) for _ in range(count)]
    prefetcher.start(micro_batches[0])
    return micro_batches


def _seed(seed: int, step: int, rank: int) -> None:
    """Dropout of a step depends on the step alone, so that a resumed run draws the same."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


def _norm(engine: Engine) -> dict[str, float]:
    """The gradient norm before gradient clipping; without ZeRO, DeepSpeed does not say it."""
    norm = engine.get_global_grad_norm()
    return {} if norm is None else {"grad_norm": float(norm)}
