"""Musical instruments → audio shards: short phrases with the family that plays, and unseen instruments as questions.

    python data_prep/instruments.py folder=data/demo/audio

The instruments are recordings: those of the soundfont TimGM6mb (GPL-2.0) that the package pretty-midi ships. A clip is
a phrase of random notes, made by playing the recordings at other speeds (`data_prep.soundfont`), in the register of its
family.

Held out are whole instruments, none of whose recordings is heard in training: vibraphone and xylophone, jazz guitar,
ocarina and shakuhachi, trumpet and tenor saxophone, fingered and slap bass, and of the drums the bongos, congas and
timbales.
"""

import functools
import io
import random
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from anymal.command_line import parse_args
from data_prep.demo_assets import cache_folder, read
from data_prep.shards import labelled_sample, write_shards
from data_prep.soundfont import RATE, Soundfont
from data_prep.steps import is_done, mapped, run, worker_pool

_DRUM_BANK = 128


@dataclass(frozen=True, kw_only=True)
class Family:
    """Instruments that are called by one name."""

    keys: range
    """MIDI keys of the lowest notes that are played."""
    train: tuple[int, ...]
    """Presets of General MIDI that are heard in training, counted from zero."""
    test: tuple[int, ...]
    """Presets that are held out."""


FAMILIES = {
    # glockenspiel, music box, tubular bells, marimba, kalimba, tinker bell; vibraphone, xylophone
    "bells": Family(keys=range(60, 85), train=(9, 10, 14, 12, 108, 112), test=(11, 13)),
    # nylon, steel, clean and muted guitar, banjo, shamisen; jazz guitar
    "guitar": Family(keys=range(45, 68), train=(24, 25, 27, 28, 105, 106), test=(26,)),
    # piccolo, flute, recorder, pan flute, bottle; shakuhachi, ocarina
    "flute": Family(keys=range(60, 80), train=(72, 73, 74, 75, 76), test=(77, 79)),
    # trombone, tuba, muted trumpet, French horn, brass section, soprano, alto and baritone saxophone; trumpet, tenor
    "horn": Family(keys=range(46, 68), train=(57, 58, 59, 60, 61, 64, 65, 67), test=(56, 66)),
    # acoustic, picked, fretless and second slap bass; fingered and first slap bass
    "bass": Family(keys=range(28, 44), train=(32, 34, 35, 37), test=(33, 36)),
    "drums": Family(keys=range(35, 60), train=(0, 25, 40), test=(0,)),  # three kits; the keys below of one
}
"""What plays → who plays it. The drums' presets are kits; there a key is an instrument."""
HELD_OUT_DRUMS = range(60, 67)
"""Keys of a drum kit that are held out: bongos, congas, timbales."""
_INTERVALS = (0, 2, 4, 5, 7, 9, 12)


@dataclass(kw_only=True)
class Settings:
    """Settings of this step."""

    folder: str = MISSING
    """The folder to write train and test into."""
    cache: str = ""
    """Folder of the downloads, as in demo_assets.py."""
    per_family: int = 120
    """Training clips of each family."""
    test_per_family: int = 8
    """Held-out clips of each family."""
    seconds: float = 3.0
    """Length of a clip."""
    seed: int = 0
    """Which notes are played, and the clips' order."""


@functools.lru_cache(maxsize=1)
def soundfont(cache: Path) -> Soundfont:
    """The demo's soundfont; parsed once in a process."""
    return Soundfont(read("pretty-midi", "pretty_midi/TimGM6mb.sf2", cache))


@dataclass(frozen=True, kw_only=True)
class _Task:
    family: str
    preset: int
    name: str
    seconds: float
    seed: int
    test: bool
    cache: Path


def phrase(keys: range, seconds: float, rng: random.Random, melodic: bool) -> list[tuple[float, float, int, int]]:
    """Random notes (start, length, key, velocity) for `seconds`: around one key if melodic, else any of the keys."""
    notes, now, low = [], 0.05, rng.choice(keys)
    while now < seconds - 0.3:
        length = rng.choice((0.3, 0.5, 0.8)) if melodic else rng.choice((0.15, 0.25, 0.4))
        key = low + rng.choice(_INTERVALS) if melodic else rng.choice(keys)
        notes.append((now, length, key, rng.randint(70, 120)))
        now += length
    return notes


def _make(task: _Task) -> dict:
    """Play one sample; runs in a worker process. All its randomness comes from the seed and the sample's name."""
    import soundfile

    rng = random.Random(f"{task.seed}/{task.name}")
    drums = task.family == "drums"
    keys = HELD_OUT_DRUMS if drums and task.test else FAMILIES[task.family].keys
    notes = phrase(keys, task.seconds, rng, melodic=not drums)
    font, bank = soundfont(task.cache), _DRUM_BANK if drums else 0
    buffer = io.BytesIO()
    soundfile.write(buffer, font.play(bank, task.preset, notes, task.seconds), RATE, format="FLAC", subtype="PCM_16")
    about = {"instrument": font.names[bank, task.preset], "preset": task.preset}
    options = FAMILIES if task.test else ()
    return labelled_sample(task.name, "audio", "flac", buffer.getvalue(), task.family, options=options, **about)


def _tasks(settings: Settings, test: bool) -> list[_Task]:
    cache, count = cache_folder(settings.cache), settings.test_per_family if test else settings.per_family
    todo = [
        _Task(
            family=name,
            preset=presets[number % len(presets)],
            name=f"audio-{name}-{'test' if test else 'train'}-{number:03d}",
            seconds=settings.seconds,
            seed=settings.seed,
            test=test,
            cache=cache,
        )
        for name, family in FAMILIES.items()
        for presets in [family.test if test else family.train]
        for number in range(count)
    ]
    random.Random(settings.seed).shuffle(todo)
    return todo


def make(settings: Settings, pool: Executor) -> None:
    """Write ``train`` and ``test`` shards into the settings' folder, whichever is not there yet."""
    for name in ("train", "test"):
        folder = Path(settings.folder, name)
        if not is_done(folder):
            samples: Iterator[dict] = mapped(pool, _make, _tasks(settings, name == "test"), f"instruments, {name}")
            write_shards(folder, samples, per_shard=96)


def main(argv: list[str] | None = None) -> None:
    """The program."""
    settings = parse_args(Settings, __doc__, argv)
    with worker_pool() as pool:
        make(settings, pool)


if __name__ == "__main__":
    run(main)
