"""Tars: where each sample lies in one, and reading one sample by its byte range.

`index` finds the byte range of every sample without reading any data, `read` takes one range apart. Neither decodes or
unpickles anything. `listing` says which tars there are, and `manifest` knows many of them.
"""

import errno
import io
import os
import re
import stat
import tarfile
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_iterator

from anymal.data import index_files
from anymal.errors import BadSample, UserError

BLOCK = 512  # bytes; whatever is in a tar begins at a multiple of it
LARGEST_SAMPLE = 1 << 30  # bytes; what a hostile header may make a worker read at once
VERSION = 1  # of the index files
_OPEN_FILES = 32
_LOOKED_AT = 3  # samples of a tar whose headers must be where its index file says
_LONGEST_REASON = 500  # characters
_META = re.compile(r"__[^/]*__($|/)")  # names that webdataset passes over
_TIMES = re.compile(rb"(\d+ [acm]time=[\d.]+\n)+")  # the pax records of webdataset's own writer: nothing to obey
_PACKED_DATA = re.compile(rb"\x1f\x8b\x08|BZh.1AY&SY|\x5d\x00\x00\x80|\xfd7zXZ|\x28\xb5\x2f\xfd", re.DOTALL)


@dataclass(kw_only=True)
class Index:
    """Where the samples of one tar lie."""

    path: str
    """The tar."""
    blocks: np.ndarray
    """[n + 1] uint32: sample i takes the bytes from 512 * blocks[i] to 512 * blocks[i + 1]."""
    bad: dict[int, str] = field(default_factory=dict)
    """Samples that must not be used, and why: the last one of a tar that was cut, for example."""
    problem: str = ""
    """Why there is no sample at all."""

    def __len__(self) -> int:
        return len(self.blocks) - 1

    def place(self, sample: int) -> tuple[int, int]:
        """Offset and size in bytes of a sample."""
        start, end = (BLOCK * int(block) for block in self.blocks[sample : sample + 2])
        return start, end - start


def index(path: str, *, again: bool = False) -> Index:
    """Where the samples of a tar lie: from its index file if that fits the tar, else by walking its headers.

    The index file lies beside the tar, or in $ANYMAL_CACHE (~/.cache/anymal) where that folder cannot be written to.

    Args:
        path: The tar.
        again: Whether to walk its headers in any case, and write the index file anew.

    Raises:
        UserError: The tar cannot be opened. One that is no tar or is cut short is no error: see `Index.problem`
            and `Index.bad`.
    """
    _forget(path)  # whoever asks for an index wants the file that is there now
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"shard {path} is not a regular file: it is a folder, a pipe or a device")
        stamp = [VERSION, status.st_size, status.st_mtime_ns]
        # ours in the cache first: where it had to be written, what lies beside the tar may be wrong for ever
        for file in () if again else reversed([*index_files.paths(f"{path}.index.json", path)]):
            saved = _load(file, path, stamp)
            if saved is not None:
                return saved
        walked = _walk(path)
    except OSError as error:
        raise UserError(f"shard {path} cannot be read: {error.strerror or error}") from error
    _save(walked, stamp)
    return walked


def _load(file: str, path: str, stamp: list[int]) -> Index | None:
    most = index_files.LARGEST_JSON + stamp[1] // 32  # a sample takes 512 bytes of the tar, and 11 of these
    known = index_files.read_json(file, most)
    try:
        if known["stamp"] != stamp or known["problem"]:  # a tar without samples is looked at again
            return None
        blocks = np.array(known["blocks"], np.uint32)
        bad = {int(sample): str(reason)[:_LONGEST_REASON] for sample, reason in known["bad"].items()}
        ours = all(reason and 0 <= sample < len(blocks) - 1 for sample, reason in bad.items())
        if not ours or not _fits(blocks, path, stamp[1]):
            return None
        return Index(path=path, blocks=blocks, bad=bad)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, tarfile.TarError):
        return None  # missing, of another version, or damaged: it is made again


