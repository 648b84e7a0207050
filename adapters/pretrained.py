"""Loading pretrained encoders through transformers: what image, video, audio and imu have in common.

Everything here runs once, when a model is built. transformers is imported by the functions, once `anymal` has been
imported: a CUDA build of torchaudio beside a CPU torch would break its import (see `anymal.environment`).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from anymal.errors import UserError
from anymal.model.fake_tensors import new_tensors, without_weights
from anymal.model.hub import unavailable

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, FeatureExtractionMixin, PreTrainedConfig, PreTrainedModel

Loaded = TypeVar("Loaded")

UNUSED = ("pooler", "head.", "_fc.", "vision_projection")
"""What the names of weights contain that no encoder here uses: a folder may lack them."""


def call(what: str, name: str, function: Callable[..., Loaded], **kwargs: Any) -> Loaded:
    """``function(name, **kwargs)``, its errors turned into one that tells the user what could not be loaded.

    Raises:
        UserError: It failed; the message holds the first line of the cause.
    """
    try:
        return function(name, **kwargs)
    except Exception as error:  # hub, network, JSON, safetensors and transformers each have errors of their own
        kind = "folder" if Path(name).exists() else "hub name (there is no such folder)"
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"cannot load the {what} of {kind} {name!r}: {lines[0] if lines else repr(error)}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers without its progress bars, and without its report of unused weights: it looks like an error."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def load_config(name: str) -> "PreTrainedConfig":
    """The encoder's transformers config; registers the architectures that this package adds.

    Raises:
        UserError: There is none, or `name` is not one name: not every modality takes a composition of encoders.
    """
    if not isinstance(name, str):
        raise UserError(f"encoder is {name!r}; here it is one hub name or local folder (see docs/encoders.md)")
    if reason := unavailable(name):
        raise UserError(
            f"encoder: {reason}; for one in a folder, one that was moved too, give model.modalities.NAME.encoder=FOLDER"
        )
    from transformers import AutoConfig

    import anymal.adapters.architectures.efficientnet_lite
    import anymal.adapters.architectures.imu_encoder  # noqa: F401

    return call("config", name, AutoConfig.from_pretrained, trust_remote_code=False)


def load_image_processor(name: str) -> "BaseImageProcessor":
    """The encoder's image processor, the variant of it that prepares pixels with PIL: torchvision need not be there.

    Raises:
        UserError: It has none.
    """
    # Some versions (5.17) hide it at the top where torchvision is missing, which its processors of PIL do not need.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    load = AutoImageProcessor.from_pretrained
    return call("image processor", name, load, backend="pil", trust_remote_code=False)


def load_network(
    name: str, *, tower: str | None = None, cls: "type[PreTrainedModel] | None" = None
) -> "PreTrainedModel":
    """A pretrained network in fp32 on the CPU, in eval mode, without gradients.

    Args:
        name: Hub name or local folder.
        tower: The attribute to keep where the model has it: ``"vision_model"`` of a CLIP.
        cls: The transformers model to load it as, if it is not what AutoModel would.

    Raises:
        UserError: It cannot be loaded, or weights that the encoder needs are missing (transformers would make them up).
    """
    config = load_config(name)
    from transformers import AutoModel

    if without_weights():
        with quiet(), torch.device("meta"):  # where numbers that are no weights can be read, as ConvNeXt does
            model = cls(config) if cls else AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
        with new_tensors():
            model.to_empty(device="cpu")
        return getattr(model, tower or "", model).eval().requires_grad_(False)
    with quiet():
        model, report = load_weights("weights", name, cls or AutoModel, trust_remote_code=False)
    keep = tower is not None and hasattr(model, tower)
    missing = [key for key in report["missing_keys"] if not any(unused in key for unused in UNUSED)]
    missing = [key for key in missing if not keep or key.split(".")[0] == tower]
    if missing:
        raise UserError(f"{name!r} lacks {len(missing)} weights of its encoder, such as {sorted(missing)[0]}")
    network = getattr(model, tower or "", model)
    vars(network)["saved_as"] = model.config, f"{tower}." if keep else ""  # for `save_network`
    return network.eval().requires_grad_(False)


def load_weights(what: str, name: str, cls: Any, **options: Any) -> "tuple[PreTrainedModel, dict[str, Any]]":
    """``cls.from_pretrained(name, **options)`` in fp32, and the report of it, which has ``missing_keys``.

    Raises:
        UserError: It cannot be loaded; the message calls it `what`.
    """
    return call(what, name, cls.from_pretrained, dtype=torch.float32, output_loading_info=True, **options)


def is_savable(network: nn.Module) -> bool:
    """Whether `load_network` loaded it, so that `save_network` can write it."""
    return "saved_as" in vars(network)


def save_network(
    network: nn.Module,
    processor: "BaseImageProcessor | FeatureExtractionMixin | None",
    folder: Path,
    weights: Mapping[str, Tensor],
    license: str,
) -> None:
    """Write a network that was trained as a folder that `load_network` and the processors' loaders read again.

    The config is that of the model which `network` is a part of: of a two-tower model the folder lacks the other tower.

    Args:
        network: From `load_network`; its weights are not read.
        processor: Its image processor or feature extractor, if it has one.
        folder: Where to.
        weights: Its weights by the names of an encoder that has it as ``network``.
        license: Of the weights, for the folder's README.md.
    """
    from huggingface_hub import save_torch_state_dict

    config, prefix = vars(network)["saved_as"]
    config.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    named = {f"{prefix}{name.removeprefix('network.')}": tensor for name, tensor in weights.items()}
    save_torch_state_dict(named, folder)
    (folder / "README.md").write_text(f"---\nlicense: {license}\n---\nAn encoder that was trained on.\n")
