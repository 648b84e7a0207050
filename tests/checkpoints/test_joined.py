"""Modalities that were trained apart start one stage together; what does not fit together is refused."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from anymal.adapters import REGISTRY
from anymal.checkpoints import checkpoint
from anymal.checkpoints.build import build
from anymal.checkpoints.joined import find_start
from anymal.config.schema import Config
from anymal.config.settings import load
from anymal.config.stages import Recipe, config_of, load_stages
from anymal.errors import UserError
from anymal.training.run import run_stages
from conftest import make_llm
from small_runs import make_checkpoint, make_encoders, pretrain_here, settings, write_pairs

CPU = torch.device("cpu")
KINDS = ["image", "imu"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> Path:
    return make_encoders(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    return write_pairs(tmp_path_factory.mktemp("pairs"), KINDS)


@pytest.fixture(scope="module")
def apart(tiny_llm, encoders, shards, tmp_path_factory) -> dict[str, Path]:
    """A real run of stage 1 for each modality."""
    folder = tmp_path_factory.mktemp("apart")
    for kind in KINDS:
        alone = write_pairs(folder / f"{kind}-pairs", [kind], shards=1)
        pretrain_here(None, *settings(tiny_llm, encoders, folder / kind, alone, [kind], optim__steps=2))
    return {kind: folder / kind for kind in KINDS}


def joined(llm: Path, encoders: Path, run: Path, places: object, shards: str = "x", **more) -> Config:
    """A second stage that starts from `places`."""
    return load(Config, None, settings(llm, encoders, run, shards, KINDS, model__checkpoint=_yaml(places), **more))


def _yaml(places: object) -> str:
    return str(places).replace("PosixPath", "").replace("(", "").replace(")", "").replace("'", "")


def projectors(place: Path) -> dict[str, dict[str, torch.Tensor]]:
    folder = checkpoint.existing(place) / "adapters"
    return {path.name: load_file(path / "model.safetensors") for path in folder.iterdir()}


def test_runs_of_stage_1_are_joined_in_one_stage_2(tiny_llm, encoders, shards, apart, tmp_path, capsys):
    expected = {kind: projectors(run)[kind] for kind, run in apart.items()}
    for places in (apart, list(apart.values())):
        config = joined(tiny_llm, encoders, tmp_path / "run", places)
        model = build(config, CPU, REGISTRY, start=find_start(config.model), partly=True).model
        for kind in KINDS:
            held = model.projectors[kind].state_dict()
            assert held.keys() == expected[kind].keys()
            assert all(torch.equal(held[name], weight) for name, weight in expected[kind].items())
    given = {"train": "[projectors,lora]", "optim__lr": 0, "optim__steps": 1}
    config = joined(tiny_llm, encoders, tmp_path / "run", apart, shards, **given)
    assert run_stages([config], REGISTRY) == 0
    after = projectors(tmp_path / "run")
    assert all(torch.equal(after[kind][name], w) for kind in KINDS for name, w in expected[kind].items())
    a, b = (checkpoint.existing(run) for run in apart.values())
    assert f"starting from {a} and {b}, projectors: image, imu" in capsys.readouterr().out
    assert load(Config, tmp_path / "run" / "recipe.yaml").model.checkpoint == {k: str(p) for k, p in apart.items()}
    build(
        checkpoint.recipe(checkpoint.existing(tmp_path / "run")),
        CPU,
        REGISTRY,
        start=checkpoint.existing(tmp_path / "run"),
    )


def test_a_modality_may_start_fresh(tiny_llm, encoders, apart, tmp_path):
    config = joined(tiny_llm, encoders, tmp_path / "run", f"{{image: {apart['image']}, imu: null}}")
    assert list(find_start(config.model).modalities) == ["image"]
    build(config, CPU, REGISTRY, start=find_start(config.model), partly=True)


def test_which_modality_is_whose_must_be_said(tiny_llm, encoders, apart, tmp_path):
    both = make_checkpoint(tiny_llm, encoders, tmp_path / "both", 1, "train=[projectors]")
    config = joined(tiny_llm, encoders, tmp_path / "run", [apart["image"], both])
    said = (
        r"image and .*both.* have a projector for image; say by modality which is meant: model\.checkpoint='\{image: "
    )
    with pytest.raises(UserError, match=said.replace("image and", "image/checkpoints/.* and")):
        find_start(config.model)
    config = joined(tiny_llm, encoders, tmp_path / "run", {"image": apart["image"], "imu": both})
    assert find_start(config.model).modalities == {"image": checkpoint.existing(apart["image"]), "imu": both}
    with pytest.raises(UserError, match=r"model\.checkpoint\.imu: .* has no projector for it, but for image"):
        find_start(joined(tiny_llm, encoders, tmp_path / "run", dict.fromkeys(KINDS, apart["image"])).model)
    of_imu = settings(tiny_llm, encoders, tmp_path / "run", "x", ["imu"], model__checkpoint=f"[{apart['image']}]")
    with pytest.raises(UserError, match=r"image/.* has projectors for image and the recipe for imu: take it out"):
        find_start(load(Config, None, of_imu).model)
    with pytest.raises(UserError, match=r"nowhere holds no checkpoint"):
        find_start(joined(tiny_llm, encoders, tmp_path / "run", {"image": "nowhere"}).model)


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ("{imgae: runs/a}", r"model\.checkpoint: the model has no modality 'imgae'; did you mean image\?"),
        ("[runs/a,3]", r"model\.checkpoint is \['runs/a', 3\]; it can be a folder, a list"),
        ("{image: [runs/a]}", r"model\.checkpoint is .*; it can be a folder, a list"),
    ],
)
def test_other_values_are_refused(tiny_llm, encoders, tmp_path, places, said):
    with pytest.raises(UserError, match=said):
        joined(tiny_llm, encoders, tmp_path / "run", places)


def test_only_the_same_llm_is_joined(tiny_llm, encoders, tmp_path):
    """The same by its weights: it may lie elsewhere by now."""
    only = {"kinds": ["image"]}
    a = make_checkpoint(tiny_llm, encoders, tmp_path / "a", 0, "train=[projectors]", **only)
    moved = shutil.copytree(tiny_llm, tmp_path / "moved")
    b = make_checkpoint(moved, encoders, tmp_path / "b", 1, "train=[projectors]", kinds=["imu"])
    other = make_llm(tmp_path / "other", seed=1)
    c = make_checkpoint(other, encoders, tmp_path / "c", 1, "train=[projectors]", kinds=["imu"])

    config = joined(tiny_llm, encoders, tmp_path / "run", {"image": a, "imu": b})
    build(config, CPU, REGISTRY, start=find_start(config.model))
    said = rf"{a} was trained with {tiny_llm}, {c} with {other}; .* cannot be joined \(anymal mix"
    with pytest.raises(UserError, match=said):
        find_start(joined(tiny_llm, encoders, tmp_path / "run", {"image": a, "imu": c}).model)
    config = joined(other, encoders, tmp_path / "run", {"image": a, "imu": b})
    said = r"a/.*/adapters/image: this projector was trained on an LLM with other weights than model\.llm\.name has now"
    with pytest.raises(UserError, match=said):
        build(config, CPU, REGISTRY, start=find_start(config.model))


def test_two_loras_or_trained_llms_are_not_joined(tiny_llm, encoders, tmp_path):
    made = {}
    for kind in KINDS:
        for what in ("lora", "llm"):
            given = (tiny_llm, encoders, tmp_path / f"{what}-{kind}", 0, f"train=[projectors,{what}]")
            made[what, kind] = make_checkpoint(*given, kinds=[kind])

    def start(**places: Path):
        return find_start(joined(tiny_llm, encoders, tmp_path / "run", places).model)

    with pytest.raises(UserError, match=r"hold a LoRA each; an LLM takes but one \(anymal mix"):
        start(image=made["lora", "image"], imu=made["lora", "imu"])
    for one in ("llm", "lora"):
        with pytest.raises(UserError, match=r"with the LLM in .*cannot be joined \(anymal mix"):
            start(image=made[one, "image"], imu=made["llm", "imu"])
    plain = make_checkpoint(tiny_llm, encoders, tmp_path / "plain", 0, "train=[projectors]", kinds=["imu"])
    assert start(imu=plain, image=made["lora", "image"]).llm == made["lora", "image"]
    # Both went on from one trained LLM, and left it as it was.
    other = shutil.copytree(made["llm", "image"], tmp_path / "other")
    (other / "adapters" / "image").rename(other / "adapters" / "imu")
    (other / "manifest.json").unlink()  # which lists the projector under its old name
    assert start(image=made["llm", "image"], imu=other).llm == made["llm", "image"]


def test_a_trained_encoder_comes_with_its_modality_and_stays(tiny_llm, encoders, shards, tmp_path):
    a = make_checkpoint(tiny_llm, encoders, tmp_path / "a", 0, "train=[projectors,encoders]", kinds=["image"])
    b = make_checkpoint(tiny_llm, encoders, tmp_path / "b", 1, "train=[projectors,encoders]", kinds=["imu"])
    config = joined(tiny_llm, encoders, tmp_path / "run", {"image": a, "imu": b}, shards, optim__steps=1)
    assert run_stages([config], REGISTRY) == 0
    latest = checkpoint.existing(tmp_path / "run")
    for kind, origin in (("image", a), ("imu", b)):
        files = sorted((origin / "encoders" / kind).glob("*.safetensors"))
        assert files and all((latest / "encoders" / kind / file.name).samefile(file) for file in files)


def test_only_the_first_stage_starts_there(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {llm: {name: x}, modalities: {image: {encoder: x}}}\n"
        "run: {dir: runs/x}\n"
        "stages: [{name: a}, {name: b}]\n"
    )
    stages = [config_of(stage) for stage in load_stages(Recipe, recipe, ["model.checkpoint.image=runs/a"])]
    assert [stage.model.checkpoint for stage in stages] == [{"image": "runs/a"}, "runs/x/a"]
