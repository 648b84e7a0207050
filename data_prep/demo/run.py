"""The program behind `make demo`: the programs that a real run uses, one after another, as subprocesses.

Each is named by its module, and the recipes by their names: so it works from any folder, without a checkout too.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from anymal.config.command_line import parse_args
from anymal.data_prep.demo.assets import cache_folder
from anymal.evaluation.tables import print_table

MODALITIES = ("image", "video", "audio", "imu")
NOTES = [
    "The test is of 42 pictures (image and video), some ten instruments and three people, each in many samples: other "
    "pictures, instruments and people would vary by more than the intervals, which count samples.",
    "image: pictures of objects that training never showed; near relatives of some were in training.",
    "video: generated motion over real pictures; held-out clips show pictures that training never moved.",
    "audio: the encoder is Whisper tiny.en, made for speech; held-out sounds are of instruments not in training.",
    "imu: people whom neither projector nor encoder saw; the encoder had learnt the exercises of five others.",
    "conversations: about one to three media of the above; whoever always takes one of two answers has half of them.",
]


@dataclass(kw_only=True)
class Settings:
    """Settings of the demo."""

    seed: int = 0
    """Which pictures, instruments and people are held out."""
    limit: int = 56
    """Samples of each test split that are evaluated; 0 takes all, 300 and more."""


def commands(cache: Path, settings: Settings) -> list[tuple[str, list[str]]]:
    """What is done, and by which module with which arguments."""
    data, models, run = data_folder(cache, settings.seed), cache / "models", run_folder(settings.seed)
    sets = [f"sets.{name}={data}/{name}/test" for name in (*MODALITIES, "conversations")]
    evaluation = [
        *sets,
        f"limit={settings.limit}",
        f"seed={settings.seed}",
        "bits=[4,32]",
        "max_new_tokens=8",
        "batch_size=48",
        f"notes={json.dumps(NOTES)}",
    ]
    pretrain, finetune = (
        ["anymal.launch.pretrain", "demo-pretrain"],
        ["anymal.launch.finetune", "demo-finetune"],
    )
    if settings.seed:  # the recipes name the folders of seed 0
        shards = [f"data.datasets.{name}.shards={data}/{name}/train" for name in MODALITIES]
        shards.append(f"model.modalities.imu.encoder={data}/imu-encoder")
        pretrain += [*shards, f"run.dir={run}/pretrain"]
        finetune += [*shards, f"data.datasets.conversations.shards={data}/conversations/train"]
        finetune += [f"model.checkpoint={run}/pretrain", f"run.dir={run}/finetune"]
    return [
        ("download models and data", ["anymal.data_prep.demo.assets"]),
        ("convert the models", ["anymal.data_prep.demo.models", f"folder={models}"]),
        ("make shards", ["anymal.data_prep.demo.data", f"folder={data}", f"seed={settings.seed}"]),
        (
            "train the IMU encoder",
            [
                "anymal.launch.pretrain_imu_encoder",
                f"shards={data}/imu/train",
                f"eval_shards={data}/imu/validation",
                f"out={data}/imu-encoder",
            ],
        ),
        ("stage 1: projectors", pretrain),
        ("stage 2: projectors and LoRA", finetune),
        ("evaluate", ["anymal.launch.evaluate", f"checkpoint={run}/finetune", f"out={run}", *evaluation]),
        ("report", ["anymal.launch.report", str(run)]),
    ]


def data_folder(cache: Path, seed: int) -> Path:
    """The data of a seed, and the IMU encoder that its training people taught."""
    return cache / (f"data-{seed}" if seed else "data")


def run_folder(seed: int) -> Path:
    """The results of a seed."""
    return Path(f"runs/demo-{seed}" if seed else "runs/demo")


def main(usage: str) -> int:
    """Run the steps; the first that fails ends the demo with its exit code."""
    settings = parse_args(Settings, usage)
    cache, began, folder = cache_folder(), time.monotonic(), run_folder(settings.seed)
    steps = commands(cache, settings)
    environment = os.environ | {"ANYMAL_CACHE": str(cache)}
    for number, (title, command) in enumerate(steps, 1):
        minutes, seconds = divmod(round(time.monotonic() - began), 60)
        print(f"\n[{number}/{len(steps)}] {title}   ({minutes}:{seconds:02d} so far)", flush=True)
        shown = [argument for argument in command if not argument.startswith("notes=")]
        print(f"    python -m {shlex.join(shown)}", flush=True)
        done = subprocess.run([sys.executable, "-m", *command], env=environment, check=False)
        if done.returncode:
            print(f"error: step {number} ended with code {done.returncode}; mend it and start the demo again")
            return done.returncode
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    print("\n" + print_table(json.loads((folder / "evaluation.json").read_text())))
    print(f"\nDone in {minutes}:{seconds:02d}. Pictures: {folder / 'report.html'}")
    return 0
