"""Mutants of arrays: cached features in safetensors' format, and IMU recordings as .npy."""

import io
import json
import struct
from random import Random
from typing import Any

import numpy as np
import torch
from fuzz_bytes import Case, Format, blind, in_place, number, poke
from fuzz_tars import PAIR
from fuzz_texts import mutate_tree, to_json

from anymal.data import feature_codec
from tiny_encoders import motion, npy


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
    data = feature_codec.dump(good, rng.choice(feature_codec.PRECISIONS))
    (length,) = struct.unpack_from("<Q", data)
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    if choice in (2, 3):
        data = _safetensors(to_json(rng, mutate_tree(rng, header)), body)
    elif choice == 4:
        data = _safetensors(header, in_place(rng, body))
    elif choice == 5:
        reason = rng.choice(
            (b"r", b"\xff\xfe", b"\0" * 30, b"no " * 1000, "é\u202e".encode(), bytes(rng.choice((40, 1 << 27))))
        )
        data = feature_codec.to_bytes({"bad": torch.frombuffer(bytearray(reason), dtype=torch.uint8)})
    elif choice == 6:
        data = _safetensors(header, body, number(rng, 64, length))
    elif choice == 7:
        data = blind(rng, data, start=rng.choice((0, 8, 8 + length)))
    name = rng.choice(("png.safetensors", "png.safetensors", "png.safetensors", "safetensors"))
    cached = {name: data, "txt": b"a dog"}
    return Case(members=PAIR, cached=cached, probe=lambda: feature_codec.from_bytes(data) is not None)


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


FORMATS = {
    "imu": Format(
        suffix="imu.npy",
        make_seeds=lambda: [npy(motion(n)) for n in (50, 60, 3000)] + [npy(motion(50).astype(np.float64))],
        structured=[_mutate_npy],
        probe=_numpy_header,
        header=128,
    )
}
