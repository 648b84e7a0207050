"""Flash attention over a packed row: when it runs, what it is given, and that it is what the loop over samples is."""

from contextlib import nullcontext

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

import varlen_on_cpu
from anymal.config.schema import LLMConfig, LoraConfig
from anymal.data.packing import pack, row_offsets
from anymal.model import attention, varlen
from anymal.model.activation_checkpointing import set_checkpointing
from anymal.model.llm import add_lora, load_llm, set_frozen_mode
from anymal.model.multimodal import AnyMAL
from anymal.model.trainable import select_trainable, trainable
from tiny_llms import SMALL, WIDTH
from toys import medium, sample, text, toy_adapters, toy_model

TORCH_2_13 = frozenset({"scale", "window_size", "enable_gqa"})
TORCH_2_11 = frozenset({"scale", "window_size"})
TORCH_2_10 = frozenset({"is_causal"})
H100 = {
    "capability": (9, 0),
    "dtype": torch.bfloat16,
    "widths": [128] * 3,
    "dropout": 0.0,
    "causal": True,
    "parameters": TORCH_2_13,
    "flash_attn": False,
}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({}, "varlen"),
        ({"dtype": torch.float16, "capability": (8, 0)}, "varlen"),
        ({"capability": None}, "loop"),  # a CPU
        ({"capability": (7, 5), "dtype": torch.float16}, "loop"),
        ({"dtype": torch.float32}, "loop"),
        ({"widths": [256] * 3}, "varlen"),
        ({"widths": [264] * 3}, "loop"),
        ({"widths": [20] * 3}, "loop"),
        ({"widths": [192, 192, 128]}, "loop"),  # DeepSeek's values are narrower
        ({"dropout": 0.1}, "loop"),
        ({"causal": False}, "loop"),
        ({"parameters": TORCH_2_11}, "varlen"),
        ({"parameters": TORCH_2_10}, "loop"),
        ({"parameters": frozenset()}, "loop"),
        ({"parameters": frozenset(), "flash_attn": True}, "flash_attn"),
        ({"flash_attn": True}, "varlen"),
        ({"flash_attn": True, "capability": None}, "loop"),
    ],
)
def test_which_kernel_runs(where, expected):
    assert varlen.kernel(**H100 | where) == expected


def test_this_torch_has_it():
    assert varlen.parameters() >= TORCH_2_11


def heads(queries: int, keys: int, tokens: int, width: int = 8) -> list[torch.Tensor]:
    """Queries, keys and values [1, H, T, d], in the memory order that transformers' layers leave them in."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, tokens, n, width) for n in (queries, keys, keys)]
    return [torch.randn(shape, generator=generator).transpose(1, 2).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("lengths", [[5, 5, 7, 2], [1, 1, 3], [6], [1]])
@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 1, 3, 7])
@pytest.mark.parametrize("parameters", [TORCH_2_13, TORCH_2_11])
def test_what_it_is_given_means_what_the_loop_computes(lengths, queries, keys, window, parameters):
    module = torch.nn.Module()
    module.num_key_value_groups = queries // keys
    row = heads(queries, keys, sum(lengths))
    cotangent = torch.randn(1, sum(lengths), queries, 8, generator=torch.Generator().manual_seed(1))
    where = {"sample_lengths": lengths, "sample_offsets": row_offsets(lengths), "sliding_window": window}
    expected, _ = attention.packed_attention(module, *row, None, **where, scaling=0.3)
    given = varlen.arguments(*row, longest=max(lengths), scale=0.3, sliding_window=window, parameters=parameters)
    assert ("enable_gqa" in given) == (queries != keys and "enable_gqa" in parameters)
    assert given.pop("max_q") == given.pop("max_k") == max(lengths)
    if not given.pop("enable_gqa", False):
        assert given["query"].shape == given["key"].shape == given["value"].shape
    found = varlen_on_cpu.attend(
        *(given[name] for name in ("query", "key", "value")), row_offsets(lengths), given["window_size"], given["scale"]
    )[None]
    torch.testing.assert_close(found, expected)
    both = [torch.autograd.grad(out, row, cotangent) for out in (found, expected)]
    torch.testing.assert_close(*both)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("window", [None, 3])
def test_torchs_own_takes_what_it_is_given(device, window):
    """On tensors without data: shapes, dtypes and options, not numbers. Autograd needs CUDA for those of a GPU."""
    learns = device == "cpu"
    dtype = torch.float32 if learns else torch.bfloat16
    with FakeTensorMode():
        row = [torch.empty(1, n, 14, 64, device=device, dtype=dtype, requires_grad=learns) for n in (8, 2, 2)]
        with torch.autocast(device, torch.bfloat16) if learns else nullcontext():
            offsets = torch.empty(4, dtype=torch.int32, device=device)
            out = varlen.run("varlen", *row, offsets=offsets, longest=7, scale=None, sliding_window=window)
        assert out.shape == (14, 8, 64) and out.dtype == torch.bfloat16 and out.device.type == device
        if learns:
            gradients = torch.autograd.grad(out.sum(), row)
            assert [(g.shape, g.dtype) for g in gradients] == [(x.shape, x.dtype) for x in row]


def test_flash_attn_is_given_the_same(monkeypatch):
    """The package's own function, as its documentation has it; it shares heads without being told."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        assert causal and not deterministic and max_seqlen_q == max_seqlen_k == 7 and cu_seqlens_k is cu_seqlens_q
        return varlen_on_cpu.attend(q, k, v, cu_seqlens_q, window_size, softmax_scale)

    monkeypatch.setattr(varlen, "flash_attn", lambda: flash_attn_varlen_func)
    monkeypatch.setattr(varlen, "parameters", lambda: TORCH_2_10)
    module, row, lengths = torch.nn.Module(), heads(4, 2, 14), [7, 5, 2]
    module.num_key_value_groups = 2
    row = [x.bfloat16() for x in row]
    more = {"sample_lengths": lengths, "sample_offsets": row_offsets(lengths), "sliding_window": 3}
    expected, _ = attention.packed_attention(module, *row, None, **more)
    with varlen_on_cpu.as_on_a_gpu():
        found, _ = attention.packed_attention(module, *row, None, **more)
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0.03)


