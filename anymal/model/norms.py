"""RMSNorm in one kernel on a GPU, in place of the six or more of transformers' modules.

A module of transformers casts to float32, squares, averages, takes the root, multiplies twice and casts back, each a
kernel that reads and writes the whole row: 12% of a step of an 8B LLM. torch's `F.rms_norm` is one kernel, and keeps
its input and a number a token for the backward pass, no float32 copy.

    fuse(llm)  each module that F.rms_norm computes alike calls it; classes, weights and state dict stay as they are

Which modules these are, their numbers say, not their names (`_match`). On a CPU nothing is replaced.
"""

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anymal.model.precision import without_autocast

LEAST_TOLERANCE = 1e-5
"""Relative, for float32: a row's sum is taken in another order."""


def fuse(llm: nn.Module) -> int:
    """Let every module of `llm` that `F.rms_norm` computes alike call it, until `unfuse`.

    It is called before the weights are sharded. Weights are read in every forward pass, so they may be exchanged, be
    trained, or be gathered for the pass (ZeRO-3). Copied or pickled modules call it, too.

    Returns:
        How many there are.
    """
    found = [(module, match) for module in llm.modules() if (match := _match(module)) is not None]
    for module, (eps, added) in found:
        module.forward = functools.partial(_forward, module, eps, added)
    return len(found)


def unfuse(llm: nn.Module) -> None:
    """Undo `fuse`."""
    for module in llm.modules():
        if getattr(vars(module).get("forward"), "func", None) is _forward:
            del module.forward


def _forward(module: nn.Module, eps: float, added: float, hidden_states: Tensor) -> Tensor:
    """What an instance's ``forward`` is once it is fused: [..., D] → [..., D]."""
    weight: Any = module.weight
    if weight.dtype != hidden_states.dtype and not added:  # torch has no kernel for two dtypes
        return type(module).forward(module, hidden_states)
    return _rms_norm(hidden_states, weight, eps, added)


def _rms_norm(rows: Tensor, weight: Tensor, eps: float, added: float) -> Tensor:
    """By torch's kernel, with a weight of ``added + weight``.

    Without autocast, on whose list of what is computed in float32 rms_norm stands: the kernel sums in float32 anyway,
    and all that follows would be float32 as well.
    """
    with without_autocast(rows.device):
        if not added:
            return F.rms_norm(rows, weight.shape, weight, eps)
        # In float32, as the modules have it: in bfloat16 1 + w loses what is small in w.
        return F.rms_norm(rows.float(), weight.shape, weight.float() + added, eps).type_as(rows)


def _match(module: nn.Module) -> tuple[float, float] | None:
    """The eps with which `F.rms_norm` gives what `module` gives, and what is to be added to its weight.

    Both are run on random rows with a random weight in the module's dtype, on its device (of a module without data, a
    CPU). Every number must agree within 2 units of the dtype's precision (the modules round once more, to bfloat16
    before they multiply by the weight), or within `LEAST_TOLERANCE`, if that is more. None: it is something else.
    """
    eps = [value for name, value in vars(module).items() if "eps" in name and isinstance(value, float)]
    if [name for name, _ in module.named_parameters()] != ["weight"] or len(eps) != 1 or "forward" in vars(module):
        return None
    if not isinstance(module.weight, Tensor) or module.weight.ndim != 1 or not module.weight.is_floating_point():
        return None
    if len(inspect.signature(type(module).forward).parameters) != 2:  # such as a gate
        return None
    device = torch.device("cpu") if module.weight.is_meta else module.weight.device
    weight, rows = _probe(len(module.weight), eps[0], module.weight.dtype, device)
    tolerance = max(2 * torch.finfo(weight.dtype).eps, LEAST_TOLERANCE)
    with torch.no_grad():
        try:
            expected = torch.func.functional_call(module, {"weight": weight}, (rows,))
        except Exception:  # it wants rows of another shape
            return None
        for added in (0.0, 1.0):
            found = _rms_norm(rows, weight, eps[0], added)
            if found.dtype == expected.dtype and torch.allclose(found, expected, rtol=tolerance, atol=0):
                return eps[0], added
    return None


def _probe(width: int, eps: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A random weight [D], and rows [6, D] that tell norms apart: of a mean that is not zero, large, and as small as
    eps counts."""
    generator = torch.Generator().manual_seed(0)
    weight = 1 + 0.5 * torch.randn(width, generator=generator)
    rows = torch.randn(6, width, generator=generator)
    rows[1::2] += 1
    rows *= torch.tensor([1, 1, 100, 100, eps**0.5, eps**0.5])[:, None]
    return weight.to(device, dtype), rows.to(device, dtype)
