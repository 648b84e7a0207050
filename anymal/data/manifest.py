"""How many samples each tar holds, known without opening the tars, and the offsets of the few that are being read.

At the start `survey` needs one file for each folder and one look at each tar, however many there are. Where the samples
of a tar begin is loaded by whoever reads from it (`load`), and forgotten again: 20,000 tars would take 800 MB.
"""

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from anymal.data import index_files, shards
from anymal.data.remote import Remote, is_url
from anymal.errors import UserError

NAME = "anymal.index.json"  # in a folder of tars; may be published with them
VERSION = 1
_MOST = 1 << 40  # samples of one tar; what is published is anyone's number
_LOADED = 256  # indexes that a process keeps
_TRIES = 3  # a tar may be removed for want of room between its download and its use


@dataclass(kw_only=True)
class Shard:
    """One tar, wherever it is."""

    path: str
    """The local file; of a remote tar the one that there is once it was downloaded."""
    count: int
    """Its samples."""
    problem: str = ""
    """Why there is no sample at all."""
    remote: Remote | None = None
    """Where it comes from, if it is not a local file."""

    def __len__(self) -> int:
        return self.count

    @property
    def name(self) -> str:
        """What people call it: the path or the address."""
        return self.remote.name if self.remote else self.path


def survey(names: Sequence[str], *, start: float = 0.0, cache: str = "", cache_gb: float = 0.0) -> dict[str, Shard]:
    """The number of samples of each tar, by its name as `anymal.data.listing.expand` gives it.

    Local tars without an index are indexed; remote ones whose number of samples is not published are downloaded. Each
    rank begins at another tar (`start` of 0..1), so that ranks share the work: the second to come finds the index.
    If it takes long, the first rank shows how far it is. What was loaded before is forgotten.

    Raises:
        UserError: A tar cannot be read or downloaded, or holds another number of samples than was published.
    """
    forget()  # tars that were replaced since, and indexed by another process, would still be read as they were
    cache = os.path.expanduser(cache) or os.path.join(index_files.cache_folder(), "shards")
    folders: dict[str, _Manifest] = {}
    surveyed, first = {}, int(start * len(names))
    work = tqdm([*names[first:], *names[:first]], "shards", unit=" tars", mininterval=10, delay=10, disable=first > 0)
    for name in work:
        remote = Remote(url=name, cache=cache, limit=int(cache_gb * 1e9)) if is_url(name) else None
        folder = os.path.dirname(remote.path if remote else name)
        if folder not in folders:
            folders[folder] = _Manifest(folder, remote)
        surveyed[name] = _remote(remote, folders[folder]) if remote else _local(name, folders[folder])
        work.set_postfix_str(surveyed[name].name, refresh=False)
    for manifest in folders.values():
        manifest.save()
    return {name: surveyed[name] for name in names}


def _local(path: str, manifest: "_Manifest") -> Shard:
    stamp = _stamp(path)
    known = manifest.get(path, stamp)
    if stamp and known and known[:2] == stamp:
        return Shard(path=path, count=known[2])
    index = shards.index(path)
    if stamp and not index.problem:
        manifest.put(path, [*stamp, len(index)])
    return Shard(path=path, count=len(index), problem=index.problem)


def _remote(remote: Remote, manifest: "_Manifest") -> Shard:
    stamp = _stamp(remote.path)
    known = manifest.get(remote.path, stamp)
    if known and stamp in (None, known[:2]):
        return Shard(path=remote.path, count=known[2], remote=remote)
    if stamp is None and (count := _published(remote)):
        manifest.put(remote.path, [0, 0, count])
        return Shard(path=remote.path, count=count, remote=remote)
    index = _index(remote.path, remote)
    if known:
        index = _agreeing(index, Shard(path=remote.path, count=known[2], remote=remote))
    if not index.problem:
        manifest.put(remote.path, [*(_stamp(remote.path) or [0, 0]), len(index)])
    return Shard(path=remote.path, count=len(index), problem=index.problem, remote=remote)


