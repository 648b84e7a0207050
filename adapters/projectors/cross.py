"""``cross_attention``: the LLM's layers attend to the media, which take but one token of the row each.

Source: Flamingo, arXiv 2204.14198, section 3.1. Latents come from its Perceiver resampler; before some of the frozen
LLM's layers stands a block of cross-attention and a feed-forward layer, each added through a gate that is shut at the
start, so that training begins with the LLM as it is.

    N media   T features of one medium   W their width   D the LLM's width   R latents of one medium   I inner width
    S tokens that see any medium

Who sees what, and the hooks that call the blocks: `anymal.model.cross_attention`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anymal.adapters.projectors.fit import inner_width
from anymal.adapters.projectors.resampler import Resampler
from anymal.config.schema import ProjectorConfig
from anymal.errors import UserError
from anymal.modality import Projector
from anymal.model.cross_attention import MediaSpan
from anymal.model.registry import Fit

LATENTS = 64
"""Flamingo's."""


@dataclass(kw_only=True)
class CrossAttentionOptions:
    """Settings of ``kind: cross_attention``."""

    every: int = 4
    """A block stands before every so many-th decoder layer: 4 is before the 4th, 8th, 12th, ... (Flamingo-9B: 4)."""
    last_only: bool = True
    """Whether a token sees only the last medium before it (Flamingo), or all of its sample's before it."""
    feed_forward: int = 4
    """Width of a block's feed-forward layer, in widths of the LLM (Flamingo: 4); 0 leaves it out. It holds most of the
    parameters."""

    def __post_init__(self):
        if self.every < 1 or self.feed_forward < 0:
            raise UserError("projector.options: every must be at least 1, and feed_forward cannot be negative")


class GatedCrossAttention(nn.Module):
    """A block: tokens attend to latents, then a feed-forward layer; both residual, each times the tanh of its gate.

    The residual is kept in the parameters' type; with both gates at zero the output equals the input to the bit.

    Args:
        llm_width: D.
        width: I, of the latents and of the attention; a multiple of `heads`.
        heads: Attention heads.
        feed_forward: Width of the feed-forward layer in multiples of D; 0 for none.
    """

    def __init__(self, *, llm_width: int, width: int, heads: int, feed_forward: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(llm_width)
        self.query = nn.Linear(llm_width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, llm_width, bias=False)
        self.gate = nn.Parameter(torch.zeros(1))
        self.feed_forward = None
        if feed_forward:
            inner = feed_forward * llm_width
            self.feed_forward = nn.Sequential(
                nn.LayerNorm(llm_width), nn.Linear(llm_width, inner), nn.GELU(), nn.Linear(inner, llm_width)
            )
            self.feed_forward_gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor, latents: Tensor, spans: Sequence[MediaSpan]) -> Tensor:
        """hidden [S, D], latents [N, R, I], and what of them each token sees → [S, D], in the type of `hidden`."""
        x = hidden.to(self.gate.dtype)
        x = x + self.gate.tanh() * self.out(self._attend(self.query(self.norm(x)), latents.to(x.dtype), spans))
        if self.feed_forward is not None:
            x = x + self.feed_forward_gate.tanh() * self.feed_forward(x)
        return x.to(hidden.dtype)

    def _attend(self, query: Tensor, latents: Tensor, spans: Sequence[MediaSpan]) -> Tensor:
        """query [S, I] → [S, I]. Neighbouring spans of one size go through torch's kernel together."""
        media = self.key_value(latents).unbind(0)  # [R, 2I] each
        groups = [
            (size, list(alike)) for size, alike in groupby(spans, lambda span: (span.tokens, span.last - span.first))
        ]
        queries = query.split([tokens * len(alike) for (tokens, _), alike in groups])
        outputs = []
        for ((tokens, _), alike), some in zip(groups, queries, strict=True):
            seen = torch.stack([torch.cat(media[span.first : span.last]) for span in alike])
            key, value = (self._split(half) for half in seen.chunk(2, dim=-1))
            attended = F.scaled_dot_product_attention(self._split(some.unflatten(0, (len(alike), tokens))), key, value)
            outputs.append(attended.transpose(1, 2).flatten(2).flatten(0, 1))
        return torch.cat(outputs)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class CrossAttentionProjector(Projector):
    """What stands in the row for a medium, what the LLM's layers see of it, and the blocks through which they do.

    Args:
        context: Features [N, T, W] → latents [N, R, I].
        blocks: By the number of the decoder layer that each stands before.
        llm_width: D.
        last_only: Whether a token sees only the last medium before it.
        scale: Standard deviation of the elements of the embedding that stands in the row.
    """

    tokens = 1

    def __init__(
        self,
        *,
        context: nn.Module,
        blocks: dict[int, GatedCrossAttention],
        llm_width: int,
        last_only: bool,
        scale: float,
    ):
        super().__init__()
        self.last_only = last_only
        # `place`, `context` and `bridges` are names of tensors in checkpoints.
        self.place = nn.Parameter(scale * torch.randn(1, llm_width))
        self.context = context
        self.bridges = nn.ModuleDict({str(layer): block for layer, block in blocks.items()})

    def forward(self, features: Tensor) -> Tensor:
        """[N, T, W] → [N, 1, D]: for every medium the same learned embedding, which says that there is one."""
        return self.place.expand(len(features), 1, -1)


def cross_attention(config: ProjectorConfig, options: CrossAttentionOptions, fit: Fit) -> Projector:
    """Flamingo's gated cross-attention: layers of the LLM look at a medium, which takes one token of the row.

    R is `config.tokens` (0: 64), I is `config.width` or the encoder's, blocks of the resampler `layers`.

    Raises:
        UserError: Heads do not divide the inner width, or the LLM has fewer layers than one block asks for.
    """
    features, width = fit.only(config)
    inner = inner_width(config, width)
    layers = range(options.every - 1, fit.llm_layers, options.every)
    if not layers:
        raise UserError(
            f"projector.options.every is {options.every}, but the LLM has {fit.llm_layers} decoder layers: no block "
            "would stand anywhere"
        )
    settings = {"llm_width": fit.llm_width, "width": inner, "heads": config.heads, "feed_forward": options.feed_forward}
    return CrossAttentionProjector(
        context=Resampler(
            width=width,
            features=features,
            tokens=config.tokens or LATENTS,
            llm_width=inner,
            inner=inner,
            blocks=config.layers,
            heads=config.heads,
        ),
        blocks={layer: GatedCrossAttention(**settings) for layer in layers},
        llm_width=fit.llm_width,
        last_only=options.last_only,
        scale=fit.scale,
    )
