"""Which sample is at which position, and bookmarks (the dataloader's state), which are positions. Reads nothing.

The stream asks `Order` where the sample at position P lies. P counts over all datasets, ranks and epochs:

    P ──cycle of ratios──▶ dataset, j ──▶ epoch j // N, i = j % N ──shuffle──▶ shard, sample in the shard

Every step is closed-form, so nothing has to be read, buffered or replayed to know what is at P. Data-parallel rank r of
R takes the positions ≡ r (mod R) (`RankSampler`): what it has done is one integer, whatever the number of workers.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import lcm
from typing import Any

import numpy as np

from anymal.errors import UserError

VERSION = 2  # of the order and of the bookmarks: a change of either must refuse older bookmarks
LONGEST_CYCLE = 10_000
PENDING = "held"  # what bookmarks call the pending positions since version 0.1, so that old and new ones load
Bookmark = dict[str, Any]
"""A bookmark, or one rank's piece of it: plain JSON, as `merge_bookmarks` describes it."""
_CYCLE, _SHARDS, _SAMPLES, _CHOICE, ONCE = range(5)  # keys that keep the random numbers of different uses apart


@lru_cache(maxsize=64)
def permutation(n: int, *key: int) -> np.ndarray:
    """[n] int64, a permutation of 0..n-1 that depends on `key` alone.

    Sorted raw output of PCG64, because numpy promises never to change that; it does not promise it for `permutation`,
    and an upgrade in the middle of a run must not move samples.
    """
    raw = np.random.PCG64(list(key)).random_raw(n)
    order = raw.argsort()  # several times faster than a stable sort, and the same unless two numbers are equal
    ranked = raw[order]
    if (ranked[1:] == ranked[:-1]).any():
        order = raw.argsort(kind="stable")
    order.flags.writeable = False
    return order


def choice(n: int, seed: int, position: int) -> int:
    """A number from 0 to n-1 that depends on its arguments alone, drawn as `permutation` draws."""
    return int(np.random.PCG64([seed, _CHOICE, position]).random_raw()) % n


@dataclass(kw_only=True)
class Counts:
    """What `Order` knows of one dataset."""

    name: str
    """As the recipe calls it."""
    shards: list[tuple[str, int]]
    """File name and number of samples of each shard, in the order given."""
    ratio: float = 1.0
    """Its share of the positions, relative to the others'."""

    def __post_init__(self):
        self.per_shard = np.array([count for _, count in self.shards], dtype=np.int64)
        self.total = int(self.per_shard.sum())
        self._epoch = (-1, np.empty(0, np.int64), np.empty(0, np.int64))

    def epoch(self, epoch: int, seed: int, index: int, shuffled: bool) -> tuple[np.ndarray, np.ndarray]:
        """[S] shards in the order in which this epoch takes them, and [S] how many samples lie before each one's end.

        The last epoch asked for is kept: positions are asked for nearly in order.
        """
        if self._epoch[0] != epoch:
            n = len(self.shards)
            order = permutation(n, seed, _SHARDS, index, epoch) if shuffled else np.arange(n)
            self._epoch = (epoch, order, self.per_shard[order].cumsum())
        return self._epoch[1:]


