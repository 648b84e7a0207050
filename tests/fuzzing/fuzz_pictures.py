"""Mutants of pictures: PNG, JPEG, GIF, WebP and BMP whose sizes and checksums are right around what is not."""

import io
import struct
import zlib
from collections.abc import Sequence
from random import Random

import numpy as np
from fuzz_bytes import Format, blind, flip, in_place, number, overwrite, poke, shuffled
from PIL import Image

SIDES = (0, 1, 2, 47, 49, 400, 4000, 8000, 7999 * 2, 65535, 1 << 20, (1 << 31) - 1, (1 << 32) - 1)
"""Sides of pictures; 8000 x 8000 is the most that is decoded by default."""


def _picture(mode: str, kind: str, size: tuple[int, int] = (48, 40), **options) -> bytes:
    ramp = np.linspace(0, 255, size[0] * size[1] * 4).reshape(size[1], size[0], 4).astype(np.uint8)
    ramp[::3] ^= 77
    stream = io.BytesIO()
    Image.fromarray(ramp, "RGBA").convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def _moving(kind: str, **options) -> bytes:
    frames = [Image.new("RGB", (32, 24), (80 * i, 255 - 80 * i, 9)) for i in range(3)]
    stream = io.BytesIO()
    frames[0].save(stream, kind, save_all=True, append_images=frames[1:], duration=40, **options)
    return stream.getvalue()


def opens(data: bytes) -> bool:
    """Whether Pillow reads the header."""
    from anymal.adapters.image.read import FORMATS

    Image.open(io.BytesIO(data), formats=FORMATS)
    return True


# ------------------------------------------------------------------------------------------------------------ PNG


