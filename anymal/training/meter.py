"""What a run measures of itself: loss by group, throughput (tokens and FLOPs per second), data waiting, memory.

model ──per-group loss──▶ Meter ──figures──▶ tracking.py
"""

import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from anymal.model.flops import StepFlops
from anymal.sample import Batch
from anymal.training.ranks import gather

GB, TERA = 1e9, 1e12
SUMS = ("tokens", "padding", "flops", "recomputed", "waited")
"""Figures that are summed over ranks."""


class Meter:
    """Adds up what the micro-batches report until the next line of figures.

    Adding never waits for the GPU: the losses stay where they are until `figures` reads them.

    Args:
        step_flops: Counts a micro-batch's FLOPs; without it there are no figures about them.
        peak_tflops: What one device can do at best, in 10^12 FLOP/s; 0 if it is not known.
    """

    def __init__(self, step_flops: StepFlops | None = None, *, peak_tflops: float = 0.0) -> None:
        self._step_flops, self._peak = step_flops, peak_tflops * TERA
        self._totals: dict[str, float] = {}
        self._all_decoded: Counter[tuple[str, str]] = Counter()
        self._all_ignored: Counter[str] = Counter()
        self._reset()

    def _reset(self) -> None:
        self._per_group: dict[str, Tensor] = {}
        self._tokens = self._padding = 0
        self._datasets: Counter[str] = Counter()
        self._decoded: Counter[tuple[str, str]] = Counter()
        self._ignored: Counter[str] = Counter()
        self._flops = self._recomputed = self._waited = 0.0
        self._since = time.perf_counter()

    def add(self, batch: Batch, per_group: Tensor, *, padding: int = 0) -> None:
        """Count one micro-batch.

        Args:
            batch: What the model saw, T tokens of it.
            per_group: [G, 2] from `anymal.model.loss.sums_per_group`: for each of ``batch.groups``, the summed loss
                (nats) and the number of answer tokens.
            padding: How many of the T tokens are padding.
        """
        for name, pair in zip(batch.groups, per_group.detach().double(), strict=True):
            self._per_group[name] = self._per_group.get(name, 0) + pair
        self._tokens += batch.ids.shape[-1]
        self._padding += padding
        self._datasets.update(batch.datasets)
        self._decoded.update(batch.decoded)
        self._ignored.update(batch.ignored)
        if self._step_flops is not None:
            needed, recomputed = self._step_flops.count(batch)
            self._flops, self._recomputed = self._flops + needed, self._recomputed + recomputed

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The time spent inside counts as waiting for data."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - began

    def figures(self, **also: float) -> dict[str, float]:
        """The figures of all ranks since the last call, and start over. With several processes all must call it.

        Args:
            also: What the caller knows and wants beside them, such as ``lr`` and ``grad_norm``.

        Returns:
            ``loss`` and ``loss/GROUP`` (nats per answer token; a group without one is left out),
            ``share/DATASET`` of the samples where there are several datasets, ``altered/MODALITY`` (the share of its
            decoded media that are `anymal.sample.Noted`, if there are any), ``tokens_per_s``
            (media and padding included) and ``answer_tokens_per_s`` (both of all ranks together), ``padding_share``
            of the tokens, ``wait_share`` of the time (the mean over ranks), ``tflops`` (10^12 model FLOP/s of all ranks
            together, as `anymal.model.flops` counts them: nothing recomputed), ``utilisation`` of the peak if it is
            known (model FLOPs utilisation, MFU), `memory_figures` (of the rank where each is
            largest), and `also`.
        """
        ours = {
            "groups": {name: pair.tolist() for name, pair in self._per_group.items()},
            "tokens": self._tokens,
            "padding": self._padding,
            "flops": self._flops,
            "recomputed": self._recomputed,
            "waited": self._waited,
            "datasets": self._datasets,
            "decoded": self._decoded,
            "ignored": self._ignored,
            "memory": memory_figures(_memory_stats()),
        }
        ranks = gather(ours)
        seconds = max(time.perf_counter() - self._since, 1e-9)
        self._reset()

        groups: dict[str, tuple[float, float]] = {}
        for rank in ranks:
            for name, (loss, answers) in rank["groups"].items():
                loss_before, answers_before = groups.get(name, (0.0, 0.0))
                groups[name] = (loss_before + loss, answers_before + answers)
        answers = sum(count for _, count in groups.values())
        figures: dict[str, float] = {}
        if answers:
            figures["loss"] = sum(loss for loss, _ in groups.values()) / answers
        figures |= {f"loss/{name}": loss / count for name, (loss, count) in sorted(groups.items()) if count}
        datasets = sum((rank["datasets"] for rank in ranks), Counter())
        if len(datasets) > 1:
            figures |= {f"share/{name}": count / datasets.total() for name, count in sorted(datasets.items())}
        decoded = sum((rank["decoded"] for rank in ranks), Counter())
        self._all_decoded.update(decoded)
        self._all_ignored.update(sum((rank["ignored"] for rank in ranks), Counter()))
        for name, counts in _by_modality(decoded).items():
            if altered := counts.total() - counts["whole"]:
                figures[f"altered/{name}"] = altered / counts.total()
        sums = {name: sum(rank[name] for rank in ranks) for name in SUMS}
        sums |= {"answers": answers, "seconds": seconds, "rank_seconds": seconds * len(ranks)}
        for name, value in sums.items():
            self._totals[name] = self._totals.get(name, 0) + value
        return figures | self._rates(sums) | _worst([rank["memory"] for rank in ranks]) | also

    def summary(self) -> dict[str, Any]:
        """The same figures over all that `figures` has reported since the start of this process, and the sums.

        ``media`` has for each modality how many media were decoded ``whole``, and how many with which note. ``ignored``
        has, if there were any, how many members of samples were left out of each modality that the run does not have.
        """
        totals = self._totals
        if not totals:
            return {}
        sums: dict[str, Any] = {name: totals[name] for name in ("seconds", "tokens", "answers")}
        if self._step_flops is not None:
            sums |= {"model_tflop": totals["flops"] / TERA, "recomputed_tflop": totals["recomputed"] / TERA}
        if self._all_decoded:
            sums["media"] = {name: dict(counts) for name, counts in _by_modality(self._all_decoded).items()}
        if self._all_ignored:
            sums["ignored"] = dict(sorted(self._all_ignored.items()))
        return self._rates(totals) | sums

    def _rates(self, sums: Mapping[str, float]) -> dict[str, float]:
        seconds, tokens = sums["seconds"], sums["tokens"]
        rates = {
            "tokens_per_s": tokens / seconds,
            "answer_tokens_per_s": sums["answers"] / seconds,
            "padding_share": sums["padding"] / max(tokens, 1),
            "wait_share": sums["waited"] / sums["rank_seconds"],
        }
        if self._step_flops is None:
            return rates
        rates["tflops"] = sums["flops"] / seconds / TERA
        if self._peak:
            rates["utilisation"] = sums["flops"] / sums["rank_seconds"] / self._peak
        return rates


