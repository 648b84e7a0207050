"""Recordings of a smartwatch → IMU shards: five-second windows with the exercise that was done, split by person.

    python data_prep/demo/smartwatch.py folder=data/demo/imu

The package seglearn (BSD) ships what a watch measured while ten people did seven shoulder exercises (Burns et al.,
arXiv 1802.01489): 140 recordings, 81 minutes, at 50 Hz. The accelerometer is in g and becomes m/s² here; the gyroscope
is in rad/s. The seed deals the people: three to test, two to validation, five to training. Held-out windows overlap by
up to half: the test's 308 are of three people, and an interval that counts windows is too narrow for what other people
would give. The training shards serve two programs: ``anymal pretrain-imu-encoder`` reads ``imu.npy`` and the label
in ``json``, stage 1 reads ``imu.npy`` and ``txt``.

The recordings come as a pickle, which could run code when read. It is pinned by hash, and read by an unpickler that
knows numpy's arrays and nothing else; shards hold plain arrays.
"""

import io
import pickle
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import MISSING
from tqdm import tqdm

from anymal.config.command_line import parse_args, run_program
from anymal.data_prep.demo.assets import cache_folder, read
from anymal.data_prep.demo.labelled import SPLITS, labelled_sample
from anymal.data_prep.write import write_shards
from anymal.errors import UserError
from anymal.files import is_done

EXERCISES = {
    "PEN": "pendulum swing",
    "ABD": "arm abduction",
    "FEL": "forward elevation",
    "IR": "internal rotation",
    "ER": "external rotation",
    "TRAP": "trapezius extension",
    "ROW": "upright row",
}
"""The recordings' labels → what is said of them."""
VALIDATION_PEOPLE, TEST_PEOPLE = 2, 3
"""How many people are held out."""
RATE, SECONDS = 50, 5
_GRAVITY = 9.80665
_PICKLED = {
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),  # how older pickles write bytes
}


@dataclass(kw_only=True)
class Settings:
    """Settings of this step."""

    folder: str = MISSING
    """The folder to write train, validation and test into."""
    cache: str = ""
    """Folder of the downloads, as in assets.py."""
    per_exercise: int = 140
    """Training windows of each exercise; they begin at every second."""
    validation_per_exercise: int = 24
    """Windows of each exercise for validation; they overlap by half at most, as those for the test."""
    test_per_exercise: int = 44
    """Windows of each exercise for the test."""
    seed: int = 0
    """Who is held out, which windows are taken, and their order."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One person doing one exercise with one arm."""

    number: int
    """Its place in the file."""
    person: int
    """1 to 10."""
    side: str
    """left or right: the arm with the watch."""
    exercise: str
    """A value of `EXERCISES`."""
    motion: np.ndarray
    """[samples, 6] float32 at 50 Hz: accelerometer x, y, z in m/s² (gravity included), gyroscope x, y, z in rad/s."""


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core")  # its name before numpy 2
        if (module, name) not in _PICKLED:
            raise UserError(f"the pickle asks for {module}.{name}; only numpy's arrays are allowed")
        return super().find_class(module, name)


def unpickle_arrays(data: bytes) -> Any:
    """The Python object in a ``.npy`` file of objects, if it is made of plain values and numpy arrays.

    Raises:
        UserError: The file asks for anything else.
    """
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)
    return _ArraysOnly(file, encoding="latin1").load()


def recordings(cache: Path) -> list[Recording]:
    """The 140 recordings."""
    data = unpickle_arrays(read("seglearn", "seglearn/data/watch_dataset.npy", cache)).item()
    labels = [EXERCISES[data["y_labels"][label]] for label in data["y"]]
    rows = zip(data["subject"], data["side"], labels, data["X"], strict=True)
    units = np.array([_GRAVITY] * 3 + [1] * 3)
    return [
        Recording(
            number=number,
            person=int(person),
            side="right" if side else "left",
            exercise=exercise,
            motion=(motion * units).astype(np.float32),
        )
        for number, (person, side, exercise, motion) in enumerate(rows)
    ]


def split(every: list[Recording], seed: int) -> dict[str, list[Recording]]:
    """The recordings of each split; all of one person's are in one."""
    people = sorted({recording.person for recording in every})
    random.Random(seed).shuffle(people)
    test, validation = people[:TEST_PEOPLE], people[TEST_PEOPLE : TEST_PEOPLE + VALIDATION_PEOPLE]
    splits: dict[str, list[Recording]] = {name: [] for name in SPLITS}
    for recording in every:
        name = "test" if recording.person in test else "validation" if recording.person in validation else "train"
        splits[name].append(recording)
    return splits


def windows(of_split: list[Recording], per_exercise: int, stride: int, seed: int) -> list[tuple[Recording, int]]:
    """(recording, first sample) of `per_exercise` windows for each exercise, `stride` samples apart, shuffled.

    Raises:
        UserError: There are fewer windows than that.
    """
    rng, taken = random.Random(seed), []
    for exercise in EXERCISES.values():
        all_windows = [
            (recording, start)
            for recording in of_split
            if recording.exercise == exercise
            for start in range(0, len(recording.motion) - RATE * SECONDS + 1, stride)
        ]
        if len(all_windows) < per_exercise:
            raise UserError(f"there are {len(all_windows)} windows of {exercise}; wanted are {per_exercise}")
        taken += rng.sample(all_windows, per_exercise)
    rng.shuffle(taken)
    return taken


def _samples(taken: list[tuple[Recording, int]], held_out: bool) -> Iterator[dict]:
    for recording, start in taken:
        key, window = f"imu-{recording.number:03d}-{start:05d}", recording.motion[start : start + RATE * SECONDS]
        about = {"source": f"person {recording.person}", "side": recording.side}
        options = EXERCISES.values() if held_out else ()
        yield labelled_sample(key, "imu", "imu.npy", window, recording.exercise, options=options, **about)


def make(settings: Settings) -> None:
    """Write the shards of every split into the settings' folder, whichever is not there yet."""
    of_split, half = split(recordings(cache_folder(settings.cache)), settings.seed), RATE * SECONDS // 2
    counts = {
        "train": (settings.per_exercise, RATE),
        "validation": (settings.validation_per_exercise, half),
        "test": (settings.test_per_exercise, half),
    }
    for name, (count, stride) in counts.items():
        folder = Path(settings.folder, name)
        if not is_done(folder):
            taken = windows(of_split[name], count, stride, settings.seed)
            progress = tqdm(_samples(taken, name != "train"), total=len(taken), desc=f"motion, {name}", leave=False)
            write_shards(folder, progress, per_shard=128)


def main(argv: list[str] | None = None) -> None:
    """The program."""
    make(parse_args(Settings, __doc__, argv))


def start() -> None:
    """Run the program, for the command line."""
    run_program(main)


if __name__ == "__main__":
    start()
