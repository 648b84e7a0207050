"""Musical instruments → audio shards: short phrases with the family that plays, and unseen instruments as questions.

    python data_prep/demo/instruments.py folder=data/demo/audio

The instruments are recordings: those of the soundfont TimGM6mb (GPL-2.0) that the package pretty-midi ships. A clip is
a phrase of random notes, made by playing the recordings at other speeds (`anymal.data_prep.demo.soundfont`), in the
register of its family.

Held out are whole instruments: presets that share a recording are one instrument, and the seed draws a third of a
family's for the test and a sixth, at least one, for validation. That is one to three instruments of a family for the
test, ten or so in all, and one for validation: an interval that counts the test's 324 clips is too narrow for what
other instruments would give. Of the drums keys are held out, since the kits share most recordings.
"""

import functools
import io
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from anymal.config.command_line import parse_args, run_program
from anymal.data_prep.demo.assets import cache_folder, read
from anymal.data_prep.demo.labelled import SPLITS, labelled_sample
from anymal.data_prep.demo.soundfont import RATE, Soundfont
from anymal.data_prep.steps import mapped, worker_pool
from anymal.data_prep.write import write_shards
from anymal.files import is_done

_DRUM_BANK = 128


@dataclass(frozen=True, kw_only=True)
class Family:
    """Instruments that are called by one name."""

    keys: range
    """MIDI keys of the lowest notes that are played."""
    presets: tuple[int, ...]
    """Presets of General MIDI, counted from zero; of the drums, kits."""


FAMILIES = {
    # celesta, glockenspiel, music box, vibraphone, marimba, xylophone, tubular bells, kalimba, tinker bell
    "bells": Family(keys=range(60, 85), presets=(8, 9, 10, 11, 12, 13, 14, 108, 112)),
    # nylon, steel, jazz, clean, muted, overdriven and distorted guitar, banjo, shamisen
    "guitar": Family(keys=range(45, 68), presets=(24, 25, 26, 27, 28, 29, 30, 105, 106)),
    # piccolo, flute, recorder, pan flute, bottle, shakuhachi, ocarina
    "flute": Family(keys=range(60, 80), presets=(72, 73, 74, 75, 76, 77, 79)),
    # trumpet, trombone, tuba, muted trumpet, French horn, brass section; soprano, alto, tenor and baritone saxophone
    "horn": Family(keys=range(46, 68), presets=(56, 57, 58, 59, 60, 61, 64, 65, 66, 67)),
    # acoustic, fingered, picked, fretless, first and second slap bass
    "bass": Family(keys=range(28, 44), presets=(32, 33, 34, 35, 36, 37)),
    "drums": Family(keys=range(35, 67), presets=(0, 32, 40)),  # three kits; a key is an instrument
}
"""What plays → who plays it."""
_INTERVALS = (0, 2, 4, 5, 7, 9, 12)


@dataclass(kw_only=True)
class Settings:
    """Settings of this step."""

    folder: str = MISSING
    """The folder to write train, validation and test into."""
    cache: str = ""
    """Folder of the downloads, as in assets.py."""
    per_family: int = 120
    """Training clips of each family."""
    validation_per_family: int = 18
    """Clips of each family for validation."""
    test_per_family: int = 54
    """Clips of each family for the test."""
    seconds: float = 3.0
    """Length of a clip."""
    seed: int = 0
    """Which instruments are held out, which notes are played, and the clips' order."""


@functools.lru_cache(maxsize=1)
def soundfont(cache: Path) -> Soundfont:
    """The demo's soundfont; parsed once in a process."""
    return Soundfont(read("pretty-midi", "pretty_midi/TimGM6mb.sf2", cache))


