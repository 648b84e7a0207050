"""Shards → samples → batches, endlessly, from any place, in an order that no number of workers can change.

    order.py: position ──▶ place in a tar   (main process)
    manifest.py: shard ──▶ its offsets      (workers; the main process knows its number of samples only)
    shards.py: place ──▶ members            (workers: no state, so how many there are changes nothing)
    parse.py: members ──▶ Sample ──prepare──▶ Tokens   (workers)
    here: Tokens ──▶ Batch with its bookmark   (main process)

A bad sample travels like a good one, as a `Bad`; the main process logs it and takes the next. docs/stream.md says why
it is done this way.
"""

import atexit
import io
import multiprocessing
import os
import pickle
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from anymal import features, manifest, shards, twins
from anymal.config import DataConfig, DatasetConfig
from anymal.errors import BadSample, Quarantine, UserError
from anymal.manifest import Shard
from anymal.order import Counts, Order, Share, merge_bookmarks
from anymal.packing import Item, Packer
from anymal.parse import parse
from anymal.sample import Batch, Sample, Tokens

__all__ = ["Bad", "Stream", "each", "merge_bookmarks", "parse", "reason_of", "samples_once", "tars"]

_CHUNK = 8  # samples that a worker is asked for at a time: spreads the cost of passing them on
_SHORT = 64  # tokens of a short sample: tells how many to read ahead for a row


@dataclass(frozen=True, kw_only=True)
class Bad:
    """What a worker sends in place of a sample that cannot be used."""

    shard: str
    """The tar."""
    key: str
    """The sample's key, or its offset where not even that could be read."""
    reason: str
    """What was found and what is wanted."""


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """One sample to be read."""

    position: int
    """Its place in the order."""
    dataset: int
    """Index of its dataset."""
    shard: int
    """Index of the shard in the dataset."""
    sample: int
    """Index of the sample in the shard."""


class Stream:
    """Endless batches of one rank.

    Iterating goes on where the last batch ended.

    Args:
        data: What is read, and how.
        suffixes: Suffix of a shard member → modality, such as ``{"jpg": "image", "imu.npy": "imu"}``; the longest
            that fits wins, and ``0.jpg`` fits ``jpg``.
        prepare: Decodes and tokenises one sample whose media are bytes. Runs in the workers, so it must be picklable.
            Whatever it raises makes the sample a bad one; a `UserError` stops the run.
        collate: The tokenised samples of one row → a batch. Runs in the main process.
        quarantine: Where bad samples are counted and named.
        seed: The order of samples derives from it and the data alone.
        rank, world: Which of how many processes this is; together they see every sample once an epoch.
        bookmark: Where to go on, as `merge_bookmarks` gave it, whatever the number of ranks was; None starts afresh.
        encoders: Modality → `anymal.features.identity` of its encoder, for those whose features may be read in place
            of media (see anymal.twins); `prepare` then gets media that are `anymal.features.Stored`.

    Raises:
        UserError: A shard is missing, a dataset is empty, or the bookmark is one of other data.
        BudgetExceeded: From here or from iterating: there are too many bad shards or samples.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        suffixes: dict[str, str],
        prepare: Callable[[Sample], Tokens],
        collate: Callable[[list[Tokens]], Batch],
        quarantine: Quarantine,
        seed: int,
        rank: int = 0,
        world: int = 1,
        bookmark: dict | None = None,
        encoders: dict[str, str] | None = None,
    ):
        named = _datasets(data)
        shards_of = _survey(data, quarantine, rank / world)
        counts = []
        for (name, dataset), found in zip(named.items(), shards_of, strict=True):
            listed = [(Path(tar.path).name, len(tar)) for tar in found]
            share = dataset.epochs * sum(len(tar) for tar in found) if dataset.epochs else dataset.ratio
            counts.append(Counts(name=name, shards=listed, ratio=share))
        self.data, self.quarantine, self.collate = data, quarantine, collate
        self.order = Order(counts, seed=seed, shuffle=data.shuffle)
        self.share = Share(self.order, rank=rank, world=world, bookmark=bookmark)
        every = {tar.path: tar for found in shards_of for tar in found if len(tar)}
        self.twins = twins.find_all(list(every.values()), encoders or {}, data.features)
        self.cached = f"features are read in place of media for {len(self.twins)} of {len(every)} tars"
        self.reader = _Reader(shards_of, suffixes, prepare, self.twins)
        self.names = list(named)
        self._total = sum(dataset.total for dataset in counts)

    @property
    def bookmark(self) -> dict:
        """This rank's piece of a bookmark after the last batch (`merge_bookmarks` joins the pieces of all ranks)."""
        return self.share.piece()

    def __iter__(self) -> Iterator[Batch]:
        packer = Packer(self.data)  # what one held before, it holds again once it was given the same samples
        tickets = (_ticket(position, self.order) for position in self.share.positions())
        for ticket, result in _load(self.reader, tickets, self.data):
            if isinstance(result, Bad):
                self._reject(result)
                continue
            self.quarantine.accept()
            rows = packer.add(Item(position=ticket.position, dataset=self.names[ticket.dataset], tokens=result))
            waiting = [item.position for row in rows for item in row]
            for row in rows:
                batch = self.collate([item.tokens for item in row])
                batch.datasets = dict(Counter(item.dataset for item in row))
                waiting = waiting[len(row) :]
                self.share.move(ticket.position, [*waiting, *packer.held()])
                batch.bookmark = self.share.piece()
                yield batch

    def _reject(self, bad: Bad) -> None:
        self.quarantine.reject(bad.shard, bad.key, bad.reason)
        if self.quarantine.in_a_row > self._total:
            raise UserError(
                f"not one of the {self._total} samples is good. The last: {bad.shard}, {bad.key}: {bad.reason}"
            )


