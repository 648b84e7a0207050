"""Projectors: the small trained networks that turn an encoder's features into embeddings of the LLM.

    features [N, T, W] ──projector──▶ embeddings [N, K, D]

    N media   T features of one medium   W their width   K tokens of one medium   D the LLM's width   I inner width

One file for each family; `PROJECTORS` has them by the names that recipes use, and `OPTIONS` the settings that a kind
has for itself.

Scale. A frozen LLM has only ever seen embeddings of its own table's scale, and elements of those tables are small
(about 0.1 in SmolLM2, 0.01 in Llama-3). Each kind normalises its last activations and draws its last layer so that
embeddings start with elements of standard deviation `scale`, whatever the encoder's own scale is; training may leave
it. Whoever builds the model reads `scale` off the LLM's embedding table.

Precision. Parameters are fp32; features of any floating type are taken in the parameters' type, and autocast works.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from anymal.adapters.projectors.abstractor import AbstractorOptions, abstractor
from anymal.adapters.projectors.cross import CrossAttentionOptions, cross_attention
from anymal.adapters.projectors.fit import Fit
from anymal.adapters.projectors.mining import mining
from anymal.adapters.projectors.parts import EachOptions, each
from anymal.adapters.projectors.pooled import linear, mlp
from anymal.adapters.projectors.qformer import QFormerOptions, qformer
from anymal.adapters.projectors.resampler import resampler
from anymal.adapters.projectors.shuffle import PixelShuffleOptions, pixel_shuffle
from anymal.config.schema import ProjectorConfig
from anymal.config.settings import options
from anymal.errors import UserError, nearest

PROJECTORS: dict[str, Callable[[ProjectorConfig, Fit], nn.Module]] = {
    "linear": linear,
    "mlp": mlp,
    "resampler": resampler,
    "qformer": qformer,
    "abstractor": abstractor,
    "pixel_shuffle": pixel_shuffle,
    "each": each,
    "mining": mining,
    "cross_attention": cross_attention,
}
"""Makers of projectors by the name that ``projector.kind`` gives."""

OPTIONS: dict[str, type] = {
    "each": EachOptions,
    "cross_attention": CrossAttentionOptions,
    "qformer": QFormerOptions,
    "abstractor": AbstractorOptions,
    "pixel_shuffle": PixelShuffleOptions,
}
"""What ``projector.options`` can hold, for the kinds that have settings of their own."""


@dataclass(kw_only=True)
class NoOptions:
    """Of the other kinds."""


def build_projector(
    config: ProjectorConfig,
    parts: Sequence[tuple[int, int]],
    llm_width: int,
    scale: float = 1.0,
    *,
    llm_layers: int = 0,
) -> nn.Module:
    """A fresh projector [N, T, W] → [N, K, D] with an attribute ``tokens`` (K).

    Args:
        config: Its kind, K, layers, inner width, heads and options.
        parts: (T, W) of each kind of features that the encoder gives of one medium (`anymal.modality.parts`).
        llm_width: D.
        scale: Standard deviation of an embedding's elements at the start, best that of the LLM's embedding table.
        llm_layers: Decoder layers of the LLM, for kinds that stand between them.

    Raises:
        UserError: An unknown kind (the nearest is named), or settings that do not fit the features.
    """
    if config.kind not in PROJECTORS:
        raise UserError(f"projector.kind is {config.kind!r}; {nearest(config.kind, PROJECTORS)}")
    options(OPTIONS.get(config.kind, NoOptions), config.options, f"projector.options of {config.kind}")
    return PROJECTORS[config.kind](config, Fit(parts=parts, llm_width=llm_width, scale=scale, llm_layers=llm_layers))
