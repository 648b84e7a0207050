"""Small files that unpack to gigabytes: refused, or decoded in little memory, measured in a process of their own."""

import io
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from anymal.adapters.audio import read_sound
from anymal.adapters.image.read import read_image
from anymal.adapters.signals import resample
from anymal.errors import BadSample
from small_runs import ROOT
from tiny_encoders import picture

MAX_PIXELS = 64_000_000


def png(side: int, *, transparent: bool) -> bytes:
    """A square of two colours, one bit or (transparent) one byte a pixel."""
    depth, row = (8, side + 1) if transparent else (1, -(-side // 8) + 1)
    chunks = {b"IHDR": struct.pack(">IIBBBBB", side, side, depth, 3, 0, 0, 0), b"PLTE": b"\x10\x20\x30\xff\xff\xff"}
    chunks |= {b"tRNS": b"\x80\xff"} if transparent else {}
    chunks |= {b"IDAT": zlib.compress(bytes(row * side), 1), b"IEND": b""}
    parts = (
        struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in chunks.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def gif(side: int) -> bytes:
    """35 bytes: a canvas of any size, of which one pixel is drawn."""
    head = b"GIF89a" + struct.pack("<HH", side, side) + b"\x80\0\0\x10\x20\x30\xff\xff\xff"
    return head + b"\x2c" + struct.pack("<HHHH", 0, 0, 1, 1) + b"\0\x02\x02\x44\x01\0\x3b"


def flac(seconds: int, channels: int, rate: int = 48_000) -> bytes:
    import soundfile

    stream = io.BytesIO()
    with soundfile.SoundFile(stream, "w", rate, channels, subtype="PCM_16", format="FLAC") as file:
        for _ in range(seconds):
            file.write(np.zeros((rate, channels), np.int16))
    return stream.getvalue()


BOMBS = {
    "png": (lambda: png(8000, transparent=False), "read_image(data, 64_000_000)", 250),
    "transparent": (lambda: png(8000, transparent=True), "read_image(data, 64_000_000)", 250),
    "gif": (lambda: gif(8000), "read_image(data, 64_000_000)", 250),
    "channels": (lambda: flac(120, 8), "read_sound(data, 600)", 100),
    "ratio": (lambda: b"", "resample(torch.zeros(1013 * 2), 1013, 48_000)", 250),
    "long": (lambda: b"", "resample(torch.zeros(1 << 24), 48_000, 16_000)", 350),
}
"""What is unpacked, by what, and the MB that it may take. Before they were bounded: 305, 732, 307, 236, 615, 561."""
PROGRAM = """
import resource, sys, torch
import anymal
from anymal.adapters.audio import read_sound
from anymal.adapters.image.read import read_image
from anymal.adapters.signals import resample
from tiny_encoders import picture, sound
torch.set_num_threads(1)
read_image(picture(), 10_000), read_sound(sound(0.5), 600), resample(torch.zeros(100), 2, 3)
data = open(sys.argv[1], "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
{call}
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_take_little_memory(name, tmp_path):
    make, call, most = BOMBS[name]
    (tmp_path / "bomb").write_bytes(make())
    command = [sys.executable, "-c", PROGRAM.format(call=call), str(tmp_path / "bomb")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}, timeout=120
    )
    assert int(done.stdout.split()[-1]) < most


def test_sounds_of_too_many_samples_are_refused_by_their_header():
    data = bytearray(flac(1, 8))
    total = 590 * 48_000 * 8  # samples of a channel are a 36-bit number
    data[21] = data[21] & 0xF0 | total >> 32
    data[22:26] = struct.pack(">I", total & 0xFFFFFFFF)
    with pytest.raises(BadSample, match=r"a sound of 226560000 samples in 8 channels; at most 67108864, or"):
        read_sound(bytes(data), 10_000)


def test_exif_in_many_pieces_and_large_files_are_refused_at_once():
    whole = picture(kind="JPEG")
    piece = b"\xff\xe1" + struct.pack(">H", 65_535) + b"Exif\0\0" + bytes(65_535 - 8)
    assert read_image(whole[:2] + piece + whole[2:], 10_000).size == (48, 40)
    began = time.process_time()
    with pytest.raises(BadSample, match="more than 64 pieces of Exif data"):
        read_image(whole[:2] + piece * 1000 + whole[2:], 10_000)
    with pytest.raises(BadSample, match=r"a picture of 134217729 bytes; at most 134217728"):
        read_image(bytes((1 << 27) + 1), 10_000)
    assert time.process_time() - began < 2


@pytest.mark.parametrize("kind", ["JPEG", "MPO"])
def test_a_jpeg_of_very_many_scans_is_refused_before_it_is_decoded(kind):
    """10,000 scans of 586 kB in all, each over 64 million pixels, took 26 s."""
    stream, noise = io.BytesIO(), Image.effect_noise((96, 96), 60)
    noise.save(
        stream, kind, progressive=True, **({"save_all": True, "append_images": [noise]} if kind == "MPO" else {})
    )
    data = stream.getvalue()
    assert Image.open(stream).format == kind
    end = data.index(b"\xff\xd9")
    last = data[data.rindex(b"\xff\xda", 0, end) : end]
    assert read_image(data[:end] + last * 10 + data[end:], MAX_PIXELS).size == (96, 96)
    with pytest.raises(BadSample, match="a JPEG of more than 32 scans"):
        read_image(data[:end] + last * 100 + data[end:], MAX_PIXELS)
    with pytest.raises(BadSample, match="a JPEG of more than 4096 segments"):
        read_image(data[:end] + b"\xff\xfe\0\2" * 5000 + data[end:], MAX_PIXELS)


def test_a_webp_beyond_its_own_bound_does_not_blame_the_setting():
    stream = io.BytesIO()
    Image.new("RGB", (5800, 5800)).save(stream, "WEBP", quality=1, method=0)
    with pytest.raises(BadSample, match=r"a WebP of 5800 x 5800 pixels; at most 33554432 are decoded$"):
        read_image(stream.getvalue(), MAX_PIXELS)


def test_the_film_behind_a_motion_photo_is_no_scan():
    """Phones put a few MB of mp4 behind the picture's end; in 4 MB of such bytes a scan's marker stands 60 times."""
    data = picture(size=(64, 48), kind="JPEG")
    film = np.random.default_rng(0).integers(0, 256, 1 << 22, np.uint8).tobytes()
    assert film.count(b"\xff\xda") > 32
    assert read_image(data + film, MAX_PIXELS).size == (64, 48)


def test_a_large_picture_is_what_it_was_at_half_the_size():
    small = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    for scale in (60, 50):  # 17.3 and 12 million pixels
        stream = io.BytesIO()
        Image.fromarray(np.kron(small, np.ones((scale, scale, 1), np.uint8))).save(stream, "PNG", exif=exif)
        made = read_image(stream.getvalue(), MAX_PIXELS)
        side = scale // 2 if 80 * 60 * scale * scale > 1 << 24 else scale
        assert made.size == (60 * side, 80 * side) and made.mode == "RGB"
        pixels = np.asarray(made).reshape(80, side, 60, side, 3)
        assert (pixels == np.rot90(small, -1)[:, None, :, None]).all()


def test_long_signals_are_resampled_as_short_ones(monkeypatch):
    from anymal.adapters import signals

    for old, new in ((48_000, 16_000), (44_101, 16_000), (8000, 48_000), (1013, 48_000)):
        signal = torch.randn(2, 40_000, generator=torch.Generator().manual_seed(0)) + 3
        whole = resample(signal, old, new)
        monkeypatch.setattr(signals, "_LONG", 12_345)
        pieces = resample(signal, old, new)
        monkeypatch.undo()
        assert pieces.shape == whole.shape
        assert torch.allclose(pieces, whole, atol=1e-5)
