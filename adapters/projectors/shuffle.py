"""``pixel_shuffle``: cells of r x r neighbouring features become one wide feature each, then a linear layer or an mlp.

Source: InternVL 1.5 (arXiv 2404.16821; LayerNorm and an mlp) and Idefics3 (arXiv 2408.12637; a linear layer); the
name is that of the inverse, arXiv 1609.05158. The order of channels is theirs.

    N media   T features of one medium   W their width   D the LLM's width   r the factor   S the grid's side, √T
"""

from dataclasses import dataclass

from torch import Tensor, nn

from anymal.adapters.projectors.fit import grid_side, scaled_mlp
from anymal.config.schema import ProjectorConfig
from anymal.errors import UserError
from anymal.modality import Projector
from anymal.model.registry import Fit


@dataclass(kw_only=True)
class PixelShuffleOptions:
    """Settings of pixel_shuffle alone."""

    factor: int = 2
    """Side of the cells of features that become one token: there are factor x factor times fewer tokens."""

    def __post_init__(self):
        if self.factor < 1:
            raise UserError(f"factor is {self.factor}; it must be at least 1")


class PixelShuffle(Projector):
    """Space to depth, LayerNorm, then a linear layer or an mlp. A token is a cell, in reading order, nothing pooled.

    Args:
        width, side, llm_width: W, S and D.
        factor: r, a divisor of S.
        inner: Widths of the hidden layers, none for a linear projector; GELU after each.
        scale: Standard deviation of an embedding's elements at the start.
    """

    def __init__(
        self, *, width: int, side: int, llm_width: int, factor: int, inner: tuple[int, ...] = (), scale: float = 1.0
    ):
        super().__init__()
        self.side, self.factor, self.tokens = side, factor, (side // factor) ** 2
        self.norm = nn.LayerNorm(factor**2 * width)
        self.layers = scaled_mlp(factor**2 * width, inner, llm_width, scale)

    def forward(self, features: Tensor) -> Tensor:
        """[N, T, W] → [N, T / r², D]."""
        return self.layers(self.norm(self.cells(features.to(self.norm.weight.dtype))))

    def cells(self, features: Tensor) -> Tensor:
        """[N, S · S, W] → [N, (S / r)², r · r · W]: the features of a cell in reading order, end to end."""
        r, cells = self.factor, self.side // self.factor
        grid = features.unflatten(1, (cells, r, cells, r))
        return grid.transpose(2, 3).flatten(3).flatten(1, 2)


def pixel_shuffle(config: ProjectorConfig, options: PixelShuffleOptions, fit: Fit) -> Projector:
    """Space to depth, then linear layers: InternVL's (2 layers) and Idefics3's (1).

    It has `config.layers` layers, of inner width `config.width` or the LLM's.

    Raises:
        UserError: The features are no square grid, r does not divide its side, or other tokens are asked for than the
            T / r² that there are (0 takes them as they are).
    """
    features, width = fit.only(config)
    side = grid_side(config, features)
    if side % options.factor:
        raise UserError(
            f"projector.options.factor is {options.factor}, but the encoder's features form a grid of {side} x {side}, "
            f"which has no whole number of cells of {options.factor} x {options.factor}"
        )
    tokens = (side // options.factor) ** 2
    if config.tokens not in (0, tokens):
        raise UserError(
            f"projector.tokens is {config.tokens}, but pixel_shuffle by {options.factor} makes {tokens} of {features} "
            f"features; write {tokens}, or 0 for as many as there are"
        )
    inner = (config.width or fit.llm_width,) * (config.layers - 1)
    sizes = {"width": width, "side": side, "llm_width": fit.llm_width, "factor": options.factor}
    return PixelShuffle(**sizes, inner=inner, scale=fit.scale)