class Order:
    """position → (dataset, shard, sample): a pure function of its arguments.

    Args:
        datasets: The datasets; each must hold samples.
        seed: All permutations derive from it.
        shuffle: Samples are permuted within consecutive windows of this many; 0 keeps shards and samples in order.

    Raises:
        UserError: A dataset is empty or its ratio is not positive, or seed or shuffle is negative.
    """

    def __init__(self, datasets: Sequence[Counts], *, seed: int, shuffle: int):
        if seed < 0 or shuffle < 0:
            raise UserError(f"run.seed is {seed} and data.shuffle is {shuffle}; neither can be negative")
        for dataset in datasets:
            if dataset.total == 0:
                raise UserError(f"data: the {len(dataset.shards)} shards of dataset {dataset.name!r} hold no sample")
            if not 0 < dataset.ratio < float("inf"):
                raise UserError(f"data: the ratio of dataset {dataset.name!r} is {dataset.ratio}; it must be positive")
        self.datasets, self.seed, self.shuffle = list(datasets), seed, shuffle
        self.cycle = _positions_per_cycle([dataset.ratio for dataset in datasets])

    def locate(self, position: int) -> tuple[int, int, int]:
        """The sample at `position`: index of the dataset, of its shard (as given), and of the sample in the shard."""
        index, j = self._blend(position)
        dataset = self.datasets[index]
        epoch, i = divmod(j, dataset.total)
        if self.shuffle:
            window, inside = divmod(i, self.shuffle)
            length = min(self.shuffle, dataset.total - window * self.shuffle)
            shuffled = permutation(length, self.seed, _SAMPLES, index, epoch, window)[inside]
            i = window * self.shuffle + int(shuffled)
        shards, ends = dataset.epoch(epoch, self.seed, index, self.shuffle > 0)
        nth = int(ends.searchsorted(i, side="right"))  # passes over empty shards
        shard = int(shards[nth])
        return index, shard, i - int(ends[nth] - dataset.per_shard[shard])

    def _blend(self, position: int) -> tuple[int, int]:
        """The dataset at a position, and how many earlier positions it has."""
        if len(self.datasets) == 1:
            return 0, position
        cycle, i = divmod(position, sum(self.cycle))
        # Permuted anew in each cycle: in a fixed order, two ranks and two datasets of equal ratio would leave each
        # rank with one of the datasets only.
        dataset_of, before = _cycle(self.cycle, self.seed, cycle)
        index = int(dataset_of[i])
        return index, cycle * self.cycle[index] + int(before[i])

    def identity(self) -> dict[str, Any]:
        """What a bookmark's positions depend on, as plain JSON."""
        datasets = {}
        for dataset in self.datasets:
            listed = "\n".join(f"{name}\t{count}" for name, count in dataset.shards)
            digest = hashlib.sha256(listed.encode(errors="surrogateescape")).hexdigest()[:16]
            described = {"samples": dataset.total, "shards": len(dataset.shards), "listing": digest}
            datasets[dataset.name] = described | {"ratio": dataset.ratio}
        return {"seed": self.seed, "shuffle": self.shuffle, "datasets": datasets}


def _positions_per_cycle(ratios: Sequence[float]) -> tuple[int, ...]:
    """How many positions of one cycle each dataset gets: exact if a cycle of at most LONGEST_CYCLE can be, else ±1."""
    shares = [Fraction(str(ratio)) for ratio in ratios]
    shares = [share / sum(shares) for share in shares]
    length = lcm(*(share.denominator for share in shares))
    if length > LONGEST_CYCLE:
        length = LONGEST_CYCLE
    counts = [int(share * length) for share in shares]
    remainders = sorted(range(len(shares)), key=lambda d: counts[d] - shares[d] * length)
    for d in remainders[: length - sum(counts)]:
        counts[d] += 1
    return tuple(max(1, count) for count in counts)  # however small its ratio, a dataset is not left out


@lru_cache(maxsize=4)
def _cycle(counts: tuple[int, ...], seed: int, cycle: int) -> tuple[np.ndarray, np.ndarray]:
    """[C] the dataset of each position of a cycle, and [C] how many positions before it in the cycle are its own."""
    dataset_of = np.repeat(np.arange(len(counts)), counts)[permutation(sum(counts), seed, _CYCLE, cycle)]
    before = np.empty_like(dataset_of)
    for d, count in enumerate(counts):
        before[dataset_of == d] = np.arange(count)
    return dataset_of, before


class RankSampler:
    """The positions that one data-parallel rank takes, from a bookmark on.

    Args:
        order: The order that the positions refer to.
        rank, world: Which of how many ranks.
        bookmark: Where to go on, as `merge_bookmarks` gives it; None starts at the beginning.

    Raises:
        UserError: The bookmark is no merged bookmark, or belongs to other data, another seed, shuffle or ratio.
    """

    def __init__(self, order: Order, *, rank: int, world: int, bookmark: Bookmark | None):
        if not 0 <= rank < world:
            raise UserError(f"rank {rank} is not one of {world}")
        self.rank, self.world, self.identity = rank, world, order.identity()
        start, self._done, pending = 0, [], set()
        if bookmark is not None:
            _check(bookmark, self.identity)
            start, self._done, pending = bookmark["next"], bookmark["done"], set(bookmark[PENDING])
        self.position = start + (rank - start) % world
        """The first position of this rank that was not read."""
        self.pending = sorted(p for p in pending if p % world == rank)
        """Positions before `position` that were read and are in no batch yet; after a change of ranks also later ones
        that stand among the done."""
        self._passed = _members(self._done, rank, world, self.position) - pending

    def positions(self) -> Iterator[int]:
        """What is left, in ascending order and endlessly, without moving `position`: prefetching is no progress."""
        position = self.position
        yield from [p for p in self.pending if p < position]
        while True:
            if position not in self._passed:
                yield position
            position += self.world

    def move(self, position: int, pending: Sequence[int]) -> None:
        """Note that a batch was made.

        Args:
            position: The last position that was read for it.
            pending: The positions that were read and are in no batch yet.
        """
        unread = [p for p in self.pending if p > position]
        self.pending = sorted([*pending, *unread])
        self.position = max(self.position, position + self.world)

    def piece(self) -> Bookmark:
        """This rank's part of a bookmark, as plain JSON."""
        return {
            "rank": self.rank,
            "world": self.world,
            "position": self.position,
            PENDING: self.pending,
            "done": self._done,
            "version": VERSION,
            "data": self.identity,
        }


