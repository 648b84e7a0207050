"""Every byte that a training step keeps alive, counted on tensors without data.

The modules that train run on fake tensors (shape, dtype and storage, no content). What autograd keeps, activation
checkpointing recomputes and the loss holds is seen as it happens; no formula stands in for it. See
`anymal.estimation.fake_step`.

Without CUDA, torch's autograd does not run on fake tensors of a GPU. So they are on the CPU, and `computing_on`
replaces what a GPU does differently: attention kernels, RMSNorm, 8-bit layers, autocast's rules.
"""

import functools
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from anymal.environment import swapped
from anymal.model import precision

BLOCK = 64  # weights that share a scale in bitsandbytes' nf4
IN_FLOAT32 = ("layer_norm", "group_norm", "softmax")
"""What autocast computes in float32 on a GPU but not on a CPU, as far as our modules use it."""
H100 = precision.Hardware(kind="cuda", capability=(9, 0))
"""Whose kernels a GPU is taken to run."""


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of all tensors made inside that are alive, and what each phase's peak consisted of."""

    def __init__(self) -> None:
        super().__init__()
        self.peaks: dict[str, Counter[str]] = {}
        """By phase, the bytes alive at its peak by label."""
        self.phase = "step"
        """The phase that is going on."""
        self._alive: Counter[str] = Counter()
        self._labels = ["other"]
        self._storages: dict[int, weakref.ref] = {}
        self._label_of: dict[int, str] = {}
        self._watched: list[nn.Module] = []

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        for module in self._watched:
            del module.forward
        super().__exit__(exc_type, exc_val, exc_tb)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):  # what was there before: a view of it is nothing new
            if isinstance(leaf, Tensor) and (key := leaf.untyped_storage()._cdata) not in self._storages:
                self._storages[key] = weakref.ref(leaf.untyped_storage(), functools.partial(self._forget, key))
        out = func(*args, **(kwargs or {}))
        if str(func) == "bitsandbytes.gemm_4bit.default":  # scales and matrix are dequantised inside
            weights = math.prod(args[2])
            self._update_peak({"dequantised": weights * args[0].element_size() + 4 * math.ceil(weights / BLOCK)})
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        if str(func) == "torch_attn._varlen_attn_backward.default":
            self._update_peak({"backward": _inside_flash_backward(*args[:7])})
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size, label = storage.nbytes(), self._label()
        self._alive[label] += size
        self._label_of[key] = label
        self._storages[key] = weakref.ref(storage, functools.partial(self._free, key, size))
        self._update_peak({})

    def relabel(self, tensors: Iterable[Tensor], label: str) -> None:
        """From now on what these take goes by `label`; they were made inside."""
        for storage in {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}.values():
            key, size = storage._cdata, storage.nbytes()
            self._alive[self._label_of[key]] -= size
            self._alive[label] += size
            self._label_of[key] = label

    def _forget(self, key: int, _: Any) -> None:
        self._storages.pop(key, None)

    def _free(self, key: int, size: int, _: Any) -> None:
        if self._storages.pop(key, None) is not None:
            self._alive[self._label_of.pop(key)] -= size

    def _update_peak(self, more: dict[str, int]) -> None:
        peak = self.peaks.setdefault(self.phase, Counter())
        if sum(self._alive.values()) + sum(more.values()) > peak.total():
            self.peaks[self.phase] = self._alive + Counter(more)

    def _label(self) -> str:
        return "backward" if torch._C._current_autograd_node() is not None else self._labels[-1]

    def watch(self, module: nn.Module, label: str) -> None:
        """What `module` allocates in its forward pass goes by `label`."""
        forward = module.forward

        @functools.wraps(forward)
        def labelled(*args: Any, **kwargs: Any) -> Any:
            self._labels.append(label)
            try:
                return forward(*args, **kwargs)
            finally:  # checkpointing leaves a layer by an exception once it has what it needs
                self._labels.pop()

        module.forward = labelled
        self._watched.append(module)


def _inside_flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, offsets: Tensor
) -> int:
    """Bytes that the kernel allocates for itself (`mha_varlen_bwd` of ATen's flash_attn/flash_api.cpp)."""
    tokens, heads, width = query.shape
    rounded = math.ceil(width / 32) * 32 if width <= 128 else math.ceil(width / 64) * 64
    sums = 4 * (tokens + 128 * (len(offsets) - 1)) * heads * (rounded + 1)  # of the queries' gradients, and of each row
    unshared = 2 * query.nbytes if key.shape[1] != heads else 0  # gradients of keys and values before heads are summed
    return sums + unshared + sum(x.nbytes for x in (grad, out) if not x.is_contiguous())


