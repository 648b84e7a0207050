"""The output of one layer of a vision network: the layers after it do not run, and no other layer's output is kept.

Where the layer stands is looked up once, when an encoder is loaded (`find_exit`); from then on the network runs with a
shorter list of layers (`output_of`). Its weights, names and what is saved of it stay as they are, and it always runs to
its end, as the hooks of ZeRO-3 want it.
"""

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from anymal.errors import UserError

_LOCK = threading.RLock()
"""While a network runs with fewer layers, no other thread may look at them."""


@dataclass(frozen=True, kw_only=True)
class Exit:
    """Behind which layer a network is left."""

    layers: str
    """Path of the list of layers in the network, such as ``"encoder.layers"``."""
    count: int
    """How many of them run."""
    item: int | None
    """Which item of the last one's output is wanted, where that is a tuple."""


def output_of(network: nn.Module, layer: int, exit: Exit | None, **inputs: Any) -> Tensor:
    """What a layer, counted from the end, makes of the inputs: [N, tokens, width], or a map [N, width, h, w].

    Args:
        network: A vision network of transformers.
        layer: -1 for its last hidden state (which may be normalised after the last layer), -2 for the last layer but
            one, and so on.
        exit: What `find_exit` found for this layer.
        inputs: The network's.

    Raises:
        UserError: The network has fewer layers.
    """
    if layer == -1:
        return network(**inputs).last_hidden_state
    if exit is None:
        return _state(network, layer, **inputs)
    path, _, name = exit.layers.rpartition(".")
    outputs: list[Any] = []
    with _LOCK:
        owner, layers = network.get_submodule(path), _layers(network, exit.layers)
        hook = layers[exit.count - 1].register_forward_hook(lambda module, given, output: outputs.append(output))
        setattr(owner, name, layers[: exit.count])
        try:
            network(**inputs)
        finally:
            setattr(owner, name, layers)
            hook.remove()
    return outputs[-1] if exit.item is None else outputs[-1][exit.item]


def find_exit(network: nn.Module, layer: int, **inputs: Any) -> Exit | None:
    """Where a network has to be left for a layer's output, tried on the inputs: on real ones, equal to the bit.

    Args:
        network: As `output_of`.
        layer: As `output_of`.
        inputs: Of one medium; fake tensors will do.

    Returns:
        None for the last hidden state, and where the network works with no shorter list: all layers are to run. A
        ConvNeXt, which normalises what it takes for its last stage's map, is left within a stage: all of it runs, but
        no other map is kept.

    Raises:
        UserError: As `output_of`.
    """
    if layer == -1:
        return None
    seen: dict[str, Any] = {}

    def note(path: str) -> Any:
        return lambda module, given, output: seen.update({path: output})

    listed = [path for path, module in network.named_modules() if isinstance(_parent(network, path), nn.ModuleList)]
    hooks = [network.get_submodule(path).register_forward_hook(note(path)) for path in listed]
    try:
        wanted = _state(network, layer, **inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for path in sorted(seen, key=lambda path: path.count(".")):  # a stage before the last block in it
        items = seen[path] if isinstance(seen[path], tuple) else (seen[path],)
        item = next((i for i, one in enumerate(items) if one is wanted), None)
        if item is None:
            continue
        layers, _, index = path.rpartition(".")
        exit = Exit(layers=layers, count=int(index) + 1, item=item if isinstance(seen[path], tuple) else None)
        try:
            if _equal(output_of(network, layer, exit, **inputs), wanted):
                return exit
        except Exception:  # of whichever network, about a list that is too short for it
            continue
    return None


def leave_out_head(network: nn.Module) -> None:
    """Do not run the head that makes one feature of a whole picture (SigLIP, AIMv2); its weights stay."""
    if getattr(network, "use_head", False):
        vars(network)["use_head"] = False


def _state(network: nn.Module, layer: int, **inputs: Any) -> Tensor:
    states = network(output_hidden_states=True, **inputs).hidden_states
    if states is None:
        raise UserError(f"layer is {layer}, but of this encoder (a {type(network).__name__}) the last alone can be had")
    if len(states) < -layer:
        raise UserError(f"layer is {layer}, but the encoder has only {len(states) - 1} layers")
    return states[layer]


def _parent(network: nn.Module, path: str) -> nn.Module | None:
    return network.get_submodule(path.rpartition(".")[0]) if path else None


def _layers(network: nn.Module, path: str) -> nn.ModuleList:
    layers = network.get_submodule(path)
    if not isinstance(layers, nn.ModuleList):
        raise TypeError(f"{path} is no list of layers")
    return layers


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return isinstance(one, FakeTensor) or torch.equal(one, other)
