"""Compositions of image encoders: the recipe's ``encoder`` is a tree in place of a name → one encoder.

    node  =  NAME
          |  {name: NAME, size: 448, layer: -2, ...}          one encoder                       (LeafConfig)
          |  {channels: [node, ...], grid: 32, ...}           maps joined channel by channel    (ChannelsConfig)
          |  {append: [node, ...]}                            features one after another        (AppendConfig)

The outermost node may also say how pictures become square: ``fit: pad`` or ``fit: squash``. All encoders are fed from
one canonical picture (see `anymal.adapters.image.pictures`). Examples, and what each published model does, are in
docs/encoders.md.

    N pictures   S side of the canonical square   W width of a feature   h, w rows and columns of a map
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anymal.adapters.image.backbone import Leaf, LeafConfig, as_tokens, load_leaf, resized
from anymal.adapters.image.pictures import FITS, SquareDecoder
from anymal.adapters.pretrained import is_savable, save_network
from anymal.config.settings import options
from anymal.errors import UserError, nearest
from anymal.modality import Encoder


@dataclass(kw_only=True)
class ChannelsConfig:
    """Maps of several encoders, resized to one grid and joined channel by channel."""

    channels: list[Any] = field(default_factory=list)
    """The nodes, in the order of their channels."""
    grid: int = 0
    """Rows and columns of the joined map; 0 takes the first node's."""
    resize: Literal["bilinear", "nearest"] = "bilinear"
    """bilinear (Eagle), or nearest (SPHINX, which repeats features)."""
    keep_global: bool = False
    """Put a feature of the whole picture before the map's: each node's class token or average, joined as well."""

    def __post_init__(self):
        if self.grid < 0:
            raise UserError(f"grid is {self.grid}; it is at least 1, or 0 for the first node's")


@dataclass(kw_only=True)
class AppendConfig:
    """Features of several nodes, one after another; the projector tells them apart (`anymal.modality.parts`)."""

    append: list[Any] = field(default_factory=list)
    """The nodes, in the order of their features."""


class Channels(nn.Module):
    """See `ChannelsConfig`. `nodes` have maps; the joined one has `side` rows and columns."""

    def __init__(self, nodes: Sequence["Leaf | Channels"], config: ChannelsConfig, side: int):
        super().__init__()
        self.nodes, self.resize, self.keep_global = nn.ModuleList(nodes), config.resize, config.keep_global
        self.size = max(node.size for node in nodes)
        self.side = side
        self.tokens = self.side**2 + self.keep_global
        self.width = sum(node.width for node in nodes)
        self.parts = ((self.tokens, self.width),)
        self.license = _licenses(nodes)

    def forward(self, pictures: Tensor) -> Tensor:
        """[N, 3, S, S] → [N, tokens, W]."""
        maps, whole = self.maps(pictures)
        return as_tokens(maps, whole, self.keep_global)

    def maps(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 3, S, S] → the joined map [N, W, h, w], and one feature of the whole picture [N, W]."""
        maps, wholes = [], []
        for node in self.nodes:
            if isinstance(node, Leaf | Channels):  # they all are
                map_, whole = node.maps(pictures)
                maps.append(resized(map_, self.side, self.resize))
                wholes.append(whole)
        return torch.cat(maps, 1), torch.cat(wholes, 1)


class Append(nn.Module):
    """See `AppendConfig`. Narrower features are filled up with zeros to the widest."""

    side = None
    """Its features form no map."""

    def __init__(self, nodes: Sequence["Leaf | Channels | Append"]):
        super().__init__()
        self.nodes = nn.ModuleList(nodes)
        self.size = max(node.size for node in nodes)
        self.parts = tuple(kind for node in nodes for kind in node.parts)
        self.tokens, self.width = sum(node.tokens for node in nodes), max(node.width for node in nodes)
        self.license = _licenses(nodes)

    def forward(self, pictures: Tensor) -> Tensor:
        """[N, 3, S, S] → [N, tokens, W]."""
        features = [node(pictures) for node in self.nodes]
        return torch.cat([F.pad(one, (0, self.width - one.shape[-1])) for one in features], 1)


class Mixture(Encoder):
    """A frozen composition of image encoders, with its decoding.

    Args:
        tree: The outermost node.
        decode: Its decoding.
    """

    def __init__(self, tree: Leaf | Channels | Append, decode: SquareDecoder):
        super().__init__()
        self.tree, self.license = tree, tree.license
        self.decode = self._images = decode
        self.tokens, self.width, self.parts = tree.tokens, tree.width, tree.parts
        self.grid = (tree.side, tree.side) if tree.side and tree.tokens == tree.side**2 else None
        self.shape, self.media_dtype = (3, decode.size, decode.size), torch.uint8
        self.eval()

    @property
    def images(self) -> SquareDecoder:
        """Prepares whole pictures, whatever `decode` does."""
        return self._images

    @property
    def savable(self) -> bool:
        """Whether it is a single encoder: of several, no folder holds all."""
        leaves = [module for module in self.tree.modules() if isinstance(module, Leaf)]
        return len(leaves) == 1 and is_savable(leaves[0].own_network)

    def save_pretrained(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the only encoder as a folder that can be named in a tree; `weights` are a whole state dict of this."""
        (leaf,) = (module for module in self.tree.modules() if isinstance(module, Leaf))
        ((path, network),) = ((n, m) for n, m in self.named_modules() if m is leaf.own_network)
        own = {f"network.{n.removeprefix(f'{path}.')}": t for n, t in weights.items() if n.startswith(f"{path}.")}
        save_network(network, leaf.processor, folder, own, leaf.license)

    def forward(self, pictures: Tensor) -> Tensor:
        """[N, 3, S, S] uint8 (or values 0 to 255 of any type) → [N, tokens, W]."""
        return self.tree(pictures)


