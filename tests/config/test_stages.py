"""Recipes of several stages: what each trains, how they follow one another, and what their checkpoints hold."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import tiny_encoders
from anymal.adapters import REGISTRY
from anymal.checkpoints import checkpoint
from anymal.checkpoints.build import build, load_encoder
from anymal.checkpoints.networks import load_bare, save_encoder, with_name
from anymal.config.schema import Config, ModalityConfig
from anymal.config.settings import load
from anymal.config.stages import Recipe, config_of, load_stages
from anymal.errors import UserError
from anymal.model.trainable import select_trainable, trainable
from anymal.training.run import run_stages
from small_runs import deepspeed, losses, make_encoders, pretrain_here, settings, write_pairs

CPU = torch.device("cpu")
ANYMAL = """
stages:
  - name: align
    train: [projectors]
    prompt: {template: plain}
  - name: instruct
    train: [projectors, lora]
    optim: {lr: 1e-5}
"""
ONELLM = """
stages:
  - name: image
    model: {modalities: {image: &image {encoder: "${oc.env:ENCODERS}/image", projector: {tokens: 4}}}}
  - name: sound
    model: {modalities: {image: *image, audio: &audio {encoder: "${oc.env:ENCODERS}/audio", projector: {tokens: 4}}}}
  - name: motion
    model:
      modalities:
        image: *image
        audio: *audio
        imu: {encoder: "${oc.env:ENCODERS}/imu", projector: {tokens: 4}, options: {rate: 50}}
"""
EAGLE = """
model: {llm: {bits: 16}}
stages:
  - name: align-clip # an expert with a projector of its own, against the frozen LLM
    train: [projectors, encoders.image]
    model: {modalities: {image: {encoder: "${oc.env:ENCODERS}/image", projector: {tokens: 4}}}}
  - name: combine # the aligned expert as an encoder like any other, a fresh projector; here in a mixture of one
    train: [projectors]
    model: &combined
      checkpoint: null
      modalities:
        image: &aligned {encoder: "${run.dir}/align-clip/checkpoints/latest/encoders/image", projector: {tokens: 2}}
  - name: joint
    train: [projectors, encoders, llm]
    model: {modalities: {image: *aligned}}
"""
SPHINX = """
model: {llm: {bits: 16}}
stages:
  - {name: pretrain, train: [projectors, llm], optim: {lr: 5e-5}}
  - {name: tune, train: [projectors, llm], prompt: {template: chat}}
