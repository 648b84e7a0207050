"""Whole networks in a checkpoint: the encoders and the LLM, where they were trained. Beside `checkpoint`.

    CHECKPOINT/encoders/MODALITY/   a folder that the modality's loader reads like any other encoder
    CHECKPOINT/llm/                 a causal LM in transformers' own layout, bfloat16 at 16 bits, else float32

A checkpoint also has those that the run started from and left as they were, as hard links where the file system has
such: each checkpoint is all that was ever trained on the way to it. What was never trained is named in the recipe.
"""

import copy
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from anymal.config import settings
from anymal.config.schema import Config, LLMConfig, ModalityConfig
from anymal.config.stages import encoder_names
from anymal.errors import UserError
from anymal.modality import Adapter, Encoder
from anymal.model.llm import bars_on_terminals_only
from anymal.model.multimodal import AnyMAL

MASTER = "master"
"""``NAME.master`` beside the optimizer's moments: a weight in float32 whose saved form is rounded."""

ENCODERS, LLM = "encoders", "llm"


@dataclass(frozen=True, kw_only=True)
class Start:
    """The checkpoint that a run goes on from, or several that were trained apart (`anymal.checkpoints.joined`)."""

    modalities: Mapping[str, Path]
    """By modality, the checkpoint that its projector comes from, and its encoder if that was trained."""
    llm: Path | None
    """The checkpoint that the LoRA and an LLM that was trained come from, as far as it has such."""


def save(
    model: AnyMAL,
    parameters: Mapping[str, Tensor],
    config: Config,
    adapters: Mapping[str, Adapter],
    tokenizer: Any,
    place: Path,
    before: Start | None,
) -> None:
    """Write the networks that learn into a checkpoint, and those that an earlier one holds.

    Args:
        model: For its structure and buffers; its weights are not read (under ZeRO they are sharded).
        parameters: What learns, by its name in `model`, whole.
        config: The resolved settings.
        adapters: As the model was made from.
        tokenizer: The LLM's.
        place: The checkpoint that is being written.
        before: The one that the run goes on or started from, if any.
    """
    for name, adapter in adapters.items():
        folder = place / ENCODERS / name
        if name in model.trained_encoders:
            learnt = _below(parameters, f"trained_encoders.{name}.")
            _save_encoder(adapter.encoder, adapter.encoder.state_dict() | learnt, folder)
        elif before is not None and name in before.modalities:
            _carry(before.modalities[name] / ENCODERS / name, folder)
    if llm_learns(config):
        _save_llm(model.llm, _below(parameters, "llm."), tokenizer, place / LLM, config.model.llm.bits)
    elif before is not None and before.llm is not None:
        _carry(before.llm / LLM, place / LLM)


def llm_learns(config: Config) -> bool:
    """Whether the LLM itself is trained."""
    return "llm" in config.train


def _below(parameters: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): p.contiguous() for n, p in parameters.items() if n.startswith(prefix)}


