"""Shards → samples → rows, endlessly, from any position, in an order that no number of workers can change.

    order.py: position ──▶ which sample of which tar    (main process)
    loader.py: that ──▶ Sample ──prepare──▶ Tokens      (workers: no state, so how many there are changes nothing)
    packing.py: Tokens ──▶ rows                         (main process)
    here: a row with its bookmark                       (main process; collated to a Batch when its turn comes)

A bad sample travels like a good one, as a `Bad`; the main process logs it and takes the next. docs/stream.md says why
it is done this way.
"""

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from anymal.config.schema import DataConfig, DatasetConfig
from anymal.data import feature_cache, listing, manifest
from anymal.data.loader import Bad, RawSample, Reader, Request, load, prepared
from anymal.data.manifest import Shard
from anymal.data.order import ONCE, Bookmark, Counts, Order, RankSampler, choice, merge_bookmarks, permutation
from anymal.data.packing import Item, Packer, Row
from anymal.data.quarantine import Quarantine
from anymal.errors import UserError, shortened
from anymal.sample import Sample, Tokens

__all__ = ["Stream", "merge_bookmarks", "samples_once", "tars", "walk"]

Result = TypeVar("Result")


class Stream:
    """Endless rows of one rank, each the samples of a micro-batch.

    Iterating goes on where the last row ended.

    Args:
        data: What is read, and how.
        suffixes: Suffix of a shard member → modality, such as ``{"jpg": "image", "imu.npy": "imu"}``; the longest
            that fits wins, and ``0.jpg`` fits ``jpg``.
        modalities: The run's; media of other ones are ignored (see `anymal.data.parse.parse`). None: all of `suffixes`.
        prepare: Decodes and tokenises one sample whose media are bytes. Runs in the workers, so it must be picklable.
            Whatever it raises makes the sample a bad one; a `UserError` stops the run.
        quarantine: Where bad samples are counted and named.
        seed: The order of samples derives from it and the data alone.
        rank, world: Which of how many data-parallel processes this is; together they see every sample once an epoch.
        refused: What `refuse` noted in an earlier process: samples that are bad by what the model made of them.
        bookmark: Where to go on, as `merge_bookmarks` gave it, whatever the number of ranks was; None starts afresh.
        encoders: Modality → `anymal.data.feature_codec.identity` of its encoder, for those whose features may be read
            in place of media (see anymal.data.feature_cache); `prepare` then gets media that are
            `anymal.data.feature_codec.Stored`.

    Raises:
        UserError: A shard is missing, a dataset is empty, or the bookmark is one of other data.
        BudgetExceeded: From here or from iterating: there are too many bad shards or samples.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        suffixes: Mapping[str, str],
        modalities: Collection[str] | None = None,
        prepare: Callable[[Sample], Tokens],
        quarantine: Quarantine,
        seed: int,
        rank: int = 0,
        world: int = 1,
        bookmark: Bookmark | None = None,
        refused: Sequence[list[Any]] = (),
        encoders: dict[str, str] | None = None,
    ):
        named = _datasets(data)
        shards_of = _survey(data, quarantine, rank / world)
        counts = []
        for (name, dataset), tars_of in zip(named.items(), shards_of, strict=True):
            listed = [(Path(tar.path).name, len(tar)) for tar in tars_of]
            ratio = dataset.epochs * sum(len(tar) for tar in tars_of) if dataset.epochs else dataset.ratio
            counts.append(Counts(name=name, shards=listed, ratio=ratio))
        self.data, self.quarantine = data, quarantine
        self.order = Order(counts, seed=seed, shuffle=data.shuffle)
        self.sampler = RankSampler(self.order, rank=rank, world=world, bookmark=bookmark)
        every = {tar.path: tar for tars_of in shards_of for tar in tars_of if len(tar)}
        self.feature_tars = feature_cache.find_all(list(every.values()), encoders or {}, data.features)
        self.cached = f"features are read in place of media for {len(self.feature_tars)} of {len(every)} tars"
        self.reader = Reader(shards_of, partial(prepared, suffixes, modalities, prepare), self.feature_tars)
        self.names = list(named)
        self._instructions = [dataset.instructions for dataset in named.values()]
        self._total = sum(dataset.total for dataset in counts)
        self._refused: dict[tuple[int, int, int], str] = {(d, s, i): reason for d, s, i, reason in refused}

    @property
    def bookmark(self) -> Bookmark:
        """This rank's piece of a bookmark after the last row (`merge_bookmarks` joins the pieces of all ranks)."""
        return self.sampler.piece()

    @property
    def refused(self) -> list[list[Any]]:
        """Every sample that `refuse` noted, as plain JSON: dataset, shard, number in the shard, and the reason."""
        return [[*sample, reason] for sample, reason in sorted(self._refused.items())]

    def refuse(self, reasons: dict[int, str]) -> None:
        """Take the samples at these positions for bad ones, in every epoch: position → reason.

        All ranks must be given the same. What was prefetched is not affected: `rewind`, and iterate anew.
        """
        self._refused |= {self.order.locate(position): reason for position, reason in reasons.items()}

    def rewind(self, bookmark: Bookmark) -> None:
        """Let a new iteration begin at a merged bookmark; one that is under way must not be used any more."""
        rank, world = self.sampler.rank, self.sampler.world
        self.sampler = RankSampler(self.order, rank=rank, world=world, bookmark=bookmark)
        self.quarantine.in_a_row = 0

    def __iter__(self) -> Generator[Row, None, None]:
        packer = Packer(self.data)  # its state comes back once it is given the samples that were pending
        requests = (self._request(position) for position in self.sampler.positions())
        for request, result in load(self.reader, requests, self.data):
            if isinstance(result, Bad):
                self._reject(result)
                continue
            self.quarantine.accept()
            rows = packer.add(Item(position=request.position, dataset=self.names[request.dataset], tokens=result))
            later = [item.position for row in rows for item in row]
            for row in rows:
                later = later[len(row) :]
                self.sampler.move(request.position, [*later, *packer.pending()])
                yield Row(items=row, bookmark=self.sampler.piece())

    def _request(self, position: int) -> Request:
        dataset, shard, sample = self.order.locate(position)
        return Request(
            position=position,
            dataset=dataset,
            shard=shard,
            sample=sample,
            instruction=_instruction(self._instructions[dataset], self.order.seed, position),
            refused=self._refused.get((dataset, shard, sample), ""),
        )

    def _reject(self, bad: Bad) -> None:
        self.quarantine.reject(bad.shard, bad.key, bad.reason)
        if self.quarantine.in_a_row > self._total:
            raise UserError(
                f"not one of the {self._total} samples is good. The last: {bad.shard}, "
                f"{shortened(bad.key)}: {shortened(bad.reason)}"
            )


