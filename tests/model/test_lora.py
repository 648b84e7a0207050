"""LoRA's family: what is trained is what is saved and loaded, the base stays, what does not go together is refused."""

from pathlib import Path

import pytest
import torch

from anymal.adapters import REGISTRY
from anymal.checkpoints import checkpoint
from anymal.checkpoints.build import build
from anymal.checkpoints.state import TrainingState
from anymal.config.schema import Config, LLMConfig, LoraConfig
from anymal.config.settings import load
from anymal.data.packing import pack
from anymal.errors import UserError
from anymal.estimation.fake_step import FakeStep, Workload
from anymal.model.flops import llm_flops
from anymal.model.llm import add_lora, base_model, load_llm, load_lora, set_frozen_mode, token_embedding
from anymal.model.multimodal import AnyMAL
from anymal.model.trainable import select_trainable, trainable
from small_runs import go_back, losses, make_encoders, pretrain_here, settings, write_pairs
from toys import medium, sample, text, toy_adapters, toy_model

CPU = torch.device("cpu")
SAMPLES = [
    sample(medium("eye", 1), text("what is this?"), answer="a dog", key="a"),
    sample(text("hear "), medium("ear", 5), text(" and see "), medium("eye", 2), answer="a red apple", key="b"),
]
COPIES = ["model.lora.modules_to_save=[embed_tokens,lm_head]"]
KINDS = {
    "rslora": (8, ["model.lora.rslora=true", "model.lora.init=gaussian"]),
    "dora": (4, ["model.lora.dora=true", "model.lora.exclude=[q_proj,k_proj]"]),
    "dora-16": (16, ["model.lora.dora=true", "model.lora.modules_to_save=[norm]"]),
    "loftq": (4, ["model.lora.init=loftq", "model.lora.dora=true"]),
    "copies-4": (4, COPIES),
    "copies-16": (16, COPIES),
}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> Path:
    return make_encoders(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    return write_pairs(tmp_path_factory.mktemp("pairs"), ["image"], shards=1)


def stated(llm: Path, encoders: Path, run: Path, shards: str, kind: str, *more: str) -> list[str]:
    """A small run of stage 2 with a LoRA of this kind."""
    bits, lora = KINDS[kind]
    given = {"model__llm__bits": bits, "model__lora__rank": 4, "train": "[projectors,lora]", "optim__steps": 2}
    return [*settings(llm, encoders, run, shards, ["image"], run__save_every=1, **given), *lora, *more]


def toy(llm: Path, bits: int = 32, checkpointing: str = "none", **lora) -> AnyMAL:
    """A toy model with a LoRA that is to be trained, all its parameters random."""
    loaded, _ = load_llm(LLMConfig(name=str(llm), bits=bits, checkpointing=checkpointing), CPU)
    torch.manual_seed(0)
    model = AnyMAL(add_lora(loaded, LoraConfig(rank=4, **lora)), toy_adapters(64, eye=3, ear=2))
    select_trainable(model, ["lora"])
    shuffle(model)
    return model


@torch.no_grad()
def shuffle(model: AnyMAL) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in trainable(model).values():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def logits(llm: torch.nn.Module) -> torch.Tensor:
    set_frozen_mode(llm, recompute=False)
    return llm(input_ids=torch.arange(40)[None]).logits.float()


# ------------------------------------------------------------------------------------------- trained, saved, loaded


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_answers_as_what_was_saved(kind, tiny_llm, encoders, shards, tmp_path):
    config = load(Config, None, stated(tiny_llm, encoders, tmp_path / "run", shards, kind))
    built = build(config, CPU, REGISTRY, train=config.train)
    plain = load_llm(config.model.llm, CPU)[0].state_dict()
    select_trainable(built.model, ["lora"])
    assert {parameter.dtype for parameter in trainable(built.model).values()} == {torch.float32}
    shuffle(built.model)
    parameters = dict(built.model.named_parameters())
    learnt = {n: p for n, p in parameters.items() if p.requires_grad or n.startswith("projectors.")}
    folder = checkpoint.save(built, learnt, {}, TrainingState(step=1), config)
    again = build(checkpoint.recipe(folder), CPU, REGISTRY, start=folder)
    assert torch.equal(logits(again.model.llm), logits(built.model.llm))
    assert not torch.equal(logits(again.model.llm), logits(load_llm(config.model.llm, CPU)[0]))
    select_trainable(again.model, ["lora"])
    assert trainable(again.model).keys() == trainable(built.model).keys()
    for name, weight in base_model(built.model.llm).state_dict().items():
        name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        assert name not in plain or torch.equal(weight, plain[name]), "the base stays as it is"


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("dora", ["model.lora.dropout=0.3", "model.llm.checkpointing=full"]),
        ("loftq", ["engine.zero=2", "optim.gradient_accumulation=2"]),
        ("copies-16", ["engine.zero=3", "optim.groups.lora.lr=1e-3"]),
    ],
)
def test_a_run_goes_on_to_the_bit_and_chat_answers(
    kind, more, tiny_llm, encoders, shards, tmp_path, run_command, capsys
):
    run = tmp_path / "run"
    given = stated(tiny_llm, encoders, run, shards, kind, *more)
    pretrain_here(None, *given)
    whole, last = losses(run), run / "checkpoints" / "step-00000002"
    files = ["lora/adapter_model.safetensors", "training/optimizer.safetensors"]
    before = [(last / name).read_bytes() for name in files]
    assert (run / "checkpoints/step-00000001" / files[0]).read_bytes() != before[0], "it learns"
    last.rename(run / "whole")
    go_back(run, 1)
    pretrain_here(None, *given)
    assert losses(run) == whole and [(last / name).read_bytes() for name in files] == before
    capsys.readouterr()
    assert run_command("chat", f"checkpoint={run}", "max_new_tokens=2", "hello") == 0
    assert capsys.readouterr().out


