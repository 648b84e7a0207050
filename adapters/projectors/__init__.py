"""Projectors: the small trained networks that turn an encoder's features into embeddings of the LLM.

    features [N, T, W] ──projector──▶ embeddings [N, K, D]

    N media   T features of one medium   W their width   K tokens of one medium   D the LLM's width   I inner width

One file for each family; `PROJECTORS` has them by the names that recipes use.

Scale. A frozen LLM has only ever seen embeddings of its own table's scale, and elements of those tables are small
(about 0.1 in SmolLM2, 0.01 in Llama-3). Each kind normalises its last activations and draws its last layer so that
embeddings start with elements of standard deviation `scale`, whatever the encoder's own scale is; training may leave
it. Whoever builds the model reads `scale` off the LLM's embedding table.

Precision. Parameters are fp32; features of any floating type are taken in the parameters' type, and autocast works.
"""

from anymal.adapters.projectors.abstractor import AbstractorOptions, abstractor
from anymal.adapters.projectors.cross import CrossAttentionOptions, cross_attention
from anymal.adapters.projectors.each import EachOptions, each
from anymal.adapters.projectors.mining import mining
from anymal.adapters.projectors.pooled import linear, mlp
from anymal.adapters.projectors.qformer import QFormerOptions, qformer
from anymal.adapters.projectors.resampler import resampler
from anymal.adapters.projectors.shuffle import PixelShuffleOptions, pixel_shuffle
from anymal.model.registry import ProjectorKind

PROJECTORS: dict[str, ProjectorKind] = {
    "linear": ProjectorKind(make=linear),
    "mlp": ProjectorKind(make=mlp),
    "resampler": ProjectorKind(make=resampler),
    "qformer": ProjectorKind(make=qformer, options=QFormerOptions),
    "abstractor": ProjectorKind(make=abstractor, options=AbstractorOptions),
    "pixel_shuffle": ProjectorKind(make=pixel_shuffle, options=PixelShuffleOptions),
    "each": ProjectorKind(make=each, options=EachOptions),
    "mining": ProjectorKind(make=mining),
    "cross_attention": ProjectorKind(make=cross_attention, options=CrossAttentionOptions),
}
"""By the name that ``projector.kind`` gives."""