def samples_once(
    data: DataConfig,
    *,
    suffixes: Mapping[str, str],
    modalities: Collection[str] | None = None,
    prepare: Callable[[Sample], Result],
    quarantine: Quarantine,
    rank: int = 0,
    world: int = 1,
    seed: int | None = None,
    limit: int = 0,
) -> Iterator[Result]:
    """One pass over samples, for evaluation: a `walk`.

    Args:
        data, suffixes, modalities, prepare, quarantine, rank, world: As for `Stream`.
        seed, limit: As for `walk`.

    Yields:
        What `prepare` makes of each good sample.

    Raises:
        As `Stream`.
    """
    use = partial(prepared, suffixes, modalities, prepare)
    return walk(data, use=use, quarantine=quarantine, rank=rank, world=world, seed=seed, limit=limit)


def walk(
    data: DataConfig,
    *,
    use: Callable[[RawSample], Result],
    quarantine: Quarantine,
    rank: int = 0,
    world: int = 1,
    seed: int | None = None,
    limit: int = 0,
) -> Iterator[Result]:
    """One pass over what lies in tars; ratios, ``data.shuffle`` and batch size play no part.

    Args:
        data, quarantine, rank, world: As for `Stream`.
        use: Takes one sample as it lies in its tar. As `prepare` of `Stream` otherwise.
        seed: Of the order; None keeps the stored one, dataset after dataset.
        limit: The first so many samples in that order alone; 0 takes all.

    Yields:
        What `use` makes of each good sample; rank r of R gets every R-th. Bad ones, those of which the index says so
        among them, go to the quarantine, as in training.

    Raises:
        As `Stream`.
    """
    shards_of = _survey(data, quarantine, rank / world)
    if not any(len(tar) for tars_of in shards_of for tar in tars_of):
        raise UserError("the shards hold no sample")
    # Counted, not listed: a run that shows four of its samples may be one over hundreds of millions.
    numbered = [(d, s) for d, tars_of in enumerate(shards_of) for s in range(len(tars_of))]
    ends = np.cumsum([len(shards_of[d][s]) for d, s in numbered])
    total = int(ends[-1])
    order = range(total) if seed is None else permutation(total, seed, ONCE)
    instructions = [dataset.instructions for dataset in _datasets(data).values()]

    def request(position: int) -> Request:
        i = int(order[position])
        nth = int(ends.searchsorted(i, side="right"))  # passes over empty tars
        d, s = numbered[nth]
        sample = i - int(ends[nth]) + len(shards_of[d][s])
        instruction = _instruction(instructions[d], 0, position)
        return Request(position=position, dataset=d, shard=s, sample=sample, instruction=instruction)

    requests = map(request, range(rank, min(limit or total, total), world))
    for _, result in load(Reader(shards_of, use), requests, data):
        if isinstance(result, Bad):
            quarantine.reject(result.shard, result.key, result.reason)
        else:
            quarantine.accept()
            yield result