def instruments_of(members: Iterable[int], recordings: Callable[[int], set[int]]) -> list[list[int]]:
    """`members` that share a recording, directly or through others, put together."""
    instruments: list[tuple[list[int], set[int]]] = []
    for member in members:
        alike, heard = [member], recordings(member)
        for other in [other for other in instruments if other[1] & heard]:
            instruments.remove(other)
            alike, heard = other[0] + alike, other[1] | heard
        instruments.append((alike, heard))
    return [alike for alike, _ in instruments]


def split(font: Soundfont, seed: int) -> dict[str, dict[str, list[list[int]]]]:
    """Split → family → its instruments, each a list of presets (of the drums: of keys) that share recordings."""
    splits: dict[str, dict[str, list[list[int]]]] = {name: {} for name in SPLITS}
    for name, family in FAMILIES.items():
        if name == "drums":
            kits = [functools.partial(font.recordings, _DRUM_BANK, kit) for kit in family.presets]
            of = instruments_of(
                family.keys, lambda key, kits=kits: set().union(*(k(range(key, key + 1)) for k in kits))
            )
        else:
            of = instruments_of(family.presets, functools.partial(font.recordings, 0))
        random.Random(f"{seed}/{name}").shuffle(of)
        test, validation = len(of) // 3, max(1, len(of) // 6)
        splits["test"][name], splits["validation"][name] = of[:test], of[test : test + validation]
        splits["train"][name] = of[test + validation :]
    return splits


@dataclass(frozen=True, kw_only=True)
class _Task:
    family: str
    preset: int
    keys: Sequence[int]
    source: str
    name: str
    seconds: float
    seed: int
    held_out: bool
    cache: Path


def phrase(
    keys: Sequence[int], seconds: float, rng: random.Random, melodic: bool
) -> list[tuple[float, float, int, int]]:
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
    notes = phrase(task.keys, task.seconds, rng, melodic=not drums)
    font, bank = soundfont(task.cache), _DRUM_BANK if drums else 0
    buffer = io.BytesIO()
    soundfile.write(buffer, font.play(bank, task.preset, notes, task.seconds), RATE, format="FLAC", subtype="PCM_16")
    about = {"instrument": font.names[bank, task.preset], "preset": task.preset, "source": task.source}
    options = FAMILIES if task.held_out else ()
    return labelled_sample(task.name, "audio", "flac", buffer.getvalue(), task.family, options=options, **about)


def _tasks(settings: Settings, cache: Path, name: str) -> list[_Task]:
    font, todo = soundfont(cache), []
    counts = {
        "train": settings.per_family,
        "validation": settings.validation_per_family,
        "test": settings.test_per_family,
    }
    for family, instruments in split(font, settings.seed)[name].items():
        presets, keys = instruments, FAMILIES[family].keys
        if family == "drums":
            presets, keys = [list(FAMILIES[family].presets)], sorted(key for alike in instruments for key in alike)
        for number in range(counts[name]):
            alike = presets[number % len(presets)]
            task = _Task(
                family=family,
                preset=alike[number // len(presets) % len(alike)],
                keys=keys,
                source="drums" if family == "drums" else font.names[0, alike[0]],
                name=f"audio-{family}-{name}-{number:03d}",
                seconds=settings.seconds,
                seed=settings.seed,
                held_out=name != "train",
                cache=cache,
            )
            todo.append(task)
    random.Random(settings.seed).shuffle(todo)
    return todo


def make(settings: Settings, pool: Executor) -> None:
    """Write the shards of every split into the settings' folder, whichever is not there yet."""
    cache = cache_folder(settings.cache)
    for name in SPLITS:
        folder = Path(settings.folder, name)
        if not is_done(folder):
            samples: Iterator[dict] = mapped(pool, _make, _tasks(settings, cache, name), f"instruments, {name}")
            write_shards(folder, samples, per_shard=96)


def main(argv: list[str] | None = None) -> None:
    """The program."""
    settings = parse_args(Settings, __doc__, argv)
    with worker_pool() as pool:
        make(settings, pool)


def start() -> None:
    """Run the program, for the command line."""
    run_program(main)


if __name__ == "__main__":
    start()
