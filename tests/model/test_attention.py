"""Attention over a packed row: the same as transformers' own, for every architecture that it is used with."""

import pytest
import torch
import transformers

from anymal.data.packing import row_offsets
from anymal.errors import UserError
from anymal.model import attention
from tiny_llms import ARCHITECTURES, SMALL, WIDTH

LENGTHS = [5, 5, 7, 2]
MORE = {
    "Mistral": {"sliding_window": 3},
    "Starcoder2": {"sliding_window": 3},
    "Qwen3": {},
    "GPTNeoX": {},
    "Olmo2": {},
    "Phi3": {},
    "SmolLM3": {},
}
WITHOUT = ("Gemma2",)  # it caps its scores, which SDPA cannot


def make(name: str, implementation: str, **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL | ARCHITECTURES.get(name, {}) | MORE.get(name, {}) | more)
    llm = getattr(transformers, f"{name}ForCausalLM")._from_config(
        config, attn_implementation=attention.at_loading(implementation)
    )
    attention.choose(llm, implementation)
    return llm.eval().requires_grad_(False)


def logits_and_gradient(llm, row: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of samples in one row: [T, V] and [T, WIDTH]."""
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    row = row[None].clone().requires_grad_()
    more = attention.arguments(llm, lengths, row_offsets(lengths))
    out = llm(inputs_embeds=row, position_ids=positions, use_cache=False, **more).logits[0]
    (gradient,) = torch.autograd.grad(out.square().sum(), row)
    return out.detach(), gradient[0]


@pytest.mark.parametrize("name", sorted((set(ARCHITECTURES) | set(MORE)) - set(WITHOUT)))
def test_a_packed_sample_is_what_eager_attention_makes_of_it_alone(name):
    ours, reference = make(name, "packed"), make(name, "eager")
    assert ours.config._attn_implementation == "packed"
    row = torch.randn(sum(LENGTHS), WIDTH, generator=torch.Generator().manual_seed(1))
    alone = [logits_and_gradient(reference, sample, [len(sample)]) for sample in row.split(LENGTHS)]
    for found, parts in zip(logits_and_gradient(ours, row, LENGTHS), zip(*alone, strict=True), strict=True):
        expected = torch.cat(parts)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("name", "more"), [("StableLm", {}), ("Llama4", {"attention_chunk_size": 8})])
def test_architectures_that_cannot_have_it_keep_sdpa(name, more):
    if name == "Llama4":
        config = transformers.Llama4TextConfig(**SMALL, num_local_experts=1, intermediate_size_mlp=48, **more)
        llm = transformers.Llama4ForCausalLM._from_config(config, attn_implementation="sdpa")
        attention.choose(llm, "packed")
    else:
        llm = make(name, "packed", **more)
    assert llm.config._attn_implementation == "sdpa"


def test_lengths_that_are_not_the_rows_are_refused():
    llm = make("Llama", "packed")
    with pytest.raises(ValueError, match="samples of 18 tokens in a row of 19"):
        more = attention.arguments(llm, [5, 5, 7, 1], row_offsets([5, 5, 7, 1]))
        llm(inputs_embeds=torch.randn(1, 19, WIDTH), use_cache=False, **more)


def test_work_grows_with_the_samples_not_with_the_row(monkeypatch):
    """Scores computed: the sum of t² over the samples of a row, in one call for samples of one length side by side."""
    shapes = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, *rest, **more):
        shapes.append((query.shape[0], query.shape[2], key.shape[2]))
        return kernel(query, key, *rest, **more)

    llm = make("Llama", "packed")
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    logits_and_gradient(llm, torch.randn(sum(LENGTHS), WIDTH), LENGTHS)
    assert shapes == 2 * [(2, 5, 5), (1, 7, 7), (1, 2, 2)]  # two layers


def test_an_architecture_that_tells_its_attention_nothing_is_named():
    """Nemotron says that it supports other attention, but does not hand their arguments on."""
    llm = make("Nemotron", "packed")
    with pytest.raises(UserError, match=r"NemotronAttention is not told.* set model\.llm\.attention=sdpa"):
        logits_and_gradient(llm, torch.randn(sum(LENGTHS), WIDTH), LENGTHS)


def test_windows_that_the_mask_alone_knows_keep_sdpa():
    windowed = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0, "num_experts": 2}
    sparse = {"num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    assert make("Qwen2Moe", "packed", **windowed, **sparse).config._attn_implementation == "sdpa"
    assert make("Qwen2Moe", "packed", num_experts=2, **sparse).config._attn_implementation == "packed"


@pytest.mark.parametrize(
    ("name", "packed"),
    [("softcap", True), ("softcap", False), ("s_aux", True), ("s_aux", False), ("sinks", True), ("indices", True)],
)
def test_what_the_kernels_leave_out_is_refused(name, packed):
    """transformers' SDPA drops attention sinks without a word, and a packed row has no mask for sparse indices."""
    x = torch.randn(1, 2, 5, 8)
    lengths = {"sample_lengths": (3, 2), "sample_offsets": row_offsets([3, 2])} if packed else {}
    with pytest.raises(UserError, match=rf"Linear attends with {name}, .* set model\.llm\.attention=eager"):
        attention.packed_attention(torch.nn.Linear(1, 1), x, x, x, None, **lengths, **{name: torch.ones(2)})
    attention.packed_attention(torch.nn.Linear(1, 1), x, x, x, None, **lengths, **{name: None})
