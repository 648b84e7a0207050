"""Tokens of several samples → one full row that the LLM reads at once, without a single padding token.

    Tokens, one by one ──Packer──▶ those of one row ──pack──▶ Batch

Samples stand end to end in a row of T tokens, and `anymal.model.attention` runs over each by itself. Positions begin at
zero with every sample; transformers' own attention implementations read the borders off the positions.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from anymal.config.schema import DataConfig
from anymal.sample import IGNORED, Batch, Features, PartlyEncoded, Tokens


@dataclass(frozen=True, kw_only=True)
class Item:
    """A sample that waits for its row."""

    position: int
    """Its place in the stream's order."""
    dataset: str
    """The dataset that it came from."""
    tokens: Tokens
    """What is packed."""


@dataclass
class _Bin:
    """A row that is being filled, and the samples that did not fit into it."""

    row: list[Item] = field(default_factory=list)
    used: float = 0
    missed: list[Item] = field(default_factory=list)


class Packer:
    """Fills rows first-fit, looking ahead over a few samples that did not fit.

    A row is done when it is full to the last token, or when more than ``data.packing_buffer`` samples did not fit;
    these begin the next one, in the order in which they came, so none waits for longer than a few rows.

    What it holds is a pure function of the samples that it was given and has not returned, in their order: given the
    same samples again, a new packer goes on alike. That is all that a bookmark has to know of it.

    Args:
        data: ``row_tokens``, ``batch_size``, ``packing_buffer``, ``encoder_cost`` and ``group_by``.
    """

    def __init__(self, data: DataConfig):
        self.data = data
        self.budget = data.row_tokens or data.batch_size
        self._bins: dict[str, _Bin] = {}

    def add(self, item: Item) -> list[list[Item]]:
        """Take a sample; return the rows that this completes: mostly none."""
        keys = {"none": "", "modality": item.tokens.group(), "dataset": item.dataset}
        bin = self._bins.setdefault(keys[self.data.group_by], _Bin())
        self._put(bin, item)
        rows = []
        while bin.used == self.budget or len(bin.missed) > self.data.packing_buffer:
            rows.append(sorted(bin.row, key=lambda item: len(item.tokens.ids)))  # see anymal.model.attention
            missed, bin.row, bin.used, bin.missed = bin.missed, [], 0, []
            for waiting in missed:
                self._put(bin, waiting)
        return rows

    def held(self) -> list[int]:
        """The positions of the samples that are in no row yet."""
        return sorted(item.position for bin in self._bins.values() for item in [*bin.row, *bin.missed])

    def _put(self, bin: _Bin, item: Item) -> None:
        cost = min(self._cost(item.tokens), self.budget)  # a sample that costs more alone gets a row of its own
        if bin.used + cost <= self.budget:
            bin.row.append(item)
            bin.used += cost
        else:
            bin.missed.append(item)

    def _cost(self, tokens: Tokens) -> float:
        if not self.data.row_tokens:
            return 1
        return len(tokens.ids) + sum(self.data.encoder_cost.get(modality, 0) for modality, _, _ in tokens.runs)


def pack(samples: Sequence[Tokens]) -> Batch:
    """Put B samples end to end.

    Raises:
        ValueError: Media of one modality differ in shape, or a sample holds more runs than media. Names the key.
    """
    ids, positions, rows, targets, group_of_row, groups = [], [], [], [], [], []
    media: dict[str, list[torch.Tensor | Features]] = {}
    slots: dict[str, list[int]] = {}
    counts: dict[str, list[int]] = {}
    skips: dict[str, list[int]] = {}
    stands: dict[str, list[tuple[int, int]]] = {}
    for sample in samples:
        start, group = len(ids), sample.group()
        if group not in groups:
            groups.append(group)
        ids += sample.ids
        positions += range(len(sample.ids))
        # The label at t is predicted from t-1; the first token of a sample has nothing before it.
        answered = [t for t, label in enumerate(sample.labels) if label != IGNORED and t > 0]
        rows += [start + t - 1 for t in answered]
        targets += [sample.labels[t] for t in answered]
        group_of_row += [groups.index(group)] * len(answered)
        if len(sample.runs) != len(sample.media):
            raise ValueError(f"sample {sample.key!r}: {len(sample.runs)} placeholder runs, {len(sample.media)} media")
        for (modality, first, length), medium in zip(sample.runs, sample.media, strict=True):
            known = media.setdefault(modality, [])
            alike = next((other for other in known if type(other) is type(medium)), medium)
            if alike.shape != medium.shape:
                raise ValueError(
                    f"sample {sample.key!r}: {modality} of shape {list(medium.shape)}, but {list(alike.shape)} before"
                )
            known.append(medium)
            slots.setdefault(modality, []).extend(range(start + first, start + first + length))
            counts.setdefault(modality, []).append(length)
        for modality, place in sample.skips:
            skips.setdefault(modality, []).append(start + place)
        for (modality, first, _), view in zip(sample.runs, _numbers_of_views(sample), strict=True):
            known = stands.setdefault(modality, [])
            known.append((start + first, len(known) - view))

    def long(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64)

    return Batch(
        ids=long(ids)[None],
        positions=long(positions)[None],
        lengths=[len(sample.ids) for sample in samples],
        rows=long(rows),
        targets=long(targets),
        group_of_row=long(group_of_row),
        groups=groups,
        media={name: _stack(items) for name, items in media.items()},
        slots={name: long(items) for name, items in slots.items()},
        counts={name: long(items) for name, items in counts.items()},
        skips={name: long(items) for name, items in skips.items()},
        keys=[sample.key for sample in samples],
        stands=stands,
        decoded=dict(Counter(medium for sample in samples for medium in sample.decoded)),
        ignored=dict(Counter(modality for sample in samples for modality in sample.ignored)),
    )


def _numbers_of_views(sample: Tokens) -> list[int]:
    """Which view of its medium each run is, counted from zero."""
    return [number for views in sample.views or [1] * len(sample.runs) for number in range(views)]


def _stack(media: Sequence[torch.Tensor | Features]) -> torch.Tensor | PartlyEncoded:
    """The media of one modality, of one shape: [N, ...], or the raw ones and the features apart."""
    known = [medium.tensor for medium in media if isinstance(medium, Features)]
    raw = [medium for medium in media if not isinstance(medium, Features)]
    if not known:
        return torch.stack(raw)
    is_known = torch.tensor([isinstance(medium, Features) for medium in media], dtype=torch.int64)
    order = is_known.argsort(stable=True).argsort()  # raw ones first, each kind in its own order
    return PartlyEncoded(raw=torch.stack(raw) if raw else None, features=torch.stack(known), order=order)
