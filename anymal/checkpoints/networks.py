"""Whole networks in a checkpoint: the encoders and the LLM, where they were trained. Beside `checkpoint`.

    CHECKPOINT/encoders/MODALITY/   a folder that the modality's loader reads like any other encoder
    CHECKPOINT/llm/                 a causal LM in transformers' own layout, bfloat16 at 16 bits, else float32

Networks that an earlier run trained and this one leaves as they are are in the checkpoint too, as hard links where
possible: each checkpoint has all that was ever trained on the way to it. What was never trained is named in the recipe.
"""

import copy
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from anymal.checkpoints.built import Built
from anymal.config import settings
from anymal.config.schema import Config, LLMConfig, ModalityConfig
from anymal.config.stages import encoder_names
from anymal.data.feature_codec import weights_digest
from anymal.errors import UserError
from anymal.modality import Encoder
from anymal.model.llm import bars_on_terminals_only, base_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MASTER = "master"
"""``NAME.master`` beside the optimizer's moments: a weight in float32 whose saved form is rounded."""

ENCODERS, LLM = "encoders", "llm"
_DIGESTS: WeakKeyDictionary[Encoder, str] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class Start:
    """The checkpoint that a run goes on from, or several that were trained apart (`anymal.checkpoints.joined`)."""

    modalities: Mapping[str, Path]
    """By modality, the checkpoint that its projector comes from, and its encoder if that was trained."""
    llm: Path | None
    """The checkpoint that the LoRA and an LLM that was trained come from, as far as it has such."""


def save(
    built: Built, parameters: Mapping[str, Tensor], config: Config, checkpoint: Path, before: Start | None
) -> None:
    """Write the networks that learn into a checkpoint, and those that an earlier one holds.

    Args:
        built: The model, for its structure and buffers (its weights are not read: under ZeRO they are sharded).
        parameters: What learns, by its name in the model, whole.
        config: The resolved settings.
        checkpoint: The folder that is being written.
        before: The checkpoint that the run goes on or started from, if any.
    """
    for name, adapter in built.adapters.items():
        folder = checkpoint / ENCODERS / name
        if name in built.model.trained_encoders:
            learnt = below(parameters, f"trained_encoders.{name}.")
            save_encoder(adapter.encoder, adapter.encoder.state_dict() | learnt, folder)
        elif before is not None and name in before.modalities:
            _carry(before.modalities[name] / ENCODERS / name, folder)
    if llm_learns(config.train):
        weights = below(parameters, "llm.")
        _save_llm(built.model.llm, weights, built.tokenizer, checkpoint / LLM, config.model.llm.bits)
    elif before is not None and before.llm is not None:
        _carry(before.llm / LLM, checkpoint / LLM)


def llm_learns(train: Sequence[str]) -> bool:
    """Whether `train`, as in a recipe, names the LLM itself."""
    return "llm" in train


def below(parameters: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin with a prefix, by what follows it."""
    return {n.removeprefix(prefix): p.contiguous() for n, p in parameters.items() if n.startswith(prefix)}


def encoder_digest(encoder: Encoder) -> str:
    """The digest of an encoder's weights, computed once: only for an encoder that does not change, or not yet."""
    if encoder not in _DIGESTS:
        _DIGESTS[encoder] = weights_digest(encoder)
    return _DIGESTS[encoder]


def save_encoder(encoder: Encoder, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write an encoder in the format of its loader, if the encoder knows it; else its weights alone."""
    folder.mkdir(parents=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    if getattr(encoder, "savable", False):
        save_pretrained: Any = encoder.save_pretrained
        save_pretrained(folder, weights)
    else:
        save_file(weights, folder / "model.safetensors")


@bars_on_terminals_only()
def _save_llm(
    llm: nn.Module, weights: Mapping[str, Tensor], tokenizer: "PreTrainedTokenizerBase", folder: Path, bits: int
) -> None:
    dtype, whole = torch.bfloat16 if bits == 16 else torch.float32, base_model(llm)
    config = copy.deepcopy(whole.config)  # save_pretrained writes the dtype of the model into its own
    whole.save_pretrained(folder, state_dict={name: weight.to(dtype) for name, weight in weights.items()})
    config.dtype = dtype
    config.architectures = [type(whole).__name__]
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


def masters(parameters: Mapping[str, Tensor], *, bits: int, train: Sequence[str]) -> dict[str, Tensor]:
    """``NAME.master``: the float32 weights of an LLM whose saved form is bfloat16, so that a run resumes exactly."""
    rounded = llm_learns(train) and bits == 16
    return {f"{n}.{MASTER}": p for n, p in parameters.items() if rounded and n.startswith("llm.")}


def llm_of(llm: LLMConfig, start: Path | None) -> LLMConfig:
    """The recipe's LLM, in the form that it has in the checkpoint that the run starts from, if it was trained.

    Raises:
        UserError: The recipe names another LLM than the checkpoint was made from.
    """
    if start is None or not (start / LLM).is_dir():
        return llm
    made_from = settings.load(Config, start / "recipe.yaml").model.llm.name
    _require_same("model.llm.name", llm.name, made_from, start / LLM)
    return replace(llm, name=str(start / LLM))


def encoders_of(modalities: Mapping[str, ModalityConfig], starts: Mapping[str, Path]) -> dict[str, ModalityConfig]:
    """The recipe's modalities, each encoder in the form that it has in its checkpoint, if it was trained.

    Args:
        modalities: ``model.modalities`` of the recipe.
        starts: By modality, the checkpoint that it goes on from, if any.

    Raises:
        UserError: The recipe names another encoder than the checkpoint was made from.
    """
    resolved = dict(modalities)
    for name, modality in modalities.items():
        folder = starts[name] / ENCODERS / name if name in starts else None
        if folder is None or not folder.is_dir():
            continue
        made_from = settings.load(Config, starts[name] / "recipe.yaml").model.modalities[name].encoder
        _require_same(f"model.modalities.{name}.encoder", modality.encoder, made_from, folder)
        if (folder / "config.json").is_file():
            resolved[name] = replace(modality, encoder=with_name(modality.encoder, str(folder)))
    return resolved


def with_name(encoder: Any, name: str) -> Any:
    """An encoder's setting with another name: itself, or the only one in a mapping."""
    if isinstance(encoder, Mapping):
        inner = {key: with_name(value, name) for key, value in encoder.items() if key in ("channels", "append")}
        return {**encoder, **({"name": name} if "name" in encoder else inner)}
    if isinstance(encoder, Sequence) and not isinstance(encoder, str):
        return [with_name(one, name) for one in encoder]
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
    """Whether two names, or compositions, differ only in folders that are gone: such a folder may have been moved.

    Its weights need no comparison, since the trained network in the checkpoint has all of its own.
    """
    pairs = zip(encoder_names(named), encoder_names(made_from), strict=False)
    gone = all(now == then or (then.startswith(("/", ".")) and not Path(then).exists()) for now, then in pairs)
    return gone and with_name(named, "") == with_name(made_from, "")


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
