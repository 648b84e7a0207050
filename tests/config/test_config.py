"""Settings: types, defaults, overrides, and errors that say what to do."""

import dataclasses
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest

from anymal.config.command_line import describe, parse_args
from anymal.config.renamed import RENAMED
from anymal.config.schema import Config, ModalityConfig, ProjectorConfig
from anymal.config.settings import RECIPES, load, options, public, save
from anymal.config.stages import Recipe, load_stages
from anymal.data_prep import negatives
from anymal.errors import UserError
from anymal.estimation.predict import EstimateConfig

NAMED = "model.llm.name=x"
ADDRESS = "https://bucket.example/a/{00..09}.tar"
SECRET = "X-Amz-Signature=0123456789abcdef"


def test_defaults_recipe_and_overrides_in_that_order(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {llm: {name: a, bits: 8}}\noptim: {lr: 1e-3}\ntrain: [projectors]\n")
    loaded = load(Config, recipe, ["optim.lr=2e-3"], defaults=["train=[projectors,lora]", "optim.steps=7"])
    assert (loaded.model.llm.bits, loaded.optim.lr, loaded.optim.steps) == (8, 2e-3, 7)
    assert loaded.train == ["projectors"]  # the recipe beats the program's default


def test_modalities_are_typed_though_their_names_are_free():
    loaded = load(
        Config, None, [NAMED, "model.modalities.smell.encoder=e", "model.modalities.smell.projector.tokens=5"]
    )
    assert loaded.model.modalities["smell"] == ModalityConfig(encoder="e", projector=ProjectorConfig(tokens=5))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lrr=1", "'lrr'.*Did you mean: 'lr'"),
        ("optim.gradient_acumulation=2", "'gradient_acumulation'.*Did you mean: 'gradient_accumulation'"),
        ("optim.accumulat=2", "'accumulat'.*Did you mean: 'gradient_accumulation'"),
        ("optim.xyz=2", "'xyz' not in 'OptimConfig'.*known are: lr, .*gradient_accumulation"),
        ("optim.lr=fast", "'fast'.*Float"),
        ("model.llm.bits=5", "bits is 5; it can be 4, 8, 16 or 32"),
        ("prompt.template=chatt", r"prompt\.template is 'chatt'; it can be chat or plain; did you mean chat\?"),
        ("prompt.template=${oc.env:HOME}", r"settings: prompt\.template is '.+'; it can be chat or plain"),
        ("prompt.template=null", r"prompt\.template is None; it can be chat or plain"),
        ("data.features=int4", r"data\.features is 'int4'; it can be auto, never, float32, bf16 or int8; .* int8\?"),
        ("data.group_by=sets", r"data\.group_by is 'sets'; it can be none, modality or dataset$"),
        ("run.wandb=of", r"run\.wandb is 'of'; it can be online, offline or disabled"),
        ("engine.zero=4", "zero is 4"),
        ("data.batch_size=0", "at least 1"),
        ("optim.steps", "neither a recipe nor an override"),
        ("optim.warmup=3", "share from 0 to 1"),
        ("data.encoder_cost={imgae: 3}", r"data\.encoder_cost: the model has no modality 'imgae'; it has none"),
        ("data.datasets.a={shards: x, epochs: -1}", "epochs is -1.0; it cannot be negative"),
        ("data.datasets.a={shards: x, epochs: 1, ratio: 2}", "a ratio or epochs, not both"),
        ("data.datasets.a={shards: x, instructions: [Describe it., ' ']}", "one of them is empty"),
        ("data.datasets.a={shards: x, instruction: [Describe it.]}", "Key 'instruction' not in 'DatasetConfig'"),
        ("run.log_every=0", "at least 1"),
        ("data.shards=${oc.env:NOT_SET_ANYWHERE}", "NOT_SET_ANYWHERE"),
        ("model.modalities.image.projector.tokenz=4", "'tokenz'.*Did you mean: 'tokens'"),
    ],
)
def test_mistakes_are_named(override, said):
    with pytest.raises(UserError, match=said):
        load(Config, None, [NAMED, override])


def test_what_has_no_default_must_be_given():
    with pytest.raises(UserError, match=r"must be given: model\.llm\.name"):
        load(Config)


