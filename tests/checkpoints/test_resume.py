"""What may change between the starts of a run: some settings freely, some aloud, all others not."""

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from anymal.config.schema import Config
from anymal.config.settings import load
from anymal.errors import UserError
from anymal.training.resume import FREE, compare
from small_runs import make_encoders, metrics, pretrain_here, settings, write_pairs

BASE = ["model.llm.name=x", "model.modalities.image.encoder=clip", "data.shards=a", "data.batch_size=2"]


def change(*overrides: str, base: tuple[str, ...] = (), processes: tuple[int, int] = (1, 1)) -> list[str]:
    """What is said where a run goes on with overrides that it did not have."""
    before = load(Config, None, list({text.split("=")[0]: text for text in (*BASE, *base)}.values()))
    given = {text.split("=")[0]: text for text in (*BASE, *base, *overrides)}
    return compare(before, load(Config, None, list(given.values())), Path("RUN/step-1"), processes)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.modalities.image.projector.tokens=8", r"image\.projector\.tokens was 32, is 8"),
        ("model.modalities.image.options.tiles=2x2", r"image\.options\.tiles was null, is 2x2"),
        ("model.modalities.image.encoder={name: clip, size: 448}", r"image\.encoder was clip, is {\"name\": \"clip\""),
        ("model.modalities.audio.encoder=whisper", r"modalities\.audio\.encoder was null, is whisper"),
        ("model.llm.bits=8", r"model\.llm\.bits was 4, is 8"),
        ("model.llm.int8_threshold=0", r"model\.llm\.int8_threshold was 6\.0, is 0\.0"),
        ("model.llm.name=y", r"model\.llm\.name was x, is y"),
        ("model.lora.alpha=32", r"model\.lora\.alpha was 16\.0, is 32\.0"),
        ("optim.lr=1e-3", r"optim\.lr was 0\.0002, is 0\.001"),
        (
            "data.batch_size=4",
            r"batch_size × optim\.gradient_accumulation × processes was 2 × 1 × 1 = 2, is 4 × 1 × 1 = 4",
        ),
        ("optim.gradient_accumulation=2", r"was 2 × 1 × 1 = 2, is 2 × 2 × 1 = 4"),
        ("data.max_tokens=100", r"data\.max_tokens was 2048, is 100"),
        ("data.row_tokens=4096", r"data\.row_tokens was 0, is 4096"),
        ("prompt.instruction=Describe it.", r"prompt\.instruction was , is Describe it\."),
        ("run.seed=1", r"run\.seed was 0, is 1"),
    ],
)
def test_what_changes_the_training_is_refused_by_name_with_both_values(override, said):
    remedy = r"Put them back.*; or start a new run from its weights: model\.checkpoint=RUN/step-1 and another run\.dir"
    with pytest.raises(UserError, match=rf"{said}.*{remedy}"):
        change(override)


def test_an_llm_that_was_moved_can_be_linked():
    with pytest.raises(UserError, match=r"Put them back; a folder that was moved: link it at its old place; or"):
        change("model.llm.name=y")


def test_all_that_is_refused_is_named_at_once():
    with pytest.raises(UserError, match=r"optim\.lr was .*; optim\.clip was "):
        change("optim.lr=1", "optim.clip=2", "data.workers=0")


@pytest.mark.parametrize(
    "override",
    [
        "data.workers=0",
        "run.save_every=3",
        "run.keep=1",
        "run.wandb=offline",
        "run.dir=moved",
        "run.samples=0",
        "model.llm.allow_unquantized=true",
    ],
)
def test_what_changes_nothing_may_change_freely(override):
    assert change(override) == []


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.steps=2000", "optim.steps was 1000, is 2000: from here on the learning rate follows"),
        ("data.shards=/elsewhere/a", "data.shards was a, is /elsewhere/a: where the tars lie"),
        ("model.modalities.image.encoder=/models/clip", "image.encoder was clip, is /models/clip: the weights there"),
        ("model.llm.attention=sdpa", "model.llm.attention was packed, is sdpa: results are rounded otherwise"),
        ("engine.zero=3", "engine.zero was 1, is 3: results are rounded otherwise"),
        ("model.modalities.image.encoder_batch_size=8", "batch_size was 64, is 8: results are rounded otherwise"),
        ("model.checkpoint=b", "model.checkpoint was null, is b: it has begun, and goes on from its own checkpoint"),
    ],
)
def test_what_is_harmless_is_said(override, said):
    (note,) = change(override)
    assert said in note


