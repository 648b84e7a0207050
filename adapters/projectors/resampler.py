"""``resampler``: AnyMAL's for images and video, the Perceiver resampler of Flamingo.

Source: arXiv 2204.14198, section 3.1 and appendix A.1.1.

    N media   T features of one medium   W their width   K tokens of one medium   D the LLM's width   I inner width
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anymal.adapters.projectors.fit import asked_tokens, inner_width, scaled_linear
from anymal.config.schema import ProjectorConfig
from anymal.modality import Projector
from anymal.model.registry import Fit, NoOptions


class ResamplerBlock(nn.Module):
    """One block of the resampler: latents attend to features and latents, then a feed-forward layer; both residual."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_latents, self.norm_features = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        """latents [N, K, I], features [N, T, I] → latents [N, K, I]."""
        normed = self.norm_latents(latents)
        context = torch.cat((self.norm_features(features), normed), dim=1)
        query = self._split(self.query(normed))
        key, value = (self._split(half) for half in self.key_value(context).chunk(2, dim=-1))
        attended = F.scaled_dot_product_attention(query, key, value)
        latents = latents + self.out(attended.transpose(1, 2).flatten(2))
        return latents + self.feed_forward(latents)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Resampler(Projector):
    """Perceiver resampler: K learned latents gather from T features through blocks of cross-attention.

    As Flamingo defines it: keys and values over the concatenation of features and latents, LayerNorm on both, a
    feed-forward layer of four times the width, a final LayerNorm. Around it a linear layer from W to I, and one from
    I to D. Attention does not see order, and neither a convolutional encoder's grid nor frames encoded one by one carry
    it, so a learned embedding for each of the T positions is added to the features (Flamingo adds one for each frame).

    Args:
        width, features, tokens, llm_width: W, T, K and D.
        inner: I, a multiple of `heads`.
        blocks: Number of blocks (AnyMAL: 6 for images, 4 for video).
        heads: Attention heads.
        scale: Standard deviation of an embedding's elements at the start.
    """

    def __init__(
        self,
        *,
        width: int,
        features: int,
        tokens: int,
        llm_width: int,
        inner: int,
        blocks: int,
        heads: int,
        scale: float = 1.0,
    ):
        super().__init__()
        self.tokens = tokens
        self.norm_in = nn.LayerNorm(width)
        self.project_in = nn.Linear(width, inner)
        self.positions = nn.Parameter(0.1 * torch.randn(features, inner))
        self.latents = nn.Parameter(torch.randn(tokens, inner))
        self.blocks = nn.ModuleList([ResamplerBlock(inner, heads) for _ in range(blocks)])
        self.norm_out = nn.LayerNorm(inner)
        self.project_out = scaled_linear(inner, llm_width, scale)

    def forward(self, features: Tensor) -> Tensor:
        """[N, T, W] → [N, K, D]."""
        features = self.project_in(self.norm_in(features.to(self.latents.dtype))) + self.positions
        latents = self.latents.expand(len(features), -1, -1)
        for block in self.blocks:
            latents = block(latents, features)
        return self.project_out(self.norm_out(latents))


def resampler(config: ProjectorConfig, options: NoOptions, fit: Fit) -> Projector:
    """Flamingo's Perceiver resampler: AnyMAL's for images and video.

    Its inner width is `config.width`, or the encoder's.

    Raises:
        UserError: No tokens are asked for, or heads do not divide the inner width.
    """
    features, width = fit.only(config)
    return Resampler(
        width=width,
        features=features,
        tokens=asked_tokens(config),
        llm_width=fit.llm_width,
        inner=inner_width(config, width),
        blocks=config.layers,
        heads=config.heads,
        scale=fit.scale,
    )
