"""Pixels travel as bytes, in a quarter of float32's room: the encoder looks their values up on its device.

    picture ──image processor: resize, crop (worker)──▶ uint8 ──look_up (device)──▶ the values that it would give

Only where the rest of what the processor does to a picture is a function of each byte alone (rescale, normalise): the
table is made by the processor itself, and tried on pictures, to the bit.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

AS_BYTES: dict[str, Any] = {"do_rescale": False, "do_normalize": False}
"""A processor's arguments for pixels as bytes."""
SIDE = 16
"""Rows and columns of a picture that shows each byte once."""
TRIED = ((160, 96), (48, 320))
"""Width and height of the pictures on which a table is tried: of both shapes, smaller and larger than what is taken."""


def lookup_table(processor: "BaseImageProcessor") -> Tensor | None:
    """What an image processor of transformers makes of each byte of each channel, [3, 256] float32.

    Returns:
        None where it does anything else: normalises each picture by its own mean, cuts patches, pads in grey, …
    """
    every = np.arange(256, dtype=np.uint8).reshape(SIDE, SIDE, 1).repeat(3, axis=2)
    try:
        table = _pixels(processor, every, do_resize=False, do_center_crop=False).float()
        if table.shape[-3:] != (3, SIDE, SIDE) or table.numel() != 3 * 256:
            return None
        table = table.reshape(3, 256)
        generator = np.random.default_rng(0)
        for width, height in TRIED:
            noise = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
            as_bytes, values = _pixels(processor, noise, **AS_BYTES), _pixels(processor, noise).float()
            if as_bytes.dtype != torch.uint8 or not torch.equal(look_up(table, as_bytes), values):
                return None
    except Exception:  # of whichever processor, about arguments or a size that it does not know
        return None
    return table


def look_up(table: Tensor, pixels: Tensor) -> Tensor:
    """[3, 256] and uint8 [..., 3, H, W] → the table's values [..., 3, H, W], in the table's dtype. Nothing waits."""
    index = pixels.int()  # a byte as an index would be taken for a mask
    index += torch.arange(0, 3 * 256, 256, dtype=torch.int32, device=pixels.device)[:, None, None]
    return table.flatten().index_select(0, index.flatten()).view(pixels.shape)


def _pixels(processor: "BaseImageProcessor", picture: np.ndarray, **arguments: Any) -> Tensor:
    outputs = processor(images=[Image.fromarray(picture)], return_tensors="pt", **arguments)
    return torch.as_tensor(outputs["pixel_values"])
