"""What projectors have in common: sizes that must fit, and how last layers are drawn. The package has the legend."""

import math
from collections.abc import Sequence

from torch import nn

from anymal.config.schema import ProjectorConfig
from anymal.errors import UserError

GELU_STD = 0.652
"""Root of the mean square of GELU(x) for standard normal x."""


def asked_tokens(config: ProjectorConfig) -> int:
    """K, for kinds that make any number of tokens and none by themselves.

    Raises:
        UserError: It is 0.
    """
    if not config.tokens:
        raise UserError(
            f"projector.tokens is 0, as many as the kind makes by itself, but projector.kind {config.kind} makes as "
            "many as it is asked for: say how many"
        )
    return config.tokens


def check_tokens(config: ProjectorConfig, tokens: int) -> None:
    """Refuse another number of tokens than the one that a kind makes by itself.

    Raises:
        UserError: `config.tokens` is neither 0 nor `tokens`.
    """
    if config.tokens not in (0, tokens):
        raise UserError(
            f"projector.tokens is {config.tokens}, but {config.kind} makes {tokens} of these features; set it to 0"
        )


def inner_width(config: ProjectorConfig, width: int) -> int:
    """I of a kind with attention: `config.width`, or W.

    Raises:
        UserError: The heads do not divide it.
    """
    inner = config.width or width
    if inner % config.heads:
        raise UserError(
            f"a {config.kind} of width {inner} cannot be split into {config.heads} heads; set projector.heads to a "
            "divisor or projector.width to a multiple"
        )
    return inner


def grid_side(config: ProjectorConfig, features: int) -> int:
    """√T, for kinds that take the features as a square grid in reading order.

    Raises:
        UserError: T is not a square.
    """
    side = math.isqrt(features)
    if side * side != features:
        raise UserError(
            f"projector.kind {config.kind} takes features of a square grid, but the encoder gives {features} of a "
            f"medium, and {side} x {side} is {side * side}"
        )
    return side


def scaled_linear(before: int, after: int, scale: float) -> nn.Linear:
    """A linear layer that turns inputs of mean square 1 into outputs of standard deviation `scale`."""
    layer = nn.Linear(before, after)
    nn.init.normal_(layer.weight, std=scale * before**-0.5)
    nn.init.zeros_(layer.bias)
    return layer


def scaled_mlp(before: int, inner: Sequence[int], after: int, scale: float) -> nn.Sequential:
    """`scaled_linear` with hidden layers of the widths `inner` (none: just that), GELU after each."""
    layers: list[nn.Module] = []
    std = 1.0
    for width in inner:
        layers += [scaled_linear(before, width, 1.0 / std), nn.GELU()]
        before, std = width, GELU_STD
    return nn.Sequential(*layers, scaled_linear(before, after, scale / std))
