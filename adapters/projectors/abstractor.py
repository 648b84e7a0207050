"""``abstractor``: Honeybee's C-Abstractor, convolutions that keep what is near to one another together.

Source: arXiv 2312.06742 and its code; the blocks are RegNet's Y blocks (arXiv 2003.13678) as timm has them.

    N media   T features of one medium   W their width   K tokens of one medium   D the LLM's width   I inner width
    S the features' grid's side, √T
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anymal.adapters.pooling import pool_map
from anymal.adapters.projectors.fit import asked_tokens, grid_side, scaled_mlp
from anymal.config.schema import ProjectorConfig
from anymal.errors import UserError
from anymal.modality import Projector
from anymal.model.registry import Fit


@dataclass(kw_only=True)
class AbstractorOptions:
    """Settings of an abstractor alone."""

    readout: int = 2
    """Linear layers from the inner width to the LLM's after the convolutions, GELU between (Honeybee: 2, with SiLU)."""

    def __post_init__(self):
        if self.readout < 1:
            raise UserError(f"readout is {self.readout}; it must be at least 1")


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels at each position: [N, C, h, w] → the same.

    Not the BatchNorm of RegNet: a medium's embeddings must not depend on what else is in its batch.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, h, w] → [N, C, h, w]."""
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


def _convolution(before: int, after: int, side: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, side, padding=side // 2, groups=groups, bias=False), ChannelNorm(after)
    )


class SqueezeExcite(nn.Module):
    """Each channel is weighed by what the whole map holds (arXiv 1709.01507)."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.weigh = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, inner, 1),
            nn.SiLU(),
            nn.Conv2d(inner, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, h, w] → [N, C, h, w]."""
        return x * self.weigh(x)


class ResidualBlock(nn.Module):
    """RegNet's Y block as Honeybee sets it: 1 x 1, 3 x 3 for each channel, squeeze-excite, 1 x 1; residual."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.layers = nn.Sequential(
            _convolution(before, after),
            nn.SiLU(),
            _convolution(after, after, side=3, groups=after),
            nn.SiLU(),
            SqueezeExcite(after, max(1, round(before / 4))),
            _convolution(after, after),
        )
        self.shortcut = nn.Identity() if before == after else _convolution(before, after)

    def forward(self, x: Tensor) -> Tensor:
        """[N, before, h, w] → [N, after, h, w]."""
        return F.silu(self.layers(x) + self.shortcut(x))


class Abstractor(Projector):
    """Residual convolutions over the grid, average pooling to √K x √K, residual convolutions, an mlp.

    As in Honeybee a learned embedding for each of the T positions is added to the features (it makes that a choice; we
    always do, for encoders whose features do not tell where they are). LayerNorm on the features and before the mlp is
    ours: embeddings then start at the LLM's scale whatever the encoder gives.

    Args:
        width, side, tokens, llm_width: W, S, K (a square) and D.
        inner: I, the channels of the convolutions (Honeybee: 1024).
        blocks: Residual blocks before the pooling, and as many after it (Honeybee: 3).
        readout: Layers of the mlp.
        scale: Standard deviation of an embedding's elements at the start.
    """

    def __init__(
        self,
        *,
        width: int,
        side: int,
        tokens: int,
        llm_width: int,
        inner: int,
        blocks: int,
        readout: int,
        scale: float = 1.0,
    ):
        super().__init__()
        self.side, self.tokens, self.pooled = side, tokens, math.isqrt(tokens)
        self.norm_in = nn.LayerNorm(width)
        self.positions = nn.Parameter(0.02 * torch.randn(side**2, width))
        self.before = nn.Sequential(*[ResidualBlock(inner if i else width, inner) for i in range(blocks)])
        self.after = nn.Sequential(*[ResidualBlock(inner, inner) for _ in range(blocks)])
        self.norm_out = nn.LayerNorm(inner)
        self.readout = scaled_mlp(inner, (llm_width,) * (readout - 1), llm_width, scale)

    def forward(self, features: Tensor) -> Tensor:
        """[N, S · S, W] → [N, K, D]."""
        features = self.norm_in(features.to(self.positions.dtype)) + self.positions
        maps = features.transpose(1, 2).unflatten(2, (self.side, self.side))
        maps = self.after(pool_map(self.before(maps), self.pooled))
        return self.readout(self.norm_out(maps.flatten(2).transpose(1, 2)))


def abstractor(config: ProjectorConfig, options: AbstractorOptions, fit: Fit) -> Projector:
    """Honeybee's C-Abstractor: convolutions, pooling to a square number of tokens, convolutions.

    It has `config.layers` blocks on either side of the pooling, and `config.width` channels, or the encoder's width.

    Raises:
        UserError: The features are no square grid, or the tokens are none or not a square number.
    """
    features, width = fit.only(config)
    tokens, root = asked_tokens(config), math.isqrt(config.tokens)
    if root * root != tokens:
        raise UserError(
            f"projector.tokens is {tokens}, but an abstractor makes a square of tokens: "
            f"{root} x {root} = {root**2} or {root + 1} x {root + 1} = {(root + 1) ** 2}"
        )
    return Abstractor(
        width=width,
        side=grid_side(config, features),
        tokens=tokens,
        llm_width=fit.llm_width,
        inner=config.width or width,
        blocks=config.layers,
        readout=options.readout,
        scale=fit.scale,
    )
