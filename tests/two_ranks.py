"""Two ranks of a run, each in a working folder of its own, then the same again: python two_ranks.py FOLDER RECIPE X=Y …

``run.dir`` is relative, so that each rank has its own ``FOLDER/RANK/run``, as ranks on machines without a common disk.
Two steps; the second start is from the first, and rank 1 then has no optimizer's file. The first start's last
checkpoint is left as ``FOLDER/0/run/STAGE/whole``. Ranks are forked from a process that
has imported everything.
"""

# ruff: noqa: E402  (the environment and the path come before what is imported)

import multiprocessing
import os
import shutil
import socket
import sys
from multiprocessing.connection import wait
from pathlib import Path

os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import deepspeed  # noqa: F401  this and the next are imported by each run: here once for all of them
import torch
import torch._dynamo

from anymal.config.command_line import run_program
from small_runs import pretrain_here

torch.set_num_threads(1)  # a pool of threads would not outlive a fork, and whoever waits for it would hang


def _rank(rank: int, port: int, folder: Path, recipe: Path, given: list[str]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    os.chdir(folder / str(rank))
    run_program(lambda: pretrain_here(recipe, *given))


def run(folder: Path, recipe: Path, given: list[str]) -> None:
    """Both ranks, to a good end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_rank, args=(rank, port, folder, recipe, given)) for rank in range(2)]
    for process in ranks:
        process.start()
    # Asked once a turn: of the last one, which ends in between, nothing would be waited for, for ever.
    while alive := [process.sentinel for process in ranks if process.is_alive()]:
        wait(alive)
        if any(process.exitcode for process in ranks):  # the other would wait for it
            for process in ranks:
                process.kill()
    if any(process.exitcode for process in ranks):
        sys.exit("a rank failed")


def main(folder: Path, recipe: Path, given: list[str]) -> None:
    """Start twice."""
    for rank in "01":
        (folder / rank).mkdir()
    run(folder, recipe, given)
    for checkpoints in (folder / "0" / "run").glob("*/checkpoints"):
        (checkpoints / "latest").unlink()  # it would lead both ranks to one folder
        (checkpoints / "step-00000002").rename(checkpoints.parent / "whole")
    without = shutil.ignore_patterns("optimizer.safetensors")
    shutil.copytree(folder / "0" / "run", folder / "1" / "run", ignore=without, dirs_exist_ok=True)
    run(folder, recipe, given)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
