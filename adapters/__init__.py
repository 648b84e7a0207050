"""The modalities: one file each, and one line each in `MODALITIES`. Between the stream and the model.

`build_adapters` turns the part of a recipe under ``model.modalities`` into `anymal.modality.Adapter`s, each with its
decoding (used by the stream's workers), its frozen encoder and its trained projector (both used by the model).

The files import torch and the standard library only; av, soundfile, torchaudio and transformers are imported
by the functions that use them, so that listing a modality costs nothing to those who do not use it.
"""

import anymal  # noqa: F401  # isort: skip  (first: it prepares the process for torch)
import inspect
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from anymal.adapters.pretrained import new_tensors
from anymal.adapters.projectors import OPTIONS as PROJECTOR_OPTIONS
from anymal.adapters.projectors import PROJECTORS, build_projector
from anymal.config.command_line import describe
from anymal.config.schema import ModalityConfig
from anymal.config.settings import options
from anymal.config.stages import encoder_names
from anymal.errors import UserError, nearest
from anymal.modality import Adapter, Encoder, Modality, parts

__all__ = ["MODALITIES", "PROJECTORS", "build_adapters", "describe_options", "load_encoder"]

FILES = [
    "image",
    "video",
    "audio",
    "imu",
]
"""The modules of this package that make a modality: a new one adds its line here, and nothing anywhere else."""

MODALITIES: dict[str, Modality] = {
    modality.name: modality for modality in (import_module(f"adapters.{file}").MODALITY for file in FILES)
}
"""Every modality by name."""


def build_adapters(
    modalities: Mapping[str, ModalityConfig], llm_width: int, embedding_std: float = 1.0, *, llm_layers: int = 0
) -> dict[str, Adapter]:
    """Load each encoder and put a fresh projector behind it.

    Args:
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
        modality, encoder = _find(name), load_encoder(name, config)
        with new_tensors():
            projector = build_projector(
                config.projector, parts(encoder), llm_width, scale=embedding_std, llm_layers=llm_layers
            )
            if getattr(encoder, "skips", False):  # what stands where a view was skipped
                projector.skip = nn.Parameter(embedding_std * torch.randn(llm_width))
        adapters[name] = Adapter(modality, encoder, projector)
    return adapters


def load_encoder(name: str, config: ModalityConfig) -> Encoder:
    """The frozen encoder of one modality of a recipe, on the CPU, in fp32.

    Raises:
        UserError: As `build_adapters`.
    """
    modality = _find(name)
    given = options(modality.options, dict(config.options), f"model.modalities.{name}.options")
    for place in encoder_names(config.encoder):
        if place.startswith(("/", ".")) and not Path(place).exists():
            raise UserError(
                f"model.modalities.{name}.encoder: there is no {place}; if it was moved, give "
                f"model.modalities.{name}.encoder=FOLDER"
            )
    return modality.load(config.encoder, given)


def describe_options() -> list[str]:
    """Lines of ``--help``: the decoding options of each modality, and the kinds of projectors with theirs."""
    lines = []
    for name, modality in MODALITIES.items():
        endings = ", ".join(f".{suffix}" for suffix in modality.suffixes)
        lines += ["", f"Options of {name} (shard members ending in {endings}):"]
        lines += describe(modality.options, f"model.modalities.{name}.options.")
    lines += ["", "Kinds of projectors (model.modalities.NAME.projector.kind), and their options:"]
    for kind, maker in PROJECTORS.items():
        lines.append(f"  {kind}: {inspect.getdoc(maker).splitlines()[0]}")
        if kind in PROJECTOR_OPTIONS:
            lines += describe(PROJECTOR_OPTIONS[kind], "  model.modalities.NAME.projector.options.")
    return lines


def _find(name: str) -> Modality:
    if name in MODALITIES:
        return MODALITIES[name]
    raise UserError(f"model.modalities.{name}: there is no such modality; {nearest(name, MODALITIES)}")