"""
SINGLE = """
train: [projectors, lora]
"""
IMAGE = ["image"]
EXPECTED = {
    "anymal": (ANYMAL, {"align": {"projectors"}, "instruct": {"projectors", "lora"}}),
    "onellm": (ONELLM, {name: {"projectors"} for name in ("image", "sound", "motion")}),
    "sphinx": (SPHINX, {name: {"projectors", "llm"} for name in ("pretrain", "tune")}),
    "single": (SINGLE, {"": {"projectors", "lora"}}),
}


@pytest.fixture(scope="session")
def encoders(tmp_path_factory) -> Path:
    return make_encoders(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> str:
    return write_pairs(tmp_path_factory.mktemp("pairs"), ["image", "imu"])


@pytest.fixture
def recipe(tiny_llm, encoders, shards, tmp_path, monkeypatch):
    """Write a recipe; returns its path and what it needs besides, with `more` as in `small_runs.settings`."""
    monkeypatch.setenv("ENCODERS", str(encoders))

    def make(text: str, **more) -> list[str]:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        given = settings(tiny_llm, encoders, tmp_path / "run", shards, [], **more)
        return [str(path), *(item for item in given if not item.startswith("model.llm.bits") or "bits" in more)]

    return make


def stages_of(arguments: list[str], *more: str) -> list[Config]:
    """The stages of what `recipe` returned; `more` overrides take the place of the same among its own."""
    given = dict(argument.split("=", 1) for argument in (*arguments[1:], *more))
    overrides = [f"{name}={value}" for name, value in given.items()]
    return [config_of(stage) for stage in load_stages(Recipe, arguments[0], overrides, ["train=[projectors]"])]


def names(config: Config, **more) -> tuple[set[str], set[str]]:
    """The trainable parameters of a built stage, and all by the part they belong to."""
    model = build(config, CPU, REGISTRY, train=config.train, **more).model
    select_trainable(model, config.train)
    return set(trainable(model)), {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("system", sorted(EXPECTED))
def test_every_stage_trains_what_it_says(recipe, encoders, system):
    text, expected = EXPECTED[system]
    image = [] if system == "onellm" else [f"model.modalities.image.encoder={encoders / 'image'}"]
    stages = stages_of(recipe(text), *image)
    folders = [Path(stage.run.dir).name if "stages" in text else "" for stage in stages]
    assert folders == list(expected)
    for stage, parts in zip(stages, expected.values(), strict=True):
        learns, every = names(stage)
        lora = {name for name in every if "lora_" in name}
        wanted = {name for name in every if name.startswith("projectors.")}
        wanted |= lora if "lora" in parts else set()
        wanted |= {name for name in every if name.startswith("llm.")} if "llm" in parts else set()
        assert learns == wanted and {name.split(".")[1] for name in wanted if name.startswith("projectors.")} == set(
            stage.model.modalities
        )
        assert bool(lora) == ("lora" in parts)


def test_of_an_encoder_learns_what_its_features_depend_on(recipe, encoders):
    (stage,) = stages_of(
        recipe("train: [encoders.image]\n"),
        *(f"model.modalities.{kind}.encoder={encoders / kind}" for kind in ("image", "audio")),
    )
    learns, every = names(stage)
    assert all(name.startswith("trained_encoders.image.network.") for name in learns)
    passed_by = {name for name in every if "trained_encoders" in name} - learns
    # CLIP's last but one layer is used; the last of three, and what comes after it, are not
    assert passed_by and all(".layers.2." in name or "post_layernorm" in name for name in passed_by)
    assert not any("audio" in name for name in every if "encoder" in name)
    model = build(stage, CPU, REGISTRY, train=stage.train).model
    select_trainable(model, stage.train)
    assert model.trained_encoders["image"].network.training and not model.encoders["audio"].network.training
    assert all(p.dtype == torch.float32 for p in trainable(model).values())


def test_batch_norm_keeps_its_statistics_and_learns_its_weights(recipe, encoders, tmp_path):
    from anymal.adapters.architectures.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel

    EfficientNetLiteModel(EfficientNetLiteConfig(num_classes=2)).save_pretrained(tmp_path / "lite")
    shutil.copy(encoders / "image" / "preprocessor_config.json", tmp_path / "lite")
    (stage,) = stages_of(recipe("train: [encoders]\n"), f"model.modalities.image.encoder={tmp_path / 'lite'}")
    model = build(stage, CPU, REGISTRY, train=stage.train).model
    select_trainable(model, stage.train)
    encoder = model.trained_encoders["image"]
    before = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    encoder(torch.rand(2, 3, 64, 64)).square().sum().backward()
    assert before and all(torch.equal(buffer, before[name]) for name, buffer in encoder.named_buffers())
    assert encoder.network._bn0.weight.grad.abs().sum() > 0 and encoder.network._bn0.weight.requires_grad
    assert not encoder.network._fc.weight.requires_grad


@pytest.mark.parametrize(
    ("text", "more", "said"),
    [
        ("stages: [{name: a, optim: {lrr: 1}}]", [], r"recipe\.yaml, stage a: .*'lrr'.*Did you mean: 'lr'"),
        ("stages: [{name: a}, {name: a}]", [], "two stages have the name a"),
        ("stages: [{train: [lora]}]", [], "stage 1 has the name None"),
        ("stages: [{name: a/b}]", [], "stage 1 has the name 'a/b'"),
        ("stages: {a: {}}", [], "stages is a list"),
        ("stages: [{name: a, run: {dir: x}}]", [], r"run\.dir is the whole recipe's"),
        ("stages: [{name: align}]", ["stage=alig"], r"has no such stage; did you mean align\?"),
        ("train: [projectors]", ["stage=a"], "no such stage; it has none"),
        ("stages: [{name: a}]", ["stages=[]"], r"stages are listed in the recipe"),
        ("stages: [{name: a}, {name: b, data: {cache: '???'}}]", [], r"must be given: data\.cache"),
        ("stages: [{name: a}, {name: b}]", ["run.resume=x"], "one stage's checkpoint"),
    ],
)
def test_mistakes_are_named(recipe, text, more, said):
    with pytest.raises(UserError, match=said):
        stages_of(recipe(text), *more)


def test_what_beats_what_and_where_stages_start(recipe, tmp_path):
    text = "model: {checkpoint: '???'}\noptim: {lr: 1, steps: 5}\nstages:\n"
    text += "  - {name: a, optim: {lr: 2}}\n  - {name: b, optim: {lr: 3, clip: 0.5}}\n"
    text += "  - {name: c, model: {checkpoint: null}}\n"
    given = [item for item in recipe(text) if not item.startswith("optim.lr")]
    with pytest.raises(UserError, match=r"must be given: model\.checkpoint"):
        stages_of(given)
    first, second, third = stages_of(given, "model.checkpoint=x", "optim.steps=7")
    assert [s.optim.lr for s in (first, second, third)] == [2, 3, 1]
    assert [s.optim.steps for s in (first, second, third)] == [7, 7, 7] and second.optim.clip == 0.5
    run = str(tmp_path / "run")
    assert [s.run.dir for s in (first, second)] == [f"{run}/a", f"{run}/b"] and second.run.group == run
    assert [s.model.checkpoint for s in (first, second, third)] == ["x", f"{run}/a", None]
    assert {s.optim.lr for s in stages_of(given, "model.checkpoint=x", "optim.lr=9")} == {9}
    (alone,) = stages_of(given, "stage=b")
    assert alone == replace(second, optim=alone.optim) and alone.optim.steps == 5
    assert stages_of(given, "stage=b", "model.checkpoint=y")[0].model.checkpoint == "y"


def test_quantised_weights_and_a_base_beneath_a_lora_cannot_learn(recipe, encoders):
    image = f"model.modalities.image.encoder={encoders / 'image'}"
    (stage,) = stages_of(recipe("train: [llm]\n"), image)
    with pytest.raises(UserError, match=r"bits is 4, and quantised weights cannot learn: set\s+model\.llm\.bits to 16"):
        names(stage)
    (stage,) = stages_of(recipe("train: [llm, lora]\n"), image, "model.llm.bits=32")
    with pytest.raises(UserError, match="the LLM has a LoRA: train one or the other"):
        names(stage)


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, made in tiny_encoders.ENCODERS.items() for name in made]
)
def test_a_trained_encoder_is_a_folder_like_any_other(tmp_path, kind, name):
    """One that cannot be (of several networks, or from a file) is its weights alone, for the recipe's encoder."""
    source = tiny_encoders.ENCODERS[kind][name](tmp_path / "source")
    options = {"rate": 50} if kind == "imu" else {}
    first = load_encoder(REGISTRY, kind, ModalityConfig(encoder=source, options=options))
    folder = tmp_path / "checkpoint" / "encoders" / kind
    save_encoder(first, changed(first), folder)
    if getattr(first, "savable", False):
        source = str(folder)
    again = load_encoder(REGISTRY, kind, ModalityConfig(encoder=source, options=options))
    load_bare({kind: again}, {kind: tmp_path / "checkpoint"})
    same(again, first, tiny_encoders.MEDIA[kind]())


