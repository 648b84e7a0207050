"""What the demo's frozen features hold: linear probes on the same features and splits, beside the trained models.

    python data_prep/demo/assets.py && python data_prep/demo/models.py
    python benchmarks/demo_ceiling.py
    python benchmarks/demo_ceiling.py seeds=[0] evaluations=[runs/demo/evaluation.json]

For each seed of the split it makes the shards and the IMU encoder, as the demo does, decodes and encodes every medium
as the demo's recipe says, and fits a ridge regression from a medium's features to its label, once from all features
of a medium end to end (*flattened*: what a projector is given) and once from their average over tokens (*averaged*).
How strongly it is regularised is chosen on validation; the test is scored once. *trained* is a model's accuracy on
that test, or on the sample of it that was evaluated, if `evaluations` has a file for the seed.

A seed takes two minutes of two cores. The intervals (Wilson, 95%) count samples; *sources* says how many objects,
instruments and people they are of. The goal is met where every test has 300 samples, every flattened probe is above
chance and not below the trained model by more than both intervals, and features end to end tell a clip's motion better
than their average, which has no order.
"""

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anymal.adapters import REGISTRY
from anymal.adapters.imu import pretrain
from anymal.checkpoints.build import load_encoder
from anymal.config.command_line import parse_args, run_program
from anymal.config.schema import ModalityConfig
from anymal.config.stages import Recipe, config_of, load_stages
from anymal.data_prep.demo import data as demo_data
from anymal.data_prep.demo.assets import cache_folder
from anymal.data_prep.demo.conversations import MEMBERS
from anymal.data_prep.demo.labelled import SPLITS
from anymal.data_prep.demo.run import MODALITIES, data_folder
from anymal.data_prep.write import read_shards
from anymal.errors import UserError
from anymal.evaluation.metrics import wilson_interval
from anymal.evaluation.tables import sets_of
from anymal.model.multimodal import run_encoder

RECIPE = Path(__file__).parent.parent / "launch" / "recipes" / "demo-pretrain.yaml"
STRENGTHS = [10.0**power for power in range(-5, 3)]
"""Of the regularisation, relative to the mean square of a feature."""
LEAST = 300
"""Samples that a test must have."""


@dataclass(kw_only=True)
class Settings:
    """Settings of the benchmark."""

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Of the splits."""
    evaluations: list[str] = field(default_factory=list)
    """evaluation.json of the model that was trained on each seed's split, in their order; there may be fewer."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One split of one modality."""

    features: Tensor
    """[n, tokens, width]."""
    labels: list[str]
    """Of each sample."""
    sources: int
    """How many objects, instruments or people the samples are of."""


def main() -> None:
    """Print the table, and one line of figures."""
    settings, cache = parse_args(Settings, __doc__), cache_folder()
    if not (cache / "models").is_dir():
        raise UserError(f"there is no {cache / 'models'}; run make demo first")
    trained = [trained_figures(Path(path)) for path in settings.evaluations]
    print("seed modality    n sources chance  flattened (95%)        averaged (95%)         trained (95%)")
    best, met = {name: [] for name in MODALITIES}, True
    for number, seed in enumerate(settings.seeds):
        data = make_data(cache, seed)
        for name, config in modalities(data).items():
            splits = encode(name, config, data / name)
            row = probe(splits) | {"trained": trained[number].get(name) if number < len(trained) else None}
            n, chance = len(splits["test"].labels), 1 / len(set(splits["test"].labels))
            print(f"{seed:4} {name:8} {n:4} {splits['test'].sources:7} {chance:6.1%}  {shown(row)}", flush=True)
            best[name].append(row["flattened"]["accuracy"])
            met &= n >= LEAST and is_plausible(name, row, chance)
    figures = (f"{name}={min(of):.3f}–{max(of):.3f}" for name, of in best.items())
    print(*figures, f"seeds={len(settings.seeds)}", f"goal={'met' if met else 'missed'}")


def trained_figures(evaluation: Path) -> dict[str, dict[str, Any]]:
    """The accuracy, with its interval, of each set of an evaluation.json."""
    sets = sets_of(json.loads(evaluation.read_text()))
    return {name: {"accuracy": one["own"]["accuracy"], "interval": one["interval"]} for name, one in sets.items()}


