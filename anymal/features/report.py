"""What is in the feature tars that `anymal encode` wrote, how exact it is, and whether reading them pays."""

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

import torch

from anymal.data import feature_cache, feature_codec, shards
from anymal.data.loader import RawSample, read_sample
from anymal.data.parse import modality_of
from anymal.errors import BadSample
from anymal.modality import Encoder

REREAD = 1000
"""Samples that are read again, to measure what that costs."""


@dataclass(kw_only=True)
class Figures:
    """What was seen of one modality: sums over its media."""

    media: int = 0
    """That were encoded."""
    bad: int = 0
    """That could not be."""
    altered: int = 0
    """That decoding cropped or filled up."""
    decode_s: float = 0.0
    """Reading and decoding the originals, seconds of a worker."""
    encode_s: float = 0.0
    """Running the encoder, seconds."""
    bytes: int = 0
    """Of features as they are written."""
    largest_error: float = 0.0
    """Of any value that was written, against the encoder's own."""
    squared_error: float = 0.0
    """Sum over all values."""
    squared: float = 0.0
    """Sum of the squares of the encoder's values."""

    def add(self, other: "Figures") -> None:
        """Take another's into account."""
        for name, value in asdict(other).items():
            mine = getattr(self, name)
            setattr(self, name, max(mine, value) if name == "largest_error" else mine + value)

    def relative_error(self) -> float:
        """Root of the mean squared error over that of the mean square of the values."""
        return (self.squared_error / self.squared) ** 0.5 if self.squared else 0.0


def seconds_to_read(
    encoders: Mapping[str, Encoder], suffixes: Mapping[str, str], feature_tars: Sequence[feature_cache.FeatureTar]
) -> dict[str, float]:
    """Modality → seconds for reading one medium's features, over about `REREAD` samples of all feature tars."""
    seconds, counts = dict.fromkeys(encoders, 0.0), dict.fromkeys(encoders, 0)
    indexes = [shards.index(tar.path) for tar in feature_tars if tar.encoders]

    def add(raw: RawSample) -> None:
        began = time.perf_counter()
        members = feature_codec.restore(raw.members)
        reading = raw.seconds + time.perf_counter() - began
        stored = {name: data for name, data in members.items() if isinstance(data, feature_codec.Stored)}
        for name, data in stored.items():
            kind, began = modality_of(name, suffixes), time.perf_counter()
            if kind is None:
                continue
            with suppress(BadSample):
                feature_codec.load(data, encoders[kind].tokens, encoders[kind].width)
            seconds[kind] += reading / len(stored) + time.perf_counter() - began
            counts[kind] += 1

    for index in indexes:
        for i in range(0, len(index), max(1, len(index) * len(indexes) // REREAD)):
            read_sample(index, i, add)  # bad ones do not count
    return {kind: seconds[kind] / count for kind, count in counts.items() if count}


def report(
    feature_tars: Mapping[str, feature_cache.FeatureTar],
    encoders: Mapping[str, Encoder],
    suffixes: Mapping[str, str],
    precision: str,
) -> list[str]:
    """Lines that say what feature tars hold, how exact it is, and whether reading them is cheaper than encoding.

    Args:
        feature_tars: That of each tar, by its path.
        encoders: Those that it was written with.
        suffixes: Which modality a shard member holds.
        precision: What it was written as.
    """
    total: dict[str, Figures] = {}
    for tar in feature_tars.values():
        for kind, figures in tar.header["media"].items():
            total.setdefault(kind, Figures()).add(Figures(**figures))
    threads, lines = torch.get_num_threads(), []
    torch.set_num_threads(1)  # as in the loader's workers
    try:
        reading = seconds_to_read(encoders, suffixes, list(feature_tars.values()))
    finally:
        torch.set_num_threads(threads)
    for kind, figures in total.items():
        altered = f" ({figures.altered:,} cropped or filled up)" if figures.altered else ""
        lines.append(
            f"{kind}: {figures.media:,} media{altered}, {figures.bad:,} bad; {figures.bytes / 1e6:,.1f} MB as "
            f"{precision}; error {figures.largest_error:.3g} at most, rel. RMS {figures.relative_error():.2e}"
        )
        if not figures.media or kind not in reading:
            continue
        again, decode = figures.encode_s / figures.media, figures.decode_s / (figures.media + figures.bad)
        ratio = (again + decode) / reading[kind]
        lines.append(
            f"  for 1,000 media: encoding again costs {1000 * again:.2f} s, decoding and reading the original "
            f"{1000 * decode:.2f} s, reading features {1000 * reading[kind]:.2f} s: "
            + (f"the features pay, {ratio:.1f} times less" if ratio > 1 else f"they do not pay ({ratio:.2f})")
        )
    originals = sum(os.path.getsize(path) for path, tar in feature_tars.items() if tar.encoders)
    written = sum(os.path.getsize(tar.path) for tar in feature_tars.values() if tar.encoders)
    return [*lines, f"{written / 1e6:,.1f} MB of features beside {originals / 1e6:,.1f} MB of tars"]
