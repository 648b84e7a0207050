"""From settings, a registry and a checkpoint to a model: the one place where core and modalities meet."""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from anymal.checkpoints import networks, precision
from anymal.checkpoints.built import Built
from anymal.checkpoints.checkpoint import recipe, start_at
from anymal.checkpoints.load import load_projectors, with_lora
from anymal.checkpoints.networks import Start
from anymal.config.schema import Config, ModalityConfig, ProjectorConfig, encoder_learns
from anymal.config.settings import options
from anymal.config.stages import encoder_names
from anymal.data.prepare import prepare
from anymal.errors import UserError
from anymal.modality import Adapter, Encoder, Projector, parts
from anymal.model.fake_tensors import new_tensors
from anymal.model.hub import license_of
from anymal.model.llm import base_model, compute_dtype, embedding_std, load_llm, token_embedding
from anymal.model.multimodal import AnyMAL
from anymal.model.registry import Fit, Registry


def build(
    config: Config,
    device: torch.device,
    registry: Registry,
    *,
    start: Path | Start | None = None,
    partly: bool = False,
    train: Sequence[str] = (),
) -> Built:
    """Load the LLM and the encoders, make the projectors, and load what a checkpoint holds.

    Args:
        config: The settings.
        device: Where everything goes.
        registry: What the settings may name.
        start: A checkpoint whose projectors and LoRA are loaded, and encoders and LLM if they were trained; or several.
        partly: Whether projectors of some modalities may be missing there.
        train: What is about to be trained, as in the recipe: of encoders and LLM, it is held in float32.
    """
    torch.manual_seed(config.run.seed)  # fresh projectors and LoRA are the same on every rank
    settings, fresh = config.model, start is None
    start = start_at(start) if isinstance(start, Path) else start or Start(modalities={}, llm=None)
    _say_other_precisions(settings.llm.bits, start)
    chosen, learns = networks.llm_of(settings.llm, start.llm), networks.llm_learns(train)
    llm, tokenizer = load_llm(chosen, device, learns=learns, trains=bool(train))
    llm = with_lora(llm, settings.lora, start.llm, train=config.train)
    std, width = embedding_std(llm), token_embedding(llm).weight.shape[1]
    layers = base_model(llm).config.get_text_config().num_hidden_layers
    modalities = networks.encoders_of(settings.modalities, start.modalities)
    adapters = build_adapters(registry, modalities, width, std, llm_layers=layers)
    dtypes = _travelling(adapters, train, device)
    networks.load_bare({name: adapter.encoder for name, adapter in adapters.items()}, start.modalities)
    model = AnyMAL(llm, adapters, train, low_precision=settings.llm.bits != 32)
    if not fresh:
        load_projectors(model, adapters, settings.modalities, start.modalities, partly=partly)
    return Built(
        model=model,
        adapters=adapters,
        tokenizer=tokenizer,
        prepare=prepare(tokenizer, adapters, config.prompt, config.data.max_tokens, dtypes),
        llm_license=settings.llm.license or license_of(settings.llm.name),
    )


def _travelling(adapters: Iterable[str], train: Sequence[str], device: torch.device) -> dict[str, torch.dtype]:
    """In which floating media travel, where their encoder is frozen and computes in less than float32."""
    dtype = compute_dtype(device)
    return {} if dtype == torch.float32 else {name: dtype for name in adapters if not encoder_learns(name, train)}


def _say_other_precisions(bits: int, start: Start) -> None:
    """Name the checkpoints whose projectors were trained beside the LLM at other bits than it is loaded at."""
    if int(os.environ.get("RANK", 0)):
        return
    for folder in dict.fromkeys(start.modalities.values()):
        if note := precision.note(folder, recipe(folder).model.llm.bits, bits):
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
        embedding_std: Standard deviation of the elements of the LLM's token embeddings; projected embeddings
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
    resolved = options(modality.options, config.options, f"model.modalities.{name}.options")
    for source in encoder_names(config.encoder):
        if source.startswith(("/", ".")) and not Path(source).exists():
            raise UserError(
                f"model.modalities.{name}.encoder: there is no {source}; if it was moved, give "
                f"model.modalities.{name}.encoder=FOLDER"
            )
    try:
        encoder = modality.load(config.encoder, resolved)
    except UserError as error:
        raise UserError(f"model.modalities.{name}: {error}") from error
    encoder.encoder_batch_size = config.encoder_batch_size
    return encoder


def build_projector(registry: Registry, config: ProjectorConfig, fit: Fit) -> Projector:
    """A fresh projector [N, T, W] → [N, K, D] with an attribute ``tokens`` (K).

    Raises:
        UserError: An unknown kind or option (the nearest is named), or settings that do not fit the features.
    """
    kind = registry.projector(config.kind)
    return kind.make(config, options(kind.options, config.options, f"projector.options of {config.kind}"), fit)
