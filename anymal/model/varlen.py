"""Flash attention over a whole packed row at once, by the offsets of its samples ("variable length").

`kernel` says what runs:

    varlen      in half precision on a GPU: torch's own, from torch 2.11 on
    flash_attn  the same of the package flash-attn, where torch is older
    loop        elsewhere: the loop over lengths in `anymal.model.attention`

The backward pass of flash attention adds up the queries' gradients in whatever order its blocks come: two runs differ
in the last bits. With ``torch.use_deterministic_algorithms(True)``, without ``warn_only``, they do not (the loop's
kernels heed that, too); the float32 accumulator is then as many times larger as B·H goes into the GPU's number of
multiprocessors, rounded up. Forward passes repeat in any case.

    B samples   T tokens of the row   H heads of queries, some fewer of keys and values   d width of a head
"""

import functools
import importlib
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from anymal.model.precision import BFLOAT16_SINCE

Kernel = Literal["varlen", "flash_attn", "loop"]

# At every call it says which backend it uses.
logging.getLogger("torch.nn.attention.varlen").setLevel(logging.WARNING)


def kernel(
    *,
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    widths: Sequence[int],
    dropout: float,
    causal: bool,
    parameters: frozenset[str],
    flash_attn: bool,
) -> Kernel:
    """Which kernel runs over a packed row.

    Args:
        capability: The GPU's compute capability; None on a CPU.
        dtype: What is computed in.
        widths: Width of a head of queries, keys and values.
        dropout: Of attention weights.
        causal: Whether a token sees none after it.
        parameters: Names of those of torch's ``varlen_attn``; empty where torch has none.
        flash_attn: Whether the package flash-attn can be used.
    """
    fits = (
        capability is not None
        and capability >= BFLOAT16_SINCE
        and dtype in (torch.bfloat16, torch.float16)
        and len(set(widths)) == 1
        and widths[0] <= 256
        and widths[0] % 8 == 0
        and dropout == 0
        and causal
    )
    if fits and parameters >= {"scale", "window_size"}:  # torch 2.10 had neither
        return "varlen"
    return "flash_attn" if fits and flash_attn else "loop"


def run(
    chosen: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    offsets: Tensor,
    longest: int,
    scale: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Attention by the kernel `chosen`, "varlen" or "flash_attn".

    Args:
        chosen: By `kernel`.
        query: [1, H, T, d].
        key: [1, H or fewer, T, d].
        value: As `key`.
        offsets: [B + 1] int32, where the row's samples begin and end, on the GPU.
        longest: Tokens of the longest sample.
        scale: Of the scores; None: 1 / √d.
        sliding_window: How many tokens back a token sees, itself included, if that is limited.

    Returns:
        [T, H, d] in what `arithmetic` says.
    """
    where: dict[str, Any] = {"longest": longest, "scale": scale, "sliding_window": sliding_window}
    if chosen == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        given = arguments(query, key, value, parameters=parameters(), **where)
        out: Any = varlen_attn(cu_seq_q=offsets, cu_seq_k=offsets, **given)  # a tuple only if it is asked for more
        return out
    function = flash_attn()
    assert function is not None
    given = arguments(query, key, value, parameters=frozenset({"enable_gqa"}), **where)  # it shares heads by itself
    return function(
        *(given[name] for name in ("query", "key", "value")),
        *(offsets, offsets, longest, longest),
        softmax_scale=scale,
        causal=True,
        window_size=given["window_size"],
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    longest: int,
    scale: float | None,
    sliding_window: int | None,
    parameters: frozenset[str],
) -> dict[str, Any]:
    """What torch's ``varlen_attn`` is given beside the offsets, from the arguments of `run`.

    Args:
        query: [1, H, T, d].
        key: [1, H or fewer, T, d].
        value: As `key`.
        longest: As `run`.
        scale: As `run`.
        sliding_window: As `run`.
        parameters: As `kernel`. Where ``enable_gqa`` is none of them (before torch 2.12), keys and values are repeated.
    """
    dtype = arithmetic(query)
    q, k, v = (_by_token(x, dtype) for x in (query, key, value))
    given: dict[str, Any] = {"max_q": longest, "max_k": longest, "scale": scale}
    # Tokens seen before and after it, itself not counted; -1 is no limit.
    given["window_size"] = (-1 if sliding_window is None or sliding_window >= longest else sliding_window - 1, 0)
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in parameters:
            given["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return {"query": q, "key": k, "value": v, **given}


def arithmetic(query: Tensor) -> torch.dtype:
    """What torch's SDPA would compute in: autocast's dtype, else the queries'."""
    device = query.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else query.dtype


def _by_token(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[1, H, T, d] → [T, H, d], the numbers of a head side by side."""
    x = x.squeeze(0).transpose(0, 1).to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.cache
def parameters() -> frozenset[str]:
    """Names of the parameters of torch's ``varlen_attn``; empty where torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


@functools.cache
def flash_attn() -> Callable[..., Tensor] | None:
    """The function of the package flash-attn; None where it is not, or was built for another torch."""
    try:
        return importlib.import_module("flash_attn").flash_attn_varlen_func
    except (ImportError, AttributeError):
        return None
