"""Tokens of several samples → one full row that the LLM reads at once, without a single padding token.

Samples stand end to end in a row of T tokens. Positions begin at zero with every sample; transformers' mask functions
read the borders off the positions, so that no token attends to another sample.
"""

from collections.abc import Sequence

import torch

from anymal.prompt import IGNORED
from anymal.sample import Batch, Features, PartlyEncoded, Tokens


def pack(samples: Sequence[Tokens]) -> Batch:
    """Put B samples end to end.

    Raises:
        ValueError: Media of one modality differ in shape, or a sample holds more runs than media. Names the key.
    """
    ids, positions, rows, targets, group_of_row, groups = [], [], [], [], [], []
    media: dict[str, list[torch.Tensor | Features]] = {}
    slots: dict[str, list[int]] = {}
    counts: dict[str, list[int]] = {}
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

    def long(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64)

    return Batch(
        ids=long(ids)[None],
        positions=long(positions)[None],
        rows=long(rows),
        targets=long(targets),
        group_of_row=long(group_of_row),
        groups=groups,
        media={name: _stack(items) for name, items in media.items()},
        slots={name: long(items) for name, items in slots.items()},
        counts={name: long(items) for name, items in counts.items()},
        keys=[sample.key for sample in samples],
    )


def _stack(media: Sequence[torch.Tensor | Features]) -> torch.Tensor | PartlyEncoded:
    """The media of one modality, of one shape: [N, ...], or the raw ones and the features apart."""
    known = [medium.tensor for medium in media if isinstance(medium, Features)]
    raw = [medium for medium in media if not isinstance(medium, Features)]
    if not known:
        return torch.stack(raw)
    is_known = torch.tensor([isinstance(medium, Features) for medium in media], dtype=torch.int64)
    order = is_known.argsort(stable=True).argsort()  # raw ones first, each kind in its own order
    return PartlyEncoded(raw=torch.stack(raw) if raw else None, features=torch.stack(known), order=order)