def load_mixture(tree: object, *, max_pixels: int) -> Mixture:
    """A composition of image encoders as a recipe states it; frozen, in fp32 on the CPU.

    Raises:
        UserError: The tree is not one (an unknown key's nearest is named), or an encoder of it cannot be loaded or does
            not fit its settings.
    """
    if not isinstance(tree, Mapping):
        raise UserError(f"encoder is {tree!r}; it is a name, or a mapping with name, channels or append")
    node = dict(tree)
    fit = node.pop("fit", FITS[0])
    if fit not in FITS:
        raise UserError(f"encoder.fit is {fit!r}; it is {' or '.join(FITS)}")
    root = _node(node, "encoder")
    return Mixture(root, SquareDecoder(size=root.size, fit=fit, max_pixels=max_pixels))


_KINDS = {"name": LeafConfig, "channels": ChannelsConfig, "append": AppendConfig}


def _node(tree: object, where: str) -> Leaf | Channels | Append:
    tree = {"name": tree} if isinstance(tree, str) else tree
    if not isinstance(tree, Mapping):
        raise UserError(f"{where} is {tree!r}; it is a name, or a mapping with name, channels or append")
    kinds = [kind for kind in _KINDS if kind in tree]
    if len(kinds) != 1:
        hints = [hint for key in tree if (hint := nearest(str(key), _KINDS, otherwise=""))]
        hint = f"; {hints[0]}" if hints and not kinds else ""
        raise UserError(f"{where} has the keys {', '.join(map(str, tree))}; one of them is {' or '.join(_KINDS)}{hint}")
    kind = kinds[0]
    config = options(_KINDS[kind], dict(tree), where)
    if isinstance(config, LeafConfig):
        return load_leaf(config, where)
    listed = config.channels if isinstance(config, ChannelsConfig) else config.append
    if not listed:
        raise UserError(f"{where}.{kind} lists no encoder")
    nodes = [_node(node, f"{where}.{kind}[{index}]") for index, node in enumerate(listed)]
    return _channels(nodes, config, where) if isinstance(config, ChannelsConfig) else Append(nodes)


def _channels(nodes: Sequence[Leaf | Channels | Append], config: ChannelsConfig, where: str) -> Channels:
    """The nodes joined, if each has a map."""
    with_maps, sides = [], []
    for index, node in enumerate(nodes):
        if isinstance(node, Append) or node.side is None or node.keep_global:
            fault = "gives no map" if node.side is None else "has keep_global; put that beside channels"
            raise UserError(f"{where}.channels[{index}] {fault}: only maps can be joined channel by channel")
        with_maps.append(node)
        sides.append(node.side)
    return Channels(with_maps, config, side=config.grid or sides[0])


def _licenses(nodes: Sequence[Leaf | Channels | Append]) -> str:
    return ", ".join(dict.fromkeys(license for node in nodes for license in node.license.split(", ")))
