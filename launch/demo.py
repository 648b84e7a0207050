"""The whole pipeline on real data, on a machine without a GPU: `make demo`.

    python launch/demo.py

Runs the programs that a real run uses, one after another, each as you would start it by hand (the commands are
printed): download, convert, prepare, train the IMU encoder, stage 1, stage 2, evaluate, report. What is done already is
not done again. Downloads, models and data go to ANYMAL_CACHE (~/.cache/anymal/demo by default), results to runs/demo.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from data_prep.demo_assets import cache_folder
from launch.build import run_program
from launch.tables import print_table

RUN = Path("runs/demo")
MODALITIES = ("image", "video", "audio", "imu")
NOTES = [
    "image: pictures of objects that training never showed; near relatives of some were in training.",
    "video: generated motion over real pictures; held-out clips show pictures that training never moved.",
    "audio: the encoder is Whisper tiny.en, made for speech; held-out sounds are of instruments not in training.",
    "imu: two people whom neither projector nor encoder saw; the encoder had learnt the exercises of eight others.",
]


def commands(cache: Path) -> list[tuple[str, list[str]]]:
    """What is done, and by which program."""
    data, models = cache / "data", cache / "models"
    sets = [f"sets.{name}={data}/{name}/test" for name in MODALITIES]
    evaluation = [*sets, "max_new_tokens=8", f"notes={json.dumps(NOTES)}"]
    return [
        ("download models and data", ["data_prep/demo_assets.py"]),
        ("convert the models", ["data_prep/demo_models.py", f"folder={models}"]),
        ("make shards", ["data_prep/demo_data.py", f"folder={data}"]),
        (
            "train the IMU encoder",
            [
                "launch/pretrain_imu_encoder.py",
                f"shards={data}/imu/train",
                f"eval_shards={data}/imu/test",
                f"out={models}/imu",
            ],
        ),
        ("stage 1: projectors", ["launch/pretrain.py", "launch/recipes/demo-pretrain.yaml"]),
        ("stage 2: projectors and LoRA", ["launch/finetune.py", "launch/recipes/demo-finetune.yaml"]),
        ("evaluate", ["launch/evaluate.py", "checkpoint=runs/demo/finetune", f"out={RUN}", *evaluation]),
        ("report", ["launch/report.py", str(RUN)]),
    ]


def main() -> int:
    """Run the steps; the first that fails ends the demo with its exit code."""
    cache, began = cache_folder(), time.monotonic()
    steps = commands(cache)
    environment = os.environ | {"ANYMAL_CACHE": str(cache)}
    for number, (title, command) in enumerate(steps, 1):
        minutes, seconds = divmod(round(time.monotonic() - began), 60)
        print(f"\n[{number}/{len(steps)}] {title}   ({minutes}:{seconds:02d} so far)", flush=True)
        shown = [argument for argument in command if not argument.startswith("notes=")]
        print(f"    python {shlex.join(shown)}", flush=True)
        done = subprocess.run([sys.executable, *command], env=environment, check=False)
        if done.returncode:
            print(f"error: step {number} ended with code {done.returncode}; mend it and run make demo again")
            return done.returncode
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    print("\n" + print_table(json.loads((RUN / "evaluation.json").read_text())))
    print(f"\nDone in {minutes}:{seconds:02d}. Pictures: {RUN / 'report.html'}")
    return 0


if __name__ == "__main__":
    run_program(main)
