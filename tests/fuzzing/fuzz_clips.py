"""Mutants of clips: MP4, MOV, Matroska, WebM, AVI and MPEG-TS whose sizes are right around what is not."""

import io
import struct
from collections.abc import Callable, Iterator
from functools import partial
from random import Random

import av
import numpy as np
from fuzz_bytes import Format, Mutator, blind, crc, flip, in_place, number, overwrite, poke, shuffled

_MP4_FOLDERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"dinf", b"udta", b"moof", b"traf", b"mvex")
_MASTERS = {
    0x18538067,
    0x1549A966,
    0x1654AE6B,
    0xAE,
    0xE0,
    0xE1,
    0x1F43B675,
    0xA0,
    0x1C53BB6B,
    0xBB,
    0xB7,
    0x114D9B74,
    0x4DBB,
}
_BLOCKS, _PRIVATE = (0xA3, 0xA1), 0x63A2
_PLACES = (0x53AC, 0xF1, 0xB3)  # where in the file an index lies, and a cluster, and when


def _clip(kind: str, codec: str, pixels: str = "yuv420p", frames: int = 9, sound: bool = False) -> bytes:
    """A few moving frames."""
    stream = io.BytesIO()
    with av.open(stream, "w", format=kind) as file:
        options = {"g": "4"} | ({"x265-params": "log-level=none"} if codec == "libx265" else {})
        video = file.add_stream(codec, rate=10, options=options)
        video.width, video.height, video.pix_fmt = 64, 48, pixels
        codecs = {"avi": "mp2", "webm": "libopus"}
        tone = file.add_stream(codecs.get(kind, "aac"), rate=16000, layout="mono") if sound else None
        ramp = np.add.outer(np.arange(48) * 3, np.arange(64) * 2)[..., None] + np.array([0, 60, 120])
        for index in range(frames):
            frame = (ramp + 11 * index).astype(np.uint8)
            file.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(video.encode())
        if tone is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 14400), np.int16), format="s16", layout="mono")
            silence.sample_rate = 16000
            file.mux(tone.encode(silence))
            file.mux(tone.encode())
    return stream.getvalue()


def opens(container: str, data: bytes) -> bool:
    """Whether FFmpeg opens the container and finds a video in it."""
    with av.open(io.BytesIO(data), format=container) as file:
        return len(file.streams.video) > 0


# --------------------------------------------------------------------------------------------------- MP4 and AVI

Leaf = tuple[bytes, int, int]
"""Name, and where its content starts and ends."""


def _boxes(data: bytes, at: int = 0, end: int | None = None) -> Iterator[Leaf]:
    """The boxes of an MP4 that hold no others."""
    end = len(data) if end is None else end
    while at + 8 <= end:
        size, name = struct.unpack_from(">I4s", data, at)
        if name in _MP4_FOLDERS:
            yield from _boxes(data, at + 8, at + size)
        else:
            yield name, at + 8, at + size
        at += max(size, 8)


def _lists(data: bytes, at: int = 12, end: int | None = None) -> Iterator[Leaf]:
    """The chunks of an AVI that hold no others."""
    end = len(data) if end is None else end
    while at + 8 <= end:
        name, size = struct.unpack_from("<4sI", data, at)
        if name == b"LIST":
            yield from _lists(data, at + 12, at + 8 + size)
        else:
            yield name, at + 8, at + 8 + size
        at += 8 + size + size % 2


def _mutate_leaves(
    parse: Callable[[bytes], Iterator[Leaf]], payload: tuple[bytes, ...], rng: Random, data: bytes
) -> bytes:
    """Change what is in one of a file's tables, its frames, or a size; where things lie stays as it was."""
    leaves = list(parse(data))
    frames = [leaf for leaf in leaves if leaf[0] in payload]
    tables = [leaf for leaf in leaves if leaf[0] not in payload and leaf[2] > leaf[1]]
    choice = rng.randrange(8)
    if choice < 3 and frames:
        _, start, end = rng.choice(frames)
        return in_place(rng, data, start, end)
    if choice == 3 and frames:
        _, start, end = rng.choice(frames)
        at = rng.randrange(start, max(end - 4, start + 1))
        return data[:at] + rng.choice((b"\0\0\1", b"\0\0\0\1", struct.pack(">I", number(rng, 32)))) + data[at + 4 :]
    _, start, end = rng.choice(tables)
    if choice == 4:
        at = start - (8 if parse is _boxes else 4)
        order = ">I" if parse is _boxes else "<I"
        return data[:at] + struct.pack(order, number(rng, 32, end - start)) + data[at + 4 :]
    if choice == 5:
        return data[: start - 4] + rng.choice(tables)[0] + data[start:]
    for _ in range(rng.choice((1, 1, 3))):
        data = poke(rng, data, start, end, ">" if parse is _boxes else "<")
    return data


