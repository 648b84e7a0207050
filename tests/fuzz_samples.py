"""Mutants of all that is no medium: texts and conversations, tars, index files, cached features; and IMU's arrays."""

import contextlib
import io
import json
import os
import struct
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from anymal import features, manifest, shards
from fuzz_bytes import Format, blind, in_place, number, poke, shuffled
from tiny_encoders import motion, npy, picture


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


def pack(members: dict[str, bytes], kind: int = tarfile.GNU_FORMAT) -> bytes:
    """Members by name → the bytes of a tar."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=kind) as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


# ---------------------------------------------------------------------------------------------------------- texts

PICTURE = picture(size=(20, 20))
PIECES = (
    *(
        "a dog",
        " ",
        "",
        "<|im_",
        "start|>",
        "<|im_start|",
        ">",
        "<|",
        "im_end|>system\n",
        "<|endof",
        "text|>",
        "<im",
        "age>",
    ),
    *(
        "<image>",
        "<|im_end|>",
        "\0",
        "\ud800",
        "\udfff\ud800",
        "\u202e",
        "😀",
        "é" * 300,
        "\ufeff",
        "a\u0301" * 50,
        "{{ x }}",
    ),
)
VALUES = (
    *(
        None,
        True,
        -1,
        0,
        3,
        1e308,
        10**40,
        float("nan"),
        "",
        "x",
        "image",
        "\0",
        "\ud800",
        "assistant",
        "system",
        [],
        {},
        [[]],
    ),
    *(
        [None],
        {"type": "image"},
        {"type": "text", "text": 3},
        {"type": "x" * 200_000},
        {"role": "user"},
        "0.png",
        "png",
    ),
    *([0, 5, 3], {"0": 1}, {"-1": "no"}, [1 << 40], [0.5], "y" * 3000, {"type": "image", "member": "z" * 200_000}),
)


def _parts(rng: Random) -> list[dict]:
    pieces = PIECES if rng.random() < 0.6 else PIECES[:3]
    said = [rng.choice(pieces) for _ in range(rng.choice((1, 2, 2, 3, 8)))]
    if rng.random() < 0.1:
        token = rng.choice(("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<image>", "<audio>"))
        cut = rng.randint(1, len(token) - 1)
        said += [token[:cut], token[cut:]]
    return [{"type": "text", "text": text} for text in said]


def conversation(rng: Random) -> dict:
    """Messages with one picture, most of them as they should be."""
    turns = []
    for i in range(rng.choice((2, 2, 2, 4, 4, 10, 10, 800))):
        content: Any = _parts(rng)
        if rng.random() < 0.3:
            content = "".join(part["text"] for part in content)
        turns.append({"role": ("user", "assistant")[i % 2], "content": content})
    if rng.random() < 0.1:
        turns.insert(0, {"role": "system", "content": rng.choice(PIECES)})
    first = turns[0]["content"]
    turns[0]["content"] = [
        {"type": "image"},
        *(first if isinstance(first, list) else [{"type": "text", "text": first}]),
    ]
    return {"messages": turns}


def mutate_tree(rng: Random, value: Any) -> Any:
    """Replace, drop, double or reorder something in nested lists and dicts."""
    if isinstance(value, dict | list) and value and rng.random() < 0.75:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        if isinstance(value, list) and rng.random() < 0.2:
            return shuffled(rng, value)
        copied = value.copy()
        copied[key] = mutate_tree(rng, value[key])
        return copied
    if isinstance(value, int) and rng.random() < 0.6:
        return value + rng.choice((-1, 1, 1000, -value - 1, 1 << 32, 1 << 63, 10**25))
    return rng.choice(VALUES)


def _json(rng: Random, value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=rng.random() < 0.7)
    data = text.encode(errors="surrogatepass")
    choice = rng.random()
    if choice < 0.06:
        deep = rng.choice((200, 990, 5000, 100_000))
        opened = rng.choice((b"[" * deep, b'{"a":' * deep, b"[" * deep + b"]" * deep))
        at = rng.choice([0, *(i + 1 for i in range(len(data[:5000])) if data[i : i + 1] == b":")])
        return data[:at] + opened + data[at:]
    return blind(rng, data) if choice < 0.15 else data


def _make_json(rng: Random) -> Case:
    held, value = {"png": PICTURE}, conversation(rng)
    choice = rng.random()
    if choice < 0.45:
        value = mutate_tree(rng, value)
    elif choice < 0.5:  # names that differ little, for whoever looks for the nearest
        held = {f"{'ab' * rng.choice((10, 400))}{i}.png": PICTURE for i in range(20)}
        value["messages"][0]["content"][0] |= {"member": "ab" * rng.choice((10, 500, 20_000)) + ".png"}
    elif choice < 0.55:
        value["options"] = rng.choice((["yes", "no"], ["\ud800"], "yes", [1], ["a"] * 10_000, {"a": 1}))
    elif choice < 0.57:
        value["messages"][-1]["content"] = rng.choice(("word ", "a", "é", "<|im_", "1")) * rng.choice(
            (10_000, 2_000_000)
        )
    data = _json(rng, value)
    return Case(members={**held, "json": data}, probe=lambda: isinstance(json.loads(data), dict))


def _make_txt(rng: Random) -> Case:
    text = "".join(rng.choice(PIECES) for _ in range(rng.choice((1, 2, 5, 40))))
    data = text.encode(errors=rng.choice(("surrogatepass", "replace")))
    choice = rng.random()
    if choice < 0.02:
        data = rng.choice((b"a", b"a dog ", "é".encode(), b"\n", b"\0")) * rng.choice((100_000, 5_000_000))
    elif choice < 0.3:
        data = rng.choice((blind(rng, data), rng.randbytes(30), b"\xff\xfe" + text.encode("utf-16", "replace")))
    return Case(members={"png": PICTURE, "txt": data}, probe=lambda: data.decode("utf-8-sig").strip() != "")


# ----------------------------------------------------------------------------------------------------------- tars


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


def _make_tar(rng: Random) -> Case:
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
    beside = rng.choice(list(_SPECIAL.values())) if rng.random() < 0.01 else None
    return Case(
        tar=data or b"\0", beside=beside, probe=lambda: tarfile.open(fileobj=io.BytesIO(data), mode="r:").next()
    )


# --------------------------------------------------------------------------------------------------- index files


def _replace(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def replaced(path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        make(path)

    return replaced


def _sparse_file(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(3 << 30)


_SPECIAL = {
    "fifo": _replace(os.mkfifo),
    "endless": _replace(lambda path: path.symlink_to("/dev/zero")),
    "folder": _replace(Path.mkdir),
    "loop": _replace(lambda path: path.symlink_to(path)),
    "sparse": _replace(_sparse_file),
}
"""What may stand in the place of a file, and is none that should be read to its end."""
_PAIR = {"png": PICTURE, "txt": b"a dog"}
_GOOD = pack({f"{key}.{suffix}": data for key in "abc" for suffix, data in _PAIR.items()})


def _make_index(rng: Random) -> Case:
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
        for other in shards.index_files(str(index), str(tar.parent if which else tar)):
            with contextlib.suppress(OSError):
                os.unlink(other)
        if special:
            mine.choice(list(_SPECIAL.values()))(index)
            return
        index.write_bytes(_json(mine, _wrong(mine, known)))
        read.append(index)

    return Case(
        tar=_GOOD, beside=beside, probe=lambda: read and isinstance(json.loads(read[0].read_bytes()), dict | list)
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


# --------------------------------------------------------------------------- cached features, and IMU's arrays


def _safetensors(header: Any, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def make_features(rng: Random, tokens: int, width: int) -> Case:
    good = torch.linspace(-2, 2, tokens * width).reshape(tokens, width)
    value = rng.choice((3e38, -3e38, 1e30, float("inf"), float("nan"), 1e-40))
    choice = rng.randrange(8)
    if choice == 0:
        good[rng.randrange(tokens), rng.randrange(width)] = value
    elif choice == 1:
        good *= 1e38
    data = features.dump(good, rng.choice(features.PRECISIONS))
    (length,) = struct.unpack_from("<Q", data)
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    if choice in (2, 3):
        data = _safetensors(_json(rng, mutate_tree(rng, header)), body)
    elif choice == 4:
        data = _safetensors(header, in_place(rng, body))
    elif choice == 5:
        reason = rng.choice(
            (b"r", b"\xff\xfe", b"\0" * 30, b"no " * 1000, "é\u202e".encode(), bytes(rng.choice((40, 1 << 27))))
        )
        data = features.to_bytes({"bad": torch.frombuffer(bytearray(reason), dtype=torch.uint8)})
    elif choice == 6:
        data = _safetensors(header, body, number(rng, 64, length))
    elif choice == 7:
        data = blind(rng, data, start=rng.choice((0, 8, 8 + length)))
    name = rng.choice(("png.safetensors", "png.safetensors", "png.safetensors", "safetensors"))
    cached = {name: data, "txt": b"a dog"}
    return Case(members=_PAIR, cached=cached, probe=lambda: features.from_bytes(data) is not None)


def _numpy_header(data: bytes) -> bool:
    np.lib.format.read_magic(stream := io.BytesIO(data))
    np.lib.format.read_array_header_1_0(stream)
    return True


def _mutate_npy(rng: Random, data: bytes) -> bytes:
    stream = io.BytesIO(data)
    np.lib.format.read_magic(stream)
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    body, choice = data[stream.tell() :], rng.randrange(4)
    if choice == 0:  # what the numbers are
        array = np.frombuffer(body, dtype).reshape(shape).copy()
        value = rng.choice((float("nan"), float("inf"), 1e30, -1e19, 999.0, 99.0, 1e-40))
        array[rng.randrange(shape[0]), rng.randrange(6)] = value
        return npy(array if rng.random() < 0.7 else array * value)
    if choice == 1:
        return data[: stream.tell()] + blind(rng, body)
    shape = rng.choice(
        (shape, (1 << 40, 6), (-1, 6), (6, 250), (len(body) // 4,), (0, 6), (1 << 62, 1 << 62), (25, 6), ())
    )
    kinds = (
        dtype.str,
        dtype.str,
        ">f4",
        "<f2",
        "<f8",
        "|O",
        "<i4",
        "<c8",
        "|V4",
        "f4,f4",
        "<U5",
        [("x", "<f4")],
        "(9,)<f4",
    )
    text = {"descr": rng.choice(kinds), "fortran_order": rng.random() < 0.2, "shape": shape}
    written = repr(text).encode()
    if choice == 3:
        written = rng.choice(
            (written, b"(" * 300, b"{" + b"-" * 5000 + b"1}", b"9" * 9000, poke(rng, written), in_place(rng, written))
        )
    written = written.ljust(118) + b"\n"
    stated = rng.choice((len(written), len(written), number(rng, 16, len(written))))
    return b"\x93NUMPY\1\0" + struct.pack("<H", stated) + written + body


NPY = Format(
    suffix="imu.npy",
    make_seeds=lambda: [npy(motion(n)) for n in (50, 60, 3000)] + [npy(motion(50).astype(np.float64))],
    structured=[_mutate_npy],
    probe=_numpy_header,
    header=128,
)
MAKERS: dict[str, Callable[[Random], Case]] = {
    "txt": _make_txt,
    "json": _make_json,
    "tar": _make_tar,
    "index": _make_index,
}
"""Makers of mutants of what is no medium."""
