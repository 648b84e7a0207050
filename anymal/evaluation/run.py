"""The program behind `anymal evaluate`: a checkpoint and held-out shards → records, figures, media, tables."""

import hashlib
import json
import os
import statistics
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch
from omegaconf import MISSING
from tqdm import tqdm

from anymal.checkpoints import checkpoint, precision
from anymal.checkpoints.build import build
from anymal.checkpoints.process import process_as_found
from anymal.config.command_line import parse_args
from anymal.config.schema import Config, DataConfig
from anymal.data.quarantine import Quarantine
from anymal.data.stream import samples_once, unchanged
from anymal.errors import BudgetExceeded, UserError
from anymal.evaluation.evaluate import evaluate, prepare_held_out
from anymal.evaluation.report import read_lines
from anymal.evaluation.scores import Rule, agreement, figures, predictions, read_records, write_record
from anymal.evaluation.tables import print_table
from anymal.files import write_whole
from anymal.model.llm import device
from anymal.model.registry import Registry
from anymal.sample import Sample

BITS = (4, 8, 16, 32)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """An evaluation."""

    checkpoint: str = MISSING
    """A checkpoint folder, or the run folder that holds it (its latest)."""
    model: dict[str, Any] = field(default_factory=dict)
    """Settings of the checkpoint's recipe to override, such as model.llm.name=FOLDER for an LLM that was moved, or
    model.modalities.NAME.encoder=FOLDER for an encoder."""
    sets: dict[str, Any] = field(default_factory=dict)
    """Shards of each held-out set, by a name of yours, as data.shards."""
    out: str = ""
    """Folder for what is written; empty takes CHECKPOINT/evaluation."""
    bits: Any = 0
    """Precision of the LLM: 4, 8, 16 or 32, or a list of several, such as [4,16,32], to have them side by side; 0
    takes the one that the checkpoint was trained with, or what model.llm.bits says."""
    limit: int = 0
    """So many samples of each set, drawn by `seed`; 0 takes all."""
    choose: Rule = "sum"
    """By what an option is chosen, for the figures called accuracy (all three are reported): sum, the log-likelihood of
    the option; bytes, that by byte of its text; or blank, that less the same with a blank medium."""
    max_new_tokens: int = 16
    """Longest free answer; 0 generates none."""
    batch_size: int = 16
    """Media encoded, and prompts answered, at once."""
    workers: int = 2
    """Processes that read and decode; 0 does it in this process."""
    media: int = 64
    """So many samples of each set have their media and predictions kept for the report."""
    seed: int = 0
    """Of the order: which samples `limit` takes, and whose media each is shown in the shuffled control."""
    notes: list[str] = field(default_factory=list)
    """Remarks that the report shows."""

    def __post_init__(self):
        if min(self.limit, self.max_new_tokens, self.workers, self.media, self.seed) < 0 or self.batch_size < 1:
            raise UserError("limit, max_new_tokens, workers, media and seed cannot be negative, batch_size not below 1")
        if not listed(self.bits) or any(bits not in (0, *BITS) for bits in listed(self.bits)):
            raise UserError(f"bits is {self.bits}; it can be {', '.join(map(str, BITS))}, or a list of these")


def listed(bits: Any) -> list[int]:
    """What `bits` says, as a list."""
    return bits if isinstance(bits, list) else [bits]


@process_as_found()
def main(usage: str, registry: Registry) -> None:
    """Read the command line, evaluate, write and print."""
    config = parse_args(EvaluateConfig, usage)
    if not config.sets:
        raise UserError("nothing to evaluate: give sets.NAME=SHARDS")
    folder = checkpoint.existing(config.checkpoint)
    trained = checkpoint.recipe(folder).model.llm.bits
    model = checkpoint.recipe(folder, model=config.model).model
    precisions = list(dict.fromkeys(bits or model.llm.bits for bits in listed(config.bits)))
    out = Path(config.out or folder / "evaluation")
    out.mkdir(parents=True, exist_ok=True)
    media = {name: write_media(config, registry, name, model.modalities, out / "media" / name) for name in config.sets}
    temporary = out / f".records.jsonl.{os.getpid()}"
    try:
        with temporary.open("w") as lines:
            for bits in precisions:
                recipe = checkpoint.recipe(folder, [f"model.llm.bits={bits}"], config.model)
                write_records(config, registry, recipe, folder, lines)
        temporary.replace(out / "records.jsonl")
    finally:
        temporary.unlink(missing_ok=True)
    evaluation = summarise(config, out, folder, precisions, media)
    write_whole(out / "evaluation.json", json.dumps(evaluation, indent=1))
    precision.save(folder, trained, {int(bits): sets for bits, sets in evaluation["precisions"].items()})
    print(print_table(evaluation))
    print(f"written: {out / 'evaluation.json'}")


