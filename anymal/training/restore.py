"""All that a run stands on: made, or restored where it goes on, by one function; saved by another.

    Config, checkpoint ──▶ model ──▶ what is trainable ──▶ float32 weights ──▶ engine ──▶ moments ──▶ stream ──▶ tracker

The order is ZeRO's. Stage 3 shards the parameters as the engine is made: before that the model is whole, takes weights
and can be counted; after it only the engine knows which slice of a moment is this rank's.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from anymal.checkpoints import checkpoint, lock
from anymal.checkpoints.build import build
from anymal.checkpoints.built import Built
from anymal.checkpoints.joined import find_start
from anymal.checkpoints.networks import Start
from anymal.checkpoints.state import TrainingState, load_training_state, optimizer_names, read_optimizer
from anymal.config import settings
from anymal.config.schema import Config
from anymal.data import feature_cache
from anymal.data.feature_codec import identity
from anymal.data.quarantine import Quarantine
from anymal.data.stream import Stream
from anymal.errors import UserError
from anymal.model.flops import StepFlops, llm_flops
from anymal.model.llm import isolates_packed_samples
from anymal.model.registry import Registry
from anymal.model.trainable import select_trainable, trainable
from anymal.training.engine import Engine, Process, engine_of
from anymal.training.optimizer_state import full_moments, portable_parameters, restore_masters, restore_moments
from anymal.training.ranks import on_rank_0
from anymal.training.tracking import Tracker


@dataclass(kw_only=True)
class Run:
    """A run on one rank: all that its checkpoints save, and that a run which goes on restores."""

    config: Config
    """The resolved settings."""
    process: Process
    """This rank."""
    built: Built
    """The model and what belongs to it; its weights are the engine's by now."""
    step_flops: StepFlops
    """Counts the FLOPs of the batches, for the figures of throughput."""
    engine: Engine
    """The optimizer with its moments."""
    stream: Stream
    """This rank's batches, from the bookmark on."""
    tracker: Tracker
    """Where figures go."""
    step: int
    """Optimizer steps that were done when it began."""
    before: Start | None
    """The newest checkpoint: the last one saved, or the one that the run resumed or started from. The next checkpoint
    takes from it the networks that were trained earlier and do not learn in this run."""


def restore(config: Config, registry: Registry, process: Process, resume: Path | None, at_end: ExitStack) -> Run:
    """Make all that a run needs; where it goes on, exactly as it was when `resume` was saved. On every rank.

    Args:
        config: The settings.
        registry: What they may name.
        process: This rank.
        resume: The verified checkpoint to go on from, or None.
        at_end: Where it is left, the engine is gone.

    Raises:
        UserError: The checkpoint is of other parameters than are trained now, or something that the settings name is
            not there or does not fit.
    """
    state = load_training_state(resume) if resume else TrainingState()
    start = checkpoint.start_at(resume) if resume else on_rank_0(partial(find_start, config.model))
    built = build(config, process.device, registry, start=start, partly=resume is None, train=config.train)
    _require_isolated_samples(built, config)
    select_trainable(built.model, config.train)
    if resume is not None:
        names = on_rank_0(partial(_optimizer_names, built, resume))
        restore_masters(built.model, names, partial(read_optimizer, resume))
    step_flops = StepFlops(built.model, llm_flops(built.model.llm, config.model.llm.checkpointing))
    engine = at_end.enter_context(engine_of(built.model, config))
    if resume is not None:
        restore_moments(engine, partial(read_optimizer, resume), state.step)
    stream = _stream(config, registry, process, built, state)
    tracker = Tracker(
        config.run,
        settings.public(config),
        rank=process.rank,
        steps=config.optim.steps,
        start=state.step,
        run_id=state.wandb_id,
    )
    return Run(
        config=config,
        process=process,
        built=built,
        step_flops=step_flops,
        engine=engine,
        stream=stream,
        tracker=tracker,
        step=state.step,
        before=start,
    )


def save(run: Run, step: int, bookmark: dict) -> None:
    """Write a checkpoint from which `restore` goes on. On every rank, since each holds a part.

    Args:
        run: The run.
        step: Optimizer steps done.
        bookmark: The place of all ranks' streams, merged.
    """
    parameters, moments = portable_parameters(run.engine), full_moments(run.engine)
    if run.process.rank:
        return
    lock.require_no_other(Path(run.config.run.dir))
    now = TrainingState(
        step=step,
        bookmark=bookmark,
        refused=run.stream.refused,
        wandb_id=run.tracker.run_id,
        world=run.process.world,
    )
    run.before = checkpoint.start_at(checkpoint.save(run.built, parameters, moments, now, run.config, run.before))


def _require_isolated_samples(built: Built, config: Config) -> None:
    if (config.data.row_tokens or config.data.batch_size > 1) and not isolates_packed_samples(built.model.llm):
        raise UserError(
            f"{config.model.llm.name} lets samples in one row see one another; try model.llm.attention=sdpa, or give "
            "each a row of its own: data.batch_size=1 data.row_tokens=0 (optim.gradient_accumulation makes up for it)"
        )


def _optimizer_names(built: Built, resume: Path) -> set[str]:
    """The names of the optimizer's tensors in a checkpoint, which must be about what is trained."""
    saved = optimizer_names(resume)
    now = set(trainable(built.model))
    before = {name.rsplit(".", 1)[0] for name in saved}
    if now != before:
        name = min(now ^ before)
        raise UserError(
            f"{resume} was made with other parameters trainable: {name} is {'new' if name in now else 'gone'}. "
            f"To start a new stage from it, set model.checkpoint={resume} and another run.dir"
        )
    return saved


def _stream(config: Config, registry: Registry, process: Process, built: Built, state: TrainingState) -> Stream:
    log = "quarantine.jsonl" if process.rank == 0 else f"quarantine-{process.rank}.jsonl"
    limits = {"max_in_a_row": config.data.max_bad_in_a_row, "max_share": config.data.max_bad_share}
    return Stream(
        config.data,
        suffixes=registry.suffixes(),
        modalities=list(built.adapters),
        prepare=built.prepare,
        quarantine=Quarantine(Path(config.run.dir) / log, **limits),
        seed=config.run.seed,
        rank=process.rank,
        world=process.world,
        bookmark=state.bookmark,
        refused=state.refused,
        encoders=_identities(built, config),
    )


def _identities(built: Built, config: Config) -> dict[str, str]:
    """What cached features must be of, by modality; not for an encoder that learns, nor if they are not wanted."""
    if not feature_cache.precisions(config.data.features):
        return {}
    encoders, learn = built.model.encoders, built.model.trained_encoders
    return {name: identity(encoder) for name, encoder in encoders.items() if name not in learn}