def test_what_a_shell_expanded_is_noticed():
    with pytest.raises(UserError, match=r"data\.shards is given 3 times; a brace pattern wants quotes"):
        load(Config, None, [NAMED, "data.shards=a/0.tar", "data.shards=a/1.tar", "data.shards=a/2.tar"])


def test_what_a_recipe_leaves_open_must_be_given(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text('model: {llm: {name: x}, checkpoint: "???"}\ndata: {shards: "???"}\n')
    with pytest.raises(UserError, match=r"must be given: data\.shards, model\.checkpoint"):
        load(Config, recipe)
    assert load(Config, recipe, ["data.shards=a", "model.checkpoint=b"]).model.checkpoint == "b"


def test_a_list_takes_the_place_of_the_recipes_dict():
    recipe = Path(__file__).parents[2] / "launch" / "recipes" / "mmit-lora.yaml"
    assert isinstance(load(Config, recipe, ["data.shards=x"]).model.checkpoint, dict)
    joined = load(Config, recipe, ["data.shards=x", "model.checkpoint=[runs/a,runs/b]"])
    assert joined.model.checkpoint == ["runs/a", "runs/b"]


def test_a_recipe_that_is_not_there_or_not_yaml(tmp_path):
    with pytest.raises(UserError, match="there is no recipe"):
        load(Config, tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: [unclosed\n")
    with pytest.raises(UserError, match=r"broken\.yaml is not valid YAML: .*line 2") as failed:
        load(Config, broken)
    assert "\n" not in str(failed.value)


def test_a_recipe_that_comes_with_the_package_is_named_without_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = load_stages(Recipe, RECIPES / "eagle-x4.yaml", ["data.shards=x"])
    assert len(shipped) > 1 and load_stages(Recipe, "eagle-x4", ["data.shards=x"]) == shipped
    assert load(Config, "demo-pretrain") == load(Config, RECIPES / "demo-pretrain.yaml")
    Path("demo-pretrain").mkdir()  # a run's folder, say
    assert load(Config, "demo-pretrain").model.llm.bits == 4
    Path("demo-pretrain").rmdir()
    Path("demo-pretrain").write_text(
        f"model: {{llm: {{name: {NAMED.split('=')[1]}, bits: 16}}}}\ndata: {{shards: x}}\n"
    )
    assert load(Config, "demo-pretrain").model.llm.bits == 16, "a file of that name goes first"
    for reads in (load, load_stages):
        with pytest.raises(UserError, match=r"there is no recipe launch/recipes/sphynx\.yaml; did you mean sphinx\?"):
            reads(Recipe, "launch/recipes/sphynx.yaml")
        with pytest.raises(UserError, match=r"no recipe zzz; those that come with AnyMAL: anymal-audio-70b, .*like$"):
            reads(Recipe, "zzz")


def test_resolved_settings_are_read_back_alike(tmp_path):
    original = load(Config, None, [NAMED, "model.modalities.image.encoder=e", "data.shards=[a,b]", "train=[lora]"])
    save(original, tmp_path / "recipe.yaml")
    assert load(Config, tmp_path / "recipe.yaml") == original


def sections(config: Any) -> Iterator[Any]:
    """The dataclasses of which settings consist, the outermost first."""
    if dataclasses.is_dataclass(config):
        yield config
        config = vars(config)
    if isinstance(config, dict):
        for value in config.values():
            yield from sections(value)


@pytest.mark.parametrize("schema", [Config, Recipe, EstimateConfig])
def test_what_is_resolved_is_frozen(schema):
    loaded = load(schema, None, [NAMED, "model.modalities.image.encoder=e", "data.datasets.a.shards=~/x"])
    assert len(list(sections(loaded))) == 12
    for section in sections(loaded):
        for f in dataclasses.fields(section):
            with pytest.raises(FrozenInstanceError):
                setattr(section, f.name, getattr(section, f.name))


def test_the_stages_of_a_recipe_share_no_settings(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {llm: {name: x}}\nrun: {dir: all}\nstages: [{name: a}, {name: b, optim: {lr: 1}}]\n")
    first, second = load_stages(Recipe, recipe)
    assert (first.stage, first.run.dir, first.run.group) == ("a", "all/a", "all")
    assert (second.stage, second.run.dir, second.model.checkpoint, second.optim.lr) == ("b", "all/b", "all/a", 1)


OLD = pytest.mark.filterwarnings("default::FutureWarning")


@OLD
@pytest.mark.parametrize(("old", "new"), RENAMED.items())
@pytest.mark.parametrize("source", ["recipe", "override", "stage"])
def test_a_setting_is_read_under_its_old_name(old, new, source, tmp_path):
    recipe, section, name = tmp_path / "r.yaml", *old.split(".")
    text, given = "model: {llm: {name: x}}\n", []
    if source == "recipe":
        text += f"{section}: {{{name}: 7}}\n"
    elif source == "stage":
        text += f"stages: [{{name: a, {section}: {{{name}: 7}}}}]\n"
    else:
        given = [f"{old}=7"]
    recipe.write_text(text)
    with pytest.warns(
        FutureWarning, match=rf"{old.replace('.', '[.]')} is called {new.replace('.', '[.]')} now"
    ) as said:
        (loaded,) = load_stages(Recipe, recipe, given)
    assert len(said) == 1 and str(said[0].message).startswith(given[0] if given else str(recipe))
    section, name = new.split(".")
    assert getattr(getattr(loaded, section), name) == 7


def test_new_names_beat_old_ones_of_an_earlier_source_and_warn_of_nothing(tmp_path, monkeypatch):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {llm: {name: x}}\noptim: {accumulate: 2, steps: '${optim.accumulate}'}\n")
    with pytest.warns(FutureWarning, match="optim.accumulate is called"):
        loaded = load(Config, recipe, ["optim.gradient_accumulation=3"])
    assert (loaded.optim.gradient_accumulation, loaded.optim.steps) == (3, 3)
    monkeypatch.setenv("RANK", "1")  # rank 0 says it
    assert load(Config, recipe).optim.gradient_accumulation == 2  # a FutureWarning is an error in tests


@OLD
def test_a_warning_holds_no_signature():
    with pytest.warns(FutureWarning, match="look_ahead") as said:
        load(Config, None, [NAMED, f"data={{look_ahead: 3, shards: '{ADDRESS.split('{')[0]}0.tar?{SECRET}'}}"])
    assert "bucket.example" in str(said[0].message) and SECRET not in str(said[0].message)


@OLD
def test_a_setting_under_both_names_is_refused(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {llm: {name: x}}\noptim: {accumulate: 2, gradient_accumulation: 3}\n")
    with pytest.raises(
        UserError, match=r"r\.yaml sets optim\.gradient_accumulation twice: optim\.accumulate is its old"
    ):
        load(Config, recipe)
    both = [NAMED, "optim.accumulate=2", "optim.gradient_accumulation=3"]
    with pytest.raises(UserError, match=r"gradient_accumulation is given 2 times; optim\.accumulate is its old name"):
        load(Config, None, both)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("way", ["optim.accumulate", " optim.accumulate ", "oc.select:optim.accumulate,7"])
def test_an_interpolation_of_an_old_name_is_one_of_the_new(way, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {{llm: {{name: x}}}}\noptim: {{accumulate: 2, steps: '${{{way}}}'}}\n"
        f"prompt: {{instruction: 'no optim.accumulate, ${{model.llm.name}}'}}\n"
    )
    loaded = load(Config, recipe)
    assert loaded.optim.steps == 2 and loaded.prompt.instruction == "no optim.accumulate, x"


def test_home_and_environment_are_filled_in(monkeypatch):
    monkeypatch.setenv("PLACE", "~/here")
    loaded = load(Config, None, [NAMED, 'data.shards=["${oc.env:PLACE}/a",b]', "run.dir=~/runs"])
    assert loaded.data.shards == [str(Path("~/here/a").expanduser()), "b"]
    assert loaded.run.dir == str(Path("~/runs").expanduser())


def test_the_launchers_local_rank_is_accepted():
    for rank in (["--local_rank=1"], ["--local_rank", "1"]):
        assert parse_args(Config, "", [*rank, NAMED]).model.llm.name == "x"


def test_help_prints_and_ends(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_args(Config, "What it does.", ["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "model.llm.bits  (int, default 4)" in shown and "  train  (list[str], default" in shown
    assert "prompt.template  (chat or plain, default 'chat')" in shown
    assert "model.llm.checkpointing  (none, selective or full, default 'none')" in shown and "Literal" not in shown


def test_help_shows_what_the_items_of_a_list_can_be():
    assert "  ways  (list[random, popular or adversarial], default" in "\n".join(describe(negatives.Settings))


def test_a_choice_can_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TEMPLATE", "plain")
    monkeypatch.setenv("BITS", "8")
    loaded = load(Config, None, [NAMED, "prompt.template=${oc.env:TEMPLATE}", "model.llm.bits=${oc.env:BITS}"])
    assert (loaded.prompt.template, loaded.model.llm.bits) == ("plain", 8)
    save(loaded, tmp_path / "recipe.yaml")
    assert "template: ${oc.env:TEMPLATE}" in (tmp_path / "recipe.yaml").read_text()
    assert load(Config, tmp_path / "recipe.yaml") == loaded


def test_unknown_options_of_a_modality_name_the_nearest():
    from anymal.adapters.video.modality import MODALITY

    with pytest.raises(UserError, match=r"model\.x: unknown option 'framez'; did you mean frames\?"):
        options(MODALITY.options, {"framez": 4}, "model.x")
    assert options(MODALITY.options, {"frames": 4}, "model.x").frames == 4


def test_what_is_written_keeps_interpolations_and_drops_signatures(tmp_path, monkeypatch):
    monkeypatch.setenv("HIDDEN", "/the/hidden/folder")
    monkeypatch.setenv("SHORT", "kept")
    recipe = tmp_path / "given.yaml"
    recipe.write_text(
        'model: {llm: {name: "${oc.env:HIDDEN}/llm"}, checkpoint: "${run.dir}/before"}\n'
        f"data: {{shards: [\"{ADDRESS}?{SECRET}\", \"${{oc.env:NOT_SET,'~/d'}}/a.tar\", '~/b.tar']}}\n"
        'prompt: {instruction: "${oc.env:SHORT} it. Is it kept?"}\n'
        "run: {dir: \"${oc.env:HIDDEN}/run\", project: kept, data_license: 'https://x.example/license'}\n"
    )
    loaded = load(Config, recipe)
    assert (
        loaded.model.llm.name == "/the/hidden/folder/llm" and loaded.model.checkpoint == "/the/hidden/folder/run/before"
    )
    assert loaded.data.shards[0].endswith(SECRET)
    changed = replace(loaded, run=replace(loaded.run, seed=1))  # as programs do
    save(changed, tmp_path / "recipe.yaml")
    written = (tmp_path / "recipe.yaml").read_text()
    assert "hidden/folder" not in written and SECRET not in written and SECRET not in str(public(loaded))
    stated = public(changed)
    assert stated["model"]["llm"]["name"] == "${oc.env:HIDDEN}/llm"
    assert stated["model"]["checkpoint"] == "${oc.env:HIDDEN}/run/before"
    assert stated["data"]["shards"] == [ADDRESS, "${oc.env:NOT_SET,'~/d'}/a.tar", str(Path("~/b.tar").expanduser())]
    assert stated["prompt"]["instruction"] == "${oc.env:SHORT} it. Is it kept?"
    assert (stated["run"]["project"], stated["run"]["data_license"]) == ("kept", "https://x.example/license")
    again = load(Config, tmp_path / "recipe.yaml")
    assert again == replace(changed, data=replace(changed.data, shards=[ADDRESS, *changed.data.shards[1:]]))

    monkeypatch.delenv("HIDDEN")  # whoever chats with a checkpoint need not have what its data need
    with pytest.raises(UserError, match="HIDDEN"):
        load(Config, tmp_path / "recipe.yaml")
    kept = load(Config, tmp_path / "recipe.yaml", ["model.llm.name=elsewhere"], keep_unset=True)
    assert (kept.model.llm.name, kept.run.dir) == ("elsewhere", "${oc.env:HIDDEN}/run")


def test_what_is_derived_from_a_setting_is_written_as_that(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS", "r")  # so short that it may stand anywhere
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        'model: {llm: {name: x}}\nrun: {dir: "${oc.env:RUNS}/all"}\nstages: [{name: align}, {name: tune}]\n'
    )
    stages = load_stages(Recipe, recipe)
    assert [stage.run.dir for stage in stages] == ["r/all/align", "r/all/tune"]
    assert [public(stage)["run"]["dir"] for stage in stages] == ["${oc.env:RUNS}/all/align", "${oc.env:RUNS}/all/tune"]
    assert public(stages[1])["model"]["checkpoint"] == "${oc.env:RUNS}/all/align"
