"""What a step takes at its peak, and the largest micro-batch that fits; what decoded media take on the host."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from anymal.config.schema import Config
from anymal.data.loader import prefetched
from anymal.estimation.fake_step import ENCODE, FEATURES, LLM, FakeStep, ResidentMemory, Workload
from anymal.training.engine import BUCKET

WORKSPACES = 3 * 32 * 2**20
"""cuBLAS' on an H100, a thread and stream: forward passes of the LLM, of the encoders, and backward passes. Elsewhere
less."""
ROUNDS = 6  # of fake steps in search of the largest micro-batch
MOST_TOKENS = 2**20  # no row is sought that is longer


@dataclass(frozen=True)
class Prediction:
    """Memory of one process at its peak, by part, in bytes."""

    by_part: Counter[str]
    """What the card (or the host) must have room for: what is there between steps, and what a step keeps alive at the
    worst moment. On a GPU the next micro-batch's media and encoders stand beside that: see `predict`."""
    tensors: int
    """The most that tensors take at once: on a GPU what a run logs as ``memory_gb``."""

    @property
    def total(self) -> int:
        """The sum of the parts: on a GPU what a run logs as ``reserved_peak_gb``, but for gaps."""
        return self.by_part.total()


def predict(fake_step: FakeStep, work: Workload, samples: int, *, world: int) -> Prediction:
    """The peak of training, while one micro-batch is trained on and the next is encoded.

    In the order in which the host asks for memory: the LLM's forward and backward pass over a micro-batch, media and
    encoders of the next, and at a step's last one the optimizer. One process on a CPU does it in that order, and what
    one phase has freed the next one takes: its peak is the maximum.

    On a GPU the encoders have a CUDA stream of their own (`anymal.training.prefetch`), which runs beside the LLM's.
    torch's allocator keeps what a stream has freed for that stream. So each has a pool that grows to its own peak, and
    the card must hold the sum: the LLM's or the optimizer's in the one; the features of this micro-batch, and media,
    encoders and features of the next one in the other.
    """
    resident, config = fake_step.resident_memory(), fake_step.config
    base = _resident_by_part(resident, config, world)
    if fake_step.gpu:
        base += Counter({"cuBLAS' workspaces": WORKSPACES})
    peaks = fake_step.peaks(work, samples)
    encode, features = peaks[ENCODE], peaks[FEATURES]
    llm = [base + _during(resident, config, world) + peaks[phase] for phase in LLM]
    optimizer = base + _optimizer_step(resident, config, world)
    moments = [*llm, base + _after_backward(resident, config, world) + encode, optimizer + features]
    tensors = max(moment.total() for moment in moments)
    if not fake_step.gpu:
        return Prediction(max(moments, key=Counter.total), tensors)
    main = max([*(_without(moment, FEATURES) for moment in llm), optimizer], key=Counter.total)
    return Prediction(main + features + Counter({"encoding the next micro-batch": encode.total()}), tensors)


def _without(parts: Counter[str], name: str) -> Counter[str]:
    return Counter({key: size for key, size in parts.items() if key != name})


def _resident_by_part(resident: ResidentMemory, config: Config, world: int) -> Counter:
    """What is there all the time. ZeRO-3 divides the LLM as well, and gathers a layer while it fetches the next."""
    zero = config.engine.zero
    over = world if zero == 3 else 1
    gathered = 2 * resident.largest_layer if over > 1 else 0
    moments = 8 * resident.trained / (world if zero else 1)
    # Stages 1 to 3 keep a copy of this process's share of the trained parameters for the optimizer.
    weights = 4 * resident.trained / over + (4 * resident.trained / world if zero else 0)
    return Counter(
        {
            f"LLM body, {config.model.llm.bits} bits": round(resident.body / over) + gathered,
            "embeddings and head": round(resident.embeddings_and_head / over),
            "encoders": resident.encoders,
            "frozen projectors": resident.frozen_projectors,
            "trained weights, float32": round(weights),
            "AdamW's moments": round(moments),
        }
    )


