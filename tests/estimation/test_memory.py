"""What a GPU's kernels keep, as the estimate counts it on tensors without data."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from anymal.data.packing import row_offsets
from anymal.estimation.memory import MemoryTracker, computing_on
from anymal.model import norms
from anymal.model.attention import packed_attention

LENGTHS = [50, 30, 20]
T, HALF, SINGLE = sum(LENGTHS), 2, 4


def peaks(make, run, *, gpu: bool) -> tuple[int, int]:
    """Bytes at the peak of a forward pass, its inputs among them, and of a backward pass after it."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with computing_on(fake, gpu=gpu), MemoryTracker() as tracker, torch.autocast("cpu", torch.bfloat16, enabled=gpu):
        inputs = make()
        out = run(*inputs)
        forward = tracker.peaks["step"].total()
        tracker.phase = "backward"
        torch.autograd.grad(out, inputs, torch.empty_like(out))
    return forward, tracker.peaks["backward"].total()


@pytest.mark.parametrize("keys", [8, 2])
@pytest.mark.parametrize("window", [None, 10])
def test_a_packed_row_is_one_call_on_a_gpu(keys, window):
    """It keeps queries, keys, values, the output and the log-sum-exp; no repeated heads, no mask, no row in pieces."""
    heads, width = 8, 64
    module = torch.nn.Module()
    module.num_key_value_groups = heads // keys
    where = {"sample_lengths": LENGTHS, "sample_offsets": row_offsets(LENGTHS), "sliding_window": window}

    def make():
        shapes = [(1, T, n, width) for n in (heads, keys, keys)]
        return [torch.empty(shape, dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for shape in shapes]

    forward, backward = peaks(make, lambda q, k, v: packed_attention(module, q, k, v, None, **where)[0], gpu=True)
    kept = HALF * T * width * (2 * heads + 2 * keys) + SINGLE * T * heads
    state = 16  # of random numbers that nobody draws
    assert forward == kept + state
    gradients = HALF * T * width * (2 * heads + 2 * keys)  # the output's among them,
    gradients += SINGLE * T * heads  # and zeros for the log-sum-exp's
    sums = SINGLE * (T + 128 * len(LENGTHS)) * heads * (width + 1)
    unshared = 2 * HALF * T * heads * width if keys < heads else 0
    assert backward == pytest.approx(kept + gradients + sums + unshared, abs=4 * state)


def test_a_norm_keeps_its_input_and_a_number_a_token_on_a_gpu():
    width = 512
    module = LlamaRMSNorm(width).bfloat16().requires_grad_(False)
    row = [lambda: [torch.empty(T, width, dtype=torch.bfloat16, requires_grad=True)], module]
    before, _ = peaks(*row, gpu=True)
    norms.fuse(module)
    forward, backward = peaks(*row, gpu=True)
    rows = HALF * T * width
    assert forward == 2 * rows + SINGLE * T  # the input and the output
    assert backward == forward + 2 * rows  # and their gradients
    assert before > 3 * rows + 2 * rows  # at least two copies in float32
