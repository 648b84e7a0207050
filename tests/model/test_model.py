"""Splice, isolation, loss, freezing: what the model does with a packed row, on the tiny LLM and toy encoders."""

import pytest
import torch
import torch.nn.functional as F

from anymal.config.schema import LoraConfig
from anymal.data.packing import Item, Row, pack
from anymal.errors import UserError
from anymal.model.llm import add_lora, load_lora
from anymal.model.multimodal import AnyMAL
from anymal.model.trainable import fingerprint, format_table, select_trainable, table, trainable
from anymal.sample import Part, Views
from anymal.training.prefetch import Prefetcher
from toys import medium, sample, text, toy_model

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

SAMPLES = [
    sample(medium("eye", 1), text("what is this?"), answer="a dog", key="a"),
    sample(text("hear "), medium("ear", 5), text(" and see "), medium("eye", 2), answer="a red apple", key="b"),
    sample(text("only text"), answer="yes it is", key="c"),
    sample(medium("ear", 7), medium("ear", 8), answer="it is a table", key="d"),
]


@pytest.fixture(scope="module")
def toy(tiny_llm):
    model, prompt = toy_model(tiny_llm, eye=3, ear=2)
    select_trainable(model, ["projectors"])
    return model, [prompt.sample(s) for s in SAMPLES]


