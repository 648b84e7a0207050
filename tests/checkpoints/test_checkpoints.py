"""Checkpoints that are damaged, stripped, edited, of an older version; and what may lie beside them."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from anymal.adapters import REGISTRY
from anymal.checkpoints import checkpoint, checksums, retention
from anymal.checkpoints.build import build
from anymal.checkpoints.model_card import model_card
from anymal.checkpoints.state import load_training_state
from anymal.config.schema import Config
from anymal.config.settings import load
from anymal.errors import UserError
from small_runs import losses, make_checkpoint, make_encoders, pretrain_here, settings, write_pairs

TRAIN = ["train=[projectors,lora]"]
PROJECTOR = "adapters/image/model.safetensors"
LORA = "lora/adapter_model.safetensors"


@pytest.fixture(scope="module")
def arguments(tiny_llm, tmp_path_factory) -> list[str]:
    """The settings of a run that keeps two checkpoints, without its folder."""
    folder = tmp_path_factory.mktemp("inputs")
    shards = write_pairs(folder / "pairs", ["image"], shards=1)
    more = {"run__save_every": 2, "model__lora__rank": 4}
    given = settings(tiny_llm, make_encoders(folder / "encoders"), folder, shards, ["image"], **more)
    return [*TRAIN, *(setting for setting in given if not setting.startswith("run.dir="))]


@pytest.fixture(scope="module")
def trained(arguments, tmp_path_factory) -> Path:
    """A run of four steps with checkpoints after the second and the last, made under a umask of a group that shares."""
    run = tmp_path_factory.mktemp("trained") / "run"
    umask = os.umask(0o027)
    try:
        pretrain_here(None, *arguments, f"run.dir={run}", "optim.steps=4")
    finally:
        os.umask(umask)
    return run


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(trained, tmp_path / "run", symlinks=True)


@pytest.fixture
def resumed(arguments, run):
    """The checkpoint that the run would go on from."""

    def find() -> Path | None:
        return checkpoint.find_resume(load(Config, None, [*arguments, f"run.dir={run}"]).run)

    return find


def flip(path: Path) -> None:
    """Change one bit near the end: all is as long and as readable as it was."""
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", [PROJECTOR, LORA, "training/optimizer.safetensors", "lora/adapter_config.json"])
def test_a_flipped_bit_is_named_and_the_run_falls_back(run, resumed, caplog, name):
    assert resumed().name == "step-00000004" and not caplog.records
    flip(run / "checkpoints/step-00000004" / name)
    assert resumed().name == "step-00000002"
    (said,) = caplog.messages
    assert f"step-00000004/{name} is damaged: its SHA-256" in said and said.endswith("newest checkpoint that verifies")


def test_elsewhere_damage_is_an_error_that_names_a_good_checkpoint(run):
    latest = run / "checkpoints/step-00000004"
    flip(latest / "training/optimizer.safetensors")
    assert checkpoint.existing(run) == latest  # an answerer does not read the state of training
    with pytest.raises(UserError, match=r"optimizer\.safetensors is damaged"):
        checkpoint.existing(run, training=True)
    flip(latest / PROJECTOR)
    said = rf"{PROJECTOR} is damaged: .*; the newest beside it that verifies is .*/step-00000002 "
    with pytest.raises(UserError, match=said):
        checkpoint.existing(run)


def test_files_that_are_cut_or_gone_are_named(run, resumed, caplog):
    latest = run / "checkpoints/step-00000004"
    (latest / LORA).unlink()
    assert resumed().name == "step-00000002" and "adapter_model.safetensors is missing" in caplog.text
    (latest / "manifest.json").write_text((latest / "manifest.json").read_text()[:200])
    assert resumed().name == "step-00000002" and "step-00000004/manifest.json is damaged" in caplog.text
    (run / "checkpoints/step-00000002/training/state.json").write_text("{}")
    with pytest.raises(UserError, match=r"manifest\.json is damaged.*; no other checkpoint in .* can be gone on from"):
        resumed()


def test_a_run_that_fell_back_trains_the_same_again(run, arguments):
    before = losses(run)
    flip(run / "checkpoints/step-00000004" / PROJECTOR)
    pretrain_here(None, *arguments, f"run.dir={run}", "optim.steps=4")
    assert losses(run) == before and checkpoint.existing(run, training=True).name == "step-00000004"


def test_half_of_a_lora_is_refused_with_and_without_a_manifest(run, caplog):
    latest = checkpoint.existing(run)
    held = load_file(latest / LORA)
    save_file({name: held[name] for name in sorted(held)[::2]}, latest / LORA)
    with pytest.raises(UserError, match=rf"{LORA} is damaged"):
        checkpoint.existing(run)
    (latest / "manifest.json").unlink()
    assert checkpoint.existing(run) == latest and "has no manifest.json" in caplog.text
    with pytest.raises(UserError, match=rf"{LORA} is not the LoRA of this LLM: \d+ of {len(held)} tensors are missing"):
        build(checkpoint.recipe(latest), torch.device("cpu"), REGISTRY, start=latest)


def test_older_checkpoints_have_no_manifest_and_load(run, resumed, caplog):
    latest = checkpoint.existing(run)
    (latest / "manifest.json").unlink()
    state = json.loads((latest / "training/state.json").read_text())
    del state["world"]
    (latest / "training/state.json").write_text(json.dumps(state))
    assert resumed() == latest and "cannot be verified" in caplog.text
    assert load_training_state(latest).world == 0
    path = latest / "training/optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert resumed().name == "step-00000002"


def test_what_people_do_to_publish_a_checkpoint_is_no_damage(run, resumed):
    latest = checkpoint.existing(run)
    shutil.rmtree(latest / "training")
    (latest / "README.md").write_text("mine")
    described = latest / "adapters/image/adapter_config.json"
    described.write_text(described.read_text().replace("encoder_weights", "was"))
    assert checkpoint.existing(run) == latest == resumed()
    with pytest.raises(UserError, match=r"training is missing: .* stripped.*set model\.checkpoint=.* another run\.dir"):
        load_training_state(latest)
    described.write_text("{")
    with pytest.raises(UserError, match=r"image/adapter_config\.json is missing or damaged"):
        checkpoint.existing(run)


@pytest.mark.parametrize("name", ["../../secret", "/dev/zero"])
def test_a_strangers_manifest_does_not_make_us_read_elsewhere(run, name):
    path = checkpoint.existing(run) / "manifest.json"
    path.write_text(json.dumps({"files": {name: {"size": 0, "sha256": ""}}}))
    with pytest.raises(UserError, match=r"manifest\.json is damaged: it lists"):
        checkpoint.existing(run)


def test_every_file_is_in_the_manifest_and_has_the_mode_of_the_umask(trained):
    latest = checkpoint.existing(trained)
    files = [path for path in latest.rglob("*") if path.is_file()]
    listed = json.loads((latest / checksums.MANIFEST).read_text())["files"]
    assert {path.relative_to(latest).as_posix() for path in files} == {*listed, "manifest.json"}
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o640"}


@pytest.mark.parametrize(("name", "head"), [("Qwen/Qwen3-0.6B", "base_model: Qwen/Qwen3-0.6B\n"), ("/home/me/llm", "")])
def test_the_card_names_a_base_model_of_the_hub_or_none(name, head):
    card = model_card(load(Config, None, [f"model.llm.name={name}"]), {}, 1, "unknown")
    assert card.startswith(f"---\n{head}library_name: anymal\n")


def test_the_card_names_the_llms_licence_and_the_recipe_keeps_what_was_set(tiny_llm, tmp_path):
    llm = tmp_path / "llm"
    shutil.copytree(tiny_llm, llm)
    (llm / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    encoders = make_encoders(tmp_path / "encoders")
    folder = make_checkpoint(llm, encoders, tmp_path / "of the LLM's card", 0, kinds=["image"])
    assert f"| LLM | {llm} | apache-2.0 |\n" in (folder / "README.md").read_text()
    assert checkpoint.recipe(folder).model.llm.license == ""
    folder = make_checkpoint(llm, encoders, tmp_path / "set", 0, "model.llm.license=mine", kinds=["image"])
    assert f"| LLM | {llm} | mine |\n" in (folder / "README.md").read_text()


def test_whatever_lies_beside_checkpoints_stops_neither_start_nor_save(run, arguments):
    place = run / "checkpoints"
    backup = shutil.copytree(place / "step-00000002", place / "step-00000002-old")
    (place / "step-00000005").write_text("a file")
    (place / "step-00000006").write_text("another, in the way")
    (place / "step-00000001" / "lora").mkdir(parents=True)  # half removed, as older versions did
    (place / "step-00000003" / "adapters").mkdir(parents=True)
    (place / ".tmp-step-00000008-1").mkdir()
    (place / ".tmp-latest-1").symlink_to("nowhere")
    (place / "notes.txt").write_text("mine")
    pretrain_here(None, *arguments, f"run.dir={run}", "optim.steps=6", "run.keep=2")
    kept = {"latest", "step-00000004", "step-00000006", "step-00000002-old", "step-00000005", "notes.txt"}
    assert {path.name for path in place.iterdir()} == kept
    assert checkpoint.existing(run).name == "step-00000006" and retention.is_whole(backup)


def test_a_kill_between_the_renames_of_a_save_loses_no_checkpoint(run, resumed):
    """The step is saved a second time: the first copy is aside, the second has not taken the name."""
    place = run / "checkpoints"
    shutil.rmtree(place / "step-00000002")
    (place / "step-00000004").rename(place / ".tmp-step-00000004-old")
    retention.clean(place)
    assert resumed().name == "step-00000004"


def test_a_copy_that_followed_links_goes_on(run, resumed, arguments):
    place = run / "checkpoints"
    (place / "latest").unlink()
    (place / "step-00000004").rename(place / "latest")
    retention.clean(place)
    assert resumed().name == "step-00000004"
    (place / "latest").unlink(missing_ok=True)
    shutil.copytree(place / "step-00000004", place / "latest")
    os.utime(place / "step-00000002" / "manifest.json")  # copied last
    retention.clean(place)
    assert resumed().name == "step-00000004"
    (place / "latest").unlink()
    shutil.copytree(place / "step-00000004", place / "latest")
    pretrain_here(None, *arguments, f"run.dir={run}", "optim.steps=5")
    assert checkpoint.existing(run).name == "step-00000005" and (place / "latest").is_symlink()
