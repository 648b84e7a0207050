"""Mixed weights are the weighted sum of both: projectors, the updates of LoRAs, whole LLMs; what differs is refused."""

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import anymal.checkpoints.mix
import tiny_encoders
from anymal.adapters import REGISTRY
from anymal.checkpoints import checkpoint
from anymal.checkpoints.build import build
from anymal.checkpoints.mix import Mix, hollow_llm, mix_checkpoints, mix_llms
from anymal.errors import UserError
from conftest import make_llm
from small_runs import make_checkpoint, python

CPU = torch.device("cpu")
KINDS = ["image", "imu"]
BETAS = [0.0, 0.5, 0.75, 1.0]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    tiny_encoders.clip(folder / "image")
    tiny_encoders.imu(folder / "imu")
    return folder


@pytest.fixture(scope="module")
def pair(tiny_llm, encoders, tmp_path_factory) -> tuple[Path, Path]:
    """Two checkpoints whose LoRAs have ranks and scales of their own."""
    folder = tmp_path_factory.mktemp("pair")
    make_checkpoint(tiny_llm, encoders, folder / "a", 0)
    other = ["model.lora.rank=6", "model.lora.alpha=3"]
    return folder / "a", make_checkpoint(tiny_llm, encoders, folder / "b", 1, *other)


def updates(folder: Path) -> dict[str, torch.Tensor]:
    """ΔW of every layer, as PEFT gives it in the model that the checkpoint makes."""
    from peft.tuners.lora import LoraLayer

    llm = build(checkpoint.recipe(folder), CPU, REGISTRY, start=folder).model.llm
    return {n: m.get_delta_weight("default").detach() for n, m in llm.named_modules() if isinstance(m, LoraLayer)}


@pytest.mark.parametrize("beta", BETAS)
def test_checkpoints_are_mixed(pair, beta, tmp_path):
    out = tmp_path / "deep" / "mixed"
    mix_checkpoints(Mix(a=str(pair[0]), b=str(pair[1]), beta=beta, out=str(out)))
    a, b = (checkpoint.existing(place) for place in pair)
    assert checkpoint.existing(out) == out and not (out / "training").exists()
    assert [path.name for path in out.parent.iterdir()] == ["mixed"], "nothing temporary is left"
    for kind in KINDS:
        weights = [load_file(folder / "adapters" / kind / "model.safetensors") for folder in (a, b, out)]
        for name, tensor in weights[2].items():
            assert torch.equal(tensor, beta * weights[0][name] + (1 - beta) * weights[1][name])
            assert beta not in (0, 1) or torch.equal(tensor, weights[round(1 - beta)][name])
    recipe = checkpoint.recipe(out)
    assert (recipe.model.lora.rank, recipe.model.lora.alpha) == (10, 10)
    assert recipe.model.modalities == checkpoint.recipe(a).model.modalities
    first, second, mixed = (updates(folder) for folder in (a, b, out))
    assert len(mixed) == 14 and mixed.keys() == first.keys()
    for name, update in mixed.items():
        expected = beta * first[name] + (1 - beta) * second[name]
        assert (update - expected).abs().max() < 1e-6 * expected.abs().max()
    assert f"{beta:g} · a + {1 - beta:g} · b" in (out / "README.md").read_text()


