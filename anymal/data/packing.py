"""Sequence packing: several samples → one full row that the LLM reads at once, without a single padding token.

    Tokens, one by one ──Packer──▶ Row, as long as it waits ──collate, pack──▶ Batch

Samples stand end to end in a row of T tokens, and `anymal.model.attention` runs over each by itself. Positions begin at
zero with every sample; transformers' own attention implementations read the borders off the positions.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

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


@dataclass(frozen=True, kw_only=True)
class Row:
    """The samples of one micro-batch, not yet collated: their media lie where the workers left them, in shared memory.

    Rows wait on the host for as long as a whole optimizer step. Collating copies media once, into memory that a GPU can
    read from, so it is left until the row's turn comes.
    """

    items: list[Item]
    """Its samples, in their order in the row."""
    bookmark: dict = field(default_factory=dict)
    """Where the stream stands after this row (the dataloader's state), as plain JSON."""

    @property
    def keys(self) -> list[str]:
        """The samples' keys."""
        return [item.tokens.key for item in self.items]

    @property
    def answers(self) -> int:
        """Its answer tokens: what the loss of a step is divided by is their sum over rows and ranks."""
        return sum(len(_answered(item.tokens)) for item in self.items)

    @property
    def datasets(self) -> dict[str, int]:
        """How many of the samples come from each dataset."""
        return dict(Counter(item.dataset for item in self.items))

    def collate(self, *, pinned: bool = False) -> Batch:
        """The row as the model takes it; see `pack`."""
        batch = pack([item.tokens for item in self.items], pinned=pinned)
        batch.datasets = self.datasets
        return batch


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

    Its state is a pure function of the pending samples (those that it was given and has not returned), in their order:
    given the same samples again, a new packer goes on alike. That is all that a bookmark has to know of it.

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
            for earlier in missed:
                self._put(bin, earlier)
        return rows

    def pending(self) -> list[int]:
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


def row_offsets(lengths: Iterable[int]) -> Tensor:
    """Where each of B samples of a row begins, and where the last one ends: [B + 1] int32, as flash attention asks."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _answered(sample: Tokens) -> list[int]:
    """The positions of its answer tokens. The first token of a sample has nothing before it to be predicted from."""
    return [t for t, label in enumerate(sample.labels) if label != IGNORED and t > 0]


def pack(samples: Sequence[Tokens], *, pinned: bool = False) -> Batch:
    """Collate B samples: put them end to end.

    Args:
        samples: In their order in the row.
        pinned: Whether media are stacked in page-locked memory, from which a GPU copies while the host goes on.

    Raises:
        ValueError: Media of one modality differ in shape, or a sample holds more runs than media. Names the key.
    """
    begins = [0, *accumulate(len(sample.ids) for sample in samples)][:-1]
    groups = list(dict.fromkeys(sample.group() for sample in samples))
    answer_positions, targets, answer_groups = [], [], []
    skips: dict[str, list[int]] = {}
    for sample, begin in zip(samples, begins, strict=True):
        answered = _answered(sample)
        answer_positions += [begin + t - 1 for t in answered]  # the label at t is predicted from t-1
        targets += [sample.labels[t] for t in answered]
        answer_groups += [groups.index(sample.group())] * len(answered)
        for modality, first in sample.skips:
            skips.setdefault(modality, []).append(begin + first)
    runs = _runs(samples, begins)
    return Batch(
        ids=_long(token for sample in samples for token in sample.ids)[None],
        positions=_long(t for sample in samples for t in range(len(sample.ids)))[None],
        lengths=[len(sample.ids) for sample in samples],
        offsets=row_offsets(len(sample.ids) for sample in samples),
        answer_positions=_long(answer_positions),
        targets=_long(targets),
        answer_groups=_long(answer_groups),
        groups=groups,
        media={name: _stack([run.medium for run in mine], pinned) for name, mine in runs.items()},
        media_positions={name: _long(p for run in mine for p in run.positions) for name, mine in runs.items()},
        counts={name: _long(len(run.positions) for run in mine) for name, mine in runs.items()},
        to_encode={name: sum(isinstance(run.medium, Tensor) for run in mine) for name, mine in runs.items()},
        skips={name: _long(positions) for name, positions in skips.items()},
        keys=[sample.key for sample in samples],
        media_starts={
            name: [(run.positions.start, number - run.view) for number, run in enumerate(mine)]
            for name, mine in runs.items()
        },
        decoded=dict(Counter(medium for sample in samples for medium in sample.decoded)),
        ignored=dict(Counter(modality for sample in samples for modality in sample.ignored)),
    )


@dataclass(frozen=True, kw_only=True)
class _Run:
    """A placeholder run of the row."""

    positions: range
    """In T."""
    medium: Tensor | Features
    """What is spliced in there."""
    view: int
    """Which view of its medium it is, counted from zero."""


def _runs(samples: Sequence[Tokens], begins: Sequence[int]) -> dict[str, list[_Run]]:
    """The runs of each modality, in reading order.

    Raises:
        ValueError: As `pack`.
    """
    runs: dict[str, list[_Run]] = {}
    for sample, begin in zip(samples, begins, strict=True):
        if len(sample.runs) != len(sample.media):
            raise ValueError(f"sample {sample.key!r}: {len(sample.runs)} placeholder runs, {len(sample.media)} media")
        numbers = [view for views in sample.views or [1] * len(sample.runs) for view in range(views)]
        for (modality, first, length), medium, view in zip(sample.runs, sample.media, numbers, strict=True):
            mine = runs.setdefault(modality, [])
            shape = next((run.medium.shape for run in mine if type(run.medium) is type(medium)), medium.shape)
            if shape != medium.shape:
                raise ValueError(
                    f"sample {sample.key!r}: {modality} of shape {list(medium.shape)}, but {list(shape)} before"
                )
            mine.append(_Run(positions=range(begin + first, begin + first + length), medium=medium, view=view))
    return runs


def _long(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)


def _stack(media: Sequence[Tensor | Features], pinned: bool) -> Tensor | PartlyEncoded:
    """The media of one modality, of one shape: [N, ...], or the raw ones and the features apart."""
    features = [medium.tensor for medium in media if isinstance(medium, Features)]
    raw = [medium for medium in media if not isinstance(medium, Features)]
    if not features:
        return _together(raw, pinned)
    is_encoded = torch.tensor([isinstance(medium, Features) for medium in media], dtype=torch.int64)
    order = is_encoded.argsort(stable=True).argsort()  # raw ones first, each kind in its own order
    return PartlyEncoded(raw=_together(raw, pinned) if raw else None, features=_together(features, pinned), order=order)


def _together(tensors: Sequence[Tensor], pinned: bool) -> Tensor:
    """[N, ...], copied once."""
    if not pinned:
        return torch.stack(list(tensors))
    whole = torch.empty(len(tensors), *tensors[0].shape, dtype=tensors[0].dtype, pin_memory=True)
    return torch.stack(list(tensors), out=whole)
