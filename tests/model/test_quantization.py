"""What bitsandbytes cannot quantise is refused, when an LLM is loaded and when it is estimated."""

import json
import logging

import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from torch._subclasses.fake_tensor import FakeTensorMode

from anymal.adapters import REGISTRY
from anymal.config.schema import Config, LLMConfig, ModelConfig
from anymal.errors import UserError
from anymal.estimation.fake_llm import make_llm, stored_bytes
from anymal.estimation.fake_step import FakeStep
from anymal.model.llm import embedding_std, load_llm, read_config, token_embedding
from anymal.model.quantization import unquantised
from tiny_llms import save

CPU = torch.device("cpu")
EXPERTS = ("Qwen3Moe", "Mixtral", "GptOss", "Llama4Text", "Olmoe", "DeepseekV3")
DENSE = ("Llama", "Phi3", "Gemma3Text", "GPT2")


@pytest.fixture(scope="module")
def folder(tiny_llm, tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = save(name, tmp_path_factory.mktemp("llms") / name, tiny_llm)
        return made[name]

    return get


def settings(folder, bits, **more):
    attention = "eager" if folder.name == "GptOss" else "packed"
    return LLMConfig(name=str(folder), bits=bits, attention=attention, **more)


def estimate(config):
    return FakeStep(Config(model=ModelConfig(llm=config), train=["lora"]), REGISTRY, gpu=False)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_refused_by_share_and_name(folder, name, bits):
    said = rf"bitsandbytes cannot hold \d\d% of its weights in {bits} bits: .*experts\.gate_up_proj \(\d\d%\), .*"
    said += r"GB in float32\. .*model\.llm\.allow_unquantized=true"
    for read in (lambda config: load_llm(config, CPU), estimate):
        with pytest.raises(UserError, match=said):
            read(settings(folder(name), bits))


def test_they_are_refused_before_weights_are_read(folder, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in folder("Mixtral").iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="bitsandbytes cannot hold"):
        load_llm(settings(bare, 4), CPU)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", [*EXPERTS, *DENSE])
def test_what_is_allowed_is_said_and_estimated_as_large_as_it_is(folder, name, bits, caplog):
    config = settings(folder(name), bits, allow_unquantized=True)
    with caplog.at_level(logging.WARNING, "anymal"):
        llm, _ = load_llm(config, CPU)
    left, total = unquantised(llm, bits)
    if name in DENSE:
        assert not left and total and not caplog.messages
    else:
        (message,) = caplog.messages
        assert f"cannot hold {left.total() / total:.0%} of its weights" in message and "as model.llm.allow" in message
    estimated = make_llm(config, read_config(config.name), FakeTensorMode(allow_non_fake_inputs=True), torch.float32)
    assert unquantised(estimated, bits) == (left, total)
    for module in llm.modules():
        if isinstance(module, Linear8bitLt):
            module.init_8bit_state()  # as its first call does
    assert stored_bytes(estimated) == stored_bytes(llm)


def test_all_of_a_dense_llm_is_quantised_and_nothing_random_is_drawn(folder):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for bits in (4, 8):
        load_llm(settings(folder("Phi3"), bits), CPU)
        estimate(settings(folder("Phi3"), bits))
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_that_something_else_quantised_are_named(folder, tmp_path):
    config = json.loads((folder("Llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(UserError, match=r"on disk, by mxfp4; for model\.llm\.bits=4 take that LLM in 16 bits"):
        load_llm(settings(tmp_path, 4), CPU)


def test_weights_that_bitsandbytes_quantised_before_are_taken_at_their_bits(folder, tmp_path):
    llm, tokenizer = load_llm(settings(folder("Llama"), 4), CPU)
    ids = torch.arange(3, 40)[None]
    for part in (llm, tokenizer):
        part.save_pretrained(tmp_path)
    again, _ = load_llm(settings(tmp_path, 4), CPU)
    assert torch.equal(again(input_ids=ids).logits, llm(input_ids=ids).logits)
    for bits in (8, 16, 32):
        with pytest.raises(UserError, match=r"quantised on disk in 4 bits; set model\.llm\.bits=4, or take"):
            load_llm(settings(tmp_path, bits), CPU)


def test_the_threshold_of_8_bits_is_set_and_plays_no_part_on_a_cpu(folder):
    ids, logits = torch.arange(3, 40)[None], []
    for threshold in (6.0, 0.0):
        llm, _ = load_llm(settings(folder("Llama"), 8, int8_threshold=threshold), CPU)
        assert {m.state.threshold for m in llm.modules() if isinstance(m, Linear8bitLt)} == {threshold}
        logits.append(llm(input_ids=ids).logits)
    assert torch.equal(*logits)
    with pytest.raises(UserError, match=r"model\.llm\.int8_threshold is -1; it can be 0"):
        LLMConfig(name="x", int8_threshold=-1)


@pytest.mark.parametrize("name", ["Llama", "Gemma3Text"])
def test_the_scale_of_token_embeddings_is_that_of_what_is_looked_up(folder, name):
    """Projected embeddings start at it; Gemma's table scales by √D what it looks up."""
    llm, _ = load_llm(settings(folder(name), 32), CPU)
    table = token_embedding(llm)
    looked_up = table(torch.arange(len(table.weight))).std().item()
    assert embedding_std(llm) == pytest.approx(looked_up, rel=1e-4)