def _fits(blocks: np.ndarray, path: str, size: int) -> bool:
    """Whether the places of samples are in order, within the tar, and headers where a few of them begin."""
    if blocks.ndim != 1 or len(blocks) < 2 or not (blocks[1:] > blocks[:-1]).all() or blocks[-1] > -(-size // BLOCK):
        return False
    with open(path, "rb") as file:
        for block in blocks[np.linspace(0, len(blocks) - 2, _LOOKED_AT).astype(int)].tolist():
            header = os.pread(file.fileno(), BLOCK, BLOCK * block)
            tarfile.TarInfo.frombuf(header, tarfile.ENCODING, "surrogateescape")  # checks its sum
    return True


def _save(index: Index, stamp: list[int]) -> None:
    saved = {"stamp": stamp, "problem": index.problem, "bad": index.bad, "blocks": index.blocks.tolist()}
    index_files.write_json(saved, index_files.paths(f"{index.path}.index.json", index.path))


def _walk(path: str) -> Index:
    """Read every header of a tar, and none of its data."""
    starts, bad, last, tar, damage = [], {}, None, None, ""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None and tar.offset > member.offset:
                    forget_members(tar)
                    key = _key(member)
                    if key is not None and key != last:
                        starts.append(member.offset)
                        last = key
                    if key is not None and member.issparse():
                        bad[len(starts) - 1] = f"its member {member.name!r} is sparse: its real size is not bounded"
        except Exception as error:  # headers are anyone's bytes: tarfile raises many kinds of errors over them
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: told to seek to nowhere
                raise
            damage = f" ({error})"
        if tar is None:
            packed = _PACKED_DATA.match(os.pread(file.fileno(), BLOCK, 0))
            problem = "is compressed; decompress it" if packed else "is not a tar" + damage
            return Index(path=path, blocks=np.zeros(1, np.uint32), problem=f"{problem}; it has {size:,} bytes")
        end = min(tar.offset, size)
        if damage or os.pread(file.fileno(), BLOCK, end) != bytes(BLOCK):
            # webdataset would end here without a word, and a cut between two members would leave half a sample.
            damage = f"the tar is cut or damaged at byte {end:,} of {size:,}{damage}, so this sample may lack members"
            bad[len(starts) - 1] = damage
    if not starts:
        return Index(path=path, blocks=np.zeros(1, np.uint32), problem=damage or f"holds no sample in {size:,} bytes")
    blocks = -(-np.array([*starts, end], np.int64) // BLOCK)
    return Index(path=path, blocks=blocks.astype(np.uint32), bad=bad)


def forget_members(tar: tarfile.TarFile) -> None:
    """Drop the headers that were read or written; else those of the whole tar stay in memory."""
    vars(tar)["members"] = []  # an attribute that its type does not tell of


def _key(member: tarfile.TarInfo) -> str | None:
    """The key of the sample that a member belongs to; None if webdataset passes it over."""
    name = member.name
    if not member.isreg() or _META.match(name):
        return None
    return base_plus_ext(name)[0]


def read(path: str, offset: int, size: int) -> tuple[str, dict[str, bytes]]:
    """One sample: its key, and the bytes of each member by its suffix (what follows the first dot, lower case).

    Raises:
        BadSample: These bytes are not one sample: cut, changed since the tar was indexed, or with a suffix twice.
    """
    if size > LARGEST_SAMPLE:
        raise BadSample(f"takes {size:,} bytes; the largest that is read is {LARGEST_SAMPLE:,}")
    data = _bytes(path, offset, size)
    if _PACKED_DATA.match(data):
        raise BadSample("its first member is named like compressed data, which webdataset would decompress")
    return _plain(data) or _any(path, data)


def _plain(data: bytes) -> tuple[str, dict[str, bytes]] | None:
    """One sample whose members all have plain headers, ten times faster than tarfile; None leaves it to `_any`."""
    key, members, start, described = None, {}, 0, False
    while start < len(data):
        header = _header(data, start)
        if header is None:
            return None
        kind, name, content, start = header
        if kind == tarfile.XHDTYPE:
            if described or not _TIMES.fullmatch(content):
                return None
            described = True
            continue
        described = False
        mine, suffix = (None, "") if _META.match(name) else base_plus_ext(name)
        if mine is not None and suffix is not None:
            suffix = suffix.lower()
            if key not in (None, mine) or suffix in members or suffix.startswith("__"):  # __key__ is webdataset's own
                return None
            key, members[suffix] = mine, content
    return None if key is None or described else (key, members)


def _header(data: bytes, start: int) -> tuple[bytes, str, bytes, int] | None:
    """Type, name and content of the member at `start`, and where the next one begins.

    None unless it is plain: a file or a pax header, a name of up to 100 bytes, its size in octal, nothing damaged.
    Fields as in https://www.gnu.org/software/tar/manual/html_node/Standard.html.
    """
    header = data[start : start + BLOCK]
    name, kind = header[:100].split(b"\0", 1)[0], header[156:157]
    if kind not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.XHDTYPE) or header[345:346] != b"\0":  # a name's prefix
        return None
    if name[-1:] in (b"/", b""):  # a folder, or the end of the tar
        return None
    try:
        size = int(header[124:136].split(b"\0", 1)[0], 8)
        checksum = int(header[148:156].split(b"\0", 1)[0], 8)
    except ValueError:
        return None
    start += BLOCK
    if sum(header) - sum(header[148:156]) + 8 * ord(" ") != checksum or not 0 <= size <= len(data) - start:
        return None
    text = name.decode(tarfile.ENCODING, "surrogateescape")
    return kind, text, data[start : start + size], start + -(-size // BLOCK) * BLOCK


def _any(path: str, data: bytes) -> tuple[str, dict[str, bytes]]:
    """One sample, by webdataset and tarfile, which know every kind of header and say what is wrong with it."""
    try:
        file: Any = io.BytesIO(data)  # webdataset's annotation has a TarFile there, which does not work
        files = ({**member, "__url__": path} for member in tar_file_iterator(file))
        samples = list(group_by_keys(files))
    except Exception as error:  # as in _walk
        raise BadSample(f"does not read as members of a tar: {str(error.args[0]).split(' @ ')[0]}") from error
    if len(samples) != 1:
        raise BadSample(
            f"its place in the tar holds {len(samples)} samples; was the tar changed during the run, "
            f"or is {os.path.basename(path)}.index.json, which says where it lies, of another tar? Then remove that"
        )
    sample = samples[0]
    key = sample.pop("__key__")
    del sample["__url__"]
    return key, sample


def name_of(path: str, offset: int, size: int) -> str:
    """The key of a sample that could not be read, if its header can be; else ``@OFFSET``."""
    try:
        with tarfile.open(fileobj=io.BytesIO(_bytes(path, offset, min(size, 1 << 16))), mode="r:") as tar:
            member = tar.next()
            return (base_plus_ext(member.name)[0] if member else None) or f"@{offset}"
    except Exception:  # as in _walk; this only serves a message
        return f"@{offset}"


_files: OrderedDict[str, int] = (
    OrderedDict()
)  # path → descriptor, the latest last; pread makes it safe to share by fork


def _bytes(path: str, offset: int, size: int) -> bytes:
    return os.pread(open_tar(path), size, offset)


def open_tar(path: str) -> int:
    """A descriptor of the tar; a few stay open, and what stays open can be read even when it is removed."""
    if path not in _files:
        while len(_files) >= _OPEN_FILES:
            os.close(_files.popitem(last=False)[1])
        _files[path] = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    _files.move_to_end(path)
    return _files[path]


def is_open(path: str) -> bool:
    """Whether the tar is still open."""
    return path in _files


def close_all() -> None:
    """Close the tars that are still open."""
    for path in list(_files):
        _forget(path)


def _forget(path: str) -> None:
    if path in _files:
        os.close(_files.pop(path))
