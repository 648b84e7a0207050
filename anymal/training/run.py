"""Training stages, from the settings to the last checkpoint. Pretraining and finetuning both are this program."""

import gc
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from anymal.checkpoints import checkpoint, lock, retention
from anymal.checkpoints.build import Built, build
from anymal.checkpoints.checkpoint import TrainingState
from anymal.checkpoints.joined import find_start
from anymal.checkpoints.networks import Start
from anymal.checkpoints.process import process_as_found
from anymal.config import settings
from anymal.config.command_line import parse_args
from anymal.config.schema import Config
from anymal.config.stages import Recipe, config_of, load_stages
from anymal.data import feature_cache
from anymal.data.feature_codec import identity
from anymal.data.packing import pack
from anymal.data.prepare import Prepare
from anymal.data.quarantine import Quarantine
from anymal.data.stream import Stream, samples_once, tars
from anymal.errors import UserError
from anymal.files import write_whole
from anymal.model.flops import StepFlops, llm_flops
from anymal.model.generate import embed_prompt, generate
from anymal.model.llm import isolates_packed_samples
from anymal.model.registry import Registry
from anymal.model.trainable import format_table, select_trainable, table, trainable
from anymal.sample import Sample, Tokens
from anymal.training.engine import (
    engine_of,
    full_moments,
    portable_parameters,
    processes,
    restore_masters,
    restore_moments,
)
from anymal.training.loop import train
from anymal.training.resume import FREE, compare, differences
from anymal.training.tracking import Tracker


@process_as_found()
def main(usage: str, registry: Registry, defaults: list[str], argv: Sequence[str] | None = None) -> int:
    """Read the command line and run its stage or stages; 0 when all steps are done, 1 when a signal stopped it."""
    stages = parse_args(Recipe, usage, argv, more_help=registry.describe(), defaults=defaults, read=load_stages)
    return run_stages([config_of(stage) for stage in stages], registry)


def run_stages(stages: Sequence[Config], registry: Registry) -> int:
    """Run stages one after another in this process; of several, those that are done are passed over."""
    undone = [stage for stage in stages if len(stages) == 1 or not checkpoint.is_done(stage)]
    for stage in undone:
        tars(stage.data)  # a missing shard is noticed before a stage is trained
    if int(os.environ.get("RANK", 0)) == 0:
        for stage in stages:
            if stage not in undone:
                print(f"{stage.run.dir}: done before{_changed_since(stage)}")
    for stage in undone:
        if run_stage(stage, registry):
            return 1
        gc.collect()  # engine and model refer to one another
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 0


def _changed_since(stage: Config) -> str:
    """The settings that a stage which is done was trained with and the recipe no longer says."""
    try:
        changed = differences(checkpoint.recipe(retention.newest(checkpoint.checkpoints(stage))), stage)
    except UserError as error:  # edited, or of another version: the stage is done all the same
        return f", with settings that cannot be compared ({error})"
    names = sorted(set(changed) - set(FREE) - {"model.checkpoint"})
    said = ", ".join(f"{name} was {changed[name][0]}, is {changed[name][1]}" for name in names)
    return f", with other settings: {said}" if said else ""


def run_stage(config: Config, registry: Registry) -> int:
    """Train as the settings say, from the beginning or from where an earlier process stopped.

    Raises:
        UserError: Another run trains in ``run.dir``, or it was begun with other settings; and many more.
    """
    tars(config.data)  # a missing shard is noticed before an LLM is loaded
    with processes() as (rank, world, device), ExitStack() as at_end:
        resume, notes = _on_rank_0(rank, lambda: _open(config, world, at_end))
        return _train(config, registry, rank, world, device, resume, notes, at_end)


def _on_rank_0(rank: int, decide: Callable[[], Any]) -> Any:
    """What `decide` returns on rank 0, on every rank; if it raises there, the others end without a word."""
    decided: list[Any] = [None]
    try:
        if rank == 0:
            decided = [(decide(),)]
    finally:
        torch.distributed.broadcast_object_list(decided)
    if decided[0] is None:
        raise SystemExit(2)
    return decided[0][0]


