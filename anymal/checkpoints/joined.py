"""Where a run starts: one checkpoint, or several whose modalities were trained apart, as AnyMAL trains them.

    model.checkpoint=runs/a                                   all of one
    model.checkpoint=[runs/a,runs/b]                          all of each, where no modality is in two
    model.checkpoint='{image: runs/a, imu: runs/b}'           by modality

A projector fits one LLM, so all of them must have been trained with the same. A LoRA, or an LLM that was trained, can
come from one of them only.
"""

import filecmp
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anymal.checkpoints.checkpoint import description, existing, modalities_in, start_at
from anymal.checkpoints.networks import LLM, Start
from anymal.config.schema import ModelConfig
from anymal.errors import UserError

MIX = "anymal mix mixes two of the same modalities"


def find_start(model: ModelConfig) -> Start | None:
    """What ``model.checkpoint`` says that the run starts from; None for nothing.

    Raises:
        UserError: A checkpoint is not there or lacks a modality that it is named for, a modality is in two, or they do
            not fit together.
    """
    start = model.checkpoint
    if start is None:
        return None
    if isinstance(start, str):
        return start_at(existing(start))
    folders = _by_modality(start) if isinstance(start, dict) else _listed(start, list(model.modalities))
    return Start(modalities=folders, llm=_llm_from(list(dict.fromkeys(folders.values()))))


def _by_modality(named: Mapping[str, str | None]) -> dict[str, Path]:
    """The checkpoints that a mapping names by modality; null starts one fresh."""
    folders = {name: existing(checkpoint) for name, checkpoint in named.items() if checkpoint is not None}
    for name, folder in folders.items():
        if name not in (trained := modalities_in(folder)):
            raise UserError(f"model.checkpoint.{name}: {folder} has no projector for it, but for {', '.join(trained)}")
    return folders


def _listed(named: Sequence[str], modalities: Sequence[str]) -> dict[str, Path]:
    """For each of the recipe's modalities, the one checkpoint of the list that has it."""
    folders: dict[str, Path] = {}
    for folder in map(existing, named):
        trained = modalities_in(folder)
        if not set(trained) & set(modalities):  # nothing of it would be taken, not even its LoRA
            raise UserError(
                f"model.checkpoint: {folder} has projectors for {', '.join(trained)} and the recipe for "
                f"{', '.join(modalities)}: take it out of the list"
            )
        for name in (name for name in trained if name in modalities):
            if name in folders:
                raise UserError(
                    f"model.checkpoint: {folders[name]} and {folder} both have a projector for {name}; say by modality "
                    f"which is meant: model.checkpoint='{{{name}: FOLDER, ...}}'"
                )
            folders[name] = folder
    return folders


def _llm_from(folders: Sequence[Path]) -> Path | None:
    """The checkpoint whose LoRA or trained LLM is taken, if there is one; refuses those that do not fit together."""
    for other in folders[1:]:
        if not _same_llm(folders[0], other):
            raise UserError(
                f"model.checkpoint: {folders[0]} was trained with {_llm_of(folders[0])}, {other} with "
                f"{_llm_of(other)}; a projector fits the LLM that it was trained with, so they cannot be joined ({MIX})"
            )
    tuned = [folder for folder in folders if (folder / "lora").is_dir()]
    if len(tuned) > 1:
        raise UserError(f"model.checkpoint: {tuned[0]} and {tuned[1]} hold a LoRA each; an LLM takes but one ({MIX})")
    return next(iter([*tuned, *(folder for folder in folders if (folder / LLM).is_dir())]), None)


def _same_llm(one: Path, other: Path) -> bool:
    trained = [(folder / LLM).is_dir() for folder in (one, other)]
    if any(trained):
        return all(trained) and _same_files(one / LLM, other / LLM)
    described = [_describe(folder) for folder in (one, other)]
    key = "llm_weights" if all(each.get("llm_weights") for each in described) else "llm"
    return described[0].get(key) == described[1].get(key)


def _same_files(one: Path, other: Path) -> bool:
    """Whether two LLMs are the same to the bit: an earlier stage's, handed on."""
    names = sorted(path.name for path in one.iterdir())
    return names == sorted(path.name for path in other.iterdir()) and all(
        filecmp.cmp(one / name, other / name) for name in names
    )


def _llm_of(folder: Path) -> str:
    """An LLM as a message names it."""
    return f"the LLM in {folder / LLM}" if (folder / LLM).is_dir() else f"{_describe(folder).get('llm')}"


def _describe(folder: Path) -> dict[str, Any]:
    return description(folder / "adapters" / modalities_in(folder)[0] / "adapter_config.json")
