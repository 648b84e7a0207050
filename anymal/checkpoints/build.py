"""From settings, a registry and a checkpoint to a model: the one place where core and modalities meet."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anymal.checkpoints import networks, precision
from anymal.checkpoints.checkpoint import load_projectors, recipe, start_at, with_lora
from anymal.checkpoints.networks import Start
from anymal.config.schema import Config, ModalityConfig, ProjectorConfig
from anymal.config.settings import options
from anymal.config.stages import encoder_names
from anymal.data.prepare import Prepare, prepare
from anymal.errors import UserError
from anymal.modality import Adapter, Encoder, Projector, parts
from anymal.model.fake_tensors import new_tensors
from anymal.model.hub import license_of
from anymal.model.llm import load_llm
from anymal.model.multimodal import AnyMAL
from anymal.model.registry import Fit, Registry


@dataclass(frozen=True, kw_only=True)
class Built:
    """A model and what belongs to it."""

    model: AnyMAL
    """LLM, encoders, projectors, on the device."""
    adapters: dict[str, Adapter]
    """What the model was made from, by modality."""
    tokenizer: Any
    """The LLM's, with the placeholder tokens."""
    prepare: Prepare
    """Decoding and prompt, for the stream's workers."""


def build(
    config: Config,
    place: torch.device,
    registry: Registry,
    *,
    start: Path | Start | None = None,
    partly: bool = False,
    train: Sequence[str] = (),
) -> Built:
    """Load the LLM and the encoders, make the projectors, and load what a checkpoint holds.

    Args:
        config: The settings.
        place: The device that everything goes to.
        registry: What the settings may name.
        start: A checkpoint whose projectors and LoRA are loaded, and encoders and LLM if they were trained; or several.
        partly: Whether projectors of some modalities may be missing there.
        train: What is about to be trained, as in the recipe: of encoders and LLM, it is held in float32.
    """
    torch.manual_seed(config.run.seed)  # fresh projectors and LoRA are the same on every rank
    fresh = start is None
    start = start_at(start) if isinstance(start, Path) else start or Start(modalities={}, llm=None)
    _say_other_precisions(config, start)
    llm, tokenizer = load_llm(networks.llm_of(config, start.llm), place, learns="llm" in train)
    config.model.llm.license = config.model.llm.license or license_of(config.model.llm.name)
    llm = with_lora(llm, config, start.llm)
    table = llm.get_input_embeddings().weight
    std, layers = table.float().std().item(), llm.config.get_text_config().num_hidden_layers
    modalities = networks.encoders_of(config, start.modalities)
    adapters = build_adapters(registry, modalities, table.shape[1], std, llm_layers=layers)
    networks.load_bare({name: adapter.encoder for name, adapter in adapters.items()}, start.modalities)
    model = AnyMAL(llm, adapters, train, low_precision=config.model.llm.bits != 32)
    if not fresh:
        load_projectors(model, adapters, config, start.modalities, partly=partly)
    return Built(
        model=model,
        adapters=adapters,
        tokenizer=tokenizer,
        prepare=prepare(tokenizer, adapters, config.prompt, config.data.max_tokens),
    )


def _say_other_precisions(config: Config, start: Start) -> None:
    """Name the checkpoints whose projectors were trained beside the LLM at other bits than it is loaded at."""
    if int(os.environ.get("RANK", 0)):
        return
    for folder in dict.fromkeys(start.modalities.values()):
        if note := precision.note(folder, recipe(folder).model.llm.bits, config.model.llm.bits):
            print(note, file=sys.stderr)


def build_adapters(
    registry: Registry,
    modalities: Mapping[str, ModalityConfig],
    llm_width: int,
    embedding_std: float = 1.0,
    *,
    llm_layers: int = 0,
) -> dict[str, Adapter]:
    """Load each encoder and put a fresh projector behind it.

    Args:
        registry: What the settings may name.
        modalities: ``model.modalities`` of a recipe.
        llm_width: D, the width of the LLM's token embeddings.
        embedding_std: Standard deviation of the elements of the LLM's token embedding table; projected embeddings
            start at about this scale (see `anymal.adapters.projectors`).
        llm_layers: Its decoder layers, for projectors that stand between them.

    Returns:
        Adapters by modality, in the recipe's order; on the CPU, in fp32, encoders in eval mode without gradients.

    Raises:
        UserError: An unknown modality, option or projector, or an encoder that cannot be loaded.
    """
    adapters = {}
    for name, config in modalities.items():
        modality, encoder = registry.modality(name), load_encoder(registry, name, config)
        fit = Fit(parts=parts(encoder), llm_width=llm_width, scale=embedding_std, llm_layers=llm_layers)
        with new_tensors():
            projector = build_projector(registry, config.projector, fit)
            if getattr(encoder, "skips", False):  # what stands where a view was skipped
                projector.skip = nn.Parameter(embedding_std * torch.randn(llm_width))
        adapters[name] = Adapter(modality, encoder, projector)
    return adapters


def load_encoder(registry: Registry, name: str, config: ModalityConfig) -> Encoder:
    """The frozen encoder of one modality of a recipe, on the CPU, in fp32.

    Raises:
        UserError: As `build_adapters`.
    """
    modality = registry.modality(name)
    given = options(modality.options, dict(config.options), f"model.modalities.{name}.options")
    for place in encoder_names(config.encoder):
        if place.startswith(("/", ".")) and not Path(place).exists():
            raise UserError(
                f"model.modalities.{name}.encoder: there is no {place}; if it was moved, give "
                f"model.modalities.{name}.encoder=FOLDER"
            )
    return modality.load(config.encoder, given)


def build_projector(registry: Registry, config: ProjectorConfig, fit: Fit) -> Projector:
    """A fresh projector [N, T, W] → [N, K, D] with an attribute ``tokens`` (K).

    Raises:
        UserError: An unknown kind or option (the nearest is named), or settings that do not fit the features.
    """
    kind = registry.projector(config.kind)
    return kind.make(config, options(kind.options, dict(config.options), f"projector.options of {config.kind}"), fit)
