"""The stream's workers: tickets → what is made of each sample, in the order of the tickets.

    manifest.py: shard ──▶ its offsets      (the main process knows its number of samples only)
    shards.py: place ──▶ members            (`read_sample`: whoever reads a sample of a tar does it here)
    parse.py: members ──▶ Sample ──prepare──▶ Tokens

They keep nothing, so how many there are changes nothing, and none of their state is in a bookmark.
"""

import os
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from anymal.config.schema import DataConfig
from anymal.data import feature_codec, manifest, pool, shards
from anymal.data.manifest import Shard
from anymal.data.parse import parse
from anymal.errors import BadSample, UserError, shortened
from anymal.sample import Sample

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
    lasting: bool = True
    """False where reading failed for want of storage or memory: another time it may be good."""


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
    refused: str = ""
    """Why it is not to be used, if its loss told so; it is not read then."""


@dataclass(kw_only=True)
class RawSample:
    """One sample as it lies in its tar."""

    shard: str
    """The tar, as people call it: the path or the address."""
    place: tuple[str, int, int]
    """The file that was read, offset and size in bytes; of a sample with cached features, in the file with these."""
    key: str
    """Its key."""
    members: dict[str, bytes]
    """By suffix; media whose features are cached are `anymal.data.feature_codec.Stored`."""
    instruction: str = ""
    """As in its `Ticket`."""
    seconds: float = 0.0
    """What reading it took."""


def read_sample(tar: shards.Index, i: int, use: Callable[[RawSample], Any], *, shard: str = "") -> Any:
    """What `use` makes of one sample of a tar.

    Args:
        tar: The tar.
        i: The sample's number in it.
        use: Whatever it raises makes the sample a bad one.
        shard: What people call the tar; empty takes its path.

    Returns:
        What `use` returned; a `Bad` if the index says that the sample is bad, if it does not read or if `use` does not
        take it; or a `UserError` that `use` raised, for the main process to raise.
    """
    place, key, began = tar.place(i), None, time.perf_counter()
    try:
        if i in tar.bad:
            raise BadSample(tar.bad[i])
        key, members = shards.read(tar.path, *place)
        seconds = time.perf_counter() - began
        raw = {"shard": shard or tar.path, "place": (tar.path, *place), "key": key, "members": members}
        return use(RawSample(**raw, seconds=seconds))
    except UserError as error:
        return error
    except Exception as error:  # decoders raise anything over hostile bytes, and one sample must not end the run
        reason, lasting = reason_of(error), key is not None or not isinstance(error, OSError | MemoryError)
    key = shards.name_of(tar.path, *place) if key is None else key
    return Bad(shard=shard or tar.path, key=key, reason=reason, lasting=lasting)


def prepared(
    suffixes: dict[str, str], modalities: Collection[str] | None, prepare: Callable[[Sample], Any], raw: RawSample
) -> Any:
    """What `prepare` makes of a sample, once it is parsed (see `anymal.data.parse.parse`) and has its instruction.

    Raises:
        BadSample: It does not parse. And whatever `prepare` raises.
    """
    sample = parse(raw.shard, raw.key, raw.members, suffixes, modalities)
    return prepare(replace(sample, instruction=raw.instruction))


class Reader:
    """What the workers hold: a ticket → what `use` makes of its sample. It has no state."""

    def __init__(
        self, listed: list[list[Shard]], use: Callable[[RawSample], Any], twins_of: dict[str, Shard] | None = None
    ):
        self.shards, self.use, self.twins = listed, use, twins_of or {}

    def one(self, ticket: Ticket) -> Any:
        """As `read_sample`."""
        if ticket.refused:
            return self.dead(ticket, ticket.refused)
        shard = self.shards[ticket.dataset][ticket.shard]
        source = self.twins.get(shard.path, shard)

        def use(raw: RawSample) -> Any:
            raw.instruction = ticket.instruction
            if source is not shard:
                raw.members = feature_codec.restore(raw.members)
            return self.use(raw)

        try:
            tar = manifest.load(source)
        except UserError as error:
            return error
        except Exception as error:  # as in read_sample: its storage may fail
            return Bad(shard=shard.name, key=f"number {ticket.sample}", reason=reason_of(error), lasting=False)
        return read_sample(tar, ticket.sample, use, shard=shard.name)

    def dead(self, ticket: Ticket, reason: str) -> Bad:
        """What stands for a sample over which a worker died, or which is refused."""
        shard = self.shards[ticket.dataset][ticket.shard]
        source = self.twins.get(shard.path, shard)
        try:
            key = shards.name_of(source.path, *manifest.load(source).place(ticket.sample))
        except Exception:  # its index may be what killed the worker
            key = f"number {ticket.sample}"
        return Bad(shard=shard.name, key=key, reason=reason)

    def name(self, ticket: Ticket) -> str:
        """Which sample it is, without a look into the tar: its storage may hang."""
        return f"sample {ticket.sample} (counted from 0) of {self.shards[ticket.dataset][ticket.shard].name}"


def each(
    count: int, read: Callable[[int], Any], data: DataConfig, *, dead: Callable[[int, str], Any], name: str
) -> Iterator[Any]:
    """``read(0)`` to ``read(count - 1)``, in order, by ``data.workers`` processes ahead of their use.

    Args:
        count: How many.
        read: Runs in the workers; a `UserError` that it returns is raised.
        data: ``workers`` and ``timeout``.
        dead: What stands for one over which a worker died, given its number and the reason.
        name: What is read, for messages.

    Raises:
        UserError: `read` returned one; or a worker hangs.
    """
    for _, result in _work(read, range(count), data, dead, lambda i: f"sample {i} (counted from 0) of {name}"):
        yield result


def reason_of(error: Exception) -> str:
    """What the quarantine says of a sample over which a decoder raised this."""
    if isinstance(error, BadSample):
        return shortened(str(error))
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {shortened(str(error))} ({os.path.basename(last.filename)}:{last.lineno})"


def load(reader: Reader, tickets: Iterable[Ticket], data: DataConfig) -> Iterator[tuple[Ticket, Any]]:
    """Tickets → (ticket, result) in the same order, read by ``data.workers`` processes ahead of their use.

    A sample that kills its worker, by a crash of its decoder or for want of memory, is a `Bad` one.

    Raises:
        UserError: A worker met one; or a sample takes longer than ``data.timeout``.
    """
    return _work(reader.one, tickets, data, reader.dead, reader.name)


def _work(one: Callable, items: Iterable, data: DataConfig, dead: Callable, name: Callable) -> Iterator[tuple]:
    """Items → (item, what `one` makes of it), by processes ahead of their use or, with no workers, in this one."""
    if data.workers:
        batch = data.row_tokens // _SHORT or data.batch_size
        size = max(1, min(_CHUNK, batch // data.workers), -(-batch // (data.workers * pool.MOST_AHEAD)))
        ahead = max(2, -(-batch // (data.workers * size)))  # the next batch is read while this one is trained on
        options = {"processes": data.workers, "size": size, "ahead": ahead, "timeout": data.timeout}
        found = pool.in_order(one, items, dead=dead, name=name, **options)
    else:
        found = ((item, one(item)) for item in items)
    for item, result in found:
        if isinstance(result, UserError):
            raise result
        yield item, result
