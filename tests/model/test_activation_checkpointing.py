"""The three checkpointing modes: the same losses and gradients to the bit, and less and less kept."""

import pytest
import torch
from torch.profiler import profile

import tiny_llms
from allocated import kept_bytes
from anymal.config.schema import Config, LLMConfig, LoraConfig
from anymal.config.settings import load
from anymal.data.packing import pack
from anymal.errors import UserError
from anymal.model.activation_checkpointing import set_checkpointing
from anymal.model.llm import add_lora, load_llm, set_frozen_mode
from anymal.model.multimodal import AnyMAL
from anymal.model.trainable import select_trainable, trainable
from toys import medium, sample, text, toy_adapters, toy_model

MODES = ("none", "selective", "full")
SAMPLES = [
    sample(medium("eye", 1), text("what is this? " * 30), answer="a dog", key="a"),
    sample(text("hear " * 30), medium("ear", 5), text(" and see "), medium("eye", 2), answer="a red apple", key="b"),
    sample(text("only text"), answer="yes it is", key="c"),
]


@pytest.mark.parametrize(
    ("bits", "train", "saved"),
    [
        (32, ["projectors"], 0.9),
        (16, ["projectors"], 0.85),
        (4, ["projectors", "lora"], 0.95),  # LoRA keeps inputs of its own
        (8, ["lora"], 0.95),
    ],
)
def test_modes_change_memory_not_gradients(tiny_llm, bits, train, saved):
    _, prompt = toy_model(tiny_llm, eye=3, ear=2)
    batch = pack([prompt.sample(s) for s in SAMPLES])
    totals, gradients, kept = [], [], []
    for mode in MODES:
        llm, _ = load_llm(LLMConfig(name=str(tiny_llm), bits=bits, checkpointing=mode), torch.device("cpu"))
        torch.manual_seed(0)
        if "lora" in train:
            llm = add_lora(llm, LoraConfig(rank=2))
        model = AnyMAL(llm, toy_adapters(64, eye=3, ear=2))
        select_trainable(model, train)
        features = model.encode(batch.media)
        model(batch, features)[0].backward()  # 8-bit layers move their scales at the first pass
        model.zero_grad()
        with profile(profile_memory=True) as watched:
            total, _ = model(batch, features)
        kept.append(kept_bytes(watched))
        total.backward()
        totals.append(total.item())
        gradients.append(torch.cat([p.grad.flatten() for p in trainable(model).values()]))
    assert totals[0] == totals[1] == totals[2] and gradients[0].norm() > 0
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])
    assert kept[1] < saved * kept[0] and kept[2] < 0.7 * kept[1]


@pytest.mark.parametrize("name", tiny_llms.ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selective_is_exact_in_every_architecture(name, dtype):
    embeddings = torch.randn(1, 12, tiny_llms.WIDTH).to(dtype)
    gradients = []
    for mode in ("none", "selective"):
        llm = tiny_llms.make(name).to(dtype)
        set_checkpointing(llm, mode)
        set_frozen_mode(llm, recompute=True)
        row = embeddings.clone().requires_grad_()
        llm(inputs_embeds=row, use_cache=False).logits.float().square().mean().backward()
        gradients.append(row.grad)
    assert gradients[0].norm() > 0 and torch.equal(*gradients)


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(UserError, match="checkpointing=selective: Linear has no layers for it; set it to none"):
        set_checkpointing(torch.nn.Linear(2, 2), "selective")


@pytest.mark.parametrize("old", ["true", "false"])
def test_what_was_true_or_false_is_told_the_new_names(old):
    with pytest.raises(UserError, match=rf"checkpointing is {old.title()}; it can be none, selective or full"):
        load(Config, None, ["model.llm.name=x", f"model.llm.checkpointing={old}"])
