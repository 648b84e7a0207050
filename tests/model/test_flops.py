"""FLOPs counted from shapes, against torch's own counter on the real thing; what a run says about its throughput."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import stand_ins
import tiny_encoders
import tiny_llms
from anymal.adapters import REGISTRY
from anymal.checkpoints.build import load_encoder
from anymal.config.schema import LLMConfig, LoraConfig, ModalityConfig, ProjectorConfig
from anymal.data.packing import pack
from anymal.model.flops import StepFlops, forward_flops, llm_flops
from anymal.model.llm import add_lora, load_llm
from anymal.sample import IGNORED, Tokens
from anymal.training.meter import Meter
from conftest import make_llm
from toys import toy_model

CPU = torch.device("cpu")


def _llm(folder, bits=32, **more):
    return load_llm(LLMConfig(name=str(folder), bits=bits, attention="eager", **more), CPU)[0]


def _counted(llm, tokens: int, answers: int) -> int:
    """FLOPs of one sample's forward and backward pass, as torch counts them (attention in full, no causal half)."""
    row = torch.randn(1, tokens, llm.config.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        llm(inputs_embeds=row, logits_to_keep=torch.arange(answers), use_cache=False).logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(("checkpointing", "tokens", "answers"), [("none", 40, 7), ("full", 40, 7), ("none", 9, 9)])
def test_the_llms_flops_are_those_that_torch_counts(tiny_llm, checkpointing, tokens, answers):
    llm = _llm(tiny_llm, checkpointing=checkpointing)
    flops = llm_flops(llm, checkpointing)
    whole = 2 * tokens**2  # torch counts the pairs that the causal mask hides, too
    ours = flops.model_flops(tokens, answers, whole) + flops.recomputed_flops(tokens, whole)
    norms = sum(p.numel() for name, p in llm.model.named_parameters() if "norm" in name)
    ours -= norms * tokens * (6 if checkpointing == "full" else 4)  # no matrix products, yet parameters
    if checkpointing == "full":  # recomputing a layer stops before its last product, whose output nothing needs
        ours -= 2 * tokens * sum(p.numel() for name, p in llm.named_parameters() if "down_proj" in name)
    assert ours == _counted(llm, tokens, answers)


@pytest.mark.parametrize("name", ["Qwen3Moe", "Mixtral"])
def test_of_a_mixtures_experts_those_count_that_a_token_is_sent_to(name, tiny_llm, tmp_path):
    llm = _llm(tiny_llms.save(name, tmp_path / name, tiny_llm))
    llm.set_experts_implementation("eager")  # torch does not count grouped products
    experts = sum(p.numel() for path, p in llm.named_parameters() if ".experts." in path)
    whole = 2 * 24**2
    norms = sum(p.numel() for path, p in llm.model.named_parameters() if "norm" in path)
    ours = llm_flops(llm).model_flops(24, 5, whole) - 4 * 24 * norms
    assert ours == pytest.approx(_counted(llm, 24, 5), rel=0.02) and experts > 0.3 * llm_flops(llm).body


def test_lora_takes_six_flops_a_parameter_and_token(tiny_llm):
    wrapped = add_lora(_llm(tiny_llm), LoraConfig(rank=4))
    lora = sum(p.numel() for name, p in wrapped.named_parameters() if "lora_" in name)
    assert llm_flops(wrapped).lora == lora > 0
    more = _counted(wrapped, 16, 3) - _counted(_llm(tiny_llm), 16, 3)
    assert more == 6 * 16 * lora


@pytest.mark.parametrize("bits", [4, 8])
def test_parameters_are_counted_alike_at_any_precision(tmp_path, bits):
    folder = make_llm(tmp_path / "llm", width=128)
    assert llm_flops(_llm(folder, bits)) == llm_flops(_llm(folder))


def _tokens(key: str, length: int, answers: int, runs: list, media: list) -> Tokens:
    labels = [IGNORED] * (length - answers) + [5] * answers
    return Tokens(key=key, ids=[5] * length, labels=labels, runs=runs, media=media)


def test_a_batch_takes_what_its_samples_and_media_do(tiny_llm):
    model, _ = toy_model(tiny_llm, smell=3)
    step_flops = StepFlops(model, llm_flops(model.llm))
    batch = pack([_tokens("a", 20, 4, [("smell", 2, 3)], [torch.ones(1)]), _tokens("b", 30, 5, [], [])])
    step_flops.encoder["smell"], step_flops.projector["smell"] = 1000, 300
    needed, recomputed = step_flops.count(batch)
    assert needed == step_flops.llm.model_flops(50, 9, 20**2 + 30**2) + 1300
    assert recomputed == 0


def test_an_encoder_is_counted_on_shapes(tmp_path):
    from anymal.adapters.image.modality import ImageOptions, load_image_encoder
    from toys import build_projector

    encoder = load_image_encoder(tiny_encoders.clip(tmp_path), ImageOptions())
    picture = torch.randn(1, 3, tiny_encoders.SIZE, tiny_encoders.SIZE)
    # torch does not count its fused attention on CPUs
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        encoder(picture)
    assert forward_flops(encoder, picture.shape) == counter.get_total_flops() > 0
    projector = build_projector(
        ProjectorConfig(kind="resampler", tokens=4, heads=2), [(encoder.tokens, encoder.width)], 64
    )
    features = torch.randn(1, encoder.tokens, encoder.width)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        projector(features).sum().backward()
    # Latents and features need no gradient of their own in the first layers, hence a little less than three passes.
    assert 2.5 < counter.get_total_flops() / forward_flops(projector, features.shape) <= 3


def test_pix2struct_is_counted_though_it_looks_into_a_mask(tmp_path):
    folder = stand_ins.make("google/pix2struct-large", tmp_path / "pix2struct", narrow=True)
    tree = {"channels": [{"name": folder, "size": 720}], "grid": 32}
    encoder = load_encoder(REGISTRY, "image", ModalityConfig(encoder=tree))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        encoder(torch.zeros(1, *encoder.shape, dtype=torch.uint8))
    assert forward_flops(encoder, (1, *encoder.shape), torch.uint8) == counter.get_total_flops() > 0


def test_the_meter_reports_flops_per_second_and_utilisation(tiny_llm):
    model, _ = toy_model(tiny_llm)
    batch = pack([_tokens("a", 20, 4, [], [])])
    step_flops = StepFlops(model, llm_flops(model.llm))
    meter = Meter(step_flops, peak_tflops=0.5)
    for _ in range(2):
        meter.add(batch, torch.tensor([[8.0, 4.0]]), padding=5)
        figures = meter.figures()
        assert figures["utilisation"] == pytest.approx(figures["tflops"] / 0.5)
        assert figures["tflops"] / figures["tokens_per_s"] == pytest.approx(step_flops.count(batch)[0] / 20 / 1e12)
    whole = meter.summary()
    assert (whole["tokens"], whole["answers"], whole["padding_share"]) == (40, 8, 0.25)
    assert whole["model_tflop"] == pytest.approx(2 * step_flops.count(batch)[0] / 1e12)
    assert json.dumps(whole)
    assert "tflops" not in Meter().figures()
