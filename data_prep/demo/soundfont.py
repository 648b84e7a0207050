"""A SoundFont 2 file as something to play: its instruments' recordings, resampled to the notes that are asked for.

    file.sf2 ──Soundfont──▶ zones of a preset (which recording for which keys) ──play──▶ waveform at 16 kHz

Used by `anymal.data_prep.demo.instruments`. Of the format (SoundFont Technical Specification 2.04) it reads what
decides how a note sounds: recordings with their loops, key and velocity ranges, tuning, and the volume envelope;
modulators, filters, effects and what a preset adds to its instruments' settings are left out.
"""

import itertools
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from anymal.errors import UserError

RATE = 16000
_INNER_RATE = 2 * RATE  # notes are made at this rate and then filtered down, so that high partials do not fold back
_GENERATORS = {
    # number in the specification: (name, value where a zone does not say)
    33: ("delay", -12000),
    34: ("attack", -12000),
    35: ("hold", -12000),
    36: ("decay", -12000),
    37: ("sustain", 0),
    38: ("release", -12000),
    43: ("keys", 127 << 8),
    44: ("velocities", 127 << 8),
    48: ("attenuation", 0),
    51: ("semitones", 0),
    52: ("cents", 0),
    54: ("loops", 0),
    56: ("cents_per_key", 100),
    58: ("root", -1),
}
_INSTRUMENT, _SAMPLE = 41, 53


@dataclass(frozen=True, kw_only=True)
class Zone:
    """One recording and how a range of keys plays it."""

    sample: int
    """Index of the recording: two instruments that share one sound alike."""
    settings: dict[str, int]
    """Values of `_GENERATORS`, by name."""


