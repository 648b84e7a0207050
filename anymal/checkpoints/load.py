"""The weights of a checkpoint → a model: projectors and LoRA, each refused by name where it does not fit.

Encoders and an LLM that were trained are loaded by their own loaders; `anymal.checkpoints.networks` says from where.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from anymal.checkpoints.checkpoint import description
from anymal.checkpoints.networks import encoder_digest
from anymal.config.schema import LoraConfig, ModalityConfig, ProjectorConfig
from anymal.errors import UserError
from anymal.modality import Adapter
from anymal.model.llm import add_lora, load_lora
from anymal.model.lora import is_lora
from anymal.model.multimodal import AnyMAL

if TYPE_CHECKING:
    from anymal.model.llm import CausalLM


def with_lora(llm: "CausalLM", lora: LoraConfig, start: Path | None, *, train: Sequence[str]) -> nn.Module:
    """The LLM with the LoRA of the checkpoint it starts from, or a fresh one if `train` asks for it, or as it is."""
    if start is not None and (start / "lora").is_dir():
        wrapped = load_lora(llm, start / "lora", lora)
        _require_whole_lora(wrapped, start / "lora" / "adapter_model.safetensors")
        return wrapped
    return add_lora(llm, lora) if "lora" in train else llm


def _require_whole_lora(llm: nn.Module, path: Path) -> None:
    """PEFT only warns of tensors that are missing: half an update would be used as if it were the whole."""
    from peft import get_peft_model_state_dict

    of_llm = {name: parameter for name, parameter in llm.named_parameters() if is_lora(name)}
    wanted = set(get_peft_model_state_dict(llm, state_dict=of_llm, save_embedding_layers=False))
    try:
        with safe_open(path, "pt") as file:
            saved = set(file.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is missing or damaged: {error}; use an older checkpoint") from error
    if wanted != saved:
        name = min(wanted ^ saved)
        raise UserError(
            f"{path} is not the LoRA of this LLM: {len(wanted - saved)} of {len(wanted)} tensors are missing and "
            f"{len(saved - wanted)} too many, such as {name}; use an older checkpoint"
        )


def load_projectors(
    model: AnyMAL,
    adapters: Mapping[str, Adapter],
    modalities: Mapping[str, ModalityConfig],
    starts: Mapping[str, Path],
    *,
    partly: bool = False,
) -> None:
    """Load the projectors of a checkpoint, or of several, into the model.

    Args:
        model: What they go into.
        adapters: As the model was made from.
        modalities: ``model.modalities`` of its recipe.
        starts: By modality, the checkpoint that has its projector.
        partly: Whether some of the model's modalities may lack one (they keep their fresh weights), and may be of a
            stage with tiles where this one has none, or the other way round.

    Raises:
        UserError: A modality is missing, a file is damaged, a projector does not fit, or was trained on an encoder or
            LLM of other weights. Names file and what differs.
    """
    for name, adapter in adapters.items():
        folder = starts.get(name)
        path = folder / "adapters" / name / "model.safetensors" if folder else None
        if path is not None and path.is_file():
            _load_projector(model, adapter, modalities[name].projector, path, partly=partly)
        elif not partly:
            folders = " and ".join(map(str, dict.fromkeys(starts.values()))) or "the checkpoint"
            raise UserError(f"{folders}: no projector for {name}, but for {', '.join(starts) or 'none'}")


def _load_projector(model: AnyMAL, adapter: Adapter, config: ProjectorConfig, path: Path, *, partly: bool) -> None:
    """Load that of one modality, as `load_projectors` says."""
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}; use an older checkpoint") from error
    own = adapter.projector.state_dict()
    if partly and ("skip" in weights) != ("skip" in own):
        weights.pop("skip", None)
        if "skip" in own:  # the embedding of skipped views keeps its fresh weights
            weights["skip"] = own["skip"]
    described = description(path.with_name("adapter_config.json"))
    wanted = {key: tuple(tensor.shape) for key, tensor in own.items()}
    saved = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    if wanted != saved:
        misfit = _misfit(adapter.modality.name, config, described.get("projector"), wanted, saved)
        raise UserError(f"{path} does not fit {misfit}")
    adapter.projector.load_state_dict(weights)
    _require_same_weights(adapter, model.llm, described, path.with_name("adapter_config.json"))


Shapes = Mapping[str, tuple[int, ...]]


def _misfit(name: str, config: ProjectorConfig, saved_config: Any, wanted: Shapes, saved: Shapes) -> str:
    """By what a projector differs from the model's: its kind, its other settings, or else a tensor."""
    setting, here = f"model.modalities.{name}.projector", asdict(config)
    there = saved_config if isinstance(saved_config, dict) else {}
    differing = [key for key in here if key in there and there[key] != here[key]]
    if "kind" in differing:
        differing = ["kind"]  # the others follow from it
    if differing:
        listed = " ".join(f"{setting}.{key}={there[key]}" for key in differing)
        is_now = ", ".join(f"{key} {here[key]}" for key in differing)
        return f"{setting}, which has {is_now} here: it was trained with {listed}; set that, or start without it"
    first = next(key for key in sorted({*wanted, *saved}) if wanted.get(key) != saved.get(key))
    return (
        f"{setting}: {first} is {saved.get(first)} there and {wanted.get(first)} in this model; is its encoder another?"
    )


def _require_same_weights(adapter: Adapter, llm: nn.Module, described: Mapping[str, Any], path: Path) -> None:
    """Refuse a projector that was trained beside other weights than its encoder's or LLM's folder has by now."""
    name = adapter.modality.name
    digests = [
        ("encoder_weights", "an encoder", f"model.modalities.{name}.encoder", lambda: encoder_digest(adapter.encoder)),
        ("llm_weights", "an LLM", "model.llm.name", lambda: llm.weights_digest),
    ]
    for key, what, setting, now in digests:
        digest = described.get(key)  # not there if it learnt, too: the checkpoint holds it then
        if digest is not None and digest != now():
            raise UserError(
                f"{path.parent}: this projector was trained on {what} with other weights than {setting} has now: name "
                "the one it was trained on, or train the projector again (or, to join them all the same, take "
                f"{key} out of {path.name})"
            )