def _members(ranges: Sequence[Sequence[int]], rank: int, world: int, start: int) -> set[int]:
    """The positions ≡ rank (mod world), from `start` on, that lie in one of the ranges (first, stop, step)."""
    members: set[int] = set()
    for first, stop, step in ranges:
        positions = np.arange(first, stop, step)
        members.update(positions[(positions % world == rank) & (positions >= start)].tolist())
    return members


def merge_bookmarks(pieces: Sequence[Bookmark]) -> Bookmark:
    """The ranks' pieces → a bookmark that does not depend on how many ranks there were.

    Returns:
        ``{"version", "data", "next", "done", "held"}``: no position before `next` is left; beyond it, those are done
        that lie in one of the ranges `done` (each ``[first, stop, step]``) and are not in `held`, the pending ones.
        Ranks advance at different speeds, by the bad samples that each met and the lengths of those that it packed;
        hence one range for each rank.

    Raises:
        UserError: The pieces are not those of all ranks of one run.
    """
    world = len(pieces)
    pieces = sorted(pieces, key=lambda piece: piece["rank"])
    if not pieces or [(p["rank"], p["world"]) for p in pieces] != [(r, world) for r in range(world)]:
        there = ", ".join(f"{piece['rank']} of {piece['world']}" for piece in pieces) or "none"
        raise UserError(f"a bookmark needs one piece from every rank of one run; found: {there}")
    if any(piece["data"] != pieces[0]["data"] for piece in pieces):
        raise UserError("the ranks read different data: they do not see the same shards, seed or ratios")
    first = min(min([piece["position"], *piece[PENDING]]) for piece in pieces)
    done = [known for known in pieces[0]["done"] if known[1] > first]
    for rank, piece in enumerate(pieces):
        begin = first + (rank - first) % world
        if begin < piece["position"]:
            done.append([begin, piece["position"], world])
    pending = sorted(p for piece in pieces for p in piece[PENDING])
    return {"version": VERSION, "data": pieces[0]["data"], "next": first, "done": done, PENDING: pending}


def _check(bookmark: Bookmark, identity: dict[str, Any]) -> None:
    """Refuse a bookmark whose positions would mean other samples here, and say what differs."""
    if "next" not in bookmark or bookmark.get("version") != VERSION:
        raise UserError(
            f"this is not a merged bookmark of version {VERSION} (see anymal.data.stream.merge_bookmarks): "
            f"it holds {', '.join(bookmark) or 'nothing'}"
        )
    was = bookmark["data"]
    changed = [
        f"{name} was {was[setting]}, is {identity[setting]}"
        for name, setting in (("run.seed", "seed"), ("data.shuffle", "shuffle"))
        if was[setting] != identity[setting]
    ]
    for name in dict.fromkeys([*was["datasets"], *identity["datasets"]]):
        before, now = was["datasets"].get(name), identity["datasets"].get(name)
        if before is None or now is None:
            changed.append(f"dataset {name!r} is {'gone' if now is None else 'new'}")
            continue
        if before["ratio"] != now["ratio"]:
            changed.append(f"the ratio of dataset {name!r} was {before['ratio']}, is {now['ratio']}")
        if before["listing"] != now["listing"]:
            changed.append(
                f"dataset {name!r} had {before['samples']} samples in {before['shards']} shards, "
                f"now {now['samples']} in {now['shards']} (or other names, or another order)"
            )
    if not changed and list(was["datasets"]) != list(identity["datasets"]):
        changed.append("the datasets are listed in another order")
    if changed:
        raise UserError(
            f"the data changed since the bookmark was made, so its positions would mean other samples: "
            f"{'; '.join(changed)}. Put it back, or start a new run from the trained weights (model.checkpoint)"
        )
