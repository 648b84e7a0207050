"""Whether a step waits for decoding: the step's time beside the sum and the larger of decode and compute time.

    make demo && .venv/bin/python benchmarks/overlap.py

Real training (stream, workers, prefetch, loop) of a projector before the demo's LLM, on the CPU. The decoder of a
made-up modality sleeps, so that decoding takes no processor from the LLM, as on a machine with a GPU; for as long that
a micro-batch's decoding, spread over two workers, takes what its computation does: then to do one after the other
takes twice as long as to do both at once. With no worker they are done one after the other, by the nature of it.
"""

import io
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
import torch
import webdataset
from torch import Tensor, nn

from anymal.adapters import PROJECTORS
from anymal.config.command_line import run_program
from anymal.config.schema import Config
from anymal.config.settings import load
from anymal.modality import Modality
from anymal.model.registry import Registry
from anymal.training.run import run_stage

GOAL = 1.1  # step time over the larger of decode and compute time, gradient accumulation 16 and two workers
CACHE = Path(os.environ.get("ANYMAL_CACHE", "~/.cache/anymal/demo")).expanduser()
BATCH, WORKERS = 2, 2
STEPS = {1: 16, 16: 5}  # optimizer steps by gradient accumulation
WARM = 2  # steps that are not counted


@dataclass(kw_only=True)
class NapOptions:
    """Settings."""

    seconds: float = 0.0
    """What decoding one medium takes."""


class Sleeper(nn.Module):
    """An encoder that costs nothing, of media whose decoding takes a while."""

    width, tokens, shape, license = 8, 4, (1,), "none"

    def __init__(self, seconds: float):
        super().__init__()
        self.decode = Nap(seconds)
        self.one = nn.Parameter(torch.ones(1))

    def forward(self, media: Tensor) -> Tensor:
        """[N, 1] → [N, 4, 8]."""
        return (media[:, :, None] * self.one).expand(-1, self.tokens, self.width)


@dataclass
class Nap:
    """Decodes bytes of float32 slowly."""

    seconds: float

    def __call__(self, data: bytes) -> Tensor:
        """Bytes → [1]."""
        time.sleep(self.seconds)
        return torch.from_numpy(np.load(io.BytesIO(data)))


def _load(_: str, options: NapOptions) -> Sleeper:
    return Sleeper(options.seconds)


NAP = Modality(name="nap", suffixes=("nap",), options=NapOptions, load=_load)
REGISTRY = Registry(modalities={"nap": NAP}, projectors=PROJECTORS)


def write_data(folder: Path) -> Path:
    """A tar of naps with captions."""
    folder.mkdir()
    with webdataset.TarWriter(str(folder / "0.tar")) as tar:
        for i in range(64):
            written = io.BytesIO()
            np.save(written, np.full(1, i, dtype=np.float32))
            tar.write({"__key__": f"{i:03d}", "nap": written.getvalue(), "txt": "a nap " * (4 + i % 5)})
    return folder


def run(data: Path, folder: Path, seconds: float, workers: int, accumulation: int) -> tuple[float, float]:
    """Train; the time of an optimizer step in seconds, and the share of it that was spent waiting for data."""
    given = {
        "model.llm.name": CACHE / "models/llm",
        "model.llm.bits": 32,
        "model.modalities.nap.encoder": "none",
        "model.modalities.nap.options.seconds": seconds,
        "model.modalities.nap.projector.tokens": 4,
        "prompt.template": "plain",
        "data.shards": data,
        "data.batch_size": BATCH,
        "data.workers": workers,
        "optim.gradient_accumulation": accumulation,
        "optim.steps": STEPS[accumulation],
        "run.dir": folder,
        "run.samples": 0,
        "run.save_every": 10**6,
    }
    run_stage(load(Config, None, [f"{name}={value}" for name, value in given.items()]), REGISTRY)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = [line["time"] for line in lines]
    each = [after - before for before, after in pairwise(times)]
    # Nothing is decoded beside the first step, nor during the last.
    return median(each[WARM - 1 : -1]), median(line["wait_share"] for line in lines[WARM:-1])


def main() -> None:
    """Print the table, and one line of figures."""
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = write_data(folder / "data")
        seconds = run(data, folder / "first", 0.0, WORKERS, 1)[0] * WORKERS / BATCH
        print(f"{BATCH} media in a micro-batch, the decoding of one takes {seconds:.3f} s", flush=True)
        for accumulation in STEPS:
            for workers in (0, WORKERS):
                name = f"{accumulation}-{workers}"
                # Computation is timed beside each: the machine may have other things to do.
                compute = run(data, folder / f"{name}-compute", 0.0, workers, accumulation)[0]
                step, waiting = run(data, folder / name, seconds, workers, accumulation)
                decode = accumulation * BATCH * seconds / max(1, workers)
                larger = max(compute, decode)
                found[accumulation, workers] = step / larger
                print(
                    f"accumulation {accumulation:2}, workers {workers}: step {step:6.3f} s, waiting {waiting:4.0%}; "
                    f"decode {decode:6.3f} s, compute {compute:6.3f} s: {step / (compute + decode):.2f} of their sum, "
                    f"{step / larger:.2f} of the larger",
                    flush=True,
                )
    figures = " ".join(f"over_larger_{a}_{w}={ratio:.2f}" for (a, w), ratio in found.items())
    print(f"{figures} goal={'met' if found[16, WORKERS] <= GOAL else 'missed'}")


if __name__ == "__main__":
    sys.exit(run_program(main))
