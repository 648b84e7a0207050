"""The stream's dataloader: requests → what workers make of each sample, prefetched, in the order of the requests.

    manifest.py: shard ──▶ its offsets        (the main process knows its number of samples only)
    shards.py: byte range ──▶ members         (`read_sample`: whoever reads a sample of a tar does it here)
    parse.py: members ──▶ Sample ──prepare──▶ Tokens

Workers keep nothing, so how many there are changes nothing, and none of their state is in a bookmark.
"""

import os
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from anymal.config.schema import DataConfig
from anymal.data import feature_codec, manifest, pool, shards
from anymal.data.manifest import Shard
from anymal.data.parse import parse
from anymal.errors import BadSample, UserError, shortened
from anymal.sample import Sample

_CHUNK = 8  # samples that a worker is asked for at a time: spreads the cost of passing them on
_SHORT = 64  # tokens of a short sample: tells how many to prefetch for a row
Item = TypeVar("Item")
Result = TypeVar("Result")


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
class Request:
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
    """Used in place of prompt.instruction where a user sent media without text; empty takes prompt.instruction."""
    refused: str = ""
    """Why the sample is refused (its loss was not finite); it is then not read. Empty: it is not refused."""


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
    """As in its `Request`."""
    seconds: float = 0.0
    """What reading it took."""


def read_sample(
    tar: shards.Index, i: int, use: Callable[[RawSample], Result], *, shard: str = ""
) -> Result | Bad | UserError:
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
    place, began = tar.place(i), time.perf_counter()
    key: str | None = None
    try:
        if i in tar.bad:
            raise BadSample(tar.bad[i])
        key, members = shards.read(tar.path, *place)
        seconds = time.perf_counter() - began
        name = shard or tar.path
        return use(RawSample(shard=name, place=(tar.path, *place), key=key, members=members, seconds=seconds))
    except UserError as error:
        return error
    except Exception as error:  # decoders raise anything over hostile bytes, and one sample must not end the run
        reason, lasting = reason_of(error), key is not None or not isinstance(error, OSError | MemoryError)
    key = shards.name_of(tar.path, *place) if key is None else key
    return Bad(shard=shard or tar.path, key=key, reason=reason, lasting=lasting)


def prepared(
    suffixes: Mapping[str, str], modalities: Collection[str] | None, prepare: Callable[[Sample], Result], raw: RawSample
) -> Result:
    """What `prepare` makes of a sample, once it is parsed (see `anymal.data.parse.parse`).

    Raises:
        BadSample: It does not parse. And whatever `prepare` raises.
    """
    sample = parse(raw.shard, raw.key, raw.members, suffixes, modalities)
    return prepare(replace(sample, instruction=raw.instruction))


class Reader(Generic[Result]):
    """What the workers hold: a request → what `use` makes of its sample. It has no state.

    Args:
        listed: The shards of each dataset.
        use: As for `read_sample`.
        feature_tars: Path of a shard → the tar that is read in its place, with features in place of media.
    """

    def __init__(
        self,
        listed: list[list[Shard]],
        use: Callable[[RawSample], Result],
        feature_tars: dict[str, Shard] | None = None,
    ):
        self.shards, self.use, self.feature_tars = listed, use, feature_tars or {}

    def read(self, request: Request) -> Result | Bad | UserError:
        """As `read_sample`."""
        if request.refused:
            return self.bad(request, request.refused)
        shard = self.shards[request.dataset][request.shard]
        source = self.feature_tars.get(shard.path, shard)

        def use(raw: RawSample) -> Result:
            raw.instruction = request.instruction
            if source is not shard:
                raw.members = feature_codec.restore(raw.members)
            return self.use(raw)

        try:
            tar = manifest.load(source)
        except UserError as error:
            return error
        except Exception as error:  # as in read_sample: its storage may fail
            return Bad(shard=shard.name, key=f"number {request.sample}", reason=reason_of(error), lasting=False)
        return read_sample(tar, request.sample, use, shard=shard.name)

    def bad(self, request: Request, reason: str) -> Bad:
        """The result for a sample over which a worker crashed, or which is refused."""
        shard = self.shards[request.dataset][request.shard]
        source = self.feature_tars.get(shard.path, shard)
        try:
            key = shards.name_of(source.path, *manifest.load(source).place(request.sample))
        except Exception:  # its index may be what killed the worker
            key = f"number {request.sample}"
        return Bad(shard=shard.name, key=key, reason=reason)

    def name(self, request: Request) -> str:
        """Which sample it is, without a look into the tar: its storage may hang."""
        return f"sample {request.sample} (counted from 0) of {self.shards[request.dataset][request.shard].name}"


def each(
    count: int,
    read: Callable[[int], Result | UserError],
    data: DataConfig,
    *,
    on_crash: Callable[[int, str], Result],
    name: str,
) -> Iterator[Result]:
    """``read(0)`` to ``read(count - 1)``, in order, prefetched by ``data.workers`` processes.

    Args:
        count: How many.
        read: Runs in the workers; a `UserError` that it returns is raised.
        data: ``workers`` and ``timeout``.
        on_crash: The result of one over which a worker crashed, given its number and the reason.
        name: What is read, for messages.

    Raises:
        UserError: `read` returned one; or a worker hangs.
    """
    for _, result in _work(read, range(count), data, on_crash, lambda i: f"sample {i} (counted from 0) of {name}"):
        yield result


def reason_of(error: Exception) -> str:
    """What the quarantine says of a sample over which a decoder raised this."""
    if isinstance(error, BadSample):
        return shortened(str(error))
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {shortened(str(error))} ({os.path.basename(last.filename)}:{last.lineno})"


def load(
    reader: Reader[Result], requests: Iterable[Request], data: DataConfig
) -> Iterator[tuple[Request, Result | Bad]]:
    """Requests → (request, result) in the same order, prefetched by ``data.workers`` processes.

    A sample that kills its worker, by a crash of its decoder or for want of memory, is a `Bad` one.

    Raises:
        UserError: A worker met one; or a sample takes longer than ``data.timeout``.
    """
    return _work(reader.read, requests, data, reader.bad, reader.name)


def prefetched(data: DataConfig) -> tuple[int, int]:
    """How many samples a worker is asked for at a time, and how many such chunks it has in advance."""
    if not data.workers:
        return 1, 0
    batch = data.row_tokens // _SHORT or data.batch_size
    chunk = max(1, min(_CHUNK, batch // data.workers), -(-batch // (data.workers * pool.MOST_PREFETCHED)))
    prefetch = max(2, -(-batch // (data.workers * chunk)))  # the next batch is read while this one trains
    return chunk, min(prefetch, pool.MOST_PREFETCHED)


def _work(
    read: Callable[[Item], Result | UserError],
    items: Iterable[Item],
    data: DataConfig,
    on_crash: Callable[[Item, str], Result],
    name: Callable[[Item], str],
) -> Iterator[tuple[Item, Result]]:
    """Items → (item, what `read` makes of it), prefetched by processes or, with no workers, in this one."""
    results: Iterator[tuple[Item, Result | UserError]]
    if data.workers:
        chunk, prefetch = prefetched(data)
        results = pool.in_order(
            read,
            items,
            processes=data.workers,
            chunk=chunk,
            prefetch=prefetch,
            timeout=data.timeout,
            on_crash=on_crash,
            name=name,
        )
    else:
        results = ((item, read(item)) for item in items)
    for item, result in results:
        if isinstance(result, UserError):
            raise result
        yield item, result