def samples_once(
    data: DataConfig,
    *,
    suffixes: dict[str, str],
    prepare: Callable[[Sample], Any],
    quarantine: Quarantine,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Any]:
    """One pass in stored order, dataset after dataset, for evaluation; ratios, shuffle and batch size play no part.

    Yields:
        What `prepare` makes of each good sample; rank r of R gets every R-th. Bad ones go to the quarantine.

    Raises:
        As `Stream`.
    """
    shards_of = _survey(data, quarantine, rank / world)
    if not any(len(tar) for found in shards_of for tar in found):
        raise UserError("data: the shards hold no sample")
    places = ((d, s, i) for d, found in enumerate(shards_of) for s, tar in enumerate(found) for i in range(len(tar)))
    mine = islice(enumerate(places), rank, None, world)
    tickets = (Ticket(position=p, dataset=d, shard=s, sample=i) for p, (d, s, i) in mine)
    for _, result in _load(_Reader(shards_of, suffixes, prepare), tickets, data):
        if isinstance(result, Bad):
            quarantine.reject(result.shard, result.key, result.reason)
        else:
            quarantine.accept()
            yield result


def each(count: int, read: Callable[[int], Any], data: DataConfig) -> Iterator[Any]:
    """``read(0)`` to ``read(count - 1)``, in order, by ``data.workers`` processes ahead of their use.

    Raises:
        UserError: `read` returned one; or a worker died, or hangs.
    """
    tickets = (Ticket(position=i, dataset=0, shard=0, sample=i) for i in range(count))
    for _, result in _load(_Each(lambda ticket: read(ticket.sample)), tickets, data):
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
    return [shards.expand(dataset.shards) for dataset in _datasets(data).values()]


def _survey(data: DataConfig, quarantine: Quarantine, start: float) -> list[list[Shard]]:
    """The shards of all datasets with their counts; those without any sample are named in the quarantine.

    Each rank begins at another shard (`start` of 0..1), so that ranks share what work there is.
    """
    paths = tars(data)
    every = list(dict.fromkeys(path for listed in paths for path in listed))
    found = manifest.survey(every, start=start, cache=data.cache, cache_gb=data.cache_gb)
    for shard in found.values():
        if shard.problem:
            quarantine.reject(shard.name, "", shard.problem)
    return [[found[path] for path in listed] for listed in paths]


def _ticket(position: int, order: Order) -> Ticket:
    dataset, shard, sample = order.locate(position)
    return Ticket(position=position, dataset=dataset, shard=shard, sample=sample)


# ---------------------------------------------------------------------------------------------------- the workers


class _Reader:
    """The map-style dataset that the workers hold: chunks of tickets → what each of them gives. It has no state."""

    def __init__(
        self,
        listed: list[list[Shard]],
        suffixes: dict[str, str],
        prepare: Callable[[Sample], Any],
        twins_of: dict[str, Shard] | None = None,
    ):
        self.shards, self.suffixes, self.prepare, self.twins = listed, suffixes, prepare, twins_of or {}

    def __getitem__(self, tickets: list[Ticket]) -> Any:
        found = [(ticket, self._one(ticket)) for ticket in tickets]
        return found if get_worker_info() is None else _pack(found)

    def _one(self, ticket: Ticket) -> Any:
        """What `prepare` made of the sample, a `Bad`, or a `UserError` (returned: a loader garbles what is raised)."""
        shard, key, place = self.shards[ticket.dataset][ticket.shard], None, (0, 0)
        source = self.twins.get(shard.path, shard)
        try:
            tar = manifest.load(source)
            place = tar.place(ticket.sample)
            if ticket.sample in tar.bad:
                raise BadSample(tar.bad[ticket.sample])
            key, members = shards.read(tar.path, *place)
            if source is not shard:
                members = features.restore(members)
            return self.prepare(parse(shard.name, key, members, self.suffixes))
        except UserError as error:
            return error
        except Exception as error:  # decoders raise anything over hostile bytes, and one sample must not end the run
            reason = reason_of(error)
        return Bad(shard=shard.name, key=shards.name_of(source.path, *place) if key is None else key, reason=reason)


