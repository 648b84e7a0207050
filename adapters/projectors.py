"""Projectors: the small trained networks that turn an encoder's features into embeddings of the LLM.

    features [N, T, W] ──projector──▶ embeddings [N, K, D]

    N media   T features of one medium   W their width   K tokens of one medium   D the LLM's width   I inner width

Three kinds, by the names in `PROJECTORS`: ``linear`` and ``mlp`` pool the features to a fixed number first; a
``resampler`` (Perceiver resampler, Flamingo, arXiv 2204.14198, section 3.1 and appendix A.1.1) attends to them.

Scale. A frozen LLM has only ever seen embeddings of its own table's scale, and elements of those tables are small
(about 0.1 in SmolLM2, 0.01 in Llama-3). Each kind normalises its last activations and draws its last layer so that
embeddings start with elements of standard deviation `scale`, whatever the encoder's own scale is; training may leave
it. Whoever builds the model reads `scale` off the LLM's embedding table.

Precision. Parameters are fp32; features of any floating type are taken in the parameters' type, and autocast works.
"""

import difflib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anymal.config import ProjectorConfig
from anymal.errors import UserError

GELU_STD = 0.652
"""Root of the mean square of GELU(x) for standard normal x."""


class PooledProjector(nn.Module):
    """Average pooling over the features, LayerNorm, then a linear layer or an mlp.

    One rule for any number of features: S is the largest divisor of K that is not above T. The T features are
    averaged to S (adaptive average pooling over the feature axis, so neighbours in the encoder's order are pooled),
    and each of them makes K / S embeddings. With T ≥ K that is one embedding for each pooled feature; with one feature
    for the whole medium it is one linear layer W → K·D, which is how a single vector becomes AnyMAL's 32 tokens.

    Args:
        width, tokens, llm_width: W, K and D.
        features: T.
        inner: Widths of the hidden layers, none for a plain linear projector; GELU after each.
        scale: Standard deviation of an embedding's elements at the start.
    """

    def __init__(
        self, *, width: int, features: int, tokens: int, llm_width: int, inner: tuple[int, ...] = (), scale: float = 1.0
    ):
        super().__init__()
        self.tokens, self.llm_width = tokens, llm_width
        self.pooled = max(s for s in range(1, tokens + 1) if tokens % s == 0 and s <= features)
        self.norm = nn.LayerNorm(width)
        layers: list[nn.Module] = []
        before, std = width, 1.0
        for after in inner:
            layers += [_scaled_linear(before, after, 1.0 / std), nn.GELU()]
            before, std = after, GELU_STD
        layers.append(_scaled_linear(before, tokens // self.pooled * llm_width, scale / std))
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """[N, T, W] → [N, K, D]."""
        features = features.to(self.norm.weight.dtype)
        if features.shape[1] != self.pooled:
            features = F.adaptive_avg_pool1d(features.transpose(1, 2), self.pooled).transpose(1, 2)
        return self.layers(self.norm(features)).reshape(len(features), self.tokens, self.llm_width)


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


class Resampler(nn.Module):
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
        self.project_out = _scaled_linear(inner, llm_width, scale)

    def forward(self, features: Tensor) -> Tensor:
        """[N, T, W] → [N, K, D]."""
        features = self.project_in(self.norm_in(features.to(self.latents.dtype))) + self.positions
        latents = self.latents.expand(len(features), -1, -1)
        for block in self.blocks:
            latents = block(latents, features)
        return self.project_out(self.norm_out(latents))


def _scaled_linear(before: int, after: int, scale: float) -> nn.Linear:
    """A linear layer that turns inputs of mean square 1 into outputs of standard deviation `scale`."""
    layer = nn.Linear(before, after)
    nn.init.normal_(layer.weight, std=scale * before**-0.5)
    nn.init.zeros_(layer.bias)
    return layer


def _linear(config: ProjectorConfig, width: int, tokens: int, llm_width: int, scale: float) -> nn.Module:
    return PooledProjector(width=width, features=tokens, tokens=config.tokens, llm_width=llm_width, scale=scale)


def _mlp(config: ProjectorConfig, width: int, tokens: int, llm_width: int, scale: float) -> nn.Module:
    inner = (config.width or llm_width,) * (config.layers - 1)
    return PooledProjector(
        width=width, features=tokens, tokens=config.tokens, llm_width=llm_width, inner=inner, scale=scale
    )


def _resampler(config: ProjectorConfig, width: int, tokens: int, llm_width: int, scale: float) -> nn.Module:
    inner = config.width or width
    if inner % config.heads:
        raise UserError(
            f"a resampler of width {inner} cannot be split into {config.heads} heads; set projector.heads to a divisor "
            "or projector.width to a multiple"
        )
    return Resampler(
        width=width,
        features=tokens,
        tokens=config.tokens,
        llm_width=llm_width,
        inner=inner,
        blocks=config.layers,
        heads=config.heads,
        scale=scale,
    )


PROJECTORS: dict[str, Callable[[ProjectorConfig, int, int, int, float], nn.Module]] = {
    "linear": _linear,
    "mlp": _mlp,
    "resampler": _resampler,
}
"""Makers of projectors by the name that ``projector.kind`` gives: (config, W, T, D, scale) → module."""


def build_projector(config: ProjectorConfig, width: int, tokens: int, llm_width: int, scale: float = 1.0) -> nn.Module:
    """A fresh projector [N, T, W] → [N, K, D] with an attribute ``tokens`` (K).

    Args:
        config: Its kind, K, layers, inner width and heads.
        width: W, the encoder's width.
        tokens: T, the encoder's features for one medium.
        llm_width: D.
        scale: Standard deviation of an embedding's elements at the start, best that of the LLM's embedding table.

    Raises:
        UserError: An unknown kind (the nearest is named), or heads that do not divide the width.
    """
    if config.kind not in PROJECTORS:
        near = difflib.get_close_matches(config.kind, PROJECTORS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are: {', '.join(PROJECTORS)}"
        raise UserError(f"projector.kind is {config.kind!r}; {hint}")
    return PROJECTORS[config.kind](config, width, tokens, llm_width, scale)
