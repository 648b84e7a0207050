"""Stand-ins for the encoders that recipes name: their architecture, input and number of features, not their weights.

Each comes in two sizes. *real*: config.json alone, for shapes on tensors without data
(`anymal.model.fake_tensors.shapes_only`). *narrow*: random weights of few and narrow layers, which give the same number
of features and run on a CPU. Sizes are those of the published models' own config files.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A published encoder."""

    model: str
    """transformers' class; its config's has Config in place of Model."""
    real: dict[str, Any]
    """The settings of its config that are not the class's defaults."""
    narrow: dict[str, Any]
    """Those that differ in the stand-in."""
    processor: dict[str, Any]
    """preprocessor_config.json."""
    by_inputs: bool = False
    """Whether the stand-in's matrices are drawn by their number of inputs. With transformers' 0.02 SAM's signal dies
    away in so narrow a network, and what learns behind it is tossed about by steps of 1e-6."""


def _pixels(kind: str, size: int) -> dict[str, Any]:
    square = {"height": size, "width": size}
    return {
        "image_processor_type": kind,
        "size": {"shortest_edge": size} if kind in ("CLIPImageProcessor", "BitImageProcessor") else square,
        "crop_size": square,
        "image_mean": MEAN,
        "image_std": STD,
    }


_NARROW = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_STAGES = {"hidden_sizes": [4, 8, 8, 16], "depths": [1, 1, 1, 1]}


def _clip(size: int) -> Shape:
    real = _CLIP_L | {"image_size": size, "patch_size": 14}
    return Shape(model="CLIPVisionModel", real=real, narrow=_NARROW, processor=_pixels("CLIPImageProcessor", size))


def _convnext(widths: list[int], depths: list[int], size: int) -> Shape:
    real = {"hidden_sizes": widths, "depths": depths, "image_size": size}
    return Shape(model="ConvNextModel", real=real, narrow=_STAGES, processor=_pixels("ViTImageProcessor", size))


SHAPES: dict[str, Shape] = {
    "openai/clip-vit-large-patch14": _clip(224),
    "openai/clip-vit-large-patch14-336": _clip(336),
    "timm/convnext_xxlarge.clip_laion2b_soup": _convnext([384, 768, 1536, 3072], [3, 4, 30, 3], 256),
    "facebook/convnext-large-384-22k-1k": _convnext([192, 384, 768, 1536], [3, 3, 27, 3], 384),
    "facebook/dinov2-giant": Shape(
        model="Dinov2Model",
        real={
            "hidden_size": 1536,
            "num_hidden_layers": 40,
            "num_attention_heads": 24,
            "patch_size": 14,
            "image_size": 518,
            "use_swiglu_ffn": True,
        },
        narrow={key: value for key, value in _NARROW.items() if key != "intermediate_size"},
        processor=_pixels("BitImageProcessor", 224),
    ),
    "facebook/sam-vit-large": Shape(
        model="SamVisionModel",
        real={
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 1024,
            "patch_size": 16,
            "output_channels": 256,
            "global_attn_indexes": [5, 11, 17, 23],
        },
        narrow={
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "output_channels": 8,
            "global_attn_indexes": [],
        },
        processor=_pixels("ViTImageProcessor", 1024),
        by_inputs=True,
    ),
    "google/pix2struct-large": Shape(
        model="Pix2StructVisionModel",
        real={"hidden_size": 1536, "d_ff": 3968, "num_hidden_layers": 18, "num_attention_heads": 24},
        narrow={"hidden_size": 16, "d_ff": 32, "d_kv": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
        processor=_pixels("ViTImageProcessor", 720),
    ),
    "Salesforce/blip2-opt-2.7b": Shape(
        model="Blip2VisionModelWithProjection",
        real={},  # ViT-g and a Q-Former of 12 layers and 768: the class's defaults
        narrow={
            "vision_config": _NARROW | {"image_size": 224, "patch_size": 14},
            "qformer_config": _NARROW | {"encoder_hidden_size": 16, "vocab_size": 64},
            "text_config": {
                "model_type": "opt",
                "hidden_size": 16,
                "ffn_dim": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "vocab_size": 64,
                "word_embed_proj_dim": 16,
            },
            "num_query_tokens": 32,
        },
        processor=_pixels("BlipImageProcessor", 224),
    ),
    "laion/clap-htsat-unfused": Shape(
        model="ClapModel",
        real={},  # HTSAT: 64 features of 768: the class's defaults
        narrow={
            "audio_config": {
                "patch_embeds_hidden_size": 4,
                "hidden_size": 32,
                "depths": [1, 1, 1, 1],
                "num_attention_heads": [1, 1, 2, 2],
            },
            "text_config": _NARROW | {"vocab_size": 64},
            "projection_dim": 8,
        },
        processor={"feature_extractor_type": "ClapFeatureExtractor", "truncation": "rand_trunc"},
    ),
}
"""By hub name."""


def make(name: str, folder: Path, *, narrow: bool) -> str:
    """Write the stand-in of a hub name to `folder`; return it as a string."""
    import transformers

    import anymal  # noqa: F401  (prepares transformers' import)

    shape = SHAPES[name]
    model = getattr(transformers, shape.model)
    config = model.config_class(**shape.real | (shape.narrow if narrow else {}))
    config.architectures = [shape.model]
    folder.mkdir(parents=True)
    if narrow:
        torch.manual_seed(0)
        made = model(config)
        for parameter in made.parameters() if shape.by_inputs else ():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        made.save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(shape.processor))
    return str(folder)


def replaced(encoder: Any, folder: Path, *, narrow: bool) -> Any:
    """An encoder setting with every name in it replaced by its stand-in.

    Args:
        encoder: A name, or a composition's mapping.
        folder: Where stand-ins are made, once each.
        narrow: Which of the two sizes. A file of IMU2CLIP has but one.
    """
    if isinstance(encoder, dict):
        return {key: replaced(value, folder, narrow=narrow) for key, value in encoder.items()}
    if isinstance(encoder, list):
        return [replaced(value, folder, narrow=narrow) for value in encoder]
    if not isinstance(encoder, str):
        return encoder
    if encoder.endswith("imu2clip_src_encoder.pt"):
        return imu2clip(folder)
    if encoder not in SHAPES:
        return encoder  # a setting of a composition that is no name
    model = folder / f"{encoder.replace('/', '--')}{'-narrow' if narrow else ''}"
    return str(model) if model.is_dir() else make(encoder, model, narrow=narrow)


def imu2clip(folder: Path, width: int = 512) -> str:
    """Write a state_dict as IMU2CLIP's training does, at its published size, with random weights; return its path."""
    path = folder / "imu2clip_src_encoder.pt"
    if not path.is_file():
        torch.manual_seed(0)
        gru = torch.nn.GRU(32, width)
        weights = {f"net.5.{name}": tensor for name, tensor in gru.state_dict().items()}
        for place, (before, kernel) in enumerate([(6, 10), (32, 5), (32, 5)], start=1):
            weights[f"net.{place}.net.0.weight"] = torch.nn.Conv1d(before, 32, kernel).weight.detach()
        for place, channels in ((0, 6), (4, 32)):
            weights |= {f"net.{place}.weight": torch.ones(channels), f"net.{place}.bias": torch.zeros(channels)}
        torch.save(weights, path)
    return str(path)