class _Each:
    """As `_Reader`, for any function of a ticket."""

    def __init__(self, one: Callable[[Ticket], Any]):
        self._one = one

    __getitem__ = _Reader.__getitem__


def reason_of(error: Exception) -> str:
    """What the quarantine says of a sample over which a decoder raised this."""
    if isinstance(error, BadSample):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({os.path.basename(last.filename)}:{last.lineno})"


def _load(reader: _Reader | _Each, tickets: Iterable[Ticket], data: DataConfig) -> Iterator[tuple[Ticket, Any]]:
    """Tickets → (ticket, result) in the same order, read by ``data.workers`` processes ahead of their use."""
    tickets = iter(tickets)
    batch = data.row_tokens // _SHORT or data.batch_size
    size = max(1, min(_CHUNK, batch // max(1, data.workers)))
    options = {}
    if data.workers:
        ahead = -(-batch // (data.workers * size))  # the next batch is read while this one is trained on
        options = {"prefetch_factor": max(2, ahead), "multiprocessing_context": "fork", "timeout": data.timeout}
        options |= {"worker_init_fn": _start_worker}
    loader = DataLoader(
        reader,
        sampler=iter(lambda: list(islice(tickets, size)), []),
        batch_size=None,
        num_workers=data.workers,
        collate_fn=_same,
        generator=torch.Generator(),  # its own: else starting a loader would draw from torch's global generator
        **options,
    )
    chunks = iter(loader)
    while True:
        try:
            chunk = next(chunks, None)
        except RuntimeError as error:
            if "DataLoader" not in str(error):
                raise
            _kill_workers()
            if "timed out" in str(error):
                why = f"nothing came within data.timeout = {data.timeout:g} s: a decoder hangs, or the storage is slow"
            else:
                why = f"a worker died, for want of memory or of /dev/shm, or in a decoder's own code ({error})"
            raise UserError(f"{why}. data.workers=0 shows where") from error
        if chunk is None:
            return
        for ticket, result in _unpack(*chunk) if data.workers else chunk:
            if isinstance(result, UserError):
                raise result
            yield ticket, result


def _kill_workers() -> None:
    """End the workers, the one that hangs included: it does not hear of being terminated, and would outlive us."""
    for worker in multiprocessing.active_children():
        with suppress(RuntimeError):  # torch's SIGCHLD handler raises over each, in whatever code it then interrupts
            worker.kill()
            worker.join()


# At exit, multiprocessing asks workers to terminate and waits for them. If an exception still holds their loader they
# were not told to stop, they do not hear of being terminated, and the process would wait for ever.
atexit.register(_kill_workers)


def _same(value: Any) -> Any:
    return value


def _start_worker(_: int) -> None:
    # Ctrl-C, and the warnings that a launcher or Slurm sends to every process, are the main process's to handle: it
    # finishes its step, for which it needs its workers, and then ends them.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of a tokenizer do not survive the fork


def _pack(value: Any) -> tuple[bytes, Tensor]:
    """Any picklable value → its pickle without tensors, and [bytes] uint8: all tensors end to end.

    A loader passes every tensor as a shared-memory file of its own; a batch of a thousand media would need a thousand
    open files. Only our own workers write what `_unpack` reads.
    """
    tensors: list[Tensor] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> tuple | None:
            if not isinstance(item, Tensor):
                return None
            tensors.append(item.detach().contiguous().reshape(-1).view(torch.uint8))
            start = sum(-(-len(tensor) // 16) * 16 for tensor in tensors[:-1])  # aligned for every dtype
            return start, len(tensors[-1]), item.dtype, tuple(item.shape)

    written = io.BytesIO()
    Pickler(written, pickle.HIGHEST_PROTOCOL).dump(value)
    flat = torch.empty(sum(-(-len(tensor) // 16) * 16 for tensor in tensors), dtype=torch.uint8)
    start = 0
    for tensor in tensors:
        flat[start : start + len(tensor)] = tensor
        start += -(-len(tensor) // 16) * 16
    return written.getvalue(), flat


def _unpack(written: bytes, flat: Tensor) -> Any:
    class Unpickler(pickle.Unpickler):
        def persistent_load(self, saved: tuple) -> Tensor:
            start, length, dtype, shape = saved
            return flat[start : start + length].view(dtype).reshape(shape)

    return Unpickler(io.BytesIO(written)).load()
