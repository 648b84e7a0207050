"""kill -9 at random moments, over workers × ranks × packing, and again the same command: nothing may change.

    python tests/training/kill_matrix.py --kills 100

For every combination an uninterrupted run is the reference. A second run is killed (all its processes, SIGKILL) and
started again, until its share of the kills is spent; then it may end. Its losses must equal the reference's bit for
bit, and each step must have trained on the same samples. Half of the kills come at random moments, half as soon as a
checkpoint is being written or an old one removed; what the dead left in ``checkpoints/`` tells where a kill fell. Some
come before the run has saved anything new, so that it resumes from one checkpoint twice in a row.

Two datasets are blended 2 : 1 and one sample in nine is bad. LLM and encoders are tiny and random, data, DeepSpeed and
processes real. Runs are forked from a process that has imported everything, so that a hundred starts take minutes.
The goal is met where nothing changed and, of a hundred kills, at least thirty fell inside a save or a prune.
"""

# ruff: noqa: E402  (the environment and the path come before what is imported)

import argparse
import contextlib
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
sys.path[:0] = map(str, Path(__file__).parents[:3])

import deepspeed  # noqa: F401  this and the next are imported by each run: here once for all of them
import torch
import torch._dynamo
import webdataset as wds

import anymal.training.loop
import anymal.training.run
from anymal.adapters import REGISTRY
from anymal.config.schema import Config
from anymal.config.settings import load
from anymal.training.meter import Meter
from anymal.training.ranks import gather
from conftest import make_llm
from small_runs import make_encoders, metrics, settings, write_pairs

torch.set_num_threads(1)  # a pool of threads would not outlive a fork, and whoever waits for it would hang

KINDS = ["image", "imu"]
STEPS = 24
MATRIX = list(itertools.product((0, 1, 2), (1, 2), (False, True)))  # workers, ranks, packed


class Witness(Meter):
    """A meter that also writes down which samples each step was trained on, rank by rank."""

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        self._keys = []

    def add(self, batch, per_group, **more):
        super().add(batch, per_group, **more)
        self._keys += batch.keys

    def figures(self, **also):
        keys, self._keys = gather(self._keys), []
        return super().figures(samples=keys, **also)


def arguments(folder: Path, name: str, workers: int, packed: bool) -> list[str]:
    """The settings of a run."""
    more = {"optim__steps": STEPS, "data__workers": workers, "data__max_bad_share": 0.5}
    more |= {"run__save_every": 3, "run__keep": 1}  # every save but the first is followed by a prune
    if packed:
        more |= {"data__row_tokens": 120, "data__max_tokens": 100, "data__packing_buffer": 4}
    given = settings(folder / "llm", folder / "encoders", folder / name, "", KINDS, **more)
    datasets = [f"data.datasets.{d}={{shards: {folder / d}, ratio: {r}}}" for d, r in (("first", 2), ("second", 1))]
    return [setting for setting in given if not setting.startswith("data.shards=")] + datasets


def make_data(folder: Path) -> None:
    """Model, encoders, and two datasets with some samples that do not decode."""
    make_llm(folder / "llm")
    make_encoders(folder / "encoders")
    write_pairs(folder / "first", KINDS, shards=3, per_shard=14)
    write_pairs(folder / "second", KINDS, shards=2, per_shard=9, seed=1)
    for name in ("first", "second"):
        with wds.TarWriter(str(folder / name / "bad.tar")) as tar:
            for i in range(6):
                tar.write({"__key__": f"bad-{i}", "png": b"no picture", "txt": f"caption {i}"})


