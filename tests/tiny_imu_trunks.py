"""State_dicts of the published IMU networks: their authors' names and shapes, random weights, reduced sizes."""

import torch
from torch import Tensor


def _weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Random tensors, of about the size that training leaves: norms near one, matrices by their inputs."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator)
        inputs = tensor[0].numel() if tensor.ndim > 1 and not name.endswith(("_k", "_v", "token", "pos_embed")) else 25
        is_norm = tensor.ndim == 1 and name.endswith("weight")
        made[name] = 1 + 0.1 * tensor if is_norm else tensor * inputs**-0.5
    return made


def _pair(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def imagebind(width: int = 128, patches: int = 20, blocks: int = 3, kernel: int = 8) -> dict[str, Tensor]:
    """The IMU part of ``imagebind_huge.pth``, and a little of its vision part."""
    shapes = {
        "modality_preprocessors.vision.cls_token": (1, 1, 24),
        "modality_trunks.vision.blocks.0.norm_1.weight": (24,),
        "modality_preprocessors.imu.pos_embed": (1, patches + 1, width),
        "modality_preprocessors.imu.cls_token": (1, 1, width),
        "modality_preprocessors.imu.imu_stem.proj.weight": (width, 6 * kernel),
        **_pair("modality_preprocessors.imu.imu_stem.norm_layer", width),
        **_pair("modality_heads.imu.0", width),
        "modality_heads.imu.3.weight": (2 * width, width),
    }
    for i in range(blocks):
        block = f"modality_trunks.imu.blocks.{i}"
        shapes |= {f"{block}.attn.{name}": (1, 1, width) for name in ("bias_k", "bias_v")}
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        shapes |= _pair(f"{block}.attn.out_proj", width, width)
        shapes |= _pair(f"{block}.norm_1", width) | _pair(f"{block}.norm_2", width)
        shapes |= _pair(f"{block}.mlp.fc1", 4 * width, width) | _pair(f"{block}.mlp.fc2", width, 4 * width)
    return _weights(shapes, 0)


def onellm(width: int = 128, patches: int = 31, blocks: int = 2, kernel: int = 10) -> dict[str, Tensor]:
    """What ``consolidated.00-of-01.pth`` holds of images, IMU and CLIP, and a little of the rest; in half precision."""
    clip = "llma.clip.visual"
    shapes = {
        "llma.tok_embeddings.weight": (8, 16),
        "llma.clip.positional_embedding": (77, 24),
        f"{clip}.class_embedding": (width,),
        f"{clip}.positional_embedding": (257, width),
        f"{clip}.proj": (width, 24),
        f"{clip}.conv1.weight": (width, 3, 14, 14),
        **_pair(f"{clip}.ln_pre", width),
        **_pair(f"{clip}.ln_post", width),
        "llma.conv1.imu.weight": (width, 6, kernel),
        "llma.conv1.audio.weight": (width, 1, 16, 16),
        "llma.positional_embedding.imu": (patches + 1, width),
        "llma.resample_tokens.imu": (1, 30, width),
        **_pair("llma.clip_proj1.imu.0", width, width),
    }
    for i in range(blocks):
        block = f"{clip}.transformer.resblocks.{i}"
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        shapes |= _pair(f"{block}.attn.out_proj", width, width)
        shapes |= _pair(f"{block}.ln_1", width) | _pair(f"{block}.ln_2", width)
        shapes |= _pair(f"{block}.mlp.c_fc", 4 * width, width) | _pair(f"{block}.mlp.c_proj", width, 4 * width)
    return {name: tensor.half() for name, tensor in _weights(shapes, 1).items()}


def imu2clip(width: int = 24, channels: int = 32) -> dict[str, Tensor]:
    """An ``*_src_encoder.pt``. Only its output's width can be reduced: 1000 samples leave 32 times for 32 channels."""
    shapes = {
        **_pair("net.0", 6),
        "net.1.net.0.weight": (channels, 6, 10),
        "net.2.net.0.weight": (channels, channels, 5),
        "net.3.net.0.weight": (channels, channels, 5),
        **_pair("net.4", channels),
        "net.5.weight_ih_l0": (3 * width, 32),
        "net.5.weight_hh_l0": (3 * width, width),
        "net.5.bias_ih_l0": (3 * width,),
        "net.5.bias_hh_l0": (3 * width,),
    }
    return _weights(shapes, 2)


STATE_DICTS = {"imagebind": imagebind, "onellm": onellm, "imu2clip": imu2clip}
"""Makers by ``options.trunk``."""
