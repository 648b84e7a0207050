"""The feature cache: tars that hold encoders' features in place of media. Between the indexes and the stream.

    FOLDER/NAME.tar ──anymal encode──▶ FOLDER/features/image-0123456789abcdef.bf16/NAME.tar

A feature tar has the samples of its original in the same order under the same keys, bad ones included, so that
positions and bookmarks mean the same with and without it. The name of its folder says whose features they are
(`anymal.data.feature_codec.identity`) and how exact; its first member, which is no sample, of which tar they are. Where
FOLDER cannot be written to, they lie in $ANYMAL_CACHE (~/.cache/anymal). docs/features.md says more.
"""

import fcntl
import hashlib
import io
import json
import logging
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from anymal.data import index_files, shards
from anymal.data.feature_codec import PRECISIONS, VERSION
from anymal.data.manifest import Shard, survey
from anymal.errors import UserError

HEADER = "__features__"  # webdataset passes over names like this one
HEADER_SIZE = 8192  # bytes, filled up with blanks: what it says is known only once all samples are written
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FeatureTar:
    """A tar of the cache that fits its original as that is now, and this run's encoders."""

    path: str
    """The tar with the features."""
    header: dict[str, Any]
    """``encoders``: modality → identity of what it holds; ``looked_for``: the modalities that would have been encoded
    if there had been any; ``media``: figures by modality; ``version``, ``tar`` and ``precision``."""

    @property
    def encoders(self) -> dict[str, str]:
        """Modality → identity of the encoder whose features it holds."""
        return self.header["encoders"]


def precisions(features: str) -> tuple[str, ...]:
    """The precisions that ``data.features`` allows, the most exact first; none for "never"."""
    return {"auto": PRECISIONS, "never": ()}.get(features, (features,))


def find(
    tar: str, encoders: Mapping[str, str], wanted: Sequence[str], listed: dict[str, list[str]]
) -> list[FeatureTar]:
    """The feature tars of a tar that a run can use: those of most modalities first, then the most exact.

    Args:
        tar: The original.
        encoders: Modality → `anymal.data.feature_codec.identity` of the run's encoder.
        wanted: Some of `anymal.data.feature_codec.PRECISIONS`.
        listed: What earlier calls saw in folders; give the same dict for many tars.
    """
    usable = []
    for cache in folders(tar):
        if cache not in listed:
            listed[cache] = os.listdir(cache) if os.path.isdir(cache) else []
        for name in listed[cache]:
            identities, precision = _split(name)
            if identities is None or precision not in wanted or not identities.items() <= encoders.items():
                continue
            path = os.path.join(cache, name, os.path.basename(tar))
            header = read_header(path)
            if header is not None and header == header | _expected(tar, identities, precision):
                usable.append(FeatureTar(path=path, header=header))
    return sorted(usable, key=lambda one: (-len(one.encoders), PRECISIONS.index(one.header["precision"])))


def find_all(tars: Sequence[Shard], encoders: Mapping[str, str], features: str) -> dict[str, Shard]:
    """The best feature tar of each tar that has one: path of the original → feature tar.

    Args:
        tars: The originals; those not yet downloaded have none.
        encoders: As for `find`.
        features: As ``data.features``.
    """
    wanted = precisions(features)
    if not wanted or not encoders:
        return {}
    listed: dict[str, list[str]] = {}
    candidates: dict[str, list[str]] = {}
    for tar in tars:
        if os.path.exists(tar.path):
            candidates[tar.path] = [one.path for one in find(tar.path, encoders, wanted, listed) if one.encoders]
    known = survey([path for paths in candidates.values() for path in paths])
    best = {}
    for tar in tars:
        for path in candidates.get(tar.path, []):
            if len(known[path]) == len(tar):
                best[tar.path] = known[path]
                break
            _log.warning("%s is not used: %d samples for %d", path, len(known[path]), len(tar))
    return best


def folders(tar: str) -> Iterator[str]:
    """Where the cache of a tar may lie, the preferred folder first."""
    folder = os.path.dirname(os.path.abspath(tar))
    yield os.path.join(folder, "features")
    digest = hashlib.sha256(folder.encode(errors="surrogateescape")).hexdigest()
    yield os.path.join(index_files.cache_folder(), "features", digest)


