"""Mutants of sounds: WAV, FLAC, Ogg Vorbis, Opus and MP3 whose sizes and checksums are right around what is not."""

import io
import struct
from random import Random

import numpy as np
from fuzz_bytes import Format, blind, crc, flip, in_place, number, overwrite, poke, shuffled
from fuzz_pictures import riff, to_riff

RATES = (0, 1, 999, 1000, 1013, 4001, 7919, 8000, 11025, 16001, 22050, 44101, 48000, 96000, 400_000, 400_001, 655_350)
"""Rates at the bounds of what is read, and some whose ratio to usual rates is awkward."""
LARGE = (1e38, -3.4e38, 1e30, 1e19, 1e300, float("inf"), float("nan"), 1e-45, -0.0)


def _sound(
    kind: str, subtype: str | None = None, *, rate: int = 16000, channels: int = 1, seconds: float = 0.6
) -> bytes:
    import soundfile

    time = np.arange(int(seconds * rate)) / rate
    wave = 0.3 * np.sin(2 * np.pi * 440 * time) + 0.02 * np.random.default_rng(0).standard_normal(len(time))
    stream = io.BytesIO()
    soundfile.write(stream, np.stack([wave] * channels, 1), rate, format=kind, subtype=subtype)
    return stream.getvalue()


def opens(data: bytes) -> bool:
    """Whether libsndfile reads the header."""
    import soundfile

    with soundfile.SoundFile(io.BytesIO(data)) as file:
        return file.samplerate > 0


# ------------------------------------------------------------------------------------------------------------ WAV


def _mutate_wav(rng: Random, data: bytes) -> bytes:
    chunks = riff(data)
    names = [name for name, _ in chunks]
    fmt, sound = names.index(b"fmt "), names.index(b"data")
    choice = rng.randrange(6)
    if choice == 0:
        chunks[fmt] = (b"fmt ", _fmt(rng, chunks[fmt][1]))
    elif choice == 1:
        rate = struct.pack("<I", rng.choice(RATES))
        chunks[fmt] = (b"fmt ", chunks[fmt][1][:4] + rate + chunks[fmt][1][8:])
    elif choice == 2:
        chunks[sound] = (b"data", blind(rng, chunks[sound][1]))
    elif choice == 3:
        body = rng.randbytes(rng.choice((0, 4, 28, 602)))
        chunks.insert(rng.randint(0, len(chunks)), (rng.choice((b"LIST", b"fact", b"smpl", b"bext", b"cue ")), body))
    elif choice == 4:
        chunks = shuffled(rng, chunks)
    else:
        data = to_riff(b"WAVE", chunks)
        at = data.index(b"data") + 4
        return data[:at] + struct.pack("<I", number(rng, 32, len(chunks[sound][1]))) + data[at + 4 :]
    return to_riff(b"WAVE", chunks)


def _fmt(rng: Random, body: bytes) -> bytes:
    tag, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", body)
    at = rng.randrange(3)
    tag = rng.choice((1, 2, 3, 6, 7, 0x11, 0x31, 0xFFFE, number(rng, 16))) if at == 0 else tag
    channels = rng.choice((0, 2, 8, 16, 17, 255, 65535)) if at == 1 else channels
    bits = rng.choice((0, 1, 4, 8, 12, 24, 32, 64, 128)) if at == 2 else bits
    align = channels * bits // 8 % 65536
    fresh = struct.pack("<HHIIHH", tag, channels, rate, rate * align % (1 << 32), align, bits)
    return rng.choice((fresh, fresh, in_place(rng, body))) + body[16:]


def _floats(rng: Random, data: bytes) -> bytes:
    """A float WAV some of whose samples, or all, are too large to be squared, or no numbers."""
    import soundfile

    wave = np.frombuffer(rng.randbytes(9600), np.int8).astype(np.float64) / 128
    value = rng.choice(LARGE)
    kind = rng.choice(("one", "all", "noise"))
    if kind == "one":
        wave[rng.randrange(len(wave))] = value
    elif kind == "all":
        wave[:] = value
    else:
        wave *= value
    subtype = rng.choice(("FLOAT", "DOUBLE"))
    stream = io.BytesIO()
    with np.errstate(over="ignore", invalid="ignore"):
        wave = wave.astype(np.float32) if subtype == "FLOAT" else wave
    soundfile.write(stream, wave, 16000, format="WAV", subtype=subtype)
    return stream.getvalue()


