"""The LLMs that people use now: splice, packing, checkpointing, LoRA, loss and generation, on tiny random ones."""

from functools import cache

import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from anymal.config.schema import LLMConfig, LoraConfig
from anymal.data.packing import pack
from anymal.errors import UserError
from anymal.model.activation_checkpointing import set_checkpointing
from anymal.model.generate import embed_prompt, generate
from anymal.model.llm import add_lora, isolates_packed_samples, load_llm, set_frozen_mode, token_embedding
from anymal.model.loss import plain_loss
from anymal.model.multimodal import AnyMAL
from anymal.model.trainable import select_trainable, trainable
from tiny_llms import save
from toys import medium, prompt_of, sample, text, toy_adapters

CPU = torch.device("cpu")
DENSE = ("Llama", "Qwen3", "Gemma3Text", "Mistral", "Phi3", "Olmo2", "SmolLM3")
EXPERTS = ("GptOss", "Qwen3Moe", "Mixtral")
CASES = [(name, bits) for name in DENSE for bits in (32, 4)] + [(name, 32) for name in EXPERTS] + [("GptOss", 4)]
SAMPLES = [
    sample(medium("eye", 1), text("what is this?"), answer="a dog", key="a"),
    sample(text("hear "), medium("ear", 5), text(" and see "), medium("eye", 2), answer="a red apple", key="b"),
    sample(text("only text"), answer="yes it is", key="c"),
]
CAPS = {"Gemma3Text": 3.0}
ATTENTION = {"GptOss": "eager"}  # its heads have an attention sink, which SDPA does not know
ALONE = ("GptOss",)  # transformers' own mask does not keep its samples apart: training refuses several in a row


@pytest.fixture(scope="module")
def load(tiny_llm, tmp_path_factory):
    """The model of an architecture at so many bits, with toy modalities, and how its samples are made."""

    @cache
    def folder(name):
        return save(name, tmp_path_factory.mktemp("zoo") / name, tiny_llm)

    def fresh(name, bits, attention=""):
        attention = attention or ATTENTION.get(name, "packed")
        config = LLMConfig(name=str(folder(name)), bits=bits, attention=attention, allow_unquantized=name in EXPERTS)
        llm, tokenizer = load_llm(config, CPU)
        adapters = toy_adapters(64, eye=3, ear=2)
        model = AnyMAL(llm, adapters)
        select_trainable(model, ["projectors"])
        return model, prompt_of(tokenizer, adapters)

    kept = cache(fresh)
    kept.fresh = fresh
    return kept


def logits(model, tokens):
    batch = pack(tokens)
    return model.logits(batch, model.encode(batch.media))[0]


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_a_packed_sample_is_what_eager_attention_makes_of_it_alone(load, name, bits):
    model, prompt = load(name, bits)
    tokens = [prompt.sample(s) for s in SAMPLES]
    batch = pack(tokens)
    row, _ = model.embed(batch, model.encode(batch.media))
    expected = token_embedding(model.llm)(batch.ids)[0].clone()  # Gemma's table scales what it looks up
    for kind, values in {"eye": (1.0, 2.0), "ear": (5.0,)}.items():
        count = model.adapters[kind].tokens
        channels = [
            torch.tensor([value + 0.01 * i, 1.0, 0.0, 0.0]).repeat(16) for value in values for i in range(count)
        ]
        expected[batch.media_positions[kind]] = torch.stack(channels)
    torch.testing.assert_close(row[0], expected)

    reference, _ = load(name, bits, "eager")
    alone = torch.cat([logits(reference, [t]) for t in tokens])
    torch.testing.assert_close(torch.cat([logits(model, [t]) for t in tokens]), alone, rtol=1e-3, atol=1e-4)
    packs = isolates_packed_samples(model.llm)
    assert packs or name in ALONE
    if packs:
        torch.testing.assert_close(logits(model, tokens), alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_the_loss_in_chunks_is_the_plain_one_whatever_is_checkpointed(load, name, bits):
    model, prompt = load(name, bits)
    assert model._head is not None and model._head.cap == CAPS.get(name) and model._head.scale == 1
    batch = pack([prompt.sample(s) for s in SAMPLES])
    features = model.encode(batch.media)
    model.train()
    learn = list(trainable(model).values())
    found = {}
    for mode in ("none", "selective", "full"):
        set_checkpointing(model.llm, mode)
        total, _ = model(batch, features)
        found[mode] = (total.detach(), *torch.autograd.grad(total, learn))
    set_checkpointing(model.llm, "none")
    plain, absent = model.logits(batch, features)
    total = plain_loss(plain, batch.targets)[0] + absent
    found["plain"] = (total.detach(), *torch.autograd.grad(total, learn))
    model.eval()
    assert all(value.any() for value in found["plain"])
    for values in found.values():
        torch.testing.assert_close(values, found["plain"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_an_answer_is_what_the_whole_row_says_token_by_token(load, name, bits):
    """Its cache, sliding windows included, changes nothing."""
    model, prompt = load(name, bits)
    question = embed_prompt(model, prompt.question(SAMPLES[1]))
    model.eval()
    row, ids = question.row, []
    for _ in range(6):
        with torch.no_grad():
            ids.append(model.llm(inputs_embeds=row, use_cache=False).logits[0, -1].argmax())
            row = torch.cat([row, token_embedding(model.llm)(ids[-1][None, None])], dim=1)
        if ids[-1] == prompt.tokenizer.eos_token_id:
            break
    (answer,) = generate(model, prompt.tokenizer, [question], max_new_tokens=6)
    assert answer.text == prompt.tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_lora_is_on_all_linear_layers_and_learns(load, name, bits):
    model, prompt = load.fresh(name, bits)
    before = logits(model, [prompt.sample(SAMPLES[0])])
    layers = [layer for layer in model.llm.modules() if isinstance(layer, GradientCheckpointingLayer)]
    linear = sum(isinstance(module, nn.Linear) for layer in layers for module in layer.modules())
    llm = add_lora(model.llm, LoraConfig(rank=2))
    model = AnyMAL(llm, model.adapters)
    select_trainable(model, ["lora"])
    torch.testing.assert_close(logits(model, [prompt.sample(SAMPLES[0])]), before)  # it starts at zero
    batch = pack([prompt.sample(s) for s in SAMPLES])
    model.train()
    model(batch, model.encode(batch.media))[0].backward()
    gradients = [p.grad for n, p in trainable(model).items() if "lora_B" in n]
    assert len(gradients) == linear or (name in EXPERTS and len(gradients) > linear)  # PEFT adapts experts, too
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)
    set_frozen_mode(llm, recompute=False)


def test_an_llm_without_sdpa_says_what_to_set(tiny_llm, tmp_path):
    folder = save("GptOss", tmp_path / "llm", tiny_llm)
    with pytest.raises(UserError, match=r"not one that SDPA knows; set model\.llm\.attention=eager"):
        load_llm(LLMConfig(name=str(folder), bits=32), CPU)