def test_a_lora_of_another_kind_is_refused(tiny_llm, tmp_path):
    toy(tiny_llm, dora=True, modules_to_save=["norm"]).llm.save_pretrained(tmp_path)

    def refused(message: str, **lora) -> None:
        with pytest.raises(UserError, match=message):
            load_lora(load_llm(LLMConfig(name=str(tiny_llm), bits=32), CPU)[0], tmp_path, LoraConfig(rank=4, **lora))

    refused(r"trained with model\.lora\.dora=true, the recipe says false")
    refused(r"model\.lora\.rslora=false, the recipe says true", rslora=True, dora=True, modules_to_save=["norm"])
    refused(r"model\.lora\.modules_to_save=\[\"norm\"\], the recipe says \[\]", dora=True)


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.lora.init=pissa"], r"init=pissa: it changes the LLM's own weights, which a checkpoint does not hold"),
        (["model.lora.init=pissa_niter_4"], r"init=pissa_niter_4: it changes the LLM's own weights"),
        (["model.lora.init=olora"], r"init=olora: it changes .*; set it to default, gaussian or loftq"),
        (["model.lora.init=eva"], r"init=eva: it is computed from the LLM's activations"),
        (["model.lora.init=loftk"], r"init is 'loftk'; it can be default, gaussian or loftq"),
        (["model.lora.dora=true", "engine.zero=3"], r"model\.lora\.dora does not go with engine\.zero=3: .*set engine"),
        (["model.lora.dora=true", "model.llm.bits=8"], r"model\.lora\.dora does not go with model\.llm\.bits=8: "),
    ],
)
def test_what_does_not_go_together_is_refused_at_once(overrides, said):
    with pytest.raises(UserError, match=said):
        load(Config, None, ["model.llm.name=x", *overrides])


@pytest.mark.parametrize(
    ("bits", "lora", "said"),
    [
        (4, {"modules_to_save": ["q_proj"]}, r"lists q_proj, whose weights model\.llm\.bits quantises"),
        (8, {"modules_to_save": ["mlp"]}, r"lists mlp, whose weights model\.llm\.bits quantises"),
        (16, {"modules_to_save": ["lm_haed"]}, r"the LLM has no 'lm_haed'; did you mean lm_head\?"),
        (16, {"init": "loftq"}, r"model\.lora\.init=loftq makes up for what model\.llm\.bits=4 takes"),
    ],
)
def test_what_does_not_go_with_the_llm_is_refused_by_name(bits, lora, said, tiny_llm):
    with pytest.raises(UserError, match=said):
        toy(tiny_llm, bits, **lora)


def test_loftq_says_where_it_looked_for_the_whole_weights(tiny_llm, tmp_path):
    llm, _ = load_llm(LLMConfig(name=str(tiny_llm), bits=4), CPU)
    llm.name_or_path = llm.config._name_or_path = str(tmp_path)
    with pytest.raises(UserError, match=rf"whole weights of {tmp_path}, and finds no model\.layers\.0\..*=default"):
        add_lora(llm, LoraConfig(rank=4, init="loftq"))