def _wav_bomb(rng: Random) -> bytes:
    """Rates whose ratio to the encoder's needs a large filter bank, and many channels."""
    rate, channels = rng.choice((1013, 1009, 1021, 47999, 399_989, 44_087)), rng.choice((1, 1, 16))
    samples = int(rate * rng.choice((0.2, 1, 20 / channels)))
    fmt = struct.pack("<HHIIHH", 1, channels, rate, rate * channels, channels, 8)
    return to_riff(b"WAVE", [(b"fmt ", fmt), (b"data", bytes([128, 140]) * (samples * channels // 2))])


# ----------------------------------------------------------------------------------------------------------- FLAC


def _crc8(data: bytes) -> bytes:
    return bytes([crc(data, 8, 0x07)])


def _crc16(data: bytes) -> bytes:
    return struct.pack(">H", crc(data, 16, 0x8005))


def _flac_parts(data: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """The blocks of metadata, and the frames."""
    found, at, last = [], 4, False
    while not last:
        last, kind = bool(data[at] & 0x80), data[at] & 0x7F
        size = int.from_bytes(data[at + 1 : at + 4], "big")
        found.append((kind, data[at + 4 : at + 4 + size]))
        at += 4 + size
    return found, data[at:]


def _flac(blocks: list[tuple[int, bytes]], frames: bytes) -> bytes:
    made = []
    for i, (kind, body) in enumerate(blocks):
        flag = 0x80 if i == len(blocks) - 1 else 0
        made.append(bytes([flag | kind & 0x7F]) + len(body).to_bytes(3, "big") + body)
    return b"fLaC" + b"".join(made) + frames


def _streaminfo(rate: int, channels: int, bits: int, samples: int, block: tuple[int, int] = (16, 65535)) -> bytes:
    packed = (rate & 0xFFFFF) << 44 | (channels - 1 & 7) << 41 | (bits - 1 & 31) << 36 | samples & (1 << 36) - 1
    return struct.pack(">HH", *block) + bytes(6) + packed.to_bytes(8, "big") + bytes(16)


def _frame_starts(frames: bytes) -> list[int]:
    """Where frames begin: a sync word, and a header of one of the usual lengths whose checksum is right."""
    found = []
    for at in range(len(frames) - 16):
        if frames[at] == 0xFF and frames[at + 1] & 0xFE == 0xF8:
            fits = [n for n in range(5, 15) if _crc8(frames[at : at + n]) == frames[at + n : at + n + 1]]
            if fits:
                found.append(at)
    return found


def _mutate_flac(rng: Random, data: bytes) -> bytes:
    blocks, frames = _flac_parts(data)
    choice = rng.randrange(6)
    if choice == 0:
        fields = struct.unpack(">HH6x8s16x", blocks[0][1])
        packed = int.from_bytes(fields[2], "big")
        rate, channels, bits, samples = (
            packed >> 44,
            (packed >> 41 & 7) + 1,
            (packed >> 36 & 31) + 1,
            packed & (1 << 36) - 1,
        )
        rate = rng.choice((rate, rate, *RATES))
        channels = rng.choice((channels, channels, 1, 2, 8))
        bits, samples = rng.choice((bits, bits, 4, 8, 24, 32)), rng.choice((samples, 0, number(rng, 36, samples)))
        blocks[0] = (0, _streaminfo(rate, channels, bits, samples, (number(rng, 16, 4096), number(rng, 16, 4096))))
    elif choice == 1:
        body = rng.choice((rng.randbytes(40), struct.pack("<I", 1 << 31) + b"x", bytes(1 << 20)))
        blocks.insert(rng.randint(1, len(blocks)), (rng.choice((1, 2, 3, 4, 5, 6, 127)), body))
    elif choice == 2:
        frames = blind(rng, frames)
    else:
        frames = _mutate_frame(rng, frames)
    return _flac(blocks, frames)


def _mutate_frame(rng: Random, frames: bytes) -> bytes:
    """Change what is in one frame, and repair its checksum."""
    starts = [*_frame_starts(frames), len(frames)]
    at = rng.randrange(len(starts) - 1)
    start, end = starts[at], starts[at + 1]
    body = in_place(rng, frames[start : end - 2], rng.choice((6, 7, 8)))
    whole = body + _crc16(body)
    return frames[:start] + whole * rng.choice((1, 1, 1, 20)) + frames[end:]


def _flac_bomb(rng: Random) -> bytes:
    """Minutes of silence in many channels: each frame of 65,535 samples takes a few dozen bytes."""
    channels, rate = rng.choice((1, 2, 8, 8)), rng.choice((8000, 48_000, 96_000, 192_000, 400_000))
    count = int(rng.choice((30, 300, 590)) * rate) // 65535
    made = []
    for i in range(max(count, 1)):
        coded = bytes([i]) if i < 0x80 else bytes([0xC0 | i >> 6, 0x80 | i & 63])
        if i >= 0x800:
            coded = bytes([0xE0 | i >> 12, 0x80 | i >> 6 & 63, 0x80 | i & 63])
        head = b"\xff\xf8" + bytes([0x70, channels - 1 << 4 | 0x08]) + coded + b"\xff\xfe"
        body = head + _crc8(head) + b"\0\1\0" * channels  # a constant of 16 bits for each channel
        made.append(body + _crc16(body))
    samples = rng.choice((max(count, 1) * 65535, max(count, 1) * 65535, 0))
    return _flac([(0, _streaminfo(rate, channels, 16, samples, (65535, 65535)))], b"".join(made))


# ------------------------------------------------------------------------------------------------- Ogg and MP3


def _pages(data: bytes) -> list[tuple[bytes, bytes, bytes]]:
    """Each page's header without sizes and checksum, its segments' sizes, and its body."""
    found, at = [], 0
    while at < len(data):
        sizes = data[at + 27 : at + 27 + data[at + 26]]
        body = at + 27 + len(sizes)
        found.append((data[at : at + 22], sizes, data[body : body + sum(sizes)]))
        at = body + sum(sizes)
    return found


def _ogg(pages: list[tuple[bytes, bytes, bytes]]) -> bytes:
    made = []
    for head, sizes, body in pages:
        rest = bytes([len(sizes) & 255]) + sizes + body
        made.append(head + struct.pack("<I", crc(head + bytes(4) + rest, 32, 0x04C11DB7)) + rest)
    return b"".join(made)


def _mutate_ogg(rng: Random, data: bytes) -> bytes:
    pages = _pages(data)
    choice = rng.randrange(9)
    at = rng.randrange(2 if len(pages) > 2 and choice < 5 else 0, len(pages))  # most of them behind the headers
    head, sizes, body = pages[at]
    if choice < 5:
        pages[at] = (head, sizes, in_place(rng, body))
    elif choice == 5:
        pages[at] = (in_place(rng, head, 5), sizes, body)  # flags, granule position, serial, sequence
    elif choice == 6:
        pages[at] = (head, in_place(rng, sizes), body)
    elif choice == 7:
        pages = shuffled(rng, pages, first=rng.choice((0, 1, 2, 2)))
    else:
        pages[0] = (pages[0][0], pages[0][1], poke(rng, pages[0][2], rng.choice((7, 8, 9)), None, "<"))
    return _ogg(pages)


def _mutate_mp3(rng: Random, data: bytes) -> bytes:
    syncs = [at for at in range(len(data) - 4) if data[at] == 0xFF and data[at + 1] & 0xE0 == 0xE0]
    at, choice = rng.choice(syncs), rng.randrange(5)
    if choice == 0:
        return data[: at + 2] + bytes([data[at + 2] ^ 1 << rng.randrange(8)]) + data[at + 3 :]
    if choice == 1:
        size = rng.choice((10, 1 << 20))
        stated = bytes(number(rng, 28, size) >> shift & 127 for shift in (21, 14, 7, 0))
        return b"ID3\4\0" + bytes([rng.randrange(256)]) + stated + rng.randbytes(10) + bytes(size - 10) + data
    if choice == 2 and (tag := max(data.find(b"Xing"), data.find(b"Info"))) > 0:
        return poke(rng, data, tag + 4, tag + 120, ">")
    if choice == 3:
        return data[:at] + data[at:] * rng.choice((2, 20, 300))
    return rng.choice((flip, overwrite, blind))(rng, data, start=min(at + 4, len(data) - 1))


def _wav_seeds() -> list[bytes]:
    kinds = ("PCM_16", "PCM_24", "PCM_U8", "FLOAT", "DOUBLE", "ULAW", "ALAW", "IMA_ADPCM", "MS_ADPCM")
    return [*(_sound("WAV", kind) for kind in kinds), _sound("WAVEX", "PCM_16", channels=2, rate=44100)]


FORMATS = {
    "wav": Format(
        suffix="wav",
        make_seeds=_wav_seeds,
        structured=[_mutate_wav, _mutate_wav, _floats],
        bombs=[_wav_bomb],
        probe=opens,
        header=48,
    ),
    "flac": Format(
        suffix="flac",
        make_seeds=lambda: [
            _sound("FLAC"),
            _sound("FLAC", "PCM_24", channels=2),
            _sound("FLAC", rate=48000, channels=6),
        ],
        structured=[_mutate_flac],
        bombs=[_flac_bomb],
        probe=opens,
        header=42,
    ),
    "ogg": Format(
        suffix="ogg",
        make_seeds=lambda: [_sound("OGG", "VORBIS"), _sound("OGG", "VORBIS", rate=44100, channels=2, seconds=2.0)],
        structured=[_mutate_ogg],
        probe=opens,
        header=4400,
    ),
    "opus": Format(
        suffix="opus",
        make_seeds=lambda: [_sound("OGG", "OPUS"), _sound("OGG", "OPUS", rate=48000, channels=2, seconds=1.3)],
        structured=[_mutate_ogg],
        probe=opens,
        header=900,
    ),
    "mp3": Format(
        suffix="mp3",
        make_seeds=lambda: [_sound("MP3"), _sound("MP3", rate=44100, channels=2)],
        structured=[_mutate_mp3],
        probe=opens,
        header=40,
    ),
}