def _datasets(data: DataConfig) -> dict[str, DatasetConfig]:
    if (data.shards is None) == (not data.datasets):
        raise UserError("data takes either shards or datasets: give one of them")
    if len({dataset.epochs > 0 for dataset in data.datasets.values()}) > 1:
        raise UserError("data.datasets: some have epochs and some a ratio; give all of them the same of the two")
    return data.datasets or {"data": DatasetConfig(shards=data.shards)}


def tars(data: DataConfig) -> list[list[str]]:
    """The tars of each dataset, without opening one: a cheap look before anything large is loaded.

    Raises:
        UserError: Neither or both of shards and datasets are given, or a tar is missing. Names it.
    """
    listed = []
    for name, dataset in _datasets(data).items():
        try:
            listed.append(listing.expand(dataset.shards))
        except UserError as error:
            raise UserError(f"data.datasets.{name}: {error}" if data.datasets else str(error)) from error
    return listed


def _survey(data: DataConfig, quarantine: Quarantine, start: float) -> list[list[Shard]]:
    """The shards of all datasets with their counts; those without any sample are named in the quarantine.

    Each rank begins at another shard (`start` of 0..1), so that ranks share what work there is.
    """
    paths = tars(data)
    every = list(dict.fromkeys(path for listed in paths for path in listed))
    surveyed = manifest.survey(every, start=start, cache=data.cache, cache_gb=data.cache_gb)
    for shard in surveyed.values():
        if shard.problem:
            quarantine.reject(shard.name, "", shard.problem)
    return [[surveyed[path] for path in listed] for listed in paths]


def _instruction(texts: list[str], seed: int, position: int) -> str:
    """The one that the sample at a position is given, whoever reads it; empty if there are none."""
    return texts[choice(len(texts), seed, position)] if texts else ""


def unchanged(sample: Sample) -> Sample:
    """A `prepare` for `anymal.data.stream.samples_once` that leaves the media encoded."""
    return sample