def _open(config: Config, world: int, at_end: ExitStack) -> tuple[Path | None, list[str]]:
    """Lock the run's folder until `at_end` is left; the verified checkpoint to go on from, and what to say of it."""
    at_end.enter_context(lock.hold(Path(config.run.dir)))
    retention.clean(checkpoint.checkpoints(config))
    resume = checkpoint.find_resume(config)
    if resume is None:
        return None, []
    before = checkpoint.load_training_state(resume).world
    return resume, compare(checkpoint.recipe(resume), config, resume, (before, world))


def _train(
    config: Config,
    registry: Registry,
    rank: int,
    world: int,
    device: torch.device,
    resume: Path | None,
    notes: Sequence[str],
    at_end: ExitStack,
) -> int:
    state = checkpoint.load_training_state(resume) if resume else TrainingState()
    start = checkpoint.start_at(resume) if resume else _on_rank_0(rank, lambda: find_start(config))
    built = build(config, device, registry, start=start, partly=resume is None, train=config.train)
    if (config.data.row_tokens or config.data.batch_size > 1) and not isolates_packed_samples(built.model.llm):
        raise UserError(
            f"{config.model.llm.name} lets samples in one row see one another; try model.llm.attention=sdpa, or give "
            "each a row of its own: data.batch_size=1 data.row_tokens=0 (optim.accumulate makes up for it)"
        )
    select_trainable(built.model, config.train)
    if resume is not None:
        read = partial(checkpoint.read_optimizer, resume)
        restore_masters(built.model, _on_rank_0(rank, lambda: _saved_by_optimizer(built, resume)), read)
    folder = Path(config.run.dir)
    if rank == 0:
        _describe(built, config, folder)
    step_flops = StepFlops(built.model, llm_flops(built.model.llm, config.model.llm.checkpointing))
    engine = at_end.enter_context(engine_of(built.model, config))
    if resume is not None:
        restore_moments(engine, read, state.step)

    log = folder / ("quarantine.jsonl" if rank == 0 else f"quarantine-{rank}.jsonl")
    limits = {"max_in_a_row": config.data.max_bad_in_a_row, "max_share": config.data.max_bad_share}
    stream = Stream(
        config.data,
        suffixes=registry.suffixes(),
        modalities=list(built.adapters),
        prepare=built.prepare,
        collate=pack,
        quarantine=Quarantine(log, **limits),
        seed=config.run.seed,
        rank=rank,
        world=world,
        bookmark=state.bookmark,
        refused=state.refused,
        encoders=_identities(built, config),
    )
    shown = _samples_to_show(built, config, registry.suffixes())
    with Tracker(
        config.run,
        settings.public(config),
        rank=rank,
        steps=config.optim.steps,
        start=state.step,
        run_id=state.wandb_id,
    ) as tracker:
        tracker.note(format_table(table(built.model)))
        tracker.note(stream.cached)
        for note in notes:
            tracker.note(note)
        if resume is not None:
            tracker.note(f"going on from {resume}, step {state.step}")
        elif start is not None:
            tracker.note(_start_of(built, start))

        def save(place: int, bookmark: dict) -> None:
            nonlocal start
            parameters, moments = portable_parameters(engine), full_moments(engine)
            if rank == 0:
                lock.require_no_other(folder)
                now = TrainingState(
                    step=place,
                    bookmark=bookmark,
                    refused=stream.refused,
                    wandb_id=tracker.run_id,
                    world=world,
                )
                parts = (config, built.adapters, built.tokenizer, start)
                saved = checkpoint.save(built.model, parameters, moments, now, *parts)
                start = checkpoint.start_at(saved)
            _show(built, shown, tracker, place)
            torch.distributed.barrier()

        loop = {"start": state.step, "rank": rank, "tracker": tracker, "save": save, "step_flops": step_flops}
        finished = train(engine, stream, config=config, **loop)
        if finished:
            logs = "".join(f"; bad samples: {path}" for path in sorted(folder.glob("quarantine*.jsonl")))
            tracker.note(f"done: {checkpoint.checkpoints(config) / checkpoint.LATEST}{logs}")
    torch.distributed.barrier()  # a rank that ends early makes the launcher stop one that still writes to W&B
    return 0 if finished else 1