def test_each_embedding_lands_exactly_where_its_placeholder_stands(toy):
    model, tokens = toy
    batch = pack(tokens)
    row, _ = model.embed(batch, model.encode(batch.media))
    expected = model.llm.get_input_embeddings()(batch.ids)[0].clone()
    start = 0
    for sample_tokens in tokens:
        for (_, first, length), value in zip(sample_tokens.runs, sample_tokens.media, strict=True):
            for i in range(length):
                channels = torch.tensor([float(value) + 0.01 * i, 1.0, 0.0, 0.0])
                expected[start + first + i] = channels.repeat(expected.shape[1] // 4)
        start += len(sample_tokens.ids)
    torch.testing.assert_close(row[0], expected)


def test_surplus_media_are_refused_with_both_numbers(toy):
    model, tokens = toy
    batch = pack(tokens)
    features = model.encode(batch.media)
    features["eye"] = torch.cat([features["eye"], features["eye"][:1]])
    with pytest.raises(ValueError, match=r"3 media of 3 embeddings for 2 placeholder runs of 6 positions.*a, b, c, d"):
        model.embed(batch, features)


def test_media_of_another_shape_are_refused_by_key(toy):
    _, tokens = toy
    odd = toy_tokens_with(tokens[0], torch.zeros(2))
    with pytest.raises(ValueError, match=r"'a'.*shape \[2\], but \[1\] before"):
        pack([tokens[0], odd])


def toy_tokens_with(tokens, value):
    from dataclasses import replace

    return replace(tokens, media=[value])


@pytest.mark.parametrize("attention", ["packed", "eager", "sdpa"])
def test_packed_samples_do_not_see_one_another(tiny_llm, attention):
    model, prompt = toy_model(tiny_llm, attention=attention, eye=3, ear=2)
    tokens = [prompt.sample(s) for s in SAMPLES]
    batch = pack(tokens)
    together, _ = model.logits(batch, model.encode(batch.media))
    alone = [model.logits(pack([t]), model.encode(pack([t]).media))[0] for t in tokens]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_what_is_encoded_ahead_is_what_would_be_encoded(tiny_llm, device):
    model, prompt = toy_model(tiny_llm, device=device, eye=3, ear=2)
    tokens = [prompt.sample(s) for s in SAMPLES]
    items = [Item(position=n, dataset="", tokens=t) for n, t in enumerate(tokens)]
    rows = [Row(items=items[n:] + items[:n]) for n in range(4)]
    prefetcher = Prefetcher(model)
    prefetcher.start(rows[0])
    for number, row in enumerate(rows):
        moved, features = prefetcher.take()
        if number < 3:
            prefetcher.start(rows[number + 1])
        total = model(moved, features)[0]
        expected = row.collate().to(model.device)
        assert not moved.media and expected.media  # they are let go once they are encoded
        torch.testing.assert_close(moved.ids, expected.ids)
        for name, value in model.encode(expected.media).items():
            assert torch.equal(features[name], value)
        assert torch.equal(total, model(expected, model.encode(expected.media))[0])


def test_loss_is_plain_cross_entropy_over_the_answers(toy):
    model, tokens = toy
    batch = pack(tokens)
    features = model.encode(batch.media)
    total, per_group = model(batch, features)
    row, _ = model.embed(batch, features)
    logits = model.llm(inputs_embeds=row, position_ids=batch.positions, use_cache=False).logits[0]
    labels = torch.tensor([label for t in tokens for label in t.labels])
    labels = torch.cat([labels[1:], torch.tensor([-100])])
    torch.testing.assert_close(total, F.cross_entropy(logits, labels, reduction="sum"), rtol=1e-5, atol=1e-4)
    assert batch.groups == ["eye", "ear+eye", "text", "ear"]
    torch.testing.assert_close(per_group[:, 0].sum(), total)
    assert per_group[:, 1].sum() == len(batch.targets) == (labels != -100).sum()


def test_an_absent_modality_takes_part_with_gradient_zero(toy):
    model, tokens = toy
    batch = pack([tokens[0]])  # an eye only
    model.zero_grad()
    model(batch, model.encode(batch.media))[0].backward()
    assert model.projectors["ear"].scale.grad is not None
    assert model.projectors["ear"].scale.grad.item() == 0
    assert model.projectors["eye"].scale.grad.item() != 0


def test_a_text_only_batch_has_a_gradient_of_zero(toy):
    model, tokens = toy
    batch = pack([tokens[2]])
    model.zero_grad()
    model(batch, model.encode(batch.media))[0].backward()
    assert {p.grad.item() for p in trainable(model).values()} == {0.0}


def test_only_what_is_listed_is_trainable(tiny_llm):
    model, _ = toy_model(tiny_llm, eye=3, ear=2)
    model = AnyMAL(add_lora(model.llm, LoraConfig(rank=2)), _adapters_of(model))
    select_trainable(model, ["projectors"])
    assert set(trainable(model)) == {"projectors.eye.scale", "projectors.ear.scale"}
    select_trainable(model, ["projectors.ear"])
    assert set(trainable(model)) == {"projectors.ear.scale"}
    select_trainable(model, ["lora"])
    assert all("lora_" in name for name in trainable(model)) and len(trainable(model)) == 2 * 2 * 7
    assert not any(p.requires_grad for e in model.encoders.values() for p in e.parameters())
    with pytest.raises(UserError, match=r"train lists 'lorra'; this model has projectors, projectors.eye"):
        select_trainable(model, ["lorra"])


def _adapters_of(model):
    from toys import toy_adapters

    return toy_adapters(model.llm.config.hidden_size, eye=3, ear=2)


@pytest.mark.parametrize("name", ["encoders.eye", "encoders"])
def test_an_encoder_that_was_not_to_learn_when_the_model_was_made_is_refused(tiny_llm, name):
    model, _ = toy_model(tiny_llm, eye=3)
    with pytest.raises(UserError, match="has no such parameters"):
        select_trainable(model, [name])


def test_train_without_lora_says_so(tiny_llm):
    model, _ = toy_model(tiny_llm, eye=3)
    with pytest.raises(UserError, match="has no such parameters"):
        select_trainable(model, ["lora"])


def test_an_adapter_of_peft_that_is_no_lora_is_refused(tiny_llm, tmp_path):
    from peft import IA3Config, get_peft_model

    model, _ = toy_model(tiny_llm)
    layers = {"target_modules": ["k_proj"], "feedforward_modules": []}
    get_peft_model(model.llm, IA3Config(task_type="CAUSAL_LM", **layers)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"holds no LoRA, but PEFT's .*IA3"):
        load_lora(toy_model(tiny_llm)[0].llm, tmp_path, LoraConfig())


def test_table_counts_four_bit_weights_as_what_they_hold(tiny_llm):
    whole = sum(r.parameters for r in table(toy_model(tiny_llm, eye=3)[0]) if r.module == "llm")
    model, _ = toy_model(tiny_llm, bits=4, eye=3)
    rows = table(model)
    assert sum(r.parameters for r in rows if r.module == "llm") == whole
    assert {r.bits for r in rows if r.module == "llm"} == {4, 32}
    assert "projectors.eye" in format_table(rows)


@pytest.mark.parametrize("bits", [4, 8])
def test_gradient_through_a_quantised_llm_is_that_of_its_dequantised_weights(tiny_llm, bits):
    quantised, prompt = toy_model(tiny_llm, bits=bits, eye=3, ear=2)
    plain, _ = toy_model(tiny_llm, bits=32, eye=3, ear=2)
    for name, module in quantised.llm.named_modules():
        if hasattr(module, "weight") and module.weight.dtype in (torch.uint8, torch.int8):
            plain.llm.get_submodule(name).weight.data = dequantised(module)
    batch = pack([prompt.sample(s) for s in SAMPLES])
    grads = []
    for model in (quantised, plain):
        select_trainable(model, ["projectors"])
        model(batch, model.encode(batch.media))[0].backward()
        grads.append(torch.cat([p.grad for p in trainable(model).values()]))
    assert grads[1].norm() > 0
    assert (grads[0] - grads[1]).norm() / grads[1].norm() < 1e-4


def dequantised(module) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    if module.weight.dtype == torch.uint8:
        return dequantize_4bit(module.weight.data, module.weight.quant_state)
    return module.weight.data.float() * module.weight.SCB[:, None] / 127


@pytest.mark.parametrize("bits", [4, 8])
def test_reading_without_gradient_first_does_not_cut_later_gradients(tiny_llm, bits):
    """bitsandbytes repacks 4-bit layers in eval mode for good at the first input without gradient."""
    model, prompt = toy_model(tiny_llm, bits=bits, eye=3, ear=2)
    tokens = [prompt.sample(s) for s in SAMPLES]
    select_trainable(model, ["projectors"])
    before = fingerprint(model.llm)
    model.eval()
    with torch.no_grad():
        for t in tokens:
            model(pack([t]), model.encode(pack([t]).media))
    model.train()
    model(pack([tokens[2]]), {})[0].backward()  # text only: its embeddings need no gradient
    model.zero_grad()
    batch = pack(tokens)
    model(batch, model.encode(batch.media))[0].backward()
    assert all(p.grad.abs().sum() > 0 for p in trainable(model).values())
    assert fingerprint(model.llm) == before


def test_views_follow_one_another_and_a_skipped_one_takes_a_single_token(tiny_llm):
    model, prompt = toy_model(tiny_llm, eye=3, ear=2)
    model.projectors["eye"].skip = torch.nn.Parameter(torch.full((model.llm.config.hidden_size,), 7.0))
    views = Part(kind="eye", content=Views(tensor=torch.tensor([[1.0], [4.0]]), skipped=(False, True, False, True)))
    tokens = prompt.sample(sample(medium("ear", 5), text("see "), views, text(" and "), medium("eye", 9)))
    assert [length for name, _, length in tokens.runs if name == "eye"] == [3, 3, 3]
    (_, first, _), (_, second, _), (_, third, _) = (run for run in tokens.runs if run[0] == "eye")
    assert tokens.skips == [("eye", first + 3), ("eye", second + 3)] and second == first + 4
    batch = pack([tokens])
    row, _ = model.embed(batch, model.encode(batch.media))
    channel = row[0, [*range(first, first + 8), *range(third, third + 3)], 0]
    torch.testing.assert_close(channel, torch.tensor([1, 1.01, 1.02, 7, 4, 4.01, 4.02, 7, 9, 9.01, 9.02]))
    model.zero_grad()
    model(batch, model.encode(batch.media))[0].backward()
    assert model.projectors["eye"].skip.grad.abs().sum() > 0
    model.zero_grad()
    model(pack([prompt.sample(SAMPLES[2])]), {})[0].backward()
    assert model.projectors["eye"].skip.grad.abs().sum() == 0