LENGTHS = [5, 5, 7, 2]


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("Llama", {}),
        ("Qwen3", {}),
        ("Mistral", {"sliding_window": 3}),
        ("Gemma3Text", {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}),
        ("SmolLM3", {}),
        ("GPTNeoX", {}),
    ],
)
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_llms_compute_what_they_compute_by_the_loop(name, more, mode):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL | more)
    model = {"Gemma3Text": "Gemma3"}.get(name, name)
    llm = getattr(transformers, f"{model}ForCausalLM")._from_config(config, attn_implementation="sdpa")
    attention.choose(llm, "packed")
    llm.bfloat16().requires_grad_(False)
    set_checkpointing(llm, mode)
    set_frozen_mode(llm, recompute=True)
    embeddings = torch.randn(1, sum(LENGTHS), WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]

    def run() -> list[torch.Tensor]:
        row = embeddings.clone().requires_grad_()
        where = attention.arguments(llm, LENGTHS, row_offsets(LENGTHS))
        logits = llm(inputs_embeds=row, position_ids=positions, use_cache=False, **where).logits.float()
        return [logits.detach(), torch.autograd.grad(logits.square().mean(), row)[0].float()]

    expected = run()
    with varlen_on_cpu.as_on_a_gpu():
        found = run()
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() < 0.03 * theirs.norm()
    layers = 2
    recomputed = layers if mode == "full" else 0  # its output is kept: selective does not attend again
    assert varlen_on_cpu.calls == {"forward": layers + recomputed, "backward": layers}


def test_with_lora_and_every_mode_gradients_are_alike(tiny_llm):
    _, prompt = toy_model(tiny_llm, eye=3)
    batch = pack([prompt.sample(sample(medium("eye", n), text("what " * n), answer="a dog")) for n in (1, 2, 3)])

    def gradient(mode: str) -> torch.Tensor:
        llm, _ = load_llm(LLMConfig(name=str(tiny_llm), bits=16, checkpointing=mode), torch.device("cpu"))
        torch.manual_seed(0)
        llm = add_lora(llm, LoraConfig(rank=2))
        model = AnyMAL(llm, toy_adapters(64, eye=3))
        select_trainable(model, ["projectors", "lora"])
        torch.manual_seed(0)
        for name, parameter in llm.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
        model(batch, model.encode(batch.media))[0].backward()
        return torch.cat([p.grad.flatten() for p in trainable(model).values()])

    by_loop = gradient("none")
    found = []
    for mode in ("none", "selective", "full"):
        with varlen_on_cpu.as_on_a_gpu():
            found.append(gradient(mode))
        assert varlen_on_cpu.calls == {"forward": 4 if mode == "full" else 2, "backward": 2}
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert (found[0] - by_loop).norm() < 0.05 * by_loop.norm()
