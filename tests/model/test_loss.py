"""The chunked loss against plain cross-entropy through the same model: many architectures, tied heads, any bits."""

import logging

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.profiler import profile

import tiny_llms
from allocated import peak_bytes
from anymal.config.schema import LoraConfig
from anymal.data.packing import pack
from anymal.model import loss
from anymal.model.llm import add_lora
from anymal.model.loss import Head, chunked_loss, find_head, plain_loss, sums_per_group
from anymal.model.multimodal import AnyMAL
from anymal.model.trainable import select_trainable, trainable
from tiny_llms import VOCABULARY, WIDTH
from toys import medium, sample, text, toy_adapters, toy_model

SAMPLES = [
    sample(medium("eye", 1), text("what is this?"), answer="a dog on the table", key="a"),
    sample(text("hear "), medium("ear", 5), text(" and see "), medium("eye", 2), answer="a red apple", key="b"),
    sample(text("only text"), answer="yes it is", key="c"),
]


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of five rows at the vocabulary of `make`."""
    monkeypatch.setattr(loss, "CHUNK_BYTES", 5 * 4 * VOCABULARY)


@pytest.mark.parametrize("name", tiny_llms.ARCHITECTURES)
def test_loss_and_gradient_are_those_of_plain_cross_entropy(name, small_chunks, caplog):
    llm = tiny_llms.make(name)
    head = find_head(llm)
    assert head is not None, caplog.text
    embeddings = torch.randn(1, 40, WIDTH)
    rows, targets = torch.arange(3, 39, 2), torch.randint(VOCABULARY, (18,))
    found = []
    for chunked in (True, False):
        row = embeddings.clone().requires_grad_()
        if chunked:
            hidden = llm.get_decoder()(inputs_embeds=row, use_cache=False).last_hidden_state[0, rows]
            total, losses = chunked_loss(head, hidden, targets)
        else:
            losses = F.cross_entropy(llm(inputs_embeds=row).logits[0, rows], targets, reduction="none")
            total = losses.sum()
        (0.37 * total).backward()
        found.append((total.detach(), losses.detach(), row.grad))
    (total, losses, gradient), (plain, plain_losses, plain_gradient) = found
    assert abs(total - plain) <= 1e-6 * plain
    torch.testing.assert_close(losses, plain_losses, rtol=1e-5, atol=1e-6)
    assert plain_gradient.norm() > 0
    assert (gradient - plain_gradient).norm() <= 1e-6 * plain_gradient.norm()


def test_what_is_done_to_logits_is_read_off_the_model():
    assert find_head(tiny_llms.make("Gemma2")).cap == 3
    assert [find_head(tiny_llms.make(name)).scale for name in ("Cohere", "Granite", "HyperCLOVAX")] == [
        0.0625,
        0.125,
        0.25,
    ]
    assert find_head(tiny_llms.make("Phi")).bias is not None
    for name in ("Qwen2", "Gemma2", "Cohere"):
        llm = tiny_llms.make(name)
        assert find_head(llm).weight is llm.get_input_embeddings().weight


class Odd(transformers.LlamaForCausalLM):
    """Does to its logits what no config tells."""

    def forward(self, *arguments, **named):
        output = super().forward(*arguments, **named)
        output.logits = 20 * torch.tanh(output.logits / 20)
        return output


def test_a_head_that_is_not_understood_takes_the_whole_logits_and_says_so(tiny_llm, caplog):
    model, prompt = toy_model(tiny_llm, eye=3, ear=2)
    model.llm.__class__ = Odd
    with caplog.at_level(logging.WARNING):
        odd = AnyMAL(model.llm, toy_adapters(64, eye=3, ear=2))
    assert "Odd: the loss takes the whole logits" in caplog.text
    batch = pack([prompt.sample(s) for s in SAMPLES])
    features = odd.encode(batch.media)
    logits, _ = odd.logits(batch, features)
    torch.testing.assert_close(odd(batch, features)[0], F.cross_entropy(logits, batch.targets, reduction="sum"))


def test_a_head_with_lora_takes_the_whole_logits(tiny_llm, caplog):
    llm = add_lora(toy_model(tiny_llm, eye=3)[0].llm, LoraConfig(rank=2, targets=["q_proj", "lm_head"]))
    assert find_head(llm) is None and "its output layer is a Linear" in caplog.text


def test_a_head_that_learns_gets_its_gradient(tiny_llm):
    model, prompt = toy_model(tiny_llm, eye=3, ear=2)
    select_trainable(model, ["projectors"])
    head = model.llm.get_output_embeddings().weight.requires_grad_()
    batch = pack([prompt.sample(s) for s in SAMPLES])
    model(batch, model.encode(batch.media))[0].backward()
    assert head.grad.norm() > 0


@pytest.mark.parametrize(("bits", "train"), [(4, ["projectors"]), (8, ["projectors"]), (4, ["projectors", "lora"])])
def test_through_a_quantised_body_and_lora(tiny_llm, bits, train, monkeypatch):
    model, prompt = toy_model(tiny_llm, bits=bits, eye=3, ear=2)
    monkeypatch.setattr(loss, "CHUNK_BYTES", 5 * 4 * model.llm.config.vocab_size)
    if "lora" in train:
        model = AnyMAL(add_lora(model.llm, LoraConfig(rank=2)), toy_adapters(64, eye=3, ear=2))
    select_trainable(model, train)
    batch = pack([prompt.sample(s) for s in SAMPLES])
    assert len(batch.targets) > 10
    totals, gradients = [], []
    for head in (find_head(model.llm), None):
        model._head = head
        model.zero_grad()
        total, per_group = model(batch, model.encode(batch.media))
        total.backward()
        totals.append(total.item())
        torch.testing.assert_close(per_group[:, 0].sum(), total)
        gradients.append(torch.cat([p.grad.flatten() for p in trainable(model).values()]))
    assert totals[0] == pytest.approx(totals[1], rel=1e-6)
    assert gradients[1].norm() > 0
    assert (gradients[0] - gradients[1]).norm() <= 1e-6 * gradients[1].norm()


def test_without_gradient_none_is_computed(small_chunks, monkeypatch):
    head = find_head(tiny_llms.make("Llama"))
    hidden, targets = torch.randn(18, WIDTH, requires_grad=True), torch.randint(VOCABULARY, (18,))
    learning, _ = chunked_loss(head, hidden, targets)
    monkeypatch.setattr(torch.autograd, "grad", None)  # to call it would be an error
    with torch.no_grad():
        total, _ = chunked_loss(head, hidden, targets)
    assert not total.requires_grad and not chunked_loss(head, hidden.detach(), targets)[0].requires_grad
    torch.testing.assert_close(total, learning.detach())


def test_softmax_is_float32_even_for_bfloat16_weights():
    linear = nn.Linear(8, 11, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    hidden, targets = torch.randn(5, 8, dtype=torch.bfloat16), torch.arange(5)
    total, losses = chunked_loss(Head(weight=linear.weight), hidden, targets)
    expected = F.cross_entropy(linear(hidden).float(), targets, reduction="sum")
    assert total.dtype == losses.dtype == torch.float32
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(plain_loss(linear(hidden), targets)[0], expected)


def test_groups_add_up():
    sums = sums_per_group(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1, 0, 1]), 3)
    assert sums.tolist() == [[2.0, 1.0], [5.0, 2.0], [0.0, 0.0]]


def test_memory_does_not_grow_with_vocabulary_times_tokens(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_BYTES", 2**18)

    def peak(vocabulary: int, answers: int, chunked: bool) -> int:
        head = Head(weight=nn.Parameter(torch.randn(vocabulary, 16), requires_grad=False))
        hidden, targets = torch.randn(answers, 16, requires_grad=True), torch.randint(vocabulary, (answers,))
        with profile(profile_memory=True) as watched:
            total, _ = chunked_loss(head, hidden, targets) if chunked else plain_loss(head.logits(hidden), targets)
            total.backward()
        return peak_bytes(watched)

    small, large = peak(1000, 100, chunked=True), peak(8000, 800, chunked=True)
    assert large < 4 * 2**18 + 8 * 800 * 16 * 4 and large < 1.5 * small
    assert peak(8000, 800, chunked=False) > 8000 * 800 * 4 > 15 * large
