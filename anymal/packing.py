"""Tokens of several samples → one full row that the LLM reads at once, without a single padding token.

Samples stand end to end in a row of T tokens. Positions begin at zero with every sample; transformers' mask functions
read the borders off the positions, so that no token attends to another sample.
"""

from collections.abc import Sequence

import torch

from anymal.prompt import IGNORED
from anymal.sample import Batch, Tokens


def pack(samples: Sequence[Tokens]) -> Batch:
    """Put B samples end to end.

    Raises:
        ValueError: Media of one modality differ in shape, or a sample holds more runs than media. Names the key.
    """
    ids, positions, rows, targets, group_of_row, groups = [], [], [], [], [], []
    media: dict[str, list[torch.Tensor]] = {}
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
            if known and known[0].shape != medium.shape:
                raise ValueError(
                    f"sample {sample.key!r}: {modality} of shape {list(medium.shape)}, "
                    f"but {list(known[0].shape)} before"
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
        media={name: torch.stack(items) for name, items in media.items()},
        slots={name: long(items) for name, items in slots.items()},
        counts={name: long(items) for name, items in counts.items()},
        keys=[sample.key for sample in samples],
    )
