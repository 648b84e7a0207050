"""Settings: types, defaults, overrides, and errors that say what to do."""

from pathlib import Path

import pytest

from anymal.command_line import parse_args
from anymal.config import Config, ModalityConfig, ProjectorConfig
from anymal.errors import UserError
from anymal.settings import load, options, save

NAMED = "model.llm.name=x"


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
        ("optim.lr=fast", "'fast'.*Float"),
        ("model.llm.bits=5", "bits is 5; it can be 4, 8, 16 or 32"),
        ("prompt.template=chatt", "can be chat or plain"),
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


def test_a_recipe_that_is_not_there_or_not_yaml(tmp_path):
    with pytest.raises(UserError, match="there is no recipe"):
        load(Config, tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: [unclosed\n")
    with pytest.raises(UserError, match=r"broken\.yaml is not valid YAML"):
        load(Config, broken)


def test_resolved_settings_are_read_back_alike(tmp_path):
    original = load(Config, None, [NAMED, "model.modalities.image.encoder=e", "data.shards=[a,b]", "train=[lora]"])
    save(original, tmp_path / "recipe.yaml")
    assert load(Config, tmp_path / "recipe.yaml") == original


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
    assert "model.llm.bits  (int, default 4)" in capsys.readouterr().out


def test_unknown_options_of_a_modality_name_the_nearest():
    from adapters.video import MODALITY

    with pytest.raises(UserError, match=r"model\.x: unknown option 'framez'; did you mean frames\?"):
        options(MODALITY.options, {"framez": 4}, "model.x")
    assert options(MODALITY.options, {"frames": 4}, "model.x").frames == 4