# ------------------------------------------------------------------------------------------------------- arithmetic


def test_rslora_scales_by_the_root_of_the_rank(tiny_llm):
    layers = [module for module in toy(tiny_llm, rslora=True, alpha=6).llm.modules() if hasattr(module, "lora_dropout")]
    assert layers and all(layer.scaling["default"] == 3 for layer in layers)


@pytest.mark.parametrize("dora", [False, True])
def test_loftq_begins_nearer_to_the_whole_llm_than_its_four_bits_alone(dora, tiny_llm):
    whole = logits(load_llm(LLMConfig(name=str(tiny_llm), bits=32), CPU)[0])

    def error(**lora) -> float:
        llm, _ = load_llm(LLMConfig(name=str(tiny_llm), bits=4), CPU)
        return (logits(add_lora(llm, LoraConfig(dora=dora, **lora))) - whole).norm().item()

    assert error(rank=4) > error(rank=16, init="loftq", alpha=1) > 10 * error(rank=62, init="loftq") > 0


@pytest.mark.parametrize(("bits", "dora"), [(4, True), (32, True), (16, False)])
def test_checkpointing_changes_no_gradient(bits, dora, tiny_llm):
    _, prompt = toy_model(tiny_llm, eye=3, ear=2)
    batch = pack([prompt.sample(sample) for sample in SAMPLES])
    gradients = []
    for mode in ("none", "selective", "full"):
        model = toy(tiny_llm, bits, mode, dora=dora, modules_to_save=["embed_tokens", "norm"])
        model(batch, model.encode(batch.media))[0].backward()
        assert all(parameter.grad is not None for parameter in trainable(model).values())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in trainable(model).values()]))
    assert gradients[0].norm() > 0 and all(torch.equal(gradients[0], other) for other in gradients[1:])


@pytest.mark.parametrize("lora", [{"dora": True}, {"modules_to_save": ["embed_tokens", "lm_head"]}])
def test_packed_samples_have_the_losses_that_they_have_alone(lora, tiny_llm):
    _, prompt = toy_model(tiny_llm, eye=3, ear=2)
    model = toy(tiny_llm, **lora)
    batches = [pack([prompt.sample(sample) for sample in some]) for some in (SAMPLES, *([one] for one in SAMPLES))]
    together, *alone = (model(batch, model.encode(batch.media))[0].item() for batch in batches)
    assert together == pytest.approx(sum(alone), rel=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_is_on_in_training_alone(dora, tiny_llm):
    model, ids = toy(tiny_llm, dora=dora, dropout=0.5), torch.arange(20)[None]
    for mode in (True, False):
        model.train(mode)
        one, other = (model.llm(input_ids=ids).logits for _ in range(2))
        assert torch.equal(one, other) != mode


def test_copies_learn_and_all_around_them_stays_as_beside_any_lora(tiny_llm):
    model = toy(tiny_llm, modules_to_save=["embed_tokens", "lm_head"])
    assert {name.split(".")[-4] for name in trainable(model) if "modules_to_save" in name} == {
        "embed_tokens",
        "lm_head",
    }
    assert not any(layer.training for layer in base_model(model.llm).modules() if type(layer).__name__ == "LlamaMLP")
    assert token_embedding(model.llm).weight.requires_grad
    flops, plain = llm_flops(model.llm), llm_flops(toy(tiny_llm).llm)
    assert (flops.body, flops.lora, flops.head) == (plain.body, plain.lora, plain.head)
    assert (flops.learns, flops.per_weight, flops.per_head_weight) == (False, 4, 6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gpu", [False, True])
def test_the_estimate_counts_them(kind, gpu, tiny_llm, encoders, shards, tmp_path):
    config = load(Config, None, stated(tiny_llm, encoders, tmp_path, shards, kind))
    step = FakeStep(config, REGISTRY, gpu=gpu)
    built = build(config, CPU, REGISTRY, train=config.train)
    select_trainable(built.model, config.train)
    resident = step.resident_memory()
    assert resident.trained == sum(parameter.numel() for parameter in trainable(built.model).values())
    assert resident.lora == sum(p.numel() for n, p in trainable(built.model).items() if n.startswith("llm."))
    assert all(peak.total() > 0 for peak in step.peaks(Workload(tokens=20, answers=5), 2).values())
