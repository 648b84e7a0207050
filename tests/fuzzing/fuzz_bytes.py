"""What all mutators share: a format's description, a mutant on the disk, and mutators that know bytes only.

    seed ──structured (a parser's own), or blind behind the header, or blind anywhere──▶ mutant

All are drawn from the generator that they are given, so that a mutant can be made again.
"""

import io
import struct
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random

Mutator = Callable[[Random, bytes], bytes]
TELLING = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    (1 << 63) - 1,
    1 << 63,
)
"""Numbers at which parsers go wrong."""


@dataclass(kw_only=True)
class Format:
    """One format of media, and how its mutants are made."""

    suffix: str
    """Of the member that holds it."""
    make_seeds: Callable[[], list[bytes]]
    """Good files that are read as they are."""
    structured: Sequence[Mutator]
    """Mutators that parse a good file, change something, and repair sizes and checksums around it."""
    bombs: Sequence[Callable[[Random], bytes]] = ()
    """Makers of files that ask for far more memory or time than their size tells."""
    probe: Callable[[bytes], object]
    """Past the header is what this neither raises over nor finds false: the format's real parser opens it."""
    header: int
    """The bytes that most blind mutators leave alone."""

    @cached_property
    def seeds(self) -> list[bytes]:
        """Made once, before processes are forked."""
        return self.make_seeds()

    def mutant(self, rng: Random) -> bytes:
        """One file that is not as it should be."""
        kind, data = rng.random(), rng.choice(self.seeds)
        if self.bombs and kind < 0.05:
            return rng.choice(self.bombs)(rng)
        if kind < 0.55 and self.structured:
            data = rng.choice(self.structured)(rng, data)
            return blind(rng, data, self.seeds, self.header) if rng.random() < 0.2 else data
        start = self.header if kind < 0.85 else 0
        for _ in range(rng.choice((1, 1, 2, 4))):
            data = blind(rng, data, self.seeds, start)
        return data


@dataclass(kw_only=True)
class Case:
    """One mutant as it lies on the disk: a sample, or a whole tar, and what lies beside it."""

    members: dict[str, bytes] = field(default_factory=dict)
    """Of the one sample, by suffix."""
    tar: bytes = b""
    """In place of `members`."""
    beside: Callable[[Path], None] | None = None
    """Writes what lies beside the tar at this path, or puts something else in its place."""
    cached: dict[str, bytes] = field(default_factory=dict)
    """Members of the sample of the tar of features, if there is one."""
    culprit: str = ""
    """What a `UserError` must name beside the folder: the file that is wrong, if it is not the tar."""
    probe: Callable[[], object]
    """As `fuzz_bytes.Format.probe`, of the whole."""

    def write(self, path: Path) -> None:
        """Put it on the disk, the tar at `path`."""
        path.write_bytes(self.tar or pack({f"sample.{suffix}": data for suffix, data in self.members.items()}))
        if self.cached:
            cached = pack({f"sample.{suffix}": data for suffix, data in self.cached.items()})
            path.with_name("features").write_bytes(cached)
        if self.beside:
            self.beside(path)


def pack(members: dict[str, bytes]) -> bytes:
    """Members by name → the bytes of a tar."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


def number(rng: Random, bits: int, old: int = 0) -> int:
    """A number of so many bits to put in the place of `old`: near it, a telling one, or any."""
    choice = rng.random()
    if choice < 0.35:
        return max(old + rng.choice((-2, -1, 1, 2, 8, 256)), 0) % (1 << bits)
    if choice < 0.75:
        return rng.choice(TELLING) % (1 << bits)
    return rng.choice((old * 2, old // 2, rng.getrandbits(bits))) % (1 << bits)


def poke(rng: Random, data: bytes, start: int = 0, end: int | None = None, order: str = "<>") -> bytes:
    """Put another number of 1 to 8 bytes somewhere between `start` and `end`."""
    end = len(data) if end is None else end
    code = rng.choice([c for c in "BHIQ" if struct.calcsize(c) <= max(end - start, 1)])
    size = struct.calcsize(code)
    if end - start < size:
        return data
    at = start + rng.randrange((end - start) // size) * size
    form = rng.choice(order) + code
    (old,) = struct.unpack_from(form, data, at)
    return data[:at] + struct.pack(form, number(rng, 8 * size, old)) + data[at + size :]


def flip(rng: Random, data: bytes, start: int = 0, end: int | None = None) -> bytes:
    """Flip a few bits."""
    changed, end = bytearray(data), len(data) if end is None else end
    for _ in range(rng.choice((1, 1, 2, 4, 16)) if end > start else 0):
        changed[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite(rng: Random, data: bytes, start: int = 0, end: int | None = None) -> bytes:
    """Overwrite a stretch with zeros, ones or noise."""
    end = len(data) if end is None else end
    if end <= start:
        return data
    at = rng.randrange(start, end)
    length = min(end - at, rng.choice((1, 2, 4, 16, 64, 1024)))
    fill = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
    return data[:at] + fill + data[at + length :]


def in_place(rng: Random, data: bytes, start: int = 0, end: int | None = None) -> bytes:
    """Change bytes, but not how many there are."""
    return rng.choice((flip, flip, overwrite, poke))(rng, data, start, end)


def blind(rng: Random, data: bytes, others: Sequence[bytes] = (), start: int = 0) -> bytes:
    """Change whatever lies behind `start`, and perhaps the length."""
    start = min(start, len(data))
    a, b = sorted((rng.randint(start, len(data)), rng.randint(start, len(data))))
    choice = rng.randrange(10)
    if choice < 5:
        return in_place(rng, data, start)
    if choice == 5:
        return data[: max(a, b)]
    if choice == 6 and others:
        other = rng.choice(others)
        return data[:a] + other[min(a + rng.choice((0, 0, -1, 7)), len(other)) :]
    if choice == 7:
        return data[:b] + data[a:b][: 1 << 16] * rng.choice((1, 1, 2, 8)) + data[b:]
    if choice == 8:
        return data[:a] + data[b:]
    return data[:a] + rng.randbytes(rng.choice((1, 3, 40))) + data[a:]


def shuffled(rng: Random, pieces: list, first: int = 0) -> list:
    """Drop, double or exchange pieces from the one numbered `first` on."""
    pieces = list(pieces)
    if len(pieces) - first < 2:
        return pieces
    a, b = rng.randrange(first, len(pieces)), rng.randrange(first, len(pieces))
    choice = rng.randrange(3)
    if choice == 0:
        del pieces[a]
    elif choice == 1:
        pieces[b:b] = [pieces[a]] * rng.choice((1, 1, 3, 50))
    else:
        pieces[a], pieces[b] = pieces[b], pieces[a]
    return pieces


def crc(data: bytes, bits: int, polynomial: int, start: int = 0) -> int:
    """A checksum whose bits are not reflected, as those of Ogg, FLAC and MPEG are."""
    table, value, mask = _table(bits, polynomial), start, (1 << bits) - 1
    for byte in data:
        value = (value << 8) & mask ^ table[(value >> (bits - 8)) ^ byte]
    return value


_tables: dict[tuple[int, int], list[int]] = {}


def _table(bits: int, polynomial: int) -> list[int]:
    if (bits, polynomial) not in _tables:
        made = []
        for byte in range(256):
            value = byte << (bits - 8)
            for _ in range(8):
                value = (value << 1) ^ (polynomial if value >> (bits - 1) else 0)
                value &= (1 << bits) - 1
            made.append(value)
        _tables[bits, polynomial] = made
    return _tables[bits, polynomial]
