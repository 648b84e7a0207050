"""Real runs of the real programs, small: real DeepSpeed, real shards on disk, tiny random-weight models."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import webdataset as wds

import tiny_encoders
from anymal.adapters import REGISTRY
from anymal.checkpoints import checkpoint
from anymal.checkpoints.build import build
from anymal.config.schema import Config
from anymal.config.settings import load
from anymal.model.trainable import select_trainable, trainable
from anymal.training.run import main

ROOT = Path(__file__).parent.parent
WORDS = ["red", "green", "blue", "white"]


def write_pairs(folder: Path, kinds: list[str], *, shards: int = 2, per_shard: int = 20, seed: int = 0) -> str:
    """Tars of media with captions; sample i holds a medium of ``kinds[i % len(kinds)]``."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    made = {
        "image": lambda i: {"png": tiny_encoders.picture(size=(40 + i % 7, 48))},
        "audio": lambda i: {"wav": tiny_encoders.sound(seconds=1 + 0.1 * (i % 5))},
        "imu": lambda i: {"imu.npy": tiny_encoders.npy(tiny_encoders.motion() + np.float32(0.1 * (i % 9)))},
    }
    for shard in range(shards):
        with wds.TarWriter(str(folder / f"{shard:03d}.tar")) as tar:
            for i in range(per_shard):
                caption = f"a {WORDS[rng.integers(4)]} {WORDS[rng.integers(4)]}"
                key = f"{kinds[i % len(kinds)]}-{shard}-{i:03d}"
                tar.write({"__key__": key, **made[kinds[i % len(kinds)]](i), "txt": caption})
    return str(folder)


def settings(llm: Path, encoders: Path, run: Path, shards: str, kinds: list[str], **more: object) -> list[str]:
    """Overrides of a small run; `more` are further ones with ``__`` for the dots."""
    given = {
        "model.llm.name": llm,
        "model.llm.bits": 4,
        "data.shards": shards,
        "data.batch_size": 4,
        "data.workers": 0,
        "optim.lr": 1e-2,
        "run.dir": run,
        "run.samples": 0,
    }
    for kind in kinds:
        given[f"model.modalities.{kind}.encoder"] = encoders / kind
        given[f"model.modalities.{kind}.projector.tokens"] = 4
    if "imu" in kinds:
        given["model.modalities.imu.options.rate"] = 50
    given |= {name.replace("__", "."): value for name, value in more.items()}
    return [f"{name}={value}" for name, value in given.items()]


def make_encoders(folder: Path) -> Path:
    """Tiny encoders of three modalities, as ``folder/KIND``."""
    tiny_encoders.clip(folder / "image")
    tiny_encoders.whisper(folder / "audio")
    tiny_encoders.imu(folder / "imu")
    return folder


def environment() -> dict[str, str]:
    """The environment of a program that a test starts: on the CPU, no ranks inherited from this process."""
    own = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    # W&B's service of this process, if an earlier test started one, would outlive the program that is killed.
    found = {n: value for n, value in os.environ.items() if n not in own and not n.startswith("WANDB")}
    return found | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def python(program: str, *arguments: str, check: bool = True, **options) -> subprocess.CompletedProcess:
    """Run one of our programs to its end."""
    done = subprocess.run(
        [sys.executable, str(ROOT / program), *arguments],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=ROOT,
        timeout=300,
        **options,
    )
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done


def deepspeed(ranks: int, program: str, *arguments: str | Path) -> None:
    """Run one of our programs under the DeepSpeed launcher."""
    launcher = Path(sys.executable).with_name("deepspeed")
    port = str(20000 + os.getpid() % 20000)
    command = [launcher, "--num_gpus", str(ranks), "--no_local_rank", "--master_port", port, ROOT / program, *arguments]
    env = environment() | {"PATH": f"{launcher.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=env, cwd=ROOT, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def zero_stages(path: Path, *stages: int) -> Path:
    """A recipe of independent stages zero1, zero2, ...: each of these ZeRO stages from one start of the processes."""
    listed = [{"name": f"zero{zero}", "engine": {"zero": zero}, "model": {"checkpoint": None}} for zero in stages]
    path.write_text(json.dumps({"stages": listed}))
    return path


def pretrain_here(recipe: Path | None, *arguments: str) -> None:
    """What launch/pretrain.py does, by one rank in this process: without the seconds that a start takes."""
    assert main("", REGISTRY, ["train=[projectors]"], [*([] if recipe is None else [str(recipe)]), *arguments]) == 0


def go_back(run: Path, step: int) -> None:
    """Make an earlier checkpoint the latest, as if the run had been killed before the next one."""
    link = run / "checkpoints" / "latest"
    link.unlink()
    link.symlink_to(f"step-{step:08d}")


def metrics(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    """Loss by step."""
    return {line["step"]: line["loss"] for line in metrics(run)}


def make_checkpoint(
    llm: Path, encoders: Path, run: Path, seed: int, *overrides: str, kinds: Sequence[str] = ("image", "imu")
) -> Path:
    """A checkpoint as training writes it, with random weights."""
    given = ["model.llm.bits=32", "train=[projectors,lora]", "model.lora.rank=4", "model.lora.alpha=8", *overrides]
    more = {name.replace(".", "__"): value for name, value in (override.split("=") for override in given)}
    config = load(Config, None, settings(llm, encoders, run, "none.tar", list(kinds), **more))
    built = build(config, torch.device("cpu"), REGISTRY, train=config.train)
    select_trainable(built.model, config.train)
    trained = trainable(built.model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.normal_(generator=generator)
    state = checkpoint.TrainingState(step=3)
    return checkpoint.save(built, trained, {}, state, config)