def changed(encoder) -> dict[str, torch.Tensor]:
    """The state dict of an encoder whose weights were moved."""
    torch.manual_seed(0)
    for parameter in encoder.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return encoder.state_dict()


def same(again, first, data: bytes) -> None:
    medium = tiny_encoders.decoded(first.decode, data)
    torch.testing.assert_close(tiny_encoders.decoded(again.decode, data), medium, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(again(medium[None]), first(medium[None]), rtol=0, atol=0)
    assert again.license == first.license


@pytest.mark.parametrize("tree", ["leaf", "channels"])
def test_an_expert_that_was_trained_in_a_tree_of_its_own_can_be_named_in_another(tmp_path, tree):
    """Eagle: an expert is aligned alone, at the size that it has in the mixture."""

    def encoder(name: str):
        leaf = {"name": name, "size": 48}
        tree_of = {"leaf": leaf, "channels": {"channels": [leaf], "grid": 6}}
        return load_encoder(REGISTRY, "image", ModalityConfig(encoder=tree_of[tree]))

    source = tiny_encoders.clip(tmp_path / "clip")
    first = encoder(source)
    assert first.savable
    save_encoder(first, changed(first), tmp_path / "saved")
    same(encoder(str(tmp_path / "saved")), first, tiny_encoders.picture())
    assert with_name({"channels": [{"name": source, "size": 48}], "grid": 6}, "x") == {
        "channels": [{"name": "x", "size": 48}],
        "grid": 6,
    }


@pytest.mark.parametrize(("kind", "options"), [("image", {"tiles": "2x2"}), ("video", {"frames": 2, "views": True})])
def test_an_encoder_of_views_can_be_saved(tmp_path, kind, options):
    first = load_encoder(REGISTRY, kind, ModalityConfig(encoder=tiny_encoders.clip(tmp_path / "clip"), options=options))
    save_encoder(first, changed(first), tmp_path / "saved")
    again = load_encoder(REGISTRY, kind, ModalityConfig(encoder=str(tmp_path / "saved"), options=options))
    pixels = torch.randn(1, *first.shape)
    with torch.no_grad():
        assert torch.equal(again(pixels), first(pixels))


def cut_after(run: Path, step: int) -> None:
    """Leave the run as a kill after the checkpoint of `step` would."""
    place = run / "checkpoints"
    for folder in place.glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    (place / "latest").unlink()
    (place / "latest").symlink_to(f"step-{step:08d}")


def test_eagle_from_an_aligned_expert_to_a_joint_training(recipe, tmp_path, encoders):
    given = recipe(EAGLE, optim__steps=4, run__save_every=2, run__samples=1, optim__lr=1e-3)
    assert run_stages(stages_of(given), REGISTRY) == 0
    run = tmp_path / "run"
    curve = losses(run / "joint")
    assert sorted(curve) == [1, 2, 3, 4]

    aligned, latest = (checkpoint.existing(run / stage) for stage in ("align-clip", "joint"))
    joint = stages_of(given)[2]
    learns, every = names(joint, start=latest)
    assert {name for name in every if name.startswith(("llm.", "projectors."))} <= learns
    assert learns - {"llm", "projectors"} and not {n for n in every - learns if not n.startswith("trained_encoders.")}

    def weights(folder: Path) -> dict[str, torch.Tensor]:
        encoder = load_encoder(REGISTRY, "image", ModalityConfig(encoder=str(folder)))
        return dict(encoder.named_parameters())

    stages = [encoders / "image", aligned / "encoders" / "image", latest / "encoders" / "image"]
    before, between, after = map(weights, stages)
    assert not torch.equal(before[first := next(iter(before))], between[first])
    assert not torch.equal(between[first], after[first])
    llm = transformers.AutoModelForCausalLM.from_pretrained(latest / "llm")
    assert llm.dtype == torch.bfloat16
    assert transformers.AutoTokenizer.from_pretrained(latest / "llm")

    # Killed in the last stage, and started again: what is done is passed over, the rest goes on exactly.
    stamp = (run / "align-clip" / "metrics.jsonl").stat().st_mtime_ns
    cut_after(run / "joint", 2)
    assert run_stages(stages_of(given), REGISTRY) == 0
    assert losses(run / "joint") == curve
    assert (run / "align-clip" / "metrics.jsonl").stat().st_mtime_ns == stamp

    # The answerer of a checkpoint has the trained networks; a later, frozen stage hands them on.
    answering = build(checkpoint.recipe(latest, ["model.llm.bits=4"]), CPU, REGISTRY, start=latest).model
    assert torch.equal(dict(answering.encoders["image"].named_parameters())[first], after[first])
    more = ["train=[projectors]", f"run.dir={run}/last", "optim.steps=1", f"model.checkpoint={run}/joint"]
    last = load(Config, run / "joint" / "recipe.yaml", more)
    assert run_stages([last], REGISTRY) == 0
    kept = checkpoint.existing(run / "last") / "llm" / "model.safetensors"
    assert kept.samefile(checkpoint.existing(run / "joint") / "llm" / "model.safetensors")


def test_a_projector_stays_with_the_encoder_that_it_was_trained_on(recipe, tmp_path):
    """An expert that is trained further after the stage that took it, under the same name."""
    given = recipe(EAGLE, optim__steps=2, run__samples=0, optim__lr=1e-3)
    align, combine, joint = stages_of(given)
    assert run_stages([align, combine], REGISTRY) == 0
    align, combine = (replace(stage, optim=replace(stage.optim, steps=3)) for stage in (align, combine))
    assert run_stages([align], REGISTRY) == 0
    said = r"adapters/image: this projector was trained on .* other weights than model\.modalities\.image\.encoder"
    for later in (combine, joint):
        with pytest.raises(UserError, match=said):
            run_stages([later], REGISTRY)
    with pytest.raises(UserError, match=said):
        latest = checkpoint.existing(tmp_path / "run/combine")
        build(checkpoint.recipe(latest), CPU, REGISTRY, start=latest)


def test_modalities_that_are_new_in_a_stage_start_fresh_and_the_others_go_on(recipe, tmp_path, capsys):
    given = recipe(ONELLM, optim__steps=1)
    text = (tmp_path / "recipe.yaml").read_text().replace("audio", "imu").split("  - name: motion")[0]
    (tmp_path / "recipe.yaml").write_text(text.replace('/imu",', '/imu", options: {rate: 50},'))
    assert run_stages(stages_of(given, "optim.lr=0"), REGISTRY) == 0
    first, second = (checkpoint.existing(tmp_path / "run" / name) / "adapters" for name in ("image", "sound"))
    assert [sorted(p.name for p in folder.iterdir()) for folder in (first, second)] == [["image"], ["image", "imu"]]
    assert (first / "image/model.safetensors").read_bytes() == (second / "image/model.safetensors").read_bytes()
    assert f"starting from {first.parent}, projectors: image; imu (new here)" in capsys.readouterr().out
    (tmp_path / "recipe.yaml").write_text(text.split("  - name: sound")[0])
    assert (
        run_stages(stages_of(given, f"model.checkpoint={second.parent}", f"run.dir={tmp_path / 'less'}"), REGISTRY) == 0
    )
    assert "projectors: image; imu (left behind, since the recipe lacks them)" in capsys.readouterr().out


def test_tiles_may_come_and_go_between_stages(recipe, encoders, tmp_path):
    """Plain, then with tiles (LLaVA-NeXT's order), then plain again; the embedding of skipped views comes and goes."""
    plain = f"{{encoder: {encoders / 'image'}, projector: {{tokens: 4}}}}"
    tiled = plain.replace("projector", "options: {tiles: 2x2}, projector")
    text = "train: [projectors]\nstages:\n"
    for name, image in (("a", plain), ("b", tiled), ("c", plain)):
        text += f"  - {{name: {name}, model: {{modalities: {{image: {image}}}}}}}\n"
    assert run_stages(stages_of(recipe(text, optim__steps=1)), REGISTRY) == 0
    held = [load_file(checkpoint.existing(tmp_path / "run" / n) / "adapters/image/model.safetensors") for n in "abc"]
    assert ["skip" in weights for weights in held] == [False, True, False]


def test_another_encoder_than_the_checkpoint_was_trained_from_is_refused(recipe, encoders, tmp_path):
    image = f"model.modalities.image.encoder={encoders / 'image'}"
    given = recipe("train: [encoders]\n", optim__steps=1)
    assert run_stages(stages_of(given, image), REGISTRY) == 0
    other = tiny_encoders.clip(tmp_path / "other", seed=1)
    start = f"model.checkpoint={tmp_path / 'run'}"
    with pytest.raises(UserError, match=r"encoder is .*other, but .*encoders/image was trained from"):
        run_stages(
            stages_of(given, f"model.modalities.image.encoder={other}", start, f"run.dir={tmp_path / 'x'}"), REGISTRY
        )


@pytest.mark.slow
def test_two_ranks_train_encoders_and_llm_though_each_sees_another_modality(recipe, encoders, tmp_path, tiny_llm):
    """Rank 0 gets only images, rank 1 only sounds, through three stages; then all of it again by one rank."""
    kinds = ["image", "audio"]
    mixed = write_pairs(tmp_path / "mixed", kinds, shards=1, per_shard=40)
    more = {"optim__steps": 4, "data__shuffle": 0, "data__batch_size": 2, "optim__lr": 1e-3}
    text = "model: {llm: {bits: 4}}\nstages:\n"
    for zero in (2, 3):
        both = f"engine: {{zero: {zero}}}"
        text += f"  - {{name: a{zero}, train: [projectors, encoders], {both}, model: {{checkpoint: null}}}}\n"
        text += f"  - {{name: b{zero}, train: [encoders.audio], {both}}}\n"
        text += f"  - {{name: c{zero}, train: [projectors, llm], {both}, model: {{llm: {{bits: 16}}}}}}\n"
    given = recipe(text, **more, data__shards=mixed)
    given += [f"model.modalities.{k}.encoder={encoders / k}" for k in kinds]
    given += [f"model.modalities.{k}.projector.tokens=4" for k in kinds]
    deepspeed(2, "launch/pretrain.py", *given)
    alone = [f"run.dir={tmp_path / 'one'}" if setting.startswith("run.dir=") else setting for setting in given]
    pretrain_here(*alone, "optim.gradient_accumulation=2")
    for stage in ("a2", "b2", "c2", "a3", "b3", "c3"):
        two, one = tmp_path / "run" / stage, tmp_path / "one" / stage
        assert sorted(losses(two)) == [1, 2, 3, 4] and losses(two) == pytest.approx(losses(one), rel=1e-4)
        if stage[0] == "c":
            weights = [load_file(checkpoint.existing(run) / "llm" / "model.safetensors") for run in (two, one)]
            untrained = load_file(tiny_llm / "model.safetensors")
            for name, weight in weights[0].items():
                torch.testing.assert_close(weight, weights[1][name], rtol=0.01, atol=1e-4)  # they are bfloat16
                assert not torch.equal(weight, untrained[name].bfloat16()), name
