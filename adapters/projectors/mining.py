"""``mining``: Mini-Gemini's patch-info mining: low-resolution features ask for details in their own patch.

Source: arXiv 2403.18814, section 3.2: T = MLP(Q + softmax(φ(Q) φ(K)ᵀ / √C) φ(V)).

    N media   Q queries, n x n of one medium, C wide   M x M cells of the map to each   H the map's width
    D the LLM's width
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from anymal.adapters.projectors.fit import check_tokens
from anymal.adapters.projectors.pooled import PooledProjector
from anymal.config.schema import ProjectorConfig
from anymal.errors import UserError
from anymal.modality import Projector
from anymal.model.registry import Fit, NoOptions


class MiningProjector(Projector):
    """Every query attends only to those M x M features of the map that show the same patch of the picture.

    Each φ is a LayerNorm and a linear layer to C, one each for queries, keys and values. What is gathered is added to
    the query as the encoder gave it; an mlp makes an embedding of the sum. Before the mlp there is a LayerNorm that
    Mini-Gemini does not have: embeddings start at the scale of the LLM's whatever the encoder's is.

    Args:
        queries: (Q, C), Q a square number.
        cells: (Q · M², H): the map in reading order.
        llm_width: D.
        inner: Widths of the mlp's hidden layers.
        scale: Standard deviation of an embedding's elements at the start.
    """

    def __init__(
        self,
        *,
        queries: tuple[int, int],
        cells: tuple[int, int],
        llm_width: int,
        inner: tuple[int, ...],
        scale: float = 1.0,
    ):
        super().__init__()
        (self.tokens, self.width), (count, self.cell_width) = queries, cells
        self.rows, self.cell = math.isqrt(self.tokens), math.isqrt(count // self.tokens)
        self.query = nn.Sequential(nn.LayerNorm(self.width), nn.Linear(self.width, self.width))
        self.key = nn.Sequential(nn.LayerNorm(self.cell_width), nn.Linear(self.cell_width, self.width))
        self.value = nn.Sequential(nn.LayerNorm(self.cell_width), nn.Linear(self.cell_width, self.width))
        sizes = {"width": self.width, "features": self.tokens, "tokens": self.tokens, "llm_width": llm_width}
        self.mlp = PooledProjector(**sizes, inner=inner, scale=scale)

    def forward(self, features: Tensor) -> Tensor:
        """[N, Q + Q · M², max(C, H)] → [N, Q, D]."""
        features = features.to(next(self.parameters()).dtype)
        queries = features[:, : self.tokens, : self.width]
        cells = features[:, self.tokens :, : self.cell_width]
        keys, values = self._by_patch(self.key(cells)), self._by_patch(self.value(cells))
        gathered = F.scaled_dot_product_attention(self.query(queries)[:, :, None], keys, values)[:, :, 0]
        return self.mlp(queries + gathered)

    def _by_patch(self, maps: Tensor) -> Tensor:
        """[N, Q · M², C] in reading order of the map → [N, Q, M², C], the cells of each query."""
        rows, cell = self.rows, self.cell
        return maps.unflatten(1, (rows, cell, rows, cell)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def mining(config: ProjectorConfig, options: NoOptions, fit: Fit) -> Projector:
    """Mini-Gemini's patch info mining: features of one encoder look at their places in another's finer map.

    Its mlp has two layers of the LLM's width: `config.layers` and `config.width` at their defaults.

    Raises:
        UserError: The encoder does not give a square of queries and a square map with M x M cells to each, or
            `config.tokens` is neither 0 nor the number of queries.
    """
    counts = [count for count, _ in fit.parts]
    rows = [math.isqrt(count) for count in counts]
    squares = [side**2 for side in rows] == counts
    if len(counts) != 2 or not squares or rows[1] % rows[0]:
        raise UserError(
            f"projector.kind is mining, but the encoder gives {' and '.join(map(str, counts))} features; it takes an "
            "encoder that appends two: n x n queries, and a map of which n x n square cells can be cut"
        )
    check_tokens(config, counts[0])
    inner = (config.width or fit.llm_width,) * (config.layers - 1)
    return MiningProjector(
        queries=fit.parts[0], cells=fit.parts[1], llm_width=fit.llm_width, inner=inner, scale=fit.scale
    )
