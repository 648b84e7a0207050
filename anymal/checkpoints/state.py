"""How far training had come: ``training/`` in a checkpoint, which may be taken out of it as a whole.

    training/state.json              `TrainingState`
    training/optimizer.safetensors   AdamW's moments as ``NAME.exp_avg`` and ``NAME.exp_avg_sq``; ``NAME.master``, the
                                     float32 weights of a trained LLM that llm/ has in bfloat16

Tensors are whole, so that a run may go on with another number of ranks.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from anymal.checkpoints.checksums import TRAINING
from anymal.errors import UserError

STATE, OPTIMIZER = "state.json", "optimizer.safetensors"
_OLDEST = ("step", "bookmark", "wandb_id")
_SAVED = (*_OLDEST, "world", "refused")
"""Fields of `TrainingState` in state.json; an older file may lack all but the oldest."""


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What a run needs, besides weights and the optimizer's tensors, to go on exactly where it stopped."""

    step: int = 0
    """Optimizer steps done."""
    bookmark: dict[str, Any] | None = None
    """The stream's place after the last sample trained on, as `anymal.data.stream.merge_bookmarks` gives it."""
    refused: list[list] = field(default_factory=list)
    """The samples that the stream passes over since their loss was not finite, as `Stream.refused`."""
    wandb_id: str | None = None
    """W&B's run id, so that a resumed run continues the same curve."""
    world: int = 0
    """Processes that trained; 0 in older checkpoints, which do not say."""


def save_training(checkpoint: Path, state: TrainingState, optimizer: Mapping[str, Tensor]) -> None:
    """Write ``training/`` of a checkpoint."""
    folder = checkpoint / TRAINING
    folder.mkdir()
    saved = {name: getattr(state, name) for name in _SAVED}
    (folder / STATE).write_text(json.dumps({"version": 1, **saved}))
    save_file(dict(optimizer), folder / OPTIMIZER)


def load_training_state(checkpoint: Path) -> TrainingState:
    """Read the state of training back, but for the optimizer's.

    Raises:
        UserError: The checkpoint was stripped of it, or it is damaged.
    """
    try:
        saved = json.loads((checkpoint / TRAINING / STATE).read_text())
        return TrainingState(**{name: saved[name] for name in _SAVED if name in saved or name in _OLDEST})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(checkpoint, error) from error


def optimizer_names(checkpoint: Path) -> set[str]:
    """The names of the optimizer's tensors: moments, and the float32 weights of an LLM that was trained.

    Raises:
        UserError: The checkpoint was stripped of them, or they are damaged.
    """
    try:
        with safe_open(checkpoint / TRAINING / OPTIMIZER, "pt") as file:
            return set(file.keys())
    except (OSError, SafetensorError) as error:
        raise _unreadable(checkpoint, error) from error


def read_optimizer(checkpoint: Path, name: str) -> Tensor:
    """One of the optimizer's tensors, float32. It lies in the mapped file, whose pages go with it.

    Raises:
        UserError: It is missing, or damaged.
    """
    try:
        with safe_open(checkpoint / TRAINING / OPTIMIZER, "pt") as file:  # anew, so that no read page stays
            return file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise _unreadable(checkpoint, error) from error


def _unreadable(checkpoint: Path, error: Exception) -> UserError:
    folder = checkpoint / TRAINING
    state = f"cannot be read ({error})" if folder.exists() else "is missing: the checkpoint was stripped of it"
    return UserError(
        f"{folder} {state}; to start a new run from these weights set model.checkpoint={checkpoint} and another run.dir"
    )
