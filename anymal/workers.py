"""The stream's workers: tickets → what `prepare` makes of each sample, in the order of the tickets.

    manifest.py: shard ──▶ its offsets      (the main process knows its number of samples only)
    shards.py: place ──▶ members
    parse.py: members ──▶ Sample ──prepare──▶ Tokens

They keep nothing, so how many there are changes nothing, and none of their state is in a bookmark.
"""

import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from anymal import features, manifest, pool, shards
from anymal.config import DataConfig
from anymal.errors import BadSample, UserError, shortened
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
    refused: str = ""
    """Why it is not to be used, if its loss told so; it is not read then."""


class Reader:
    """What the workers hold: a ticket → what it gives. It has no state."""

    def __init__(
        self,
        listed: list[list[Shard]],
        suffixes: dict[str, str],
        prepare: Callable[[Sample], Any],
        twins_of: dict[str, Shard] | None = None,
    ):
        self.shards, self.suffixes, self.prepare, self.twins = listed, suffixes, prepare, twins_of or {}

    def one(self, ticket: Ticket) -> Any:
        """What `prepare` made of the sample, a `Bad`, or a `UserError` (returned, for the main process to raise)."""
        if ticket.refused:
            return self.dead(ticket, ticket.refused)
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