def _chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def _png(chunks: Sequence[tuple[bytes, bytes]]) -> bytes:
    made = [struct.pack(">I", len(b)) + kind + b + struct.pack(">I", zlib.crc32(kind + b)) for kind, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


def _ihdr(rng: Random, chunks: list) -> list:
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    if rng.random() < 0.5:
        width, height = (rng.choice((width, *SIDES)), rng.choice((height, *SIDES)))
    else:
        at = rng.choice((0, 0, 1, 1, 4, 2, 3))
        rest[at] = rng.choice((0, 1, 2, 3, 4, 6, 8, 16, number(rng, 8)))
    return [(b"IHDR", struct.pack(">IIBBBBB", width, height, *rest)), *chunks[1:]]


def _idat(rng: Random, chunks: list) -> list:
    pixels = zlib.decompress(b"".join(body for kind, body in chunks if kind == b"IDAT"))
    packed = zlib.compress(blind(rng, pixels), rng.choice((0, 1, 9)))
    cut = rng.randint(0, len(packed))
    first = next(i for i, chunk in enumerate(chunks) if chunk[0] == b"IDAT")
    rest = [chunk for chunk in chunks if chunk[0] != b"IDAT"]
    return [*rest[:first], (b"IDAT", packed[:cut]), (b"IDAT", packed[cut:]), *rest[first:]]


def _extra(rng: Random) -> tuple[bytes, bytes]:
    packed = zlib.compress(rng.randbytes(rng.randrange(60)))
    zeros = zlib.compress(bytes(rng.choice((1 << 10, 1 << 21, 1 << 26))))
    made = {
        b"tRNS": rng.randbytes(rng.choice((1, 2, 6, 256))),
        b"PLTE": rng.randbytes(rng.choice((3, 5, 768, 3000))),
        b"gAMA": rng.randbytes(4),
        b"pHYs": rng.randbytes(9),
        b"iCCP": b"p\0\0" + rng.choice((packed, zeros)),
        b"zTXt": b"k\0\0" + rng.choice((packed, zeros)),
        b"iTXt": b"k\0\1\0en\0k\0" + rng.choice((packed, zeros)),
        b"tEXt": b"k\0" + b"x" * rng.choice((1, 1 << 20)),
        b"eXIf": b"MM\0*\0\0\0\10\0\1\1\x12\0\3\0\0\0\1\0" + rng.randbytes(6),
        b"acTL": struct.pack(">II", number(rng, 31, 2), 0),
        b"fcTL": struct.pack(">IIIIIHHBB", 0, *(number(rng, 31, n) for n in (48, 40, 0, 0)), 1, 10, 0, 0),
        b"fdAT": struct.pack(">I", 1) + packed,
        b"cHRM": rng.randbytes(32),
    }
    kind = rng.choice(list(made))
    return kind, made[kind]


def _mutate_png(rng: Random, data: bytes) -> bytes:
    chunks = _chunks(data)
    choice = rng.randrange(6)
    if choice == 0:
        chunks = _ihdr(rng, chunks)
    elif choice in (1, 2):
        chunks = _idat(rng, chunks)
    elif choice == 3:
        chunks.insert(rng.randint(1, len(chunks)), _extra(rng))
    elif choice == 4:
        chunks = shuffled(rng, chunks, first=1)
    else:
        at = rng.randrange(1, len(chunks))
        chunks[at] = (chunks[at][0], blind(rng, chunks[at][1]))
    return _png(chunks)


def _png_bomb(rng: Random) -> bytes:
    """So many pixels of one colour as may be, or a few more, in a few kilobytes."""
    side, depth, colour = rng.choice((2000, 4000, 7999, 8000, 13000)), rng.choice((1, 8, 8, 16)), rng.choice((0, 2, 6))
    depth = max(depth, 8) if colour else depth
    row = 1 + side * {0: 1, 2: 3, 6: 4}[colour] * depth // 8
    packer = zlib.compressobj(1)
    packed = b"".join(packer.compress(bytes(row)) for _ in range(rng.choice((side, side, side // 2))))
    body = struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, rng.choice((0, 0, 1)))
    return _png([(b"IHDR", body), (b"IDAT", packed + packer.flush()), (b"IEND", b"")])


# ----------------------------------------------------------------------------------------------------------- JPEG


def _segments(data: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """The segments up to the first scan's header, and what follows it."""
    found, at = [], 2
    while True:
        marker, length = data[at + 1], struct.unpack_from(">H", data, at + 2)[0]
        found.append((marker, data[at + 4 : at + 2 + length]))
        at += 2 + length
        if marker == 0xDA:
            return found, data[at:]


def _jpeg(segments: Sequence[tuple[int, bytes]], scan: bytes) -> bytes:
    made = [struct.pack(">BBH", 0xFF, marker, min(len(body) + 2, 65535)) + body for marker, body in segments]
    return b"\xff\xd8" + b"".join(made) + scan


def _mutate_jpeg(rng: Random, data: bytes) -> bytes:
    segments, scan = _segments(data)
    at = rng.randrange(len(segments))
    frame = next(i for i, (marker, _) in enumerate(segments) if marker in (0xC0, 0xC1, 0xC2))
    choice = rng.randrange(7)
    if choice == 0:
        sides = struct.pack(">HH", rng.choice(SIDES) % 65536, rng.choice(SIDES) % 65536)
        segments[frame] = (segments[frame][0], segments[frame][1][:1] + sides + segments[frame][1][5:])
    elif choice == 1:
        segments[frame] = (rng.choice((0xC0, 0xC1, 0xC2, 0xC3, 0xC9)), poke(rng, segments[frame][1], 5))
    elif choice == 2:
        segments[at] = (segments[at][0], in_place(rng, segments[at][1]))
    elif choice == 3:
        scan = rng.choice((flip, overwrite, blind))(rng, scan)
    elif choice == 4:
        segments.insert(rng.randint(0, len(segments) - 1), _application(rng))
    elif choice == 5:
        scan = scan[:-2] * rng.choice((2, 5, 100)) + scan[-2:]
    else:
        segments = shuffled(rng, segments, first=0)
    return _jpeg(segments, scan)


def _application(rng: Random) -> tuple[int, bytes]:
    """A segment of an application: Exif with a wrong orientation, an index of further pictures, a profile's part."""
    ifd = struct.pack(
        ">HHHII", 1, rng.choice((0x112, 0x8769, 0x8825)), rng.choice((3, 4, 5, 7, 13)), number(rng, 32), 8
    )
    exif = b"Exif\0\0MM\0*" + struct.pack(">I", rng.choice((8, 8, 0, 1 << 31))) + ifd + rng.randbytes(8)
    return rng.choice(
        [
            (0xE1, exif),
            (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"<x>" * 5000),
            (0xE2, b"MPF\0MM\0*" + rng.randbytes(60)),
            (0xE2, b"ICC_PROFILE\0\1" + bytes([rng.randrange(256)]) + rng.randbytes(900)),
            (0xED, b"Photoshop 3.0\0" + b"8BIM" + rng.randbytes(40)),
            (0xEE, b"Adobe" + rng.randbytes(7)),
            (0xDD, rng.randbytes(2)),
            (0xFE, bytes(65533)),
        ]
    )


def _jpeg_exif(rng: Random) -> bytes:
    """Exif that goes on over many segments: more than a hundred megabytes at most."""
    segments, scan = _segments(_picture("RGB", "JPEG"))
    part = (0xE1, b"Exif\0\0" + b"MM\0*\0\0\0\10" + bytes(65519))
    return _jpeg([part] * rng.choice((20, 200, 2000)) + segments, scan)


def _jpeg_scans(rng: Random) -> bytes:
    """A large progressive picture whose scans are repeated."""
    segments, scan = _segments(_picture("RGB", "JPEG", progressive=True))
    frame = next(i for i, (marker, _) in enumerate(segments) if marker == 0xC2)
    side = struct.pack(">HH", *[rng.choice((1000, 4000, 8000))] * 2)
    segments[frame] = (0xC2, segments[frame][1][:1] + side + segments[frame][1][5:])
    header = _jpeg([segments[-1]], scan[:-2])[2:]
    return _jpeg(segments, scan[:-2] + header * rng.choice((10, 200, 1000)) + scan[-2:])


# ------------------------------------------------------------------------------------------------------------ GIF


def _blocks(data: bytes) -> list[bytes]:
    """Screen and its colours, then each extension and picture."""
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    found = [data[:at]]
    while at < len(data) and data[at] != 0x3B:
        start = at
        if data[at] == 0x21:
            at += 2
        else:
            flags = data[at + 9]
            at += 11 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
        while data[at]:
            at += 1 + data[at]
        at += 1
        found.append(data[start:at])
    return found


def _mutate_gif(rng: Random, data: bytes) -> bytes:
    blocks = _blocks(data)
    pictures = [i for i, block in enumerate(blocks) if block[0] == 0x2C]
    at, choice = rng.choice(pictures), rng.randrange(6)
    sides = [rng.choice(SIDES) % 65536 for _ in range(2)]
    if choice == 0:
        blocks[0] = blocks[0][:6] + struct.pack("<HH", *sides) + blocks[0][10:]
    elif choice == 1:
        blocks[at] = poke(rng, blocks[at], 1, 9, "<")
    elif choice == 2:
        blocks[at] = in_place(rng, blocks[at], 9)
    elif choice == 3:
        blocks = shuffled(rng, blocks, first=1)
    elif choice == 4:
        blocks.insert(at, b"\x21\xf9\4" + rng.randbytes(4) + b"\0")
    else:
        blocks = [*blocks, *[blocks[at]] * rng.choice((1, 10, 1000))]
    return b"".join(blocks) + b";"


def _gif_bomb(rng: Random) -> bytes:
    """35 bytes that ask for the largest picture that may be."""
    width, height = rng.choice(((8000, 8000), (7999, 8000), (65535, 976), (30000, 2000), (65535, 65535)))
    screen = b"GIF89a" + struct.pack("<HH", width, height) + bytes([0x80, 0, 0]) + b"\0\0\0\xff\xff\xff"
    inner = rng.choice(((width, height), (1, 1), (width, 1)))
    one = b"\x2c\0\0\0\0" + struct.pack("<HHB", *inner, rng.choice((0, 0x40))) + b"\2\2\x4c\1\0"
    return screen + one * rng.choice((1, 1, 50)) + b";"


# --------------------------------------------------------------------------------------------------- WebP and BMP


def riff(data: bytes) -> list[tuple[bytes, bytes]]:
    """The chunks of a RIFF file, up to one that is not whole."""
    found, at = [], 12
    while at + 8 <= len(data):
        (size,) = struct.unpack_from("<I", data, at + 4)
        found.append((data[at : at + 4], data[at + 8 : at + 8 + size]))
        at += 8 + size + size % 2
    return found


def to_riff(kind: bytes, chunks: Sequence[tuple[bytes, bytes]]) -> bytes:
    """A RIFF file of right sizes."""
    body = b"".join(name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for name, data in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + kind + body


def _mutate_webp(rng: Random, data: bytes) -> bytes:
    chunks = riff(data)
    at, choice = rng.randrange(len(chunks)), rng.randrange(5)
    name, body = chunks[at]
    if choice == 0:
        chunks[at] = (name, poke(rng, body, 0, min(len(body), 26), "<"))
    elif choice == 1:
        chunks = shuffled(rng, chunks)
    elif choice == 2:
        canvas = struct.pack("<I", rng.choice(SIDES) & 0xFFFFFF)[:3] + struct.pack("<I", rng.choice(SIDES))[:3]
        rest = [chunk for chunk in chunks if chunk[0] != b"VP8X"]
        chunks = [(b"VP8X", bytes([rng.choice((0x10, 2, 0x12, 0x2C, rng.randrange(256))), 0, 0, 0]) + canvas), *rest]
    else:
        chunks[at] = (name, blind(rng, body, start=min(10, len(body))))
    return to_riff(b"WEBP", chunks)


def _mutate_bmp(rng: Random, data: bytes) -> bytes:
    header = bytearray(data)
    choice = rng.randrange(4)
    if choice == 0:
        struct.pack_into("<ii", header, 18, *(rng.choice((48, -40, *SIDES[:-1])) for _ in range(2)))
    elif choice == 1:
        struct.pack_into("<HI", header, 28, rng.choice((1, 2, 4, 8, 16, 24, 32, 0, 77)), rng.choice((0, 1, 2, 3, 4, 9)))
    elif choice == 2:
        struct.pack_into("<I", header, rng.choice((10, 14, 34, 46, 50)), number(rng, 32, 54))
    else:
        return blind(rng, data, start=54)
    return bytes(header)


def _run_length(rng: Random, data: bytes) -> bytes:
    """A compressed BMP: runs of colours, jumps and literal stretches."""
    runs = b"".join(
        rng.choice((b"\xff\7", b"\0\0", b"\0\1", b"\0\2\3\4", b"\0\6abcdef")) for _ in range(rng.randrange(900))
    )
    width, height = rng.choice(((48, 40), (8000, 8000), (400, 300), (7000, 200)))
    bits = rng.choice((8, 8, 4))
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 2 if bits == 4 else 1, len(runs), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(runs), 0, 0, 1078) + head + bytes(range(256)) * 4 + runs


def _png_seeds() -> list[bytes]:
    found = [_picture(mode, "PNG") for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")]
    return [*found, _moving("PNG"), _picture("P", "PNG", transparency=3)]


def _jpeg_seeds() -> list[bytes]:
    exif = Image.Exif()
    exif[0x112] = 6
    plain = [_picture(mode, "JPEG") for mode in ("RGB", "L", "CMYK")]
    return [*plain, _picture("RGB", "JPEG", progressive=True), _picture("RGB", "JPEG", exif=exif, optimize=True)]


def _webp_seeds() -> list[bytes]:
    still = [_picture("RGB", "WEBP"), _picture("RGBA", "WEBP"), _picture("RGB", "WEBP", lossless=True)]
    return [
        *still,
        _picture("RGBA", "WEBP", exif=b"Exif\0\0MM\0*\0\0\0\10\0\0", icc_profile=b"p" * 200),
        _moving("WEBP"),
    ]


FORMATS = {
    "jpg": Format(
        suffix="jpg",
        make_seeds=_jpeg_seeds,
        structured=[_mutate_jpeg],
        bombs=[_jpeg_exif, _jpeg_scans],
        probe=opens,
        header=160,
    ),
    "png": Format(
        suffix="png", make_seeds=_png_seeds, structured=[_mutate_png], bombs=[_png_bomb], probe=opens, header=33
    ),
    "webp": Format(suffix="webp", make_seeds=_webp_seeds, structured=[_mutate_webp], probe=opens, header=30),
    "gif": Format(
        suffix="gif",
        make_seeds=lambda: [_picture("P", "GIF"), _picture("L", "GIF", interlace=0), _moving("GIF", loop=0)],
        structured=[_mutate_gif],
        bombs=[_gif_bomb],
        probe=opens,
        header=13,
    ),
    "bmp": Format(
        suffix="bmp",
        make_seeds=lambda: [_picture(mode, "BMP") for mode in ("RGB", "L", "P", "1")],
        structured=[_mutate_bmp, _mutate_bmp, _run_length],
        probe=opens,
        header=54,
    ),
}
