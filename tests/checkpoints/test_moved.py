"""An LLM or an encoder that lies elsewhere by now is named anew wherever a checkpoint is read; another is refused."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import webdataset as wds

import anymal.checkpoints.mix
import anymal.evaluation.run
import anymal.serving.chat
import tiny_encoders
from anymal.adapters import REGISTRY
from anymal.checkpoints import checkpoint
from anymal.checkpoints.build import build
from anymal.checkpoints.joined import find_start
from anymal.config.schema import Config, LLMConfig
from anymal.config.settings import load
from anymal.errors import UserError
from anymal.model.llm import load_llm
from conftest import make_llm
from small_runs import make_checkpoint, settings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def moved(tmp_path_factory) -> dict[str, Path]:
    """Two checkpoints with a LoRA each, whose LLM and encoder have moved."""
    folder = tmp_path_factory.mktemp("moved")
    llm, encoder = make_llm(folder / "old" / "llm"), tiny_encoders.clip(folder / "old" / "image")
    runs = [
        make_checkpoint(llm, Path(encoder).parent, folder / f"run-{seed}", seed, kinds=["image"]) for seed in range(2)
    ]
    (folder / "old").rename(folder / "new")
    other = make_llm(folder / "other" / "llm", seed=1).parent
    tiny_encoders.clip(other / "image", seed=1)
    return {"a": runs[0], "b": runs[1], "old": folder / "old", "new": folder / "new", "other": other}


def names(folder: Path) -> list[str]:
    return [f"model.llm.name={folder / 'llm'}", f"model.modalities.image.encoder={folder / 'image'}"]


def program(module, monkeypatch, *arguments: str) -> None:
    """What the program does, in this process."""
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    module.main("") if module is anymal.checkpoints.mix else module.main("", REGISTRY)


def test_chat_and_evaluate_take_the_new_place(moved, monkeypatch, tmp_path, capsys):
    picture = tmp_path / "a.png"
    picture.write_bytes(tiny_encoders.picture())
    asked = [f"checkpoint={moved['a']}", "max_new_tokens=4", "--image", str(picture), "model?"]
    program(anymal.serving.chat, monkeypatch, *asked, *names(moved["new"]))
    assert capsys.readouterr().out

    turns = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "red"}]
    with wds.TarWriter(str(tmp_path / "test.tar")) as tar:
        tar.write(
            {"__key__": "t", "png": picture.read_bytes(), "json": {"messages": turns, "options": ["red", "blue"]}}
        )
    given = [f"checkpoint={moved['a']}", f"sets.x={tmp_path / 'test.tar'}", f"out={tmp_path / 'out'}"]
    program(anymal.evaluation.run, monkeypatch, *given, *names(moved["new"]), "model.llm.bits=16", "max_new_tokens=0")
    assert list(json.loads((tmp_path / "out" / "evaluation.json").read_text())["precisions"]) == ["16"]
    for module, arguments in ((anymal.serving.chat, asked), (anymal.evaluation.run, given)):
        with pytest.raises(UserError, match=r"no folder .*old/llm; .*give model\.llm\.name=FOLDER"):
            program(module, monkeypatch, *arguments)
        with pytest.raises(
            UserError, match=r"there is no .*old/image; if it was moved, give model\.modalities\.image\."
        ):
            program(module, monkeypatch, *arguments, names(moved["new"])[0])
        with pytest.raises(UserError, match=r"'nam' not in 'LLMConfig'.*Did you mean: 'name'"):
            program(module, monkeypatch, *arguments, "model.llm.nam=x")


@pytest.mark.parametrize(("place", "what"), [(0, "an LLM"), (1, "an encoder")])
def test_another_than_the_one_that_moved_is_refused(moved, place, what):
    given = names(moved["new"])
    given[place] = names(moved["other"])[place]
    with pytest.raises(UserError, match=f"this projector was trained on {what} with other weights"):
        build(checkpoint.recipe(moved["a"], given), CPU, REGISTRY, start=moved["a"])


def test_mix_takes_the_new_place_and_hands_it_on(moved, monkeypatch, tmp_path):
    given = [f"a={moved['a']}", f"b={moved['b']}", f"out={tmp_path / 'out'}"]
    with pytest.raises(UserError, match=r"give model\.llm\.name=FOLDER"):
        program(anymal.checkpoints.mix, monkeypatch, *given)
    program(anymal.checkpoints.mix, monkeypatch, *given, *names(moved["new"]))
    described = json.loads((tmp_path / "out" / "adapters" / "image" / "adapter_config.json").read_text())
    assert (described["llm"], described["encoder"]) == (str(moved["new"] / "llm"), str(moved["new"] / "image"))
    build(checkpoint.recipe(tmp_path / "out"), CPU, REGISTRY, start=tmp_path / "out")


def test_checkpoints_from_before_and_after_a_move_are_mixed(moved, monkeypatch, tmp_path):
    c = make_checkpoint(moved["new"] / "llm", moved["new"], tmp_path / "c", 2, kinds=["image"])
    given = [f"a={moved['a']}", f"b={c}", f"out={tmp_path / 'out'}"]
    program(anymal.checkpoints.mix, monkeypatch, *given, *names(moved["new"]))
    assert checkpoint.recipe(tmp_path / "out").model.llm.name == str(moved["new"] / "llm")


def test_a_next_stage_names_the_new_place(moved, tmp_path):
    given = settings(moved["new"] / "llm", moved["new"], tmp_path / "run", "x", ["image"])
    config = load(Config, None, [*given, f"model.checkpoint={moved['a']}", "model.lora.rank=4", "model.lora.alpha=8"])
    build(config, CPU, REGISTRY, start=find_start(config.model))


def test_networks_that_were_trained_need_not_be_where_they_came_from(tmp_path):
    """Their weights are in the checkpoint: a folder that is gone may be named anew, one that is there may not."""
    llm = make_llm(tmp_path / "old" / "llm")
    tiny_encoders.clip(tmp_path / "old" / "image")
    trained = "train=[projectors,llm,encoders]"
    folder = make_checkpoint(llm, tmp_path / "old", tmp_path / "run", 0, trained, kinds=["image"])
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    with pytest.raises(UserError, match=r"model\.llm\.name is .*new/llm, but .* was trained from .*old/llm"):
        build(checkpoint.recipe(folder, names(tmp_path / "new")), CPU, REGISTRY, start=folder)
    shutil.rmtree(tmp_path / "old")
    build(checkpoint.recipe(folder), CPU, REGISTRY, start=folder)
    build(checkpoint.recipe(folder, names(tmp_path / "new")), CPU, REGISTRY, start=folder)


def test_an_llm_is_known_at_every_precision(tiny_llm, tmp_path):
    digests = {load_llm(LLMConfig(name=str(tiny_llm), bits=bits), CPU)[0].weights_digest for bits in (4, 8, 16, 32)}
    other = make_llm(tmp_path / "other", seed=1)
    digests |= {load_llm(LLMConfig(name=str(other), bits=bits), CPU)[0].weights_digest for bits in (4, 16)}
    assert len(digests) == 2
