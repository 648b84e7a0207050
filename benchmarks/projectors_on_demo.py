"""A Q-Former and a mixture of two encoders beside the demo's projector, trained and scored on the demo's real images.

    make demo && .venv/bin/python data_prep/demo/dinov2_focus.py
    .venv/bin/python benchmarks/projectors_on_demo.py
    .venv/bin/python benchmarks/projectors_on_demo.py optim.steps=200 run.seed=1

Each variant is a recipe: the demo's stage 1 with images alone and what `VARIANTS` says, written to a temporary folder,
trained by ``launch/pretrain.py`` and scored by ``launch/evaluate.py`` on held-out pictures. Data, their order, steps,
batch, learning rate and the tokens of a picture are the same for all; overrides of all recipes may follow. The Q-Former
has about as many parameters as the mlp before one encoder; before two, whose features are wider, the mlp has more.

*loss* is the average over the last ten steps; *accuracy*, with its 95% interval, is that of the likeliest of the class
names, *blank* and *shuffled* the same with a blank and with somebody else's picture. The goal is met where every
variant is above both by more than its interval.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from anymal.config.command_line import run_program
from anymal.data_prep.demo.assets import cache_folder
from anymal.errors import UserError
from anymal.evaluation.report import read_lines
from anymal.evaluation.scores import CONDITIONS
from anymal.evaluation.tables import sets_of

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "launch" / "recipes" / "demo-pretrain.yaml"
STEPS, LAST = 80, 10  # 80 batches of 16 are one pass over the images
FIRST, SECOND = "models/image", "models/dinov2"
"""EfficientNet-Lite0 (7 x 7 features, 1280 wide) and DINOv2's smallest (16 x 16, 384 wide), in the demo's cache."""
MLP = {"kind": "mlp", "tokens": 4}
VARIANTS: dict[str, tuple[Sequence[str], dict[str, Any]]] = {
    "mlp": ([FIRST], MLP),
    "qformer": ([FIRST], {"kind": "qformer", "tokens": 4, "layers": 2, "width": 144, "heads": 6}),
    "mixture": ([FIRST, SECOND], MLP),
}
"""Encoders and projector. Several encoders are joined channel by channel."""
GRID = 8
"""Of the joined map: each of its features is the average of 2 x 2 of DINOv2's."""


def recipe(cache: Path, folders: Sequence[str], projector: dict[str, Any]) -> DictConfig:
    """The demo's recipe of stage 1 with images alone, and with these encoders and this projector."""
    made = OmegaConf.load(RECIPE)
    names = [str(cache / folder) for folder in folders]
    encoder = names[0] if len(names) == 1 else {"channels": names, "grid": GRID}
    made.model.modalities = {"image": {"encoder": encoder, "projector": projector}}
    made.data.datasets = {"image": made.data.datasets.image}
    made.data.features = "never"  # of the demo's runs: only some of the variants would find theirs
    made.optim.steps = STEPS
    made.run.update(save_every=STEPS, samples=0, wandb="disabled")
    return made


def start(cache: Path, *command: str) -> None:
    """Run one of our programs; what it prints goes to stderr.

    Raises:
        UserError: It failed.
    """
    environment = os.environ | {"ANYMAL_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, stdout=sys.stderr)
    if done.returncode:
        raise UserError(f"{command[0]} ended with code {done.returncode} (see above)")


def measure(cache: Path, folder: Path, name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Train and score a variant: the result of the set, ``loss`` and ``parameters``."""
    made = recipe(cache, *VARIANTS[name])
    made.run.dir = str(folder / name)
    OmegaConf.save(made, folder / f"{name}.yaml")
    start(cache, "launch/pretrain.py", str(folder / f"{name}.yaml"), *overrides)
    out = folder / f"{name}-evaluation"
    asked = [f"sets.image={cache}/data/image/validation", "max_new_tokens=0", "media=0"]
    start(cache, "launch/evaluate.py", f"checkpoint={folder / name}", *asked, f"out={out}")
    evaluation = json.loads((out / "evaluation.json").read_text())
    losses = [line["loss"] for line in read_lines(folder / name / "metrics.jsonl") if "loss" in line]
    trained = {"loss": statistics.mean(losses[-LAST:]), "parameters": evaluation["trained_parameters"]}
    return sets_of(evaluation)["image"] | trained


def main() -> None:
    """Print the table, and one line of figures."""
    cache = cache_folder().absolute()
    for folder, program in ((FIRST, "make demo"), (SECOND, "python data_prep/demo/dinov2_focus.py")):
        if not (cache / folder).is_dir():
            raise UserError(f"there is no {cache / folder}; run {program} first")
    found = {}
    print("variant       parameters   loss  accuracy   95% interval   blank  shuffled")
    with tempfile.TemporaryDirectory() as folder:
        for name in VARIANTS:
            found[name] = one = measure(cache, Path(folder), name, sys.argv[1:])
            low, high = one["interval"]
            own, blank, shuffled = (one[condition]["accuracy"] for condition in CONDITIONS)
            figures = f"{one['parameters']:11,} {one['loss']:6.3f} {own:9.1%}  {low:6.1%} – {high:6.1%}"
            print(f"{name:12} {figures}{blank:7.1%} {shuffled:9.1%}", flush=True)
    controls = CONDITIONS[1:]
    seen = all(one["interval"][0] > max(one[control]["accuracy"] for control in controls) for one in found.values())
    accuracies = (f"{name}={one['own']['accuracy']:.3f}" for name, one in found.items())
    print(*accuracies, f"n={found['mlp']['n']}", f"goal={'met' if seen else 'missed'}")


if __name__ == "__main__":
    run_program(main)