def _published(remote: Remote) -> int | None:
    """The number of samples that is published beside a tar: in its index, or in the statistics of img2dataset."""
    tar = os.path.basename(remote.path)
    try:
        known = remote.published(f"{tar}.index.json")
        if known is not None:
            return _count(len(known["blocks"]) - 1)
        return _count(remote.published(f"{tar.removesuffix('.tar')}_stats.json")["successes"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return None


def _count(value: Any) -> int:
    if not 0 < int(value) < _MOST:
        raise ValueError("not a number of samples")
    return int(value)


def _stamp(path: str) -> list[int] | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


class _Manifest:
    """The file that knows the tars of one folder: name → [size, mtime in ns, samples].

    It lies in the folder, or in the cache where that cannot be written to. That of a remote folder is read as well;
    there, size and mtime say nothing.
    """

    def __init__(self, folder: str, remote: Remote | None):
        self.paths = list(index_files.paths(os.path.join(folder, NAME), folder))
        self.remote, self.new = remote, False
        manifests = [_tars(index_files.read_json(path)) for path in self.paths]
        self.tars = {name: entry for tars in manifests for name, entry in tars.items()}
        # What others left in the folder; where it cannot be written to, ours is in the cache.
        self._others = manifests[0]

    def get(self, path: str, stamp: list[int] | None) -> list[int] | None:
        """What is known of a tar, which has this size and mtime if it is here."""
        name = os.path.basename(path)
        if name not in self.tars and self.remote is not None:
            for other, (_, _, count) in _tars(self.remote.published(NAME)).items():
                self.tars.setdefault(other, [0, 0, count])
            self.remote, self.new = None, True  # asked once
        known = self.tars.get(name)
        other = self._others.get(name)
        return other if other and known and known[:2] != stamp == other[:2] else known

    def put(self, path: str, entry: list[int]) -> None:
        """Note what was found out about a tar."""
        self.tars[os.path.basename(path)] = entry
        self.new = True

    def save(self) -> None:
        """Write the file if there is anything new. Ranks may do so at once: each knows all, and the last one stays."""
        if self.new and self.tars:
            index_files.write_json({"version": VERSION, "tars": self.tars}, self.paths)


def _tars(known: Any) -> dict[str, list[int]]:
    """The entries of a manifest; none if it is of another version or damaged."""
    try:
        entries = known["tars"] if known["version"] == VERSION else {}
        return {str(name): [int(size), int(time), _count(count)] for name, (size, time, count) in entries.items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return {}


_loaded: OrderedDict[str, shards.Index] = OrderedDict()  # path → index, the latest last


def load(shard: Shard) -> shards.Index:
    """Where the samples of a tar lie that is about to be read; a remote one is downloaded first.

    Raises:
        UserError: It cannot be read or downloaded, or no longer holds the number of samples that `survey` found.
    """
    index = _loaded.get(shard.path)
    removable = shard.remote is not None and shard.remote.limit > 0
    if index is None or (removable and not shards.is_open(shard.path)):
        index = _agreeing(_index(shard.path, shard.remote), shard)
        _loaded[shard.path] = index
        while len(_loaded) > _LOADED:
            _loaded.popitem(last=False)
    _loaded.move_to_end(shard.path)
    return index


def forget() -> None:
    """Close all tars, and drop where their samples lie."""
    _loaded.clear()
    shards.close_all()


def _agreeing(index: shards.Index, shard: Shard) -> shards.Index:
    """The index of a tar, made again from the tar itself if it does not agree with what is known of it.

    Raises:
        UserError: What is known of it is wrong; of a local tar it is right from now on.
    """
    if len(index) != shard.count:
        index = _index(shard.path, shard.remote, again=True)
    if len(index) == shard.count:
        return index
    now = f"it {index.problem}" if index.problem else f"it holds {len(index):,} samples"
    if shard.remote is None:
        known = _Manifest(os.path.dirname(shard.path), None)
        if not index.problem:
            known.put(shard.path, [*(_stamp(shard.path) or [0, 0]), len(index)])
        known.save()
        raise UserError(
            f"{shard.name} held {shard.count:,} samples at the start, now {now}: it was changed, or what {NAME} said "
            "of it was wrong, and is mended now. Start the run again"
        )
    raise UserError(
        f"{shard.name} should hold {shard.count:,} samples, as was published beside it or seen before; {now}. "
        f"Mend what is published, or remove {os.path.dirname(shard.path)} if the tar was replaced"
    )


def _index(path: str, remote: Remote | None, *, again: bool = False) -> shards.Index:
    """The index of a tar, which is open from then on: nobody can take it away while it is read."""
    tries_left = _TRIES if remote else 1
    while True:
        tries_left -= 1
        try:
            if remote:
                remote.fetch()
            index = shards.index(path, again=again)
            shards.open_tar(path)
            if remote and index.problem:
                os.unlink(path)  # a login page, perhaps: the next start asks for the tar again
            return index
        except (UserError, FileNotFoundError):
            if not tries_left or os.path.exists(path):
                raise
