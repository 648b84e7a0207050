"""Mutants of tars, whose headers have right checksums, and of the index files beside them."""

import contextlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from fuzz_bytes import Case, blind, in_place, number, pack, shuffled
from fuzz_texts import PICTURE, mutate_tree, to_json

from anymal.data import index_files, manifest

PAIR = {"png": PICTURE, "txt": b"a dog"}


def _replace(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def replaced(path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        make(path)

    return replaced


def _sparse_file(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(3 << 30)


SPECIAL = {
    "fifo": _replace(os.mkfifo),
    "endless": _replace(lambda path: path.symlink_to("/dev/zero")),
    "folder": _replace(Path.mkdir),
    "loop": _replace(lambda path: path.symlink_to(path)),
    "sparse": _replace(_sparse_file),
}
"""What may stand in the place of a file, and is none that should be read to its end."""


def _header(name: bytes, length: int, kind: bytes = b"0", **more: bytes) -> bytes:
    """A header with a right checksum; `more` are fields by name."""
    places = {
        "mode": 100,
        "size": 124,
        "mtime": 136,
        "kind": 156,
        "link": 157,
        "magic": 257,
        "prefix": 345,
        "sparse": 386,
    }
    made = bytearray(512)
    more = {"mode": b"0000644\0", "size": b"%011o\0" % length, "mtime": b"0" * 11, "magic": b"ustar\00000"} | more
    made[: len(name[:100])] = name[:100]
    for field_name, data in ({"kind": kind} | more).items():
        at = places[field_name]
        made[at : at + len(data)] = data[: 512 - at]
    return _signed(bytes(made))


def _signed(header: bytes) -> bytes:
    made = header[:148] + b" " * 8 + header[156:]
    return made[:148] + b"%06o\0 " % sum(made) + made[156:]


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def _pax(rng: Random) -> bytes:
    records = []
    for _ in range(rng.choice((1, 1, 3))):
        key, value = rng.choice(
            [
                ("size", rng.choice(("5", "-1", "0", str(1 << 62), "x", "9" * 5000))),
                (
                    "path",
                    rng.choice(
                        ("/etc/passwd", "../../x.png", "a" * 5000 + ".png", "", "\0.png", "é.png", "__x__/a.png")
                    ),
                ),
                ("GNU.sparse.major", rng.choice("01")),
                ("GNU.sparse.realsize", rng.choice(("10", str(1 << 50)))),
                ("GNU.sparse.map", rng.choice(("0,5", "0," + str(1 << 40), "x", "1,2,3"))),
                ("GNU.sparse.name", "b.png"),
                ("mtime", rng.choice(("1.5", "nan", "1e999", "x"))),
                ("hdrcharset", "BINARY"),
                ("comment", "c" * rng.choice((1, 100_000))),
                ("linkpath", "/etc/passwd"),
            ]
        )
        body = f" {key}={value}\n".encode()
        length = len(body) + len(str(len(body) + 2))
        length = rng.choice((length, length, length, number(rng, 31, length)))
        records.append(str(length).encode() + body)
    return b"".join(records)


def _members(rng: Random, key: str) -> list[bytes]:
    """A sample as headers and contents, perhaps with something between or about them."""
    pairs = [(f"{key}.png".encode(), PICTURE), (f"{key}.txt".encode(), b"a dog")]
    made = [_header(name, len(data)) + _padded(data) for name, data in pairs]
    at, choice = rng.randrange(2), rng.randrange(9)
    name, data = pairs[at]
    sizes = (
        b"%011o\0" % number(rng, 33, len(data)),
        b"\x80" + rng.randbytes(11),
        b"\xff" * 12,
        b"99",
        b"-7",
        b"\x80" + bytes(10) + b"\1",
    )
    if choice == 0:
        made[at] = _header(name, 0, size=rng.choice(sizes)) + _padded(data)
    elif choice == 1:
        made[at] = _header(name, len(data), bytes([rng.choice(b"0123456789ABDKLMNSVXgx\0\xff")])) + _padded(data)
    elif choice == 2:
        names = (
            b"",
            b".",
            b"/",
            b"a/",
            b"../../etc/x.png",
            b"\xff\xfe.png",
            b"a.PNG",
            b"a.png.gz",
            b"a.pkl",
            b"__meta__",
            b"\0",
        )
        made[at] = _header(rng.choice(names), len(data)) + _padded(data)
    elif choice == 3:
        pax = _pax(rng)
        made.insert(at, _header(b"pax", len(pax), rng.choice((b"x", b"x", b"g"))) + _padded(pax))
    elif choice == 4:
        long = rng.choice((name, b"x" * rng.choice((101, 5000, 1_000_000)) + b".png", b"\0", b"")) + b"\0"
        made.insert(at, _header(b"././@LongLink", len(long), rng.choice((b"L", b"K"))) + _padded(long))
    elif choice == 5:
        entry = b"%011o\0%011o\0" % (number(rng, 30, 0), number(rng, 33, 5))
        sparse = entry * 4 + bytes([rng.randrange(2)]) + b"%011o\0" % number(rng, 33, 1 << 20)
        made[at] = _header(name, len(data), b"S", sparse=sparse) + _padded(data) * rng.choice((1, 4))
    elif choice == 6:
        made[at] = _signed(in_place(rng, made[at][:512])) + made[at][512:]
    elif choice == 7:
        made[at] = _header(
            name, len(data), prefix=rng.randbytes(40), magic=rng.choice((b"ustar  \0", b"junk"))
        ) + _padded(data)
    return made


def make_tar(rng: Random) -> Case:
    blocks = [
        block for i in range(rng.choice((1, 2, 3))) for block in _members(rng, rng.choice((f"{i}", "same", f"d/{i}")))
    ]
    if rng.random() < 0.25:
        blocks = shuffled(rng, blocks)
    if rng.random() < 0.1:
        blocks.insert(rng.randrange(len(blocks) + 1), bytes(512))
    data = b"".join(blocks) + bytes(rng.choice((1024, 1024, 1024, 512, 0, 10240)))
    choice = rng.random()
    if choice < 0.1:
        data = data[: rng.randrange(len(data))]
    elif choice < 0.2:
        data = blind(rng, data)
    elif choice < 0.22:
        data = rng.choice((b"\x1f\x8b\x08", b"BZh91AY&SY", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")) + data
    beside = rng.choice(list(SPECIAL.values())) if rng.random() < 0.01 else None
    return Case(
        tar=data or b"\0", beside=beside, probe=lambda: tarfile.open(fileobj=io.BytesIO(data), mode="r:").next()
    )


# --------------------------------------------------------------------------------------------------- index files

_GOOD = pack({f"{key}.{suffix}": data for key in "abc" for suffix, data in PAIR.items()})


def make_index(rng: Random) -> Case:
    """A good tar, and an index of it (or of its folder) that fits by its stamp, and does not by what it says."""
    which, special, seed = rng.random() < 0.5, rng.random() < 0.1, rng.random()
    read = []

    def beside(tar: Path) -> None:
        manifest.survey([str(tar)])  # writes both
        mine = Random(seed)
        index = tar.with_name(manifest.NAME) if which else tar.with_name(f"{tar.name}.index.json")
        if which and mine.random() < 0.3:  # else its own index may hide what is wrong with the folder's
            tar.with_name(f"{tar.name}.index.json").unlink()
        known = json.loads(index.read_bytes())
        for other in index_files.paths(str(index), str(tar.parent if which else tar)):
            with contextlib.suppress(OSError):
                os.unlink(other)
        if special:
            mine.choice(list(SPECIAL.values()))(index)
            return
        index.write_bytes(to_json(mine, _wrong(mine, known)))
        read.append(index)

    return Case(
        culprit="index.json",
        tar=_GOOD,
        beside=beside,
        probe=lambda: read and isinstance(json.loads(read[0].read_bytes()), dict | list),
    )


def _wrong(rng: Random, known: dict) -> Any:
    if "blocks" in known and rng.random() < 0.6:
        blocks, last = list(known["blocks"]), known["blocks"][-1]
        wrong = (
            *(blocks[:-1], [*blocks, last + 2], blocks[::-1], [0] * 4, [5, 3, 1, 2], [*blocks[:-1], 1 << 31], [], [0]),
            *(
                [-4, *blocks[1:]],
                list(range(2_000_000)),
                [float(b) for b in blocks],
                [str(b) for b in blocks],
                [blocks],
            ),
        )
        return known | {"blocks": rng.choice(wrong)}
    if "blocks" in known and rng.random() < 0.4:
        bad = (
            {"0": "no"},
            {"-1": "x"},
            {"99": "x"},
            {"0": "y" * 100_000},
            {"x": "y"},
            {"9" * 30: "z"},
            {"0": ""},
            ["0"],
        )
        return known | {"bad": rng.choice(bad)}
    if "tars" in known and rng.random() < 0.6:
        ((name, entry),) = known["tars"].items()
        count = rng.choice((0, 1, 2, 4, -3, 1 << 39, 1 << 41, 2.5, "3", None, [3], 10**30))
        return known | {"tars": {name: [*entry[:2], count]}}
    return mutate_tree(rng, known)