def _rank(rank: int, world: int, port: int, given: list[str], log: Path) -> None:
    """One process of a run; never returns."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)  # makes this process a pool of its own before several threads at once want one
    anymal.training.loop.Meter = Witness
    code = 1
    with contextlib.suppress(SystemExit):
        code = anymal.training.run.run_stage(load(Config, None, given, ["train=[projectors]"]), REGISTRY)
    os._exit(code)


class Run:
    """The processes of one start of a run."""

    def __init__(self, folder: Path, name: str, ranks: int, given: list[str]):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.log, self.metrics = folder / f"{name}.log", folder / name / "metrics.jsonl"
        self.checkpoints = folder / name / "checkpoints"
        fork = multiprocessing.get_context("fork")
        self.processes = [fork.Process(target=_rank, args=(r, ranks, port, given, self.log)) for r in range(ranks)]
        for process in self.processes:
            process.start()

    def steps(self) -> int:
        """How many steps its metrics tell of."""
        return self.metrics.read_bytes().count(b"\n") if self.metrics.exists() else 0

    def latest(self) -> str:
        """The name of its newest checkpoint."""
        link = self.checkpoints / "latest"
        return os.readlink(link) if link.is_symlink() else ""

    def at_work(self) -> str:
        """What it is doing in ``checkpoints/``, or was when it was killed: save, prune, or nothing."""
        mine = f"-{self.processes[0].pid}"  # what an earlier process left goes at the start
        names = os.listdir(self.checkpoints) if self.checkpoints.is_dir() else []
        names = [name for name in names if name.startswith(".tmp-") and name.endswith(mine)]
        if any(name.startswith(".tmp-gone-") for name in names):
            return "prune"
        return "save" if names else "nothing"

    def running(self) -> bool:
        """Whether all processes live."""
        return all(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        """SIGKILL to every process, loader workers included."""
        for process in self.processes:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it may have ended by itself
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                for pid in [process.pid, *map(int, children)]:
                    os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.join()

    def finish(self) -> None:
        """Wait for its end, which must be a good one."""
        for process in self.processes:
            process.join(timeout=300)
            assert process.exitcode == 0, self.log.read_text()[-4000:]


def trained(folder: Path, name: str) -> dict[int, tuple]:
    """Per step: the loss, and the samples of each rank."""
    return {line["step"]: (line["loss"], line["samples"]) for line in metrics(folder / name)}


def kill_once(run: Run, rng: random.Random) -> None:
    """Kill a run after a few more steps: at a random moment, or inside a save or a prune."""
    goal = min(run.steps() + rng.randint(0, 6), STEPS - 1)
    while run.running() and run.steps() < goal:
        time.sleep(0.003)
    if rng.random() < 0.5:
        wanted = rng.choice(["save", "prune"])
        while run.running() and run.at_work() != wanted and run.steps() < STEPS:
            time.sleep(1e-4)  # a prune is over within a few milliseconds
        time.sleep(rng.random() * 0.02 if wanted == "save" else 0)
    else:
        time.sleep(rng.random() * 0.1)
    run.kill()


def one_cell(
    folder: Path, workers: int, ranks: int, packed: bool, kills: int, rng: random.Random
) -> tuple[int, Counter[str], list[int]]:
    """Kill one combination `kills` times; how many it survived unchanged, where they fell, and after which steps."""
    place = f"{workers}-{ranks}-{packed}"
    reference, killed = f"whole-{place}", f"killed-{place}"
    Run(folder, reference, ranks, arguments(folder, reference, workers, packed)).finish()
    whole, at, fell = trained(folder, reference), [], Counter()
    while len(at) < kills:
        run = Run(folder, killed, ranks, arguments(folder, killed, workers, packed))
        before = run.latest()
        kill_once(run, rng)
        if run.steps() >= STEPS:  # it was faster than we: that was no kill, begin again
            shutil.rmtree(folder / killed)
            continue
        at.append(run.steps())
        fell[run.at_work()] += 1
        fell["resumed twice"] += bool(before) and run.latest() == before
    Run(folder, killed, ranks, arguments(folder, killed, workers, packed)).finish()
    same = trained(folder, killed) == whole and len(whole) == STEPS
    return (kills if same else 0), fell, at


def kill_matrix(kills: int, seed: int, cells: list[tuple[int, int, bool]] = MATRIX) -> tuple[int, Counter[str]]:
    """Spread `kills` over the cells; how many were survived without a change, and where they fell."""
    rng, survived, fell = random.Random(seed), 0, Counter()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_data(folder)
        for number, (workers, ranks, packed) in enumerate(cells):
            share = kills * (number + 1) // len(cells) - kills * number // len(cells)
            good, where, at = one_cell(folder, workers, ranks, packed, share, rng)
            survived, fell = survived + good, fell + where
            said = f"killed after steps {', '.join(map(str, at))}; {dict(where)}"
            print(f"workers={workers} ranks={ranks} packed={packed}: {good}/{share} equal; {said}", flush=True)
    return survived, fell


def main() -> None:
    """Read the command line, run, and print the figures last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--last", type=int, default=len(MATRIX), help="only so many of the combinations, from the end")
    given = parser.parse_args()
    began = time.monotonic()
    survived, fell = kill_matrix(given.kills, given.seed, MATRIX[-given.last :])
    inside = fell["save"] + fell["prune"]
    met = survived == given.kills and inside >= 0.3 * given.kills * (given.kills >= 100)
    where = f"in_save={fell['save']} in_prune={fell['prune']} resumed_twice={fell['resumed twice']}"
    seconds = f"seconds={time.monotonic() - began:.0f}"
    print(f"seed={given.seed} kills={given.kills} equal={survived} {where} {seconds} goal={'met' if met else 'missed'}")
    sys.exit(not met)


if __name__ == "__main__":
    main()
