"""What is computed in, by what a device can do: the whole table, on no device at all."""

import pytest
import torch

from anymal.config.schema import LLMConfig
from anymal.errors import UserError
from anymal.model.llm import compute_dtype, load_llm
from anymal.model.precision import Hardware, hardware, limits, llm_dtype, low_dtype, require_no_overflow
from toys import toy_model

CPU = Hardware(kind="cpu")
H100 = Hardware(kind="cuda", capability=(9, 0), name="NVIDIA H100 80GB HBM3")
A100 = Hardware(kind="cuda", capability=(8, 0), name="NVIDIA A100-SXM4-80GB")
T4 = Hardware(kind="cuda", capability=(7, 5), name="Tesla T4")
V100 = Hardware(kind="cuda", capability=(7, 0), name="Tesla V100-SXM2-16GB")
MI300 = Hardware(kind="cuda", name="AMD Instinct MI300X")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NO_TRAINING, NO_INT8 = r"has no bfloat16, and float16 loses the gradients of training", r"cannot multiply in 8 bits"


@pytest.mark.parametrize(
    ("on", "trains", "by_bits"),
    [
        (CPU, False, {4: FP32, 8: FP32, 16: BF16, 32: FP32}),
        (CPU, True, {4: FP32, 8: FP32, 16: BF16, 32: FP32}),
        *[(on, trains, {4: BF16, 8: BF16, 16: BF16, 32: FP32}) for on in (H100, A100, MI300) for trains in (0, 1)],
        (T4, False, {4: FP16, 8: FP16, 16: FP16, 32: FP32}),
        (T4, True, {4: NO_TRAINING, 8: NO_TRAINING, 16: NO_TRAINING, 32: FP32}),
        (V100, False, {4: FP16, 8: NO_INT8, 16: FP16, 32: FP32}),
        (V100, True, {4: NO_TRAINING, 8: NO_TRAINING, 16: NO_TRAINING, 32: FP32}),
    ],
)
def test_what_the_llm_computes_in(on, trains, by_bits):
    for bits, expected in by_bits.items():
        if isinstance(expected, torch.dtype):
            assert llm_dtype(on, bits, trains=bool(trains)) == expected
            continue
        with pytest.raises(UserError, match=expected) as refused:
            llm_dtype(on, bits, trains=bool(trains))
        assert on.name in str(refused.value) and f"compute capability 7.{on.capability[1]}" in str(refused.value)
        assert "32" in str(refused.value), "what to set"


def test_what_overflows_in_float16_is_refused_there():
    for architecture in ("llama", "qwen3", "mistral"):
        require_no_overflow(T4, architecture)
    for architecture in ("gemma", "gemma2", "gemma3", "gemma3_text", "vaultgemma"):
        with pytest.raises(UserError, match=rf"Tesla T4 .*{architecture} overflows in float16: .*model\.llm\.bits=32"):
            require_no_overflow(T4, architecture)


def test_limits_are_said_of_cards_that_have_some():
    assert limits(H100) == limits(A100) == limits(MI300) == limits(CPU) == ""
    assert limits(T4) == "it has no bfloat16: it answers in float16, and trains with model.llm.bits=32 alone"
    assert "not with model.llm.bits=8" in limits(V100)


def test_a_cpu_computes_as_it_always_did(tiny_llm):
    on = hardware(torch.device("cpu"))
    assert on == CPU and compute_dtype(torch.device("cpu")) == FP32 and low_dtype(on) == BF16
    for bits, dtype in {4: FP32, 8: FP32, 16: BF16, 32: FP32}.items():
        llm, _ = load_llm(LLMConfig(name=str(tiny_llm), bits=bits), torch.device("cpu"), trains=True)
        assert llm.get_input_embeddings().weight.dtype == dtype
    model, _ = toy_model(tiny_llm, eye=3)
    with model.autocast():
        assert not torch.is_autocast_enabled("cpu")
