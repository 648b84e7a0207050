"""``each``: SPHINX's, for an encoder that gives several kinds of features: a projector for each kind.

N media   T features of one medium   W their width   K tokens of one medium   D the LLM's width
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anymal.adapters.projectors.fit import check_tokens
from anymal.adapters.projectors.pooled import PooledProjector
from anymal.config.schema import ProjectorConfig
from anymal.modality import Projector
from anymal.model.registry import Fit


@dataclass(kw_only=True)
class EachOptions:
    """Settings of ``each`` alone."""

    tags: bool = False
    """Put a learned embedding before and after the others (SPHINX: 257 + 32 + 2 = 291 tokens a view)."""


class EachProjector(Projector):
    """One embedding for each feature: LayerNorm and a linear layer or an mlp of its own for each kind.

    SPHINX has the linear layer first and the LayerNorm behind it; here it stands before, as in all our projectors, so
    that embeddings start at the scale of the LLM's.

    Args:
        parts: (T, W) of each kind; features are filled up with zeros to the largest W.
        llm_width: D.
        inner: Widths of the hidden layers, none for a plain linear projector.
        tags: As in `EachOptions`.
        scale: Standard deviation of an embedding's elements at the start.
    """

    def __init__(
        self,
        *,
        parts: Sequence[tuple[int, int]],
        llm_width: int,
        inner: tuple[int, ...] = (),
        tags: bool = False,
        scale: float = 1.0,
    ):
        super().__init__()
        self.parts = [tuple(part) for part in parts]
        self.each = nn.ModuleList(
            PooledProjector(width=width, features=count, tokens=count, llm_width=llm_width, inner=inner, scale=scale)
            for count, width in self.parts
        )
        self.tags = nn.Parameter(scale * torch.randn(2, llm_width)) if tags else None
        self.tokens = sum(count for count, _ in self.parts) + 2 * tags

    def forward(self, features: Tensor) -> Tensor:
        """[N, T, W] → [N, K, D]: kind after kind, between the tags if there are any."""
        kinds = features.split([count for count, _ in self.parts], dim=1)
        embeddings = [
            project(kind[..., :width]) for project, kind, (_, width) in zip(self.each, kinds, self.parts, strict=True)
        ]
        if self.tags is not None:
            first, last = (tag.expand(len(features), 1, -1) for tag in self.tags)
            embeddings = [first, *embeddings, last]
        return torch.cat(embeddings, dim=1)


def each(config: ProjectorConfig, options: EachOptions, fit: Fit) -> Projector:
    """SPHINX's: a linear layer (or an mlp) of its own for each kind of features of a composition.

    ``layers: 1`` is SPHINX's linear layer; more make an mlp of inner width `config.width`, or the LLM's.

    Raises:
        UserError: `config.tokens` is neither 0 nor the number of features (and tags).
    """
    projector = EachProjector(
        parts=fit.parts,
        llm_width=fit.llm_width,
        inner=(config.width or fit.llm_width,) * (config.layers - 1),
        tags=options.tags,
        scale=fit.scale,
    )
    check_tokens(config, projector.tokens)
    return projector
