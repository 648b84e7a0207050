"""What a projector must fit, and how its last layer is drawn. See the package for the legend and the scale."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from anymal.config import ProjectorConfig
from anymal.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What a projector stands between."""

    parts: Sequence[tuple[int, int]]
    """(T, W) of each kind of features that the encoder gives of one medium; mostly one. See `anymal.modality.parts`."""
    llm_width: int
    """D."""
    scale: float = 1.0
    """Standard deviation of an embedding's elements at the start, best that of the LLM's embedding table."""
    llm_layers: int = 0
    """Decoder layers of the LLM, for projectors that stand between them."""

    def only(self, config: ProjectorConfig) -> tuple[int, int]:
        """T and W, for projectors of one kind of features.

        Raises:
            UserError: There are several.
        """
        if len(self.parts) != 1:
            raise UserError(
                f"projector.kind is {config.kind}, but the encoder gives {len(self.parts)} kinds of features apart; "
                "a projector that takes several is wanted, or an encoder that joins them"
            )
        return self.parts[0]


def scaled_linear(before: int, after: int, scale: float) -> nn.Linear:
    """A linear layer that turns inputs of mean square 1 into outputs of standard deviation `scale`."""
    layer = nn.Linear(before, after)
    nn.init.normal_(layer.weight, std=scale * before**-0.5)
    nn.init.zeros_(layer.bias)
    return layer