class _FusedRMSNorm(torch.autograd.Function):
    """What torch's kernel for a GPU keeps: its input, 1 / RMS in float32, and the weight."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, _shape: Any, weight: Tensor, _eps: float) -> Tensor:
        scale = torch.empty((*rows.shape[:-1], 1), dtype=torch.float32)
        ctx.save_for_backward(rows, scale, weight)
        return torch.empty_like(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        rows, _, weight = ctx.saved_tensors
        return torch.empty_like(rows), None, torch.empty_like(weight) if ctx.needs_input_grad[2] else None, None


@contextmanager
def computing_on(fake: FakeTensorMode, *, gpu: bool, packed: bool = True) -> Iterator[None]:
    """Inside, new tensors are fake, and modules choose what they would choose on a GPU (or on a CPU).

    Args:
        fake: The mode that the modules' own tensors belong to.
        gpu: Which.
        packed: Whether a row holds several samples: attention then takes an attention mask.
    """
    from peft.tuners.lora import dora

    with ExitStack() as stack:
        if gpu:
            from bitsandbytes.autograd import _functions

            stack.enter_context(swapped(_functions, "MatMul8bitFp", _functions.MatMul8bitLt))
            stack.enter_context(swapped(precision, "hardware", lambda _: H100))
            stack.enter_context(swapped(F, "rms_norm", _FusedRMSNorm.apply))
            for name in IN_FLOAT32:
                stack.enter_context(swapped(F, name, _in_float32(getattr(F, name))))
        # Not a TorchFunctionMode: torch suspends it in backward passes, and with it in what they recompute.
        stack.enter_context(swapped(F, "scaled_dot_product_attention", functools.partial(_attention, gpu)))
        stack.enter_context(swapped(nn.Module, "to", _to))
        stack.enter_context(swapped(dora, "dequantize_module_weight", _dequantised))
        stack.enter_context(swapped(FakeTensor, "__deepcopy__", _copied))
        if not packed:  # transformers looks at the positions' values
            from transformers import masking_utils

            stack.enter_context(swapped(masking_utils, "find_packed_sequence_indices", lambda _: None))
        stack.enter_context(fake)
        yield


def _to(module: nn.Module, *arguments: Any, **named: Any) -> nn.Module:
    """``module.to`` for fake tensors, which torch cannot exchange in place; there is but one device."""
    _, dtype, *_ = torch._C._nn._parse_to(*arguments, **named)
    for part in module.modules() if dtype is not None else ():
        for name, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if tensor is None or not tensor.is_floating_point() or tensor.dtype == dtype:
                continue
            new = tensor.detach().to(dtype)
            if name in part._parameters:
                part._parameters[name] = nn.Parameter(new, requires_grad=tensor.requires_grad)
            else:
                part._buffers[name] = new
    return module


def _copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """``copy.deepcopy`` of a fake tensor, as PEFT does it. Torch's own copies a storage that is not there."""
    new = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
    for name, value in vars(tensor).items():  # bitsandbytes keeps the quantisation in a weight's attributes
        vars(new).setdefault(name, value)
    memo[id(tensor)] = new
    return new


def _dequantised(module: nn.Module) -> Tensor:
    """A layer's weight for DoRA. PEFT knows a quantised one by its class, which fake tensors do not have."""
    weight: Any = module.weight
    state = getattr(weight, "quant_state", None)
    return weight if state is None else torch.empty(state.shape, dtype=state.dtype)


def _in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` as autocast on a GPU runs it."""

    def wide(*arguments: Any, **named: Any) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return function(*arguments, **named)
        with torch.autocast("cpu", enabled=False):
            arguments, named = tree_map_only(Tensor, Tensor.float, (arguments, named))
            return function(*arguments, **named)

    return wide


def _attention(
    gpu: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As torch prepares its fused kernels and calls them (ATen/native/transformers/attention.cpp)."""
    if torch.is_autocast_enabled("cpu"):
        low = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(low), key.to(low), value.to(low)
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # a bias of each call's own, kept for its backward pass
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    if not gpu:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    if attn_mask is None and query.dtype != torch.float32:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
        return kernel(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:  # only the flash kernels read shared heads in place
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    if attn_mask is not None:
        width = attn_mask.shape[-1]
        if width % 8:  # the kernel wants each row to begin at a multiple of 16 bytes
            attn_mask = F.pad(attn_mask, (0, 8 - width % 8))[..., :width]
        attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
