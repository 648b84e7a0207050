"""Flash attention over a packed row on a CPU, for tests: what torch's operator computes on a GPU, written out.

Registered as the CPU kernels of the operator's forward and backward pass, which have none. Everything around them is
torch's own: the function that is called, what it checks, and what its autograd formula keeps.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import varlen as torch_varlen

from anymal.environment import swapped
from anymal.model import precision

calls: Counter[str] = Counter()
"""How often each of the two ran."""


def attend(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, window: tuple[int, int], scale: float | None):
    """[T, H, d] by softmax over masked scores, a sample at a time; heads may be shared."""
    outputs = []
    for begin, end in zip(offsets.tolist()[:-1], offsets.tolist()[1:], strict=True):
        q, k, v = (x[begin:end].transpose(0, 1) for x in (query, key, value))
        weights, shared = _weights(q, k, window, scale)
        outputs.append((weights @ v.repeat_interleave(shared, dim=0)).transpose(0, 1))
    return torch.cat(outputs)


def _weights(q: Tensor, k: Tensor, window: tuple[int, int], scale: float | None) -> tuple[Tensor, int]:
    """[H, t, t] attention weights of a sample, and how many heads share a key."""
    shared = len(q) // len(k)
    scores = q @ k.repeat_interleave(shared, dim=0).transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    back = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
    left, right = window
    hidden = (back > left) * (left >= 0) | (-back > right) * (right >= 0)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1), shared


def _gradients(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, window, scale) -> list[Tensor]:
    """Of `attend`, to queries, keys and values; by hand, since no autograd runs inside of an operator."""
    found = []
    for begin, end in zip(offsets.tolist()[:-1], offsets.tolist()[1:], strict=True):
        g, q, k, v = (x[begin:end].transpose(0, 1) for x in (grad, query, key, value))
        weights, shared = _weights(q, k, window, scale)
        k, v = (x.repeat_interleave(shared, dim=0) for x in (k, v))
        of_weights = g @ v.transpose(1, 2)
        of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True))
        of_scores = of_scores * (q.shape[-1] ** -0.5 if scale is None else scale)
        of_keys, of_values = of_scores.transpose(1, 2) @ q, weights.transpose(1, 2) @ g
        sums = [x.unflatten(0, (-1, shared)).sum(1) for x in (of_keys, of_values)]
        found.append([x.transpose(0, 1) for x in (of_scores @ k, *sums)])
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def _check(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int, window: list[int], causal: bool):
    """What the kernel refuses on a GPU (ATen/native/transformers/cuda/flash_attn/flash_api.cpp)."""
    assert query.dtype in (torch.bfloat16, torch.float16) and query.dtype == key.dtype == value.dtype
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    assert query.shape[-1] % 8 == 0 and query.shape[-1] <= 256 and key.shape == value.shape
    assert offsets.dtype == torch.int32 and offsets.is_contiguous()
    assert int(offsets[-1]) == len(query) == len(key) and longest == int(offsets.diff().max())
    assert causal == (window == [-1, 0]) and window[1] == 0


def _forward(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, scale=None, window_size=None, *_):
    calls["forward"] += 1
    _check(query, key, value, cu_seq_q, max_q, window_size, is_causal)
    out = attend(query.float(), key.float(), value.float(), cu_seq_q, tuple(window_size), scale)
    lse = torch.zeros(query.shape[1], query.shape[0])
    return out.to(query.dtype), lse, torch.zeros(2, dtype=torch.uint64)


def _backward(
    grad, query, key, value, out, lse, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, rng, scale=None, window_size=None
):
    calls["backward"] += 1
    assert out.shape == grad.shape == query.shape
    wide = [x.float() for x in (grad, query, key, value)]
    return tuple(x.to(query.dtype) for x in _gradients(*wide, cu_seq_q, tuple(window_size), scale))


torch_varlen._varlen_attn.register_kernel("cpu")(_forward)
torch_varlen._varlen_attn_backward.register_kernel("cpu")(_backward)


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside, attention chooses its kernel as on an H100; `calls` begins at zero."""
    calls.clear()
    with swapped(precision, "hardware", lambda _: precision.Hardware(kind="cuda", capability=(9, 0))):
        yield