def test_one_process_with_eight_micro_batches_is_eight_with_one():
    (note,) = change("optim.gradient_accumulation=1", base=("optim.gradient_accumulation=8",), processes=(1, 8))
    assert "was 2 × 8 × 1 = 16, is 2 × 1 × 8 = 16" in note
    (note,) = change("optim.gradient_accumulation=8", base=("data.row_tokens=4096",), processes=(8, 1))
    assert "optim.gradient_accumulation × processes was 1 × 8 = 8, is 8 × 1 = 8" in note
    with pytest.raises(UserError, match="was 2 × 1 × 2 = 4, is 2 × 1 × 1 = 2"):
        change(processes=(2, 1))
    assert change(processes=(0, 4)) == []  # older checkpoints do not say how many they were
    (note,) = change("optim.gradient_accumulation=8", processes=(0, 1))
    assert "is for you to know" in note


def test_a_folder_under_another_name_is_the_same(tmp_path, monkeypatch):
    (tmp_path / "llm").mkdir()
    (tmp_path / "link").symlink_to("llm")
    monkeypatch.chdir(tmp_path)
    assert change(f"model.llm.name={tmp_path / 'link'}", base=("model.llm.name=llm",)) == []


def test_the_settings_that_may_change_exist():
    def names(value: object, prefix: str = "") -> list[str]:
        found = []
        for f in fields(value):
            inner = getattr(value, f.name)
            found += names(inner, f"{prefix}{f.name}.") if is_dataclass(inner) else [prefix + f.name]
        return found

    assert set(FREE) <= set(names(load(Config, None, BASE)))


def test_a_run_that_is_started_with_another_learning_rate_is_left_as_it_is(tiny_llm, tmp_path, capfd):
    shards = write_pairs(tmp_path / "pairs", ["image"], shards=1)
    encoders = make_encoders(tmp_path / "encoders")
    given = settings(tiny_llm, encoders, tmp_path / "run", shards, ["image"], optim__steps=2)
    pretrain_here(None, *given)
    stamp = (tmp_path / "run/recipe.yaml").stat().st_mtime_ns
    more = [text.replace("optim.steps=2", "optim.steps=3") for text in given]
    with pytest.raises(UserError, match=r"optim\.lr was 0\.01, is 0\.02"):
        pretrain_here(None, *(text.replace("optim.lr=0.01", "optim.lr=0.02") for text in more))
    assert len(metrics(tmp_path / "run")) == 2 and (tmp_path / "run/recipe.yaml").stat().st_mtime_ns == stamp
    pretrain_here(None, *more)
    assert len(metrics(tmp_path / "run")) == 3 and "optim.steps was 2, is 3" in capfd.readouterr().out


def test_a_stage_that_is_done_is_passed_over_with_a_word_on_what_changed(tiny_llm, tmp_path, capfd):
    shards = write_pairs(tmp_path / "pairs", ["image"], shards=1)
    (tmp_path / "recipe.yaml").write_text("stages: [{name: a}, {name: b}]")
    encoders = make_encoders(tmp_path / "encoders")
    given = settings(tiny_llm, encoders, tmp_path / "run", shards, ["image"], optim__steps=1)
    pretrain_here(tmp_path / "recipe.yaml", *given)
    pretrain_here(tmp_path / "recipe.yaml", *given)
    pretrain_here(tmp_path / "recipe.yaml", *(text.replace("optim.lr=0.01", "optim.lr=0.02") for text in given))
    said = capfd.readouterr().out
    for name in "ab":
        assert f"{tmp_path}/run/{name}: done before\n" in said
        assert f"{tmp_path}/run/{name}: done before, with other settings: optim.lr was 0.01, is 0.02\n" in said
    for path in (tmp_path / "run").glob("a/checkpoints/latest/recipe.yaml"):
        path.write_text(path.read_text() + "gone: 1\n")
    pretrain_here(tmp_path / "recipe.yaml", *given)
    assert "run/a: done before, with settings that cannot be compared (" in capfd.readouterr().out
