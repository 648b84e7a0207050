"""Training stages, from the settings to the last checkpoint. Pretraining and finetuning both are this program."""

import gc
import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from anymal.checkpoints import checkpoint, lock, retention
from anymal.checkpoints.built import Built
from anymal.checkpoints.networks import Start
from anymal.checkpoints.process import process_as_found
from anymal.checkpoints.state import load_training_state
from anymal.config import settings
from anymal.config.command_line import parse_args
from anymal.config.schema import Config
from anymal.config.stages import Recipe, config_of, load_stages
from anymal.data.prepare import Prepare
from anymal.data.quarantine import Quarantine
from anymal.data.stream import samples_once, tars
from anymal.errors import UserError
from anymal.files import write_whole
from anymal.model.generate import embed_prompt, generate
from anymal.model.registry import Registry
from anymal.model.trainable import format_table, table
from anymal.sample import Sample, Tokens
from anymal.training.determinism import deterministic
from anymal.training.engine import processes
from anymal.training.loop import train
from anymal.training.ranks import on_rank_0, wait_for_all
from anymal.training.restore import Run, restore, save
from anymal.training.resume import FREE, compare, differences


@process_as_found()
def main(usage: str, registry: Registry, defaults: list[str], argv: Sequence[str] | None = None) -> int:
    """Read the command line and run its stage or stages; 0 when all steps are done, 1 when a signal stopped it."""
    stages = parse_args(Recipe, usage, argv, more_help=registry.describe(), defaults=defaults, read=load_stages)
    return run_stages([config_of(stage) for stage in stages], registry)


def run_stages(stages: Sequence[Config], registry: Registry) -> int:
    """Run stages one after another in this process; of several, those that are done are passed over."""
    undone = [stage for stage in stages if len(stages) == 1 or not checkpoint.is_done(stage.run, stage.optim.steps)]
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
    newest = retention.newest(checkpoint.checkpoints(stage.run))
    assert newest is not None
    try:
        changed = differences(checkpoint.recipe(newest), stage)
    except UserError as error:  # edited, or of another version: the stage is done all the same
        return f", with settings that cannot be compared ({error})"
    names = sorted(set(changed) - set(FREE) - {"model.checkpoint"})
    differing = ", ".join(f"{name} was {changed[name][0]}, is {changed[name][1]}" for name in names)
    return f", with other settings: {differing}" if differing else ""


def run_stage(config: Config, registry: Registry) -> int:
    """Train as the settings say, from the beginning or from where an earlier process stopped.

    Raises:
        UserError: Another run trains in ``run.dir``, or it was begun with other settings; and many more.
    """
    tars(config.data)  # a missing shard is noticed before an LLM is loaded
    with deterministic(config.run.deterministic), processes() as process, ExitStack() as at_end:
        resume, notes = on_rank_0(partial(_open, config, process.world, at_end))
        run = restore(config, registry, process, resume, at_end)
        return _train(run, registry, resume, notes)


def _open(config: Config, world: int, at_end: ExitStack) -> tuple[Path | None, list[str]]:
    """Lock the run's folder until `at_end` is left; the verified checkpoint to go on from, and what to say of it."""
    at_end.enter_context(lock.hold(Path(config.run.dir)))
    retention.clean(checkpoint.checkpoints(config.run))
    resume = checkpoint.find_resume(config.run)
    if resume is None:
        return None, []
    before = load_training_state(resume).world
    return resume, compare(checkpoint.recipe(resume), config, resume, (before, world))


def _train(run: Run, registry: Registry, resume: Path | None, notes: Sequence[str]) -> int:
    config, tracker = run.config, run.tracker
    with tracker:
        if run.process.rank == 0:
            _describe(run)
        questions = _questions(run, registry)
        _introduce(run, resume, notes)

        def save_and_answer(step: int, bookmark: dict) -> None:
            save(run, step, bookmark)
            _answer(run, questions, step)
            wait_for_all()

        finished = train(
            run.engine,
            run.stream,
            config=config,
            start=run.step,
            rank=run.process.rank,
            tracker=tracker,
            save=save_and_answer,
            step_flops=run.step_flops,
        )
        if finished:
            logs = sorted(Path(config.run.dir).glob("quarantine*.jsonl"))
            latest = checkpoint.checkpoints(config.run) / checkpoint.LATEST
            tracker.note(f"done: {latest}{''.join(f'; bad samples: {path}' for path in logs)}")
    wait_for_all()  # a rank that ends early makes the launcher stop one that still writes to W&B
    return 0 if finished else 1


def _describe(run: Run) -> None:
    """Leave the resolved recipe and the table of what is trained in the run's folder."""
    folder = Path(run.config.run.dir)
    write_whole(folder / "recipe.yaml", settings.to_yaml(run.config))
    write_whole(folder / "model.json", json.dumps([asdict(row) for row in table(run.built.model)], indent=2))


def _introduce(run: Run, resume: Path | None, notes: Sequence[str]) -> None:
    """Say what is trained, from where, and what is read."""
    run.tracker.note(format_table(table(run.built.model)))
    run.tracker.note(run.stream.cached)
    for note in notes:
        run.tracker.note(note)
    if resume is not None:
        run.tracker.note(f"going on from {resume}, step {run.step}")
    elif run.before is not None:
        run.tracker.note(_start_of(run.built, run.before))


def _start_of(built: Built, start: Start) -> str:
    """Which projectors a stage takes from the checkpoint, or checkpoints, that it starts from; and which not."""
    here, there = set(built.adapters), set(start.modalities)
    folders = dict.fromkeys(start.modalities.values())
    shares = {"": here & there, "new here": here - there, "left behind, since the recipe lacks them": there - here}
    texts = [f"{', '.join(sorted(names))}{f' ({what})' if what else ''}" for what, names in shares.items() if names]
    return f"starting from {' and '.join(map(str, folders))}, projectors: {'; '.join(texts)}"


Question = tuple[str, str, Tokens]  # key, right answer, question


def _questions(run: Run, registry: Registry) -> list[Question]:
    """The questions whose answers are logged with each checkpoint; bad samples are skipped."""
    config, built = run.config, run.built
    if not config.run.samples:
        return []
    data = replace(config.data, workers=0)
    if config.run.samples_from is not None:
        data = replace(data, shards=config.run.samples_from, datasets={})
    few = {"max_in_a_row": data.max_bad_in_a_row, "max_share": data.max_bad_share, "grace": sys.maxsize}
    quarantine = Quarantine(None, **few)  # a few samples say nothing of a share
    samples = samples_once(
        data,
        suffixes=registry.suffixes(),
        modalities=list(built.adapters),
        prepare=partial(_question, built.prepare),
        quarantine=quarantine,
    )
    return list(islice(samples, config.run.samples))


def _question(prepare: Prepare, sample: Sample) -> Question:
    return sample.key, sample.answer(), prepare.question(sample)


def _answer(run: Run, questions: Sequence[Question], step: int) -> None:
    """Log what the model answers. Every rank computes it, since a sharded model needs them all."""
    if not questions:
        return
    model = run.built.model
    prompts = [embed_prompt(model, question) for _, _, question in questions]
    answers = generate(model, run.built.tokenizer, prompts, max_new_tokens=16)
    rows = [
        [key, question.group(), answer, one.text]
        for (key, answer, question), one in zip(questions, answers, strict=True)
    ]
    run.tracker.table("samples", ["key", "modality", "answer", "said"], rows, step)
    model.train()
