"""Average pooling as ``adaptive_avg_pool`` takes its areas, also where a GPU shall give the same bits each time.

The backward pass of torch's kernels adds up in any order on a GPU, and is refused under ``run.deterministic``. There
matrix products do the same, but for rounding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def pool_sequence(features: Tensor, count: int) -> Tensor:
    """[N, T, W] → [N, count, W]."""
    if torch.are_deterministic_algorithms_enabled():
        return _areas(features.shape[1], count, features) @ features
    return F.adaptive_avg_pool1d(features.transpose(1, 2), count).transpose(1, 2)


def pool_map(maps: Tensor, side: int) -> Tensor:
    """[N, C, h, w] → [N, C, side, side]."""
    if torch.are_deterministic_algorithms_enabled():
        height, width = maps.shape[-2:]
        return _areas(height, side, maps) @ maps @ _areas(width, side, maps).T
    return F.adaptive_avg_pool2d(maps, side)


def _areas(size: int, count: int, like: Tensor) -> Tensor:
    """[count, size]: what each of `size` places has in each of `count` means. Made on the device: nothing is copied."""
    place = torch.arange(size, device=like.device)
    area = torch.arange(count, device=like.device)[:, None]
    begin, end = area * size // count, -(-(area + 1) * size // count)
    return ((place >= begin) & (place < end)).to(like.dtype) / (end - begin).to(like.dtype)