def folder_name(encoders: Mapping[str, str], precision: str) -> str:
    """``audio-0123456789abcdef+image-fedcba9876543210.bf16``; ``none.bf16`` for a tar that holds nothing to encode."""
    return ("+".join(f"{name}-{encoders[name]}" for name in sorted(encoders)) or "none") + f".{precision}"


def _split(folder: str) -> tuple[dict[str, str] | None, str]:
    """What `folder_name` joined; None for any other name."""
    named, _, precision = folder.rpartition(".")
    if named == "none":
        return {}, precision
    pairs = [pair.rpartition("-") for pair in named.split("+")]
    valid = all(modality and identity for modality, _, identity in pairs)
    return ({modality: identity for modality, _, identity in pairs} if valid else None), precision


def _expected(tar: str, encoders: Mapping[str, str], precision: str) -> dict[str, Any]:
    return {"version": VERSION, "tar": stamp(tar), "precision": precision, "encoders": dict(encoders)}


def stamp(tar: str) -> list[int]:
    """Size and time of change (ns) of a tar: its feature tar fits as long as they are the same."""
    stat = os.stat(tar)
    return [stat.st_size, stat.st_mtime_ns]


def read_header(path: str) -> dict[str, Any] | None:
    """What a feature tar says of itself; None if this is none, or one that was not finished."""
    if not os.path.isfile(path):  # a pipe would be waited for
        return None
    try:
        with tarfile.open(path, mode="r:") as tar:
            member = tar.next()
            if member is None or member.name != HEADER or member.size != HEADER_SIZE:
                return None
            data = tar.extractfile(member)
            header = json.loads(data.read()) if data else None
    except Exception:  # tarfile raises many kinds of errors over what is no tar
        return None
    return header if isinstance(header, dict) else None


# -------------------------------------------------------------------------------------------------------- writing


class Writer:
    """Writes a feature tar into a file: `add` each sample, then `finish`."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.tar = tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT)  # noqa: SIM115
        self._add(HEADER, bytes(HEADER_SIZE))

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """One sample: its key, and its members by suffix."""
        for suffix, data in members.items():
            self._add(f"{key}.{suffix}", data)

    def _add(self, name: str, data: bytes) -> None:
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode = len(data), 0o644
        self.tar.addfile(entry, io.BytesIO(data))
        shards.forget_members(self.tar)

    def finish(
        self,
        tar: str,
        encoders: Mapping[str, str],
        precision: str,
        *,
        looked_for: Sequence[str],
        media: Mapping[str, Mapping[str, float]],
    ) -> None:
        """Say of which tar and by which encoders these are the features, and put everything on disk.

        Args:
            tar: The original.
            encoders, looked_for, media: As in `FeatureTar.header`.
            precision: One of `anymal.data.feature_codec.PRECISIONS`.
        """
        self.tar.close()
        header = _expected(tar, encoders, precision) | {"looked_for": looked_for, "media": media}
        header = json.dumps(header).encode()
        if len(header) > HEADER_SIZE:
            raise ValueError(f"the header of a feature tar takes {len(header)} bytes; {HEADER_SIZE} are reserved")
        self.file.seek(shards.BLOCK)
        self.file.write(header.ljust(HEADER_SIZE))
        self.file.flush()
        os.fsync(self.file.fileno())


@contextmanager
def claim(path: str, *, wait: bool) -> Iterator[BinaryIO | None]:
    """The file at `path`, empty and ours alone; None if another process has it, or had it while we waited.

    The kernel holds the lock and drops it with our process, however that ends: no lock can be stale.
    """
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
            return
        except OSError as error:
            raise UserError(
                f"{path} cannot be locked: {error.strerror}. Make the folder read-only to have features written to "
                "$ANYMAL_CACHE, and point that to a local disk"
            ) from error
        if not (Path(path).exists() and os.path.samestat(os.stat(path), os.fstat(file.fileno()))):
            yield None  # whoever had it has finished, and renamed it
            return
        file.truncate(0)
        yield file
