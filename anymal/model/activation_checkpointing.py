"""Activation checkpointing: what autograd keeps of a decoder layer for the backward pass, and how to keep less of it.

Linear layers whose weights are frozen keep no input. What is left: the inputs of the norms; queries, keys, values and
the output of attention; and in the MLP gate, up and act(gate). ``docs/memory.md`` has the figures.

    none       keep all of it
    selective  keep no tensor that is an elementwise function of what is kept anyway: recompute it where it is used
    full       keep the layer's input, and run the whole layer again (its quantised weights are dequantised again, too)
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakTensorKeyDictionary

from anymal.config.schema import Checkpointing
from anymal.errors import UserError

LAYERS_FUNCTION = "_gradient_checkpointing_func"
"""The attribute of transformers' decoder layers that says by which function a layer's forward pass is called."""

_LOW_PRECISION = (torch.bfloat16, torch.float16)
_Result = TypeVar("_Result")


def set_checkpointing(llm: nn.Module, mode: Checkpointing) -> None:
    """Make the decoder layers of a causal LM keep what `mode` says: none, selective or full.

    They do so while their training flag is set (`anymal.model.llm.set_frozen_mode`).

    Raises:
        UserError: The architecture does not offer it.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    # Non-reentrant: the inputs of the first layer need no gradient in a text-only batch.
    functions: dict[str, Callable | None] = {
        "none": None,
        "selective": checkpoint_selectively,
        "full": partial(checkpoint, use_reentrant=False),
    }
    function = functions[mode]
    layers = [module for module in llm.modules() if isinstance(module, GradientCheckpointingLayer)]
    if function is not None and not layers:
        raise UserError(f"model.llm.checkpointing={mode}: {type(llm).__name__} has no layers for it; set it to none")
    for layer in layers:
        layer.gradient_checkpointing = function is not None
        setattr(layer, LAYERS_FUNCTION, function)


def checkpoint_selectively(function: Callable[..., _Result], *arguments: Any) -> _Result:
    """Call `function`; autograd keeps nothing that follows elementwise from what it keeps anyway.

    The results of matrix products and of attention are kept, so no weight is dequantised again. Values and gradients
    are those of a plain call, bit for bit: what is recomputed is the same operation on the same input.
    """
    low_copies = WeakTensorKeyDictionary()  # a norm keeps its input twice; both shall share one copy

    def pack(tensor: Tensor) -> Callable[[], Tensor] | Tensor:
        if tensor.grad_fn is None:  # a weight or the like. Kept as itself: ZeRO-3 exchanges its data
            return tensor
        recompute = _recompute(tensor.grad_fn)
        if recompute is not None:
            return recompute
        source = _source_dtype(tensor.grad_fn)
        if source in _LOW_PRECISION and tensor.dtype == torch.float32:  # what a norm works on: a lossless way back
            low = low_copies.get(tensor)
            if low is None:
                low = low_copies[tensor] = tensor.detach().to(source)
            return low.float
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda packed: packed if isinstance(packed, Tensor) else packed()):
        return function(*arguments)


def _recompute(node: Any) -> Callable[[], Tensor] | None:
    """How to make the output of an autograd node again from what the node keeps, if that is elementwise.

    The result is called in the backward pass, where the node that uses the output runs before `node` does, and so
    before `node` frees what it keeps.
    """
    match node.name():
        case "SiluBackward0":
            return lambda: F.silu(node._saved_self)
        case "GeluBackward0":
            return lambda: F.gelu(node._saved_self, approximate=node._saved_approximate)
        case "MulBackward0" if all(following for following, _ in node.next_functions):  # then it keeps both factors
            return lambda: node._saved_self * node._saved_other
    return None


def _source_dtype(node: Any) -> torch.dtype | None:
    """What a cast was made from; None if `node` is none."""
    if node.name() != "ToCopyBackward0":
        return None
    before, output = node.next_functions[0]
    return before._input_metadata[output].dtype