class Soundfont:
    """A parsed file.

    Args:
        data: The bytes of an ``.sf2`` file.

    Raises:
        UserError: Not a SoundFont 2 file, or one that ends too early.
    """

    def __init__(self, data: bytes):
        if data[:4] != b"RIFF" or data[8:12] != b"sfbk":
            raise UserError(f"not a SoundFont 2 file: it begins with {data[:12]!r}, not with RIFF....sfbk")
        try:
            chunks = _chunks(data, 12)
            self.pcm = np.frombuffer(chunks[b"smpl"], "<i2")
            self.headers = list(struct.iter_unpack("<20s5IBbHH", chunks[b"shdr"]))[:-1]  # the last marks the end
            names = [(f[0], f[2], f[1], f[3]) for f in struct.iter_unpack("<20s3H3I", chunks[b"phdr"])]
            instruments = [bag for _, bag in struct.iter_unpack("<20sH", chunks[b"inst"])]
            preset_zones = _zones(chunks[b"pbag"], chunks[b"pgen"])
            instrument_zones = _zones(chunks[b"ibag"], chunks[b"igen"])
        except (KeyError, struct.error) as error:
            raise UserError(f"the SoundFont 2 file is damaged or cut: {error!r}") from error
        self.names = {(bank, number): name.split(b"\0")[0].decode("latin-1") for name, bank, number, _ in names[:-1]}
        self._zones: dict[tuple[int, int], list[Zone]] = {}
        for (_, bank, number, first), (*_, end) in itertools.pairwise(names):
            played = [zone[_INSTRUMENT] for zone in preset_zones[first:end] if _INSTRUMENT in zone]
            self._zones[bank, number] = [
                zone
                for index in played
                for zone in _resolve(instrument_zones[instruments[index] : instruments[index + 1]])
            ]

    def zones(self, bank: int, number: int) -> list[Zone]:
        """The zones of a preset (bank 128 holds the drum kits)."""
        return self._zones[bank, number]

    def recordings(self, bank: int, number: int, keys: range = range(128)) -> set[int]:
        """The recordings that a preset plays for `keys`. The two channels of a stereo recording come together."""
        numbers = set()
        for zone in self.zones(bank, number):
            if any(_within(key, zone.settings["keys"]) for key in keys):
                *_, link, kind = self.headers[zone.sample]
                numbers |= {zone.sample, link} if kind in (2, 4) else {zone.sample}
        return numbers

    def play(self, bank: int, number: int, notes: list[tuple[float, float, int, int]], seconds: float) -> np.ndarray:
        """Play notes (start in s, length in s, MIDI key, velocity 1 to 127) → [seconds * 16000] float32, peak 0.7.

        Raises:
            UserError: None of the preset's recordings plays any of the keys.
        """
        mix = np.zeros(round(seconds * _INNER_RATE))
        for start, length, key, velocity in notes:
            for zone in self.zones(bank, number):
                if _within(key, zone.settings["keys"]) and _within(velocity, zone.settings["velocities"]):
                    first = round(start * _INNER_RATE)
                    sound = self._note(zone, key, length)[: len(mix) - first]
                    mix[first : first + len(sound)] += sound * (velocity / 127) ** 2
        low = np.fft.irfft(np.fft.rfft(mix)[: len(mix) // 4 + 1], len(mix) // 2)  # what half the rate can hold
        peak = np.abs(low).max()
        if peak < 1e-9:
            keys = [key for _, _, key, _ in notes]
            raise UserError(f"{self.names[bank, number]} has no recording for the keys {keys}")
        return (0.7 * low / peak).astype(np.float32)

    def _note(self, zone: Zone, key: int, length: float) -> np.ndarray:
        settings = zone.settings
        _, start, end, loop_start, loop_end, rate, original, correction, _, _ = self.headers[zone.sample]
        root = settings["root"] if settings["root"] >= 0 else original
        cents = (key - root) * settings["cents_per_key"] + settings["semitones"] * 100 + settings["cents"] + correction
        step = rate * 2 ** (cents / 1200) / _INNER_RATE
        release = min(_seconds(settings["release"]), 1.0)
        at = np.arange(round((length + release) * _INNER_RATE)) * step
        if settings["loops"] & 1 and loop_end > loop_start:
            into, period = loop_start - start, loop_end - loop_start
            at = np.where(at < into + period, at, into + (at - into) % period)
        else:
            at = at[at < end - start - 1]
        wave = np.interp(at, np.arange(end - start), self.pcm[start:end]) / 32768
        attenuation = 10 ** (-settings["attenuation"] * 0.4 / 200)  # as the format's first hardware took it
        return wave * _envelope(settings, len(wave), length, release) * attenuation


def _chunks(data: bytes, at: int) -> dict[bytes, bytes]:
    """RIFF chunks by name, those of the lists inside included."""
    chunks = {}
    while at + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, at)
        body = data[at + 8 : at + 8 + size]
        chunks |= _chunks(body, 4) if name == b"LIST" else {name: body}
        at += 8 + size + size % 2
    return chunks


def _zones(bags: bytes, generators: bytes) -> list[dict[int, int]]:
    """Each zone's generators: number → value (signed; ranges are low byte to high byte)."""
    values = list(struct.iter_unpack("<Hh", generators))
    starts = [first for first, _ in struct.iter_unpack("<HH", bags)]
    return [dict(values[first:end]) for first, end in itertools.pairwise(starts)]


def _resolve(zones: list[dict[int, int]]) -> list[Zone]:
    """An instrument's zones; a first zone without a recording holds what the others leave out."""
    common = zones[0] if zones and _SAMPLE not in zones[0] else {}
    resolved: list[Zone] = []
    for zone in zones:
        if _SAMPLE in zone:
            values: dict[int, Any] = common | zone
            settings = {name: values.get(number, default) for number, (name, default) in _GENERATORS.items()}
            resolved.append(Zone(sample=zone[_SAMPLE], settings=settings))
    return resolved


def _within(value: int, limits: int) -> bool:
    return (limits & 0xFF) <= value <= (limits >> 8 & 0xFF)


def _seconds(timecents: int) -> float:
    return 2 ** (timecents / 1200)


def _envelope(settings: dict[str, int], samples: int, length: float, release: float) -> np.ndarray:
    """Loudness over time: a rise, a hold, a fall in decibels to the sustained level, and the fall after the key is up.

    The format gives the falls as the time to lose 100 dB.
    """
    time = np.arange(samples) / _INNER_RATE
    attack = min(_seconds(settings["attack"]), 0.5)
    falling = time - attack - min(_seconds(settings["hold"]), 2.0)
    loss = np.clip(100 * falling / _seconds(settings["decay"]), 0, settings["sustain"] / 10)
    loss += np.clip(100 * (time - length) / max(release, 0.02), 0, 100)
    return np.minimum(time / attack, 1) * np.exp(loss * (-np.log(10) / 20))