def _during(resident: ResidentMemory, config: Config, world: int) -> Counter:
    """Gradients beside the activations: in ZeRO's bucket, and with gradient accumulation of earlier micro-batches."""
    if not config.engine.zero:  # they are among what the step keeps, unless they were there before
        return Counter({"gradients": 4 * resident.trained if config.optim.gradient_accumulation > 1 else 0})
    kept = 4 * resident.trained / world if config.optim.gradient_accumulation > 1 else 0
    return Counter({"gradients": round(4 * min(BUCKET, resident.trained) + kept)})


def _after_backward(resident: ResidentMemory, config: Config, world: int) -> Counter:
    """Gradients once a backward pass is over: all of them, or under ZeRO this process's share and the bucket."""
    if not config.engine.zero:
        return Counter({"gradients": 4 * resident.trained})
    return Counter({"gradients": round(4 * min(BUCKET, resident.trained) + 4 * resident.trained / world)})


def _optimizer_step(resident: ResidentMemory, config: Config, world: int) -> Counter:
    """The optimizer's step: gradients (under ZeRO once more, flat) and AdamW's two temporaries of their size."""
    share = 4 * resident.trained / (world if config.engine.zero else 1)
    return Counter({"gradients": round(share * (2 if config.engine.zero else 1)), "AdamW at work": round(2 * share)})


def largest_batch(fake_step: FakeStep, work: Workload, room: float, *, world: int) -> int:
    """The most samples in a micro-batch whose peak stays below `room` bytes; 0 if not even one does.

    Each phase's peak grows with the samples and, where attention takes a mask, with their square: a parabola is laid
    through three micro-batches, and what it says is tried in its turn until it holds.
    """
    totals: dict[int, int] = {}

    def total(samples: int) -> int:
        if samples not in totals:
            totals[samples] = predict(fake_step, work, samples, world=world).total
        return totals[samples]

    step = max(1, len(fake_step.adapters))  # each modality as often as the others
    points = [2 * step, 4 * step, 8 * step]  # from two on, a row is packed
    for _ in range(ROUNDS):
        curve = np.polyfit(points, [total(n) for n in points], 2)
        few = 8 * max(totals)  # few samples say little about very many
        guess = min(_last_below(curve, room), few, MOST_TOKENS // fake_step.mean_tokens(work))
        if guess in totals or guess < 1:
            break
        total(guess)
        points = sorted(sorted(totals, key=lambda n: abs(n - guess))[:3])
    for samples in range(min(points) - 1, 0, -1) if min(totals.values()) > room else ():
        if total(samples) <= room:
            break
    return max((n for n, size in totals.items() if size <= room), default=0)


def _last_below(curve: np.ndarray, room: float) -> int:
    """The largest whole number up to which a growing parabola stays below `room`."""
    below, above = 0, 1
    while np.polyval(curve, above) <= room and above < 10**7:
        below, above = above, 2 * above
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if np.polyval(curve, middle) <= room else (below, middle)
    return below


def media_on_host(fake_step: FakeStep, work: Workload, samples: int, config: Config) -> Counter[str]:
    """Bytes of the decoded media that wait in host memory, at most, by where they wait.

    A step's answer tokens must be known before its first backward pass, so a step of rows and one more are there
    (`anymal.training.prefetch`); workers are ahead of that (`anymal.data.loader`). One micro-batch is collated into
    page-locked memory, which torch hands out in powers of two.
    """
    sizes = fake_step.media_sizes(work, samples)
    row, data = sum(sizes.values()), config.data
    chunk, prefetch = prefetched(data)
    ahead = data.workers * chunk * prefetch + chunk + (data.packing_buffer if data.row_tokens else 0)
    counts = Counter(
        {
            "rows of this step and the next": row * (config.optim.gradient_accumulation + 1),
            "workers' results and packing": round(row / samples * ahead),
        }
    )
    if fake_step.gpu:
        counts["page-locked, on the way to the GPU"] = sum(1 << (size - 1).bit_length() for size in sizes.values())
    else:
        counts["collated"] = row
    return +counts