def test_loras_that_scale_otherwise_are_mixed(pair, tiny_llm, encoders, tmp_path):
    b = make_checkpoint(tiny_llm, encoders, tmp_path / "b", 1, "model.lora.rslora=true", "model.lora.init=gaussian")
    mix_checkpoints(Mix(a=str(b), b=str(pair[0]), beta=0.25, out=str(tmp_path / "mixed")))
    assert not checkpoint.recipe(tmp_path / "mixed").model.lora.rslora
    first, second, mixed = (updates(checkpoint.existing(folder)) for folder in (b, pair[0], tmp_path / "mixed"))
    for name, update in mixed.items():
        expected = 0.25 * first[name] + 0.75 * second[name]
        assert (update - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize(("name", "value"), [("dora", "true"), ("modules_to_save", "[lm_head]")])
def test_loras_that_are_more_than_an_update_are_not_mixed(name, value, tiny_llm, encoders, tmp_path):
    a, b = (make_checkpoint(tiny_llm, encoders, tmp_path / n, 0, f"model.lora.{name}={value}") for n in "ab")
    with pytest.raises(UserError, match=rf"were trained with model\.lora\.{name}: .* cannot be mixed"):
        mix_checkpoints(Mix(a=str(a), b=str(b), out=str(tmp_path / "out")))


def test_checkpoints_without_lora_are_mixed(tiny_llm, encoders, tmp_path):
    made = [
        make_checkpoint(tiny_llm, encoders, tmp_path / name, seed, "train=[projectors]", kinds=["imu"])
        for seed, name in enumerate("ab")
    ]
    said = python("launch/mix.py", f"a={tmp_path / 'a'}", f"b={made[1]}", f"out={tmp_path / 'out'}").stdout
    assert said.startswith(f"{tmp_path / 'out'}: 0.5 · ") and not (tmp_path / "out" / "lora").exists()
    build(checkpoint.recipe(tmp_path / "out"), CPU, REGISTRY, start=checkpoint.existing(tmp_path / "out"))
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_what_is_the_same_in_both_stays_the_same_to_the_bit():
    weight = torch.randn(1000)
    assert torch.equal(anymal.checkpoints.mix.mixed(weight, weight.clone(), 0.3, "x"), weight)
    assert not torch.equal(0.3 * weight + 0.7 * weight, weight)


def test_trained_networks_are_mixed_too(tiny_llm, encoders, tmp_path):
    trained = ["train=[projectors,llm,encoders.image]"]
    for seed, name in enumerate("ab"):
        make_checkpoint(tiny_llm, encoders, tmp_path / name, seed, *trained)
    mix_checkpoints(Mix(a=str(tmp_path / "a"), b=str(tmp_path / "b"), beta=0.25, out=str(tmp_path / "out")))
    a, b = (checkpoint.existing(tmp_path / name) for name in "ab")
    for place in ("llm", "encoders/image"):
        first, second, out = (tensors(folder / place) for folder in (a, b, tmp_path / "out"))
        assert out and any(not torch.equal(first[name], second[name]) for name in out)
        for name, tensor in out.items():
            torch.testing.assert_close(tensor, 0.25 * first[name] + 0.75 * second[name])
    built = build(checkpoint.recipe(tmp_path / "out"), CPU, REGISTRY, start=tmp_path / "out")
    mixed = {name.removeprefix("vision_model."): w for name, w in tensors(tmp_path / "out/encoders/image").items()}
    assert all(torch.equal(w, mixed[name]) for name, w in built.model.encoders["image"].network.named_parameters())
    shutil.rmtree(b / "encoders")
    (b / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"trained networks"):
        mix_checkpoints(Mix(a=str(a), b=str(b), beta=0.25, out=str(tmp_path / "none")))


def test_nothing_of_the_llm_is_loaded_for_a_lora(tiny_llm):
    llm = hollow_llm(str(tiny_llm))
    assert all(weight.untyped_storage().nbytes() == 4 for weight in llm.parameters())
    assert sum(weight.numel() for weight in llm.parameters()) > 50_000


@pytest.mark.parametrize(
    ("overrides", "kinds", "message"),
    [
        (
            ["model.modalities.imu.projector.kind=linear"],
            KINDS,
            r"adapters/imu: projector is .* in a and .* cannot be mixed",
        ),
        (["model.modalities.imu.projector.tokens=5"], KINDS, "adapters/imu: projector is .*'tokens': 4.*'tokens': 5"),
        (["model.modalities.imu.encoder={other}"], KINDS, "adapters/imu: encoder is .*imu' in a and .*other' in b"),
        (["model.llm.name={llm}"], KINDS, "adapters/image: llm is .* in a and .*another' in b"),
        (["train=[projectors]"], KINDS, "LoRA is True in a and False in b"),
        (["model.lora.targets=[q_proj]"], KINDS, r"lora: target_modules is .* in a and \['q_proj'\] in b"),
        ([], ["imu"], r"modalities is \['image', 'imu'\] in a and \['imu'\] in b"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(pair, overrides, kinds, message, tiny_llm, encoders, tmp_path):
    if "{other}" in "".join(overrides):
        tiny_encoders.imu(tmp_path / "other")
    if "{llm}" in "".join(overrides):
        make_llm(tmp_path / "another")
    overrides = [text.format(other=tmp_path / "other", llm=tmp_path / "another") for text in overrides]
    b = make_checkpoint(tiny_llm, encoders, tmp_path / "b", 1, *overrides, kinds=kinds)
    with pytest.raises(UserError, match=message):
        mix_checkpoints(Mix(a=str(pair[0]), b=str(b), out=str(tmp_path / "out")))
    assert not list(tmp_path.glob("*out*")), "nothing is left"


def test_a_projector_of_another_shape_is_refused(pair, tmp_path):
    shutil.copytree(checkpoint.existing(pair[1]), tmp_path / "b")
    path = tmp_path / "b" / "adapters" / "imu" / "model.safetensors"
    weights = load_file(path)
    name = next(iter(sorted(weights)))
    save_file(weights | {name: weights[name][:-1].clone()}, path)
    (tmp_path / "b" / "manifest.json").unlink()
    with pytest.raises(UserError, match=rf"adapters/imu: {name} is \[.*\] in a and \[.*\] in b"):
        mix_checkpoints(Mix(a=str(pair[0]), b=str(tmp_path / "b"), out=str(tmp_path / "out")))


# ------------------------------------------------------------------------------------------------- two whole LLMs


@pytest.fixture(scope="module")
def llms(tmp_path_factory) -> dict[str, Path]:
    """a in several files, b in one; c is larger."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("llms")
    made = {name: make_llm(folder / name, seed=seed) for seed, name in enumerate("ab")}
    whole = AutoModelForCausalLM.from_pretrained(made["a"])
    (made["a"] / "model.safetensors").unlink()
    whole.save_pretrained(made["a"], max_shard_size="100KB")
    (made["a"] / "code.py").write_text("raise SystemExit")
    (made["a"] / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (made["b"] / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return made | {"c": make_llm(folder / "c", layers=3)}


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(torch.arange(24)[None]).logits


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_whole_llms_are_mixed(llms, beta, order, tmp_path):
    a, b = (llms[name] for name in order)
    out = tmp_path / "mixed"
    mix_llms(Mix(a=str(a), b=str(b), beta=beta, out=str(out)))
    first, second, mixed = tensors(a), tensors(b), tensors(out)
    assert mixed.keys() == first.keys()
    for name, tensor in mixed.items():
        assert torch.equal(tensor, beta * first[name] + (1 - beta) * second[name])
    if beta in (0, 1):
        assert torch.equal(logits(out), logits(a if beta else b))
    else:
        assert min((logits(out) - logits(parent)).abs().max() for parent in (a, b)) > 1e-3
    kept = {path.name: path.stat().st_size for path in a.iterdir() if path.name not in ("code.py", "README.md")}
    assert {p.name: p.stat().st_size for p in out.iterdir() if p.name != "README.md"} == kept, "the files of a, no code"
    assert (out / "README.md").read_text().startswith("---\nlicense: apache-2.0\n---\n")


def test_half_precision_is_mixed_in_float32(tmp_path):
    from transformers import AutoModelForCausalLM

    for seed, name in enumerate("ab"):
        made = AutoModelForCausalLM.from_pretrained(make_llm(tmp_path / name, seed=seed))
        made.to(torch.bfloat16).save_pretrained(tmp_path / name)
    mix_llms(Mix(a=str(tmp_path / "a"), b=str(tmp_path / "b"), beta=0.3, out=str(tmp_path / "out")))
    first, second, mixed = (tensors(tmp_path / name) for name in ("a", "b", "out"))
    for name, tensor in mixed.items():
        exact = 0.3 * first[name].double() + 0.7 * second[name].double()
        assert tensor.dtype == torch.bfloat16
        assert (tensor.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_one_tensor_of_each_is_in_memory_at_a_time(llms, tmp_path, monkeypatch):
    alive, most = set(), []

    class Watched:
        """safe_open, counting the tensors that it gave out and that are still there."""

        def __init__(self, path, framework):
            self.file = real(path, framework)

        def __enter__(self):
            self.opened = self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def keys(self):
            return self.opened.keys()

        def get_tensor(self, name):
            tensor = self.opened.get_tensor(name)
            alive.add(id(tensor))
            weakref.finalize(tensor, alive.discard, id(tensor))
            most.append(len(alive))
            return tensor

    real = anymal.checkpoints.mix.safe_open
    monkeypatch.setattr(anymal.checkpoints.mix, "safe_open", Watched)
    mix_llms(Mix(a=str(llms["a"]), b=str(llms["b"]), out=str(tmp_path / "out")))
    assert len(most) == 2 * len(tensors(llms["a"])) and max(most) == 2


def test_llms_that_do_not_fit_are_refused(llms, tmp_path):
    def refused(match: str, b: Path, a: Path = llms["a"]) -> None:
        with pytest.raises(UserError, match=match):
            mix_llms(Mix(a=str(a), b=str(b), out=str(tmp_path / "out")))
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".tmp*"))

    refused(r"config.json: num_hidden_layers is 2 in a and 3 in b", llms["c"])
    other = Path(shutil.copytree(llms["b"], tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for changed, match in [
        ({k: v for k, v in weights.items() if k != name}, f"tensors: {name} is 'there' in a and None in b"),
        (
            weights | {name: weights[name][:-1].clone()},
            rf"{name} is \[128, 64\] of torch.float32 in a, and \[127, 64\]",
        ),
        (weights | {name: weights[name].half()}, rf"{name} is .* torch.float32 in a, and .* of torch.float16 in b"),
    ]:
        save_file(changed, other / "model.safetensors", {"format": "pt"})
        refused(match, other)
    (other / "model.safetensors").write_bytes(b"nothing")
    refused("model.safetensors is damaged", other)
    (other / "model.safetensors").unlink()
    refused("other lacks model.safetensors", other)
    quantised = Path(shutil.copytree(llms["b"], tmp_path / "quantised"))
    config = json.loads((quantised / "config.json").read_text()) | {"quantization_config": {}}
    (quantised / "config.json").write_text(json.dumps(config))
    refused("is quantised", quantised, quantised)


# --------------------------------------------------------------------------------------------------- command line


def test_help_lists_the_settings():
    said = python("launch/mix.py", "--help").stdout
    assert all(f"  {name}  (" in said for name in ("a", "b", "beta", "out"))


def test_mistakes_are_one_line(llms, pair, tmp_path):
    def said(*arguments: str) -> str:
        done = python("launch/mix.py", *arguments, f"out={tmp_path / 'out'}", check=False)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        return done.stderr

    assert "is an LLM (it has a config.json) and" in said(f"a={llms['a']}", f"b={pair[0]}")
    assert "holds no checkpoint" in said(f"a={tmp_path}", f"b={pair[0]}")
    with pytest.raises(UserError, match=r"beta is 1\.5"):
        Mix(a="a", b="b", beta=1.5, out="c")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out is there already"):
        mix_llms(Mix(a=str(llms["a"]), b=str(llms["b"]), out=str(tmp_path / "out")))
