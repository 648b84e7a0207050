"""``linear`` and ``mlp``: pool the features to a fixed number, then a linear layer or several.

N media   T features of one medium   W their width   K tokens of one medium   D the LLM's width   I inner width
"""

from torch import Tensor, nn

from anymal.adapters.pooling import pool_sequence
from anymal.adapters.projectors.fit import scaled_mlp
from anymal.config.schema import ProjectorConfig
from anymal.modality import Projector
from anymal.model.registry import Fit, NoOptions


class PooledProjector(Projector):
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
        self.layers = scaled_mlp(width, inner, tokens // self.pooled * llm_width, scale)

    def forward(self, features: Tensor) -> Tensor:
        """[N, T, W] → [N, K, D]."""
        features = features.to(self.norm.weight.dtype)
        if features.shape[1] != self.pooled:
            features = pool_sequence(features, self.pooled)
        return self.layers(self.norm(features)).reshape(len(features), self.tokens, self.llm_width)


def linear(config: ProjectorConfig, options: NoOptions, fit: Fit) -> Projector:
    """Pool, then one linear layer: AnyMAL's for audio and IMU."""
    return _pooled(config, fit, inner=())


def mlp(config: ProjectorConfig, options: NoOptions, fit: Fit) -> Projector:
    """Pool, then linear layers with GELU between: LLaVA-1.5's."""
    return _pooled(config, fit, inner=(config.width or fit.llm_width,) * (config.layers - 1))


def _pooled(config: ProjectorConfig, fit: Fit, inner: tuple[int, ...]) -> Projector:
    features, width = fit.only(config)
    tokens = config.tokens or features  # 0: one for each, as in LLaVA
    sizes = {"width": width, "features": features, "tokens": tokens, "llm_width": fit.llm_width}
    return PooledProjector(**sizes, inner=inner, scale=fit.scale)
