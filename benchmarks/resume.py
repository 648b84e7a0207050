"""Time to the first batch from the beginning, the middle and the end of an epoch, against raw webdataset that skips.

    make demo && .venv/bin/python benchmarks/resume.py

Three tars of 10,000 samples, made of the demo's real pictures and captions in a temporary folder. Each time is that of
a process of its own: from making the stream, and from the process's start (mostly imports), to the first batch of 16
decoded samples, with two workers; once without any index, as when the shards are seen for the first time, and then with
it. webdataset has no way to go on but to read and drop what came before; it need not decode it.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from anymal.config.command_line import run_program
from anymal.data.stream import merge_bookmarks
from stream import BATCH, demo_samples, ours, theirs, write

GOAL = 2.0  # seconds, at any position, with the index
SHARDS, PER_SHARD, WORKERS, TIMES = 3, 10_000, 2, 3
PLACES = {"beginning": 0, "middle": SHARDS * PER_SHARD // 2, "end": SHARDS * PER_SHARD - BATCH}


def first_batch(side: str, folder: Path, position: int) -> float:
    """Seconds from making the stream to the first batch after `position` samples. Runs in a process of its own."""
    torch.set_num_threads(1)
    bookmark = json.loads((folder / "bookmark.json").read_text()) | {"next": position}
    begun = time.perf_counter()
    if side == "ours":
        next(iter(ours(folder, WORKERS, bookmark))).collate()
    else:
        next(theirs(folder, WORKERS, position))
    return time.perf_counter() - begun


def measure(side: str, folder: Path, place: str) -> tuple[float, float]:
    """Seconds to the first batch: from making the stream, and from the start of a process."""
    command = [sys.executable, __file__, side, str(folder), str(PLACES[place])]
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return float(done.stdout.splitlines()[-1]), time.perf_counter() - begun


def tell(what: str, stream: float, process: float) -> float:
    """Print one row."""
    print(f"{what:27} {stream:6.2f} s from making the stream, {process:6.2f} s from the process's start", flush=True)
    return stream


def main() -> None:
    """Print the table, and one line of figures."""
    figures = {}
    with tempfile.TemporaryDirectory() as made:
        folder = write(Path(made, "d"), demo_samples("image"), n=SHARDS * PER_SHARD, shards=SHARDS)
        bookmark = merge_bookmarks([ours(folder, 0).bookmark])
        (folder / "bookmark.json").write_text(json.dumps(bookmark))
        for index in folder.glob("*.index.json"):
            index.unlink()
        figures["middle_without_index"] = tell("ours, no index yet, middle", *measure("ours", folder, "middle"))
        for place in PLACES:
            times = zip(*(measure("ours", folder, place) for _ in range(TIMES)), strict=True)
            figures[place] = tell(f"ours, {place}", *map(median, times))
        figures["webdataset_middle"] = tell("webdataset, middle", *measure("theirs", folder, "middle"))
    met = max(figures[place] for place in PLACES) < GOAL
    print(*(f"{key}_s={value:.2f}" for key, value in figures.items()), f"goal={'met' if met else 'missed'}")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(first_batch(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
    else:
        run_program(main)