# ------------------------------------------------------------------------------------------- Matroska and WebM


def _vint(data: bytes, at: int, *, marked: bool) -> tuple[int, int]:
    """A number of variable length, with or without its length's mark, and where it ends."""
    length = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + length], "big")
    return value if marked else value & (1 << 7 * length) - 1, at + length


def _elements(data: bytes, at: int, end: int) -> list[list]:
    """[id, content] of each element; the content of those that hold others is such a list."""
    found = []
    while at < end:
        kind, at = _vint(data, at, marked=True)
        width = 9 - data[at].bit_length()
        size, at = _vint(data, at, marked=False)
        last = end if size == (1 << 7 * width) - 1 else min(at + size, end)  # of unknown size
        found.append([kind, _elements(data, at, last) if kind in _MASTERS else data[at:last]])
        at = last
    return found


def _ebml(elements: list[list]) -> bytes:
    made = []
    for kind, content in elements:
        body = _ebml(content) if isinstance(content, list) else content
        width = 1 if len(body) < 127 else 4
        size = (len(body) | 1 << 7 * width).to_bytes(width, "big")
        made.append(kind.to_bytes((kind.bit_length() + 7) // 8, "big") + size + body)
    return b"".join(made)


def _leaves(elements: list[list]) -> list[list]:
    """Every element that holds no other, as the tree has it: to be changed in place."""
    found = []
    for element in elements:
        found += _leaves(element[1]) if isinstance(element[1], list) else [element]
    return found


def _masters(elements: list[list]) -> list[list]:
    found = [element for element in elements if isinstance(element[1], list)]
    return found + [inner for element in found for inner in _masters(element[1])]


def _mutate_mkv(rng: Random, data: bytes) -> bytes:
    tree = _elements(data, 0, len(data))
    leaves = _leaves(tree)
    blocks = [leaf for leaf in leaves if leaf[0] in _BLOCKS]
    for _ in range(rng.choice((1, 1, 2, 3))):
        choice = rng.randrange(10)
        if choice < 5:
            _mutate_block(rng, rng.choice(blocks))
        elif choice == 5:
            private = [leaf for leaf in leaves if leaf[0] == _PRIVATE] or blocks
            chosen = rng.choice(private)
            chosen[1] = blind(rng, chosen[1])
        elif choice in (6, 7):
            kind = rng.choice(sorted({leaf[0] for leaf in leaves} - set(_BLOCKS)))
            chosen = rng.choice([leaf for leaf in leaves if leaf[0] == kind])
            chosen[1] = _number(rng, chosen[1])
        elif choice == 8:
            chosen = rng.choice(_masters(tree))
            chosen[1] = shuffled(rng, chosen[1])
        else:
            chosen = rng.choice(leaves)
            chosen[0] = rng.choice(leaves)[0]
    return _ebml(tree)


def _number(rng: Random, old: bytes) -> bytes:
    """Another number in the place of one, as wide or wider; or other bytes, where there is no number."""
    if len(old) > 8:
        return blind(rng, old)
    width = max(len(old), rng.choice((1, 1, 4, 8)))
    return number(rng, 8 * width, int.from_bytes(old, "big")).to_bytes(width, "big")


def _misplace(rng: Random, data: bytes) -> bytes:
    """Say that indexes or clusters lie elsewhere: mostly behind the end of the file."""
    tree = _elements(data, 0, len(data))
    kind = rng.choice(_PLACES)
    for leaf in _leaves(tree):
        if leaf[0] == kind and rng.random() < 0.6:
            leaf[1] = (1 << rng.randrange(20, 46)).to_bytes(8, "big") if rng.random() < 0.7 else _number(rng, leaf[1])
    return _ebml(tree)


def _mutate_block(rng: Random, block: list) -> None:
    """Change one block: its frame's bytes, the lengths inside it, its own length, its time, or its flags."""
    body = block[1]
    choice = rng.randrange(7)
    if choice < 2:
        block[1] = body[:4] + rng.choice((flip, overwrite))(rng, body[4:])
    elif choice == 2:  # H.264 and HEVC begin with the length of the first unit
        block[1] = body[:4] + struct.pack(">I", number(rng, 32, len(body) - 8)) + body[8:]
    elif choice == 3:
        block[1] = body[: rng.randint(4, len(body))] if rng.random() < 0.7 else body[:4]
    elif choice == 4:
        block[1] = body + rng.randbytes(rng.choice((1, 3, 4, 100)))
    elif choice == 5:
        block[1] = body[:1] + struct.pack(">h", rng.randint(-32768, 32767)) + body[3:]
    else:
        block[1] = body[:3] + bytes([rng.choice((0, 0x80, 0x02, 0x84, 0x06, 0x08))]) + blind(rng, body[4:])


# -------------------------------------------------------------------------------------------------------- MPEG-TS


def _mutate_ts(rng: Random, data: bytes) -> bytes:
    packets = [data[at : at + 188] for at in range(0, len(data), 188)]
    at, choice = rng.randrange(len(packets)), rng.randrange(5)
    tables = [i for i, packet in enumerate(packets) if packet[1] & 0x40 and packet[4] == 0 and packet[5] in (0, 2)]
    if choice == 0:
        packets = shuffled(rng, packets, first=rng.choice((0, 3)))
    elif choice == 1:
        packets[at] = in_place(rng, packets[at], 1, 4)
    elif choice == 2 and tables:
        at = rng.choice(tables)
        packet = packets[at]
        end = 8 + (int.from_bytes(packet[6:8], "big") & 0xFFF)
        section = in_place(rng, packet[5 : end - 4], 3)
        packets[at] = packet[:5] + section + struct.pack(">I", crc(section, 32, 0x04C11DB7, 0xFFFFFFFF)) + packet[end:]
    else:
        packets[at] = in_place(rng, packets[at], 4)
    return b"".join(packets)


def _format(suffix: str, container: str, header: int, mutate: list[Mutator], *kinds: tuple) -> Format:
    """`kinds`: FFmpeg's name of the container, the codec, and perhaps its pixels."""
    return Format(
        suffix=suffix,
        make_seeds=lambda: [_clip(*kind) for kind in kinds] + [_clip(*kinds[0], sound=True)],
        structured=mutate,
        probe=partial(opens, container),
        header=header,
    )


_MKV = [_mutate_mkv, _mutate_mkv, _misplace]
_mutate_mp4 = partial(_mutate_leaves, _boxes, (b"mdat",))
_mutate_avi = partial(_mutate_leaves, _lists, (b"00dc", b"01wb"))

FORMATS = {
    "mp4": _format("mp4", "mp4", 48, [_mutate_mp4], ("mp4", "libx264"), ("mp4", "mpeg4"), ("mp4", "libvpx-vp9")),
    "mov": _format("mov", "mp4", 48, [_mutate_mp4], ("mov", "libx264"), ("mov", "mjpeg", "yuvj420p"), ("mov", "mpeg4")),
    "mkv": _format(
        "mkv",
        "matroska",
        400,
        _MKV,
        ("matroska", "libx264"),
        ("matroska", "mpeg4"),
        ("matroska", "mjpeg", "yuvj420p"),
        ("matroska", "ffv1"),
        ("matroska", "libx265"),
    ),
    "webm": _format("webm", "matroska", 400, _MKV, ("webm", "libvpx"), ("webm", "libvpx-vp9")),
    "avi": _format("avi", "avi", 300, [_mutate_avi], ("avi", "mpeg4"), ("avi", "mjpeg", "yuvj420p"), ("avi", "ffv1")),
    "mpegts": _format("mp4", "mpegts", 564, [_mutate_ts], ("mpegts", "libx264"), ("mpegts", "mpeg2video")),
}
