"""The stream's workers: tickets → what `prepare` makes of each sample, in the order of the tickets.

    manifest.py: shard ──▶ its offsets      (the main process knows its number of samples only)
    shards.py: place ──▶ members
    parse.py: members ──▶ Sample ──prepare──▶ Tokens

They keep nothing, so how many there are changes nothing, and none of their state is in a bookmark.
"""

import atexit
import io
import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from anymal import features, manifest, shards
from anymal.config import DataConfig
from anymal.errors import BadSample, UserError
from anymal.manifest import Shard
from anymal.parse import parse
from anymal.sample import Sample, told

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
    instruction: str = ""
    """What the user says after media without a word, in place of prompt.instruction; empty leaves that."""


class Reader:
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
            sample = parse(shard.name, key, members, self.suffixes)
            return self.prepare(replace(sample, messages=told(sample.messages, ticket.instruction)))
        except UserError as error:
            return error
        except Exception as error:  # decoders raise anything over hostile bytes, and one sample must not end the run
            reason = reason_of(error)
        return Bad(shard=shard.name, key=shards.name_of(source.path, *place) if key is None else key, reason=reason)


class _Each:
    """As `Reader`, for any function of a ticket."""

    def __init__(self, one: Callable[[Ticket], Any]):
        self._one = one

    __getitem__ = Reader.__getitem__


def each(count: int, read: Callable[[int], Any], data: DataConfig) -> Iterator[Any]:
    """``read(0)`` to ``read(count - 1)``, in order, by ``data.workers`` processes ahead of their use.

    Raises:
        UserError: `read` returned one; or a worker died, or hangs.
    """
    tickets = (Ticket(position=i, dataset=0, shard=0, sample=i) for i in range(count))
    for _, result in load(_Each(lambda ticket: read(ticket.sample)), tickets, data):
        yield result


def reason_of(error: Exception) -> str:
    """What the quarantine says of a sample over which a decoder raised this."""
    if isinstance(error, BadSample):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({os.path.basename(last.filename)}:{last.lineno})"


def load(reader: Reader | _Each, tickets: Iterable[Ticket], data: DataConfig) -> Iterator[tuple[Ticket, Any]]:
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
    others = set(multiprocessing.active_children())
    chunks = iter(loader)
    mine = set(multiprocessing.active_children()) - others
    _started.update(mine)
    while True:
        try:
            chunk = next(chunks, None)
        except RuntimeError as error:
            if "DataLoader" not in str(error):
                raise
            _kill(mine)
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


_started: WeakSet[multiprocessing.Process] = WeakSet()  # every loader's workers; other children are not ours to end


def _kill(workers: Iterable[multiprocessing.Process]) -> None:
    """End workers, one that hangs included: it does not hear of being terminated, and would outlive us."""
    for worker in set(workers) & set(multiprocessing.active_children()):
        with suppress(RuntimeError):  # torch's SIGCHLD handler raises over each, in whatever code it then interrupts
            worker.kill()
            worker.join()


# At exit, multiprocessing asks workers to terminate and waits for them. If an exception still holds their loader they
# were not told to stop, they do not hear of being terminated, and the process would wait for ever.
atexit.register(_kill, _started)


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