def _save_encoder(encoder: Encoder, weights: dict[str, Tensor], folder: Path) -> None:
    """In the format of its loader, if the encoder knows it; else its weights alone."""
    folder.mkdir(parents=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    if getattr(encoder, "savable", False):
        encoder.save_pretrained(folder, weights)
    else:
        save_file(weights, folder / "model.safetensors")


@bars_on_terminals_only()
def _save_llm(llm: Any, weights: dict[str, Tensor], tokenizer: Any, folder: Path, bits: int) -> None:
    dtype = torch.bfloat16 if bits == 16 else torch.float32
    config = copy.deepcopy(llm.config)  # save_pretrained writes the dtype of the model into its own
    llm.save_pretrained(folder, state_dict={name: weight.to(dtype) for name, weight in weights.items()})
    config.dtype = dtype
    config.architectures = [type(llm).__name__]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _carry(source: Path, folder: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, folder, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def masters(parameters: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """``NAME.master``: the float32 weights of an LLM whose saved form is bfloat16, so that a run resumes exactly."""
    rounded = llm_learns(config) and config.model.llm.bits == 16
    return {f"{n}.{MASTER}": p for n, p in parameters.items() if rounded and n.startswith("llm.")}


def llm_of(config: Config, start: Path | None) -> LLMConfig:
    """The recipe's LLM, in the form that it has in the checkpoint that the run starts from, if it was trained.

    Raises:
        UserError: The recipe names another LLM than the checkpoint was made from.
    """
    llm = config.model.llm
    if start is None or not (start / LLM).is_dir():
        return llm
    made_from = settings.load(Config, start / "recipe.yaml").model.llm.name
    _require_same("model.llm.name", llm.name, made_from, start / LLM)
    return replace(llm, name=str(start / LLM))


def encoders_of(config: Config, starts: Mapping[str, Path]) -> dict[str, ModalityConfig]:
    """The recipe's modalities, each encoder in the form that it has in its checkpoint, if it was trained.

    Args:
        config: The recipe.
        starts: By modality, the checkpoint that it goes on from, if any.

    Raises:
        UserError: The recipe names another encoder than the checkpoint was made from.
    """
    found = dict(config.model.modalities)
    for name, modality in found.items():
        folder = starts[name] / ENCODERS / name if name in starts else None
        if folder is None or not folder.is_dir():
            continue
        made_from = settings.load(Config, starts[name] / "recipe.yaml").model.modalities[name].encoder
        _require_same(f"model.modalities.{name}.encoder", modality.encoder, made_from, folder)
        if (folder / "config.json").is_file():
            found[name] = replace(modality, encoder=_renamed(modality.encoder, str(folder)))
    return found


def _renamed(encoder: Any, name: str) -> Any:
    """An encoder's setting with another name: itself, or the only one in a mapping."""
    if isinstance(encoder, Mapping):
        inner = {key: _renamed(value, name) for key, value in encoder.items() if key in ("channels", "append")}
        return {**encoder, **({"name": name} if "name" in encoder else inner)}
    if isinstance(encoder, Sequence) and not isinstance(encoder, str):
        return [_renamed(one, name) for one in encoder]
    return name


def _require_same(setting: str, named: Any, made_from: Any, folder: Path) -> None:
    """A run must not silently go on from other weights than its recipe names, in either direction."""
    if named == made_from or _moved(named, made_from):
        return
    if not isinstance(named, str) or Path(named).resolve() != folder.resolve():
        raise UserError(
            f"{setting} is {named}, but {folder} was trained from {made_from}: to go on with what was trained set "
            f"{setting}={folder}; to begin with {named}, start from another model.checkpoint (null for none)"
        )


def _moved(named: Any, made_from: Any) -> bool:
    """Whether two names, or compositions, differ in folders only of which the older is gone: then it may be here now.

    No weights are read from it: what was trained has them all.
    """
    pairs = zip(encoder_names(named), encoder_names(made_from), strict=False)
    gone = all(now == then or (then.startswith(("/", ".")) and not Path(then).exists()) for now, then in pairs)
    return gone and _renamed(named, "") == _renamed(made_from, "")


def load_bare(encoders: Mapping[str, Encoder], starts: Mapping[str, Path]) -> None:
    """Load the trained weights of encoders that were saved without a format of their own.

    Args:
        encoders: By modality.
        starts: By modality, the checkpoint that it goes on from, if any.

    Raises:
        UserError: A file is damaged, or does not fit the recipe's encoder.
    """
    for name, encoder in encoders.items():
        path = starts[name] / ENCODERS / name / "model.safetensors" if name in starts else Path()
        if not path.is_file() or path.with_name("config.json").is_file():
            continue
        try:
            encoder.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError) as error:
            raise UserError(f"{path} cannot be loaded into the encoder of {name}: {error}") from error
