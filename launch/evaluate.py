"""Score a checkpoint on held-out shards, beside a blank and a shuffled control.

    python launch/evaluate.py checkpoint=runs/demo/finetune sets.image=data/demo/image/test sets.imu=data/demo/imu/test
    python launch/evaluate.py checkpoint=runs/demo/finetune sets.image=data/demo/image/test bits=4

Writes evaluation.json, and the media that the predictions are about, to `out`; prints a table.
"""

import json
import os
import statistics
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING
from tqdm import tqdm

from anymal import checkpoint
from anymal.command_line import parse_args
from anymal.config import DataConfig
from anymal.errors import Quarantine, UserError
from anymal.evaluate import evaluate, pieces
from anymal.sample import Sample
from anymal.stream import samples_once
from launch.build import build, device, run_program, suffixes, unchanged
from launch.report import print_table, read_lines


@dataclass(kw_only=True)
class EvaluateConfig:
    """An evaluation."""

    checkpoint: str = MISSING
    """A checkpoint folder, or the run folder that holds it (its latest)."""
    sets: dict[str, Any] = field(default_factory=dict)
    """Shards of each held-out set, by a name of yours, as data.shards."""
    out: str = ""
    """Folder for evaluation.json and media; empty takes CHECKPOINT/evaluation."""
    bits: int = 0
    """Precision of the LLM: 4, 8, 16 or 32; 0 takes the one it was trained with."""
    limit: int = 0
    """Samples of each set; 0 takes all."""
    max_new_tokens: int = 16
    """Longest free answer."""
    batch_size: int = 16
    """Media encoded, and answers generated, at once."""
    seed: int = 0
    """Of the exchange of media in the shuffled control."""
    notes: list[str] = field(default_factory=list)
    """Remarks that the report shows."""


def read_sets(config: EvaluateConfig) -> dict[str, list[Sample]]:
    """The samples of each set, media still encoded.

    Raises:
        UserError: No set is given, or one holds a bad or no sample: held-out data must be whole.
    """
    if not config.sets:
        raise UserError("nothing to evaluate: give sets.NAME=SHARDS")
    found = {}
    for name, shards in config.sets.items():
        quarantine = Quarantine(None, max_in_a_row=0, max_share=0)
        data = DataConfig(shards=shards, workers=0)
        samples = samples_once(data, suffixes=suffixes(), prepare=unchanged, quarantine=quarantine)
        found[name] = list(islice(samples, config.limit or None))
        for sample in found[name]:
            if sample.options and sample.answer() not in sample.options:
                raise UserError(f"{sample.shard}, key {sample.key!r}: {sample.answer()!r} is not among its options")
    return found


def write_media(samples: list[Sample], folder: Path) -> list[list[str]]:
    """Write each sample's media to `folder` as they are in the shard; return their names, sample by sample."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for i, sample in enumerate(samples):
        names.append([f"{i:04d}-{n}.{part.member}" for n, part in enumerate(sample.media())])
        for name, part in zip(names[-1], sample.media(), strict=True):
            (folder / name).write_bytes(part.content)
    return names


def main() -> None:
    """Read the command line, evaluate, write and print."""
    config = parse_args(EvaluateConfig, __doc__)
    folder = checkpoint.existing(config.checkpoint)
    overrides = [f"model.llm.bits={config.bits}"] if config.bits else []
    recipe = checkpoint.recipe(folder, overrides)
    sets = read_sets(config)
    built = build(recipe, device(), start=folder)
    out = Path(config.out or folder / "evaluation")
    results = {}
    with tqdm(total=sum(map(pieces, sets.values())), unit="answer", desc="evaluate", dynamic_ncols=True) as bar:
        for name, samples in sets.items():
            bar.set_postfix_str(name)
            results[name] = evaluate(
                built.model,
                built.prepare,
                samples,
                max_new_tokens=config.max_new_tokens,
                batch_size=config.batch_size,
                seed=config.seed,
                progress=bar.update,
            )
            for prediction, media in zip(
                results[name]["predictions"], write_media(samples, out / "media" / name), strict=True
            ):
                prediction["media"] = [f"media/{name}/{file}" for file in media]
    evaluation = {
        "modalities": results,
        "checkpoint": str(folder),
        "bits": recipe.model.llm.bits,
        "trained_parameters": trained_parameters(folder),
        "tokens_per_s": training_speed(folder),
        "notes": config.notes,
    }
    temporary = out / f".evaluation.json.{os.getpid()}"
    temporary.write_text(json.dumps(evaluation, indent=1))
    temporary.replace(out / "evaluation.json")
    print(print_table(evaluation))
    print(f"written: {out / 'evaluation.json'}")


def training_speed(folder: Path) -> float | None:
    """The median tokens/s of the run that a checkpoint belongs to, if its metrics are still there."""
    log = folder.parent.parent / "metrics.jsonl"
    if not log.is_file():
        return None
    speeds = [line["tokens_per_s"] for line in read_lines(log) if "tokens_per_s" in line]
    return statistics.median(speeds) if speeds else None


def trained_parameters(folder: Path) -> int:
    """How many numbers a checkpoint holds in projectors, LoRA, and in encoders and an LLM that were trained."""
    from safetensors import safe_open

    total = 0
    parts = ("adapters", "lora", "encoders", "llm")
    for path in (path for part in parts for path in folder.glob(f"{part}/**/*.safetensors")):
        with safe_open(path, "pt") as file:
            total += sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys())  # noqa: SIM118
    return total


if __name__ == "__main__":
    run_program(main)