def _by_modality(decoded: Counter[tuple[str, str]]) -> dict[str, Counter[str]]:
    """Modality → how many of its media were decoded with which note; ``"whole"`` where there is none."""
    counts: dict[str, Counter[str]] = {}
    for (name, note), count in sorted(decoded.items()):
        counts.setdefault(name, Counter())[note or "whole"] = count
    return counts


def _memory_stats() -> Mapping[str, int] | None:
    """torch's figures of this process's GPU, if it has one. They are kept on the host: nobody waits."""
    return torch.cuda.memory_stats() if torch.cuda.is_available() else None


def memory_figures(stats: Mapping[str, int] | None) -> dict[str, float]:
    """What a process has taken of its memory since it started.

    Args:
        stats: As ``torch.cuda.memory_stats`` gives it; None without a GPU.

    Returns:
        On a GPU ``memory_gb`` (10^9 bytes: the most that tensors took at once), ``reserved_gb`` and
        ``reserved_peak_gb`` (what torch holds of the card for them, now and at most: gaps, and what one CUDA stream
        has freed and another cannot use, included) and ``num_alloc_retries`` (how often the card was full, so that
        torch waited for the GPU and gave back what it did not use; a run without haste has 0). Without one
        ``memory_gb`` alone, the most that the process took, without its workers.
    """
    if stats is None:
        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
        return {"memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GB}
    return {
        "memory_gb": stats.get("allocated_bytes.all.peak", 0) / GB,
        "reserved_gb": stats.get("reserved_bytes.all.current", 0) / GB,
        "reserved_peak_gb": stats.get("reserved_bytes.all.peak", 0) / GB,
        "num_alloc_retries": stats.get("num_alloc_retries", 0),
    }


def _worst(ranks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each figure the largest over ranks."""
    return {name: max(rank[name] for rank in ranks) for name in ranks[0]}