def _start_of(built: Built, start: Start) -> str:
    """What a stage takes from the checkpoint it starts from, or from several, and what not."""
    here, there = set(built.adapters), set(start.modalities)
    folders = dict.fromkeys(start.modalities.values())
    shares = {"": here & there, "new here": here - there, "left behind, since the recipe lacks them": there - here}
    parts = [f"{', '.join(sorted(names))}{f' ({what})' if what else ''}" for what, names in shares.items() if names]
    return f"starting from {' and '.join(map(str, folders))}, projectors: {'; '.join(parts)}"


def _identities(built: Built, config: Config) -> dict[str, str]:
    """What cached features must be of, by modality; not for an encoder that learns, nor if they are not wanted."""
    if not feature_cache.precisions(config.data.features):
        return {}
    encoders, learn = built.model.encoders, built.model.trained_encoders
    return {name: identity(encoder) for name, encoder in encoders.items() if name not in learn}


def _saved_by_optimizer(built: Built, folder: Path) -> set[str]:
    """The names of the optimizer's tensors in a checkpoint, which must be about what is trained."""
    saved = checkpoint.optimizer_names(folder)
    now = set(trainable(built.model))
    before = {name.rsplit(".", 1)[0] for name in saved}
    if now != before:
        name = sorted(now ^ before)[0]
        raise UserError(
            f"{folder} was made with other parameters trainable: {name} is {'new' if name in now else 'gone'}. "
            f"To start a new stage from it, set model.checkpoint={folder} and another run.dir"
        )
    return saved


def _describe(built: Built, config: Config, folder: Path) -> None:
    """Leave the resolved recipe and the table of what is trained in the run's folder."""
    write_whole(folder / "recipe.yaml", settings.to_yaml(config))
    write_whole(folder / "model.json", json.dumps([asdict(row) for row in table(built.model)], indent=2))


Shown = tuple[str, str, Tokens]  # key, right answer, question


def _samples_to_show(built: Built, config: Config, suffixes: Mapping[str, str]) -> list[Shown]:
    """The samples whose answers are logged with each checkpoint; bad ones are passed over."""
    if not config.run.samples:
        return []
    data = replace(config.data, workers=0)
    if config.run.samples_from is not None:
        data = replace(data, shards=config.run.samples_from, datasets={})
    few = {"max_in_a_row": data.max_bad_in_a_row, "max_share": data.max_bad_share, "grace": sys.maxsize}
    quarantine = Quarantine(None, **few)  # a few samples say nothing of a share
    parts = {"suffixes": suffixes, "modalities": list(built.adapters), "prepare": partial(_question, built.prepare)}
    return list(islice(samples_once(data, **parts, quarantine=quarantine), config.run.samples))


def _question(prepare: Prepare, sample: Sample) -> Shown:
    return sample.key, sample.answer(), prepare.prompt.question(prepare.decode(sample))


def _show(built: Built, samples: list[Shown], tracker: Tracker, step: int) -> None:
    """Log what the model answers. Every rank computes it, since a sharded model needs them all."""
    if not samples:
        return
    prompts = [embed_prompt(built.model, question) for _, _, question in samples]
    said = generate(built.model, built.tokenizer, prompts, max_new_tokens=16)
    rows = [
        [key, question.group(), answer, one.text] for (key, answer, question), one in zip(samples, said, strict=True)
    ]
    tracker.table("samples", ["key", "modality", "answer", "said"], rows, step)
    built.model.train()
