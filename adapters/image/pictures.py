"""Pictures for compositions of encoders: one canonical square from the worker, each encoder's own pixels on its device.

    bytes ──SquareDecoder (worker)──▶ uint8 [3, S, S] ──Pixels (device)──▶ float32 [N, 3, size, size] for one encoder

S is the largest size in the composition: pictures are only ever scaled down from it, and each is decoded and sent once,
in a quarter of float32's bytes.

    N pictures   S side of the canonical square   size side of what one encoder takes
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from anymal.adapters.image.read import read_image
from anymal.errors import UserError

FITS = ("pad", "squash")
BICUBIC, BILINEAR = "bicubic", "bilinear"


def square(picture: Image.Image, size: int, fit: str) -> Tensor:
    """An image of mode RGB, or a crop of one → uint8 [3, size, size].

    Args:
        picture: Of any size and shape.
        size: Pixels of a side.
        fit: ``"pad"`` keeps its shape and fills up with its own mean colour, half on each side; ``"squash"`` fills the
            square.
    """
    if picture.width == picture.height or fit == "squash":
        squared = picture.resize((size, size), Image.Resampling.BICUBIC)
    else:
        mean = tuple(picture.resize((1, 1), Image.Resampling.BOX).tobytes())
        squared = ImageOps.pad(picture, (size, size), Image.Resampling.BICUBIC, color=mean)
    return torch.from_numpy(np.array(squared)).permute(2, 0, 1).contiguous()


@dataclass(frozen=True, kw_only=True)
class SquareDecoder:
    """bytes → uint8 [3, S, S]."""

    size: int
    """S."""
    fit: str
    """As in `square`."""
    max_pixels: int
    """As in `anymal.adapters.image.modality.ImageOptions`."""

    def __call__(self, data: bytes) -> Tensor:
        """Raises `BadSample`."""
        return square(read_image(data, self.max_pixels), self.size, self.fit)

    def prepare(self, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Images of mode RGB → ``pixel_values`` [len, 3, S, S], as `ImageDecoder.prepare`."""
        return {"pixel_values": torch.stack([square(picture, self.size, self.fit) for picture in pictures])}


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """Canonical pictures → what one encoder takes, as its image processor would: resized, then normalised."""

    size: int
    """Side of the square that it takes."""
    mode: str
    """``"bicubic"`` or ``"bilinear"``; both antialiased."""
    scale: float = 1 / 255
    """Factor of the values 0 to 255 before they are normalised."""
    mean: tuple[float, ...] = ()
    """Of each channel; empty: every picture is normalised by its own mean and deviation (Pix2Struct)."""
    std: tuple[float, ...] = ()
    """Of each channel."""

    def __call__(self, pictures: Tensor) -> Tensor:
        """[N, 3, S, S] of values 0 to 255, any type → [N, 3, size, size] float32.

        Always in float32: in bfloat16 the weights of the resampling would be off by up to a grey level.
        """
        pixels = pictures.float()
        if not self.mean:
            std, mean = torch.std_mean(pixels, dim=(1, 2, 3), correction=0, keepdim=True)
            pixels = (pixels - mean) / std.clamp(min=pixels[0].numel() ** -0.5)
        if pixels.shape[-1] != self.size:
            pixels = F.interpolate(pixels, (self.size, self.size), mode=self.mode, align_corners=False, antialias=True)
        if not self.mean:
            return pixels
        channels = (pixels.clamp(0, 255) * self.scale).unbind(1)  # bicubic filters overshoot
        return torch.stack([(c - mean) / std for c, mean, std in zip(channels, self.mean, self.std, strict=True)], 1)


def pixels_for(processor: Any, size: int, where: str) -> Pixels:
    """What an encoder takes, from its image processor.

    Args:
        processor: An image processor of transformers; which attributes it has depends on the encoder.
        size: Side of its square; 0 takes the processor's own.
        where: The key in the recipe, for errors.

    Raises:
        UserError: The processor does not say its size, or has none.
    """
    timm = getattr(processor, "data_config", None)
    if timm:
        return Pixels(
            size=size or timm["input_size"][-1],
            mode=BILINEAR if timm.get("interpolation") == BILINEAR else BICUBIC,
            mean=tuple(timm["mean"]),
            std=tuple(timm["std"]),
        )
    patches = getattr(processor, "max_patches", None)
    if patches and type(processor).__name__.startswith("Pix2Struct"):
        side = processor.patch_size["height"]
        return Pixels(size=size or int(patches**0.5) * side, mode=BILINEAR)
    cropped = processor.crop_size if getattr(processor, "do_center_crop", False) else None
    sizes = cropped or processor.size
    if sizes is None:
        raise UserError(f"{where}: an encoder of flexible resolution cannot be part of a composition")
    named = [sizes[key] for key in ("height", "shortest_edge", "longest_edge") if sizes[key]]
    if not size and not named:
        raise UserError(f"{where}: its image processor names no size in pixels; set size")
    normalise = getattr(processor, "do_normalize", True)
    return Pixels(
        size=size or named[0],
        mode=BILINEAR if getattr(processor, "resample", None) == 2 else BICUBIC,  # Pillow's number
        scale=processor.rescale_factor if getattr(processor, "do_rescale", True) else 1.0,
        mean=tuple(processor.image_mean) if normalise else (0.0,) * 3,
        std=tuple(processor.image_std) if normalise else (1.0,) * 3,
    )