def make_data(cache: Path, seed: int) -> Path:
    """The folder of a seed's shards and IMU encoder, made if they are not there."""
    data = data_folder(cache, seed)
    of_imu = [f"shards={data}/imu/train", f"eval_shards={data}/imu/validation"]
    with contextlib.redirect_stdout(sys.stderr):  # the table stands alone
        demo_data.main([f"folder={data}", f"seed={seed}"])
        pretrain.main("", [*of_imu, f"out={data}/imu-encoder"])
    return data


def modalities(data: Path) -> dict[str, ModalityConfig]:
    """As the demo's recipe has them, with the IMU encoder of this seed."""
    overrides = [f"model.modalities.imu.encoder={data}/imu-encoder"]
    (stage,) = load_stages(Recipe, RECIPE, overrides)
    return config_of(stage).model.modalities


@torch.no_grad()
def encode(name: str, config: ModalityConfig, shards: Path) -> dict[str, Encoded]:
    """Decode and encode every medium of a modality's splits, as training does."""
    encoder, found = load_encoder(REGISTRY, name, config), {}
    for split in SPLITS:
        samples = list(read_shards(shards / split))
        parts = []
        for start in range(0, len(samples), 32):
            media = [encoder.decode(sample[MEMBERS[name]]) for sample in samples[start : start + 32]]
            parts.append(run_encoder(encoder, torch.stack(media), torch.device("cpu")))
        about = [sample["json"] for sample in samples]
        found[split] = Encoded(
            features=torch.cat(parts),
            labels=[one["label"] for one in about],
            sources=len({one["source"] for one in about}),
        )
    return found


def probe(splits: dict[str, Encoded]) -> dict[str, dict[str, Any]]:
    """The accuracy, with its interval, of both kinds of probe on the test."""
    labels = {name: split.labels for name, split in splits.items()}
    flattened = {name: split.features.flatten(1) for name, split in splits.items()}
    averaged = {name: split.features.mean(1) for name, split in splits.items()}
    return {"flattened": ridge(flattened, labels), "averaged": ridge(averaged, labels)}


def ridge(features: dict[str, Tensor], labels: dict[str, Sequence[str]]) -> dict[str, Any]:
    """Ridge regression to one-hot labels, in kernel form (there are fewer samples than features), scored on the test.

    Args:
        features: By split, [n, width].
        labels: By split, n of them.

    Returns:
        ``accuracy``, ``n``, ``interval`` on the test, and the ``strength`` that validation chose.
    """
    mean, std = features["train"].mean(0), features["train"].std(0)
    scaled = {name: (split - mean) / (std + 1e-3 * std.mean()) for name, split in features.items()}
    kernels = {name: (split @ scaled["train"].T / len(mean)).double() for name, split in scaled.items()}
    names = sorted(set(labels["train"]))
    targets = torch.tensor([[float(label == name) for name in names] for label in labels["train"]]).double()
    values, vectors = torch.linalg.eigh(kernels["train"])
    turned = vectors.T @ (targets - targets.mean(0))

    def right(split: str, strength: float) -> int:
        solution = vectors @ (turned / (values.clamp_min(0) + strength)[:, None])
        chosen = (kernels[split] @ solution + targets.mean(0)).argmax(1).tolist()
        return sum(names[number] == label for number, label in zip(chosen, labels[split], strict=True))

    strength = max(reversed(STRENGTHS), key=lambda one: right("validation", one))
    k, n = right("test", strength), len(labels["test"])
    return {"accuracy": k / n, "n": n, "interval": wilson_interval(k, n), "strength": strength}


def shown(row: dict[str, dict[str, Any] | None]) -> str:
    """The accuracies of a row, with their intervals."""
    cells = []
    for found in row.values():
        cell = "–"
        if found is not None:
            low, high = found["interval"]
            cell = f"{found['accuracy']:6.1%} ({low:.1%} – {high:.1%})"
        cells.append(f"{cell:22}")
    return " ".join(cells)


def is_plausible(name: str, row: dict[str, Any], chance: float) -> bool:
    """Whether a row says what a ceiling can say."""
    low, high = row["flattened"]["interval"]
    above = row["trained"] is None or row["trained"]["interval"][0] <= high
    ordered = name != "video" or low > row["averaged"]["interval"][1]
    return low > chance and above and ordered


if __name__ == "__main__":
    run_program(main)