def held_out(
    config: EvaluateConfig,
    registry: Registry,
    name: str,
    modalities: Collection[str],
    prepare: Callable[[Sample], T],
    limit: int,
) -> Iterator[T]:
    """The samples of a set in the order of the evaluation, each as `prepare` makes it.

    Media of other modalities than the model's are ignored.

    Raises:
        UserError: One is bad: held-out data must be whole.
    """
    data = DataConfig(shards=config.sets[name], workers=config.workers)
    quarantine = Quarantine(None, max_in_a_row=0, max_share=0)
    try:
        yield from samples_once(
            data,
            suffixes=registry.suffixes(),
            modalities=list(modalities),
            prepare=prepare,
            quarantine=quarantine,
            seed=config.seed,
            limit=limit,
        )
    except BudgetExceeded as error:
        raise UserError(f"sets.{name}: held-out data must be whole. {error}") from error


def write_records(config: EvaluateConfig, registry: Registry, recipe: Config, folder: Path, lines: TextIO) -> None:
    """Evaluate all sets with the LLM at one precision, record by record."""
    built = build(recipe, device(), registry, start=folder)
    bits = recipe.model.llm.bits
    prepare = partial(prepare_held_out, built.prepare)
    for name in config.sets:
        samples = held_out(config, registry, name, built.adapters, prepare, config.limit)
        records = evaluate(
            built.model,
            built.tokenizer,
            samples,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
        )
        for record in tqdm(records, desc=f"{name}, {bits} bits", unit=" answers", dynamic_ncols=True):
            lines.write(write_record(record, set=name, bits=bits))


def summarise(
    config: EvaluateConfig,
    out: Path,
    folder: Path,
    precisions: list[int],
    media: dict[str, dict[tuple[str, str], list[str]]],
) -> dict[str, Any]:
    """What evaluation.json holds: its figures are computed from the records alone."""
    by_bits: dict[str, dict[str, Any]] = {}
    for name in config.sets:
        reference = None
        for bits in precisions:
            records = read_records(out / "records.jsonl", set=name, bits=bits)
            result = figures(records, config.choose)
            samples = sorted({(record.shard, record.key) for record in records})
            result["samples"] = hashlib.sha256(json.dumps(samples).encode()).hexdigest()[:16]
            result["same_choice"] = None if reference is None else agreement(reference, records, config.choose)
            kept = (p for p in predictions(records, config.choose) if (p["shard"], p["key"]) in media[name])
            result["predictions"] = [p | {"media": media[name][p["shard"], p["key"]]} for p in kept]
            reference = records if reference is None else reference
            by_bits.setdefault(str(bits), {})[name] = result
    return {
        "precisions": by_bits,
        "checkpoint": str(folder),
        "seed": config.seed,
        "limit": config.limit,
        "trained_parameters": trained_parameters(folder),
        "tokens_per_s": training_speed(folder),
        "notes": list(config.notes),
    }


def write_media(
    config: EvaluateConfig, registry: Registry, name: str, modalities: Collection[str], folder: Path
) -> dict[tuple[str, str], list[str]]:
    """Write the media of a set's first samples as they are in the shard; (shard, key) → their names below `out`."""
    if not config.media:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    limit = min(config.limit or config.media, config.media)
    names: dict[tuple[str, str], list[str]] = {}
    samples = held_out(config, registry, name, modalities, unchanged, limit)
    for i, sample in enumerate(samples):
        mine = names.setdefault((sample.shard, sample.key), [])
        for n, part in enumerate(sample.media()):
            mine.append(f"media/{name}/{i:04d}-{n}.{part.member}")
            (folder.parent.parent / mine[-1]).write_bytes(part.content)
    return names


def training_speed(folder: Path) -> float | None:
    """The median tokens/s of the run that a checkpoint belongs to, if its metrics are still there."""
    log = folder.parent.parent / "metrics.jsonl"
    if not log.is_file():
        return None
    speeds = [line["tokens_per_s"] for line in read_lines(log) if "tokens_per_s" in line]
    return statistics.median(speeds) if speeds else None


def trained_parameters(folder: Path) -> int:
    """How many parameters a checkpoint holds: projectors, LoRA, and encoders and an LLM that were trained."""
    from safetensors import safe_open

    total = 0
    folders = ("adapters", "lora", "encoders", "llm")
    for path in (path for name in folders for path in folder.glob(f"{name}/**/*.safetensors")):
        with safe_open(path, "pt") as file:
            total += sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys())  # noqa: SIM118
    return total
