"""What people run, as they run it: chat, evaluate, a new modality, hostile shards."""

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds

import smell
import tiny_encoders
from anymal.adapters import REGISTRY
from anymal.checkpoints import checkpoint, precision
from anymal.checkpoints.build import build
from anymal.config.command_line import run_program
from anymal.config.schema import LoraConfig
from anymal.errors import UserError
from anymal.model.generate import embed_prompt, generate
from anymal.model.llm import add_lora
from anymal.sample import Message, Part, Sample
from small_runs import ROOT, environment, losses, make_encoders, pretrain_here, python, settings, write_pairs

KINDS = ["image", "imu"]


@pytest.fixture(scope="module")
def trained(tiny_llm, tmp_path_factory) -> Path:
    """A run of a few steps on pictures and motion."""
    folder = tmp_path_factory.mktemp("trained")
    shards = write_pairs(folder / "pairs", KINDS)
    encoders = make_encoders(folder / "encoders")
    pretrain_here(None, *settings(tiny_llm, encoders, folder / "run", shards, KINDS, optim__steps=3))
    return folder / "run"


def test_chat_answers_interleaved_prompts(trained, tmp_path):
    picture, motion = tiny_encoders.picture(), tiny_encoders.npy(tiny_encoders.motion())
    (tmp_path / "a.png").write_bytes(picture)
    (tmp_path / "b.npy").write_bytes(motion)
    media = ["--image", str(tmp_path / "a.png"), "and", "--imu", str(tmp_path / "b.npy"), "what is this?"]
    said = python("launch/chat.py", f"checkpoint={trained}", "bits=32", "max_new_tokens=8", *media).stdout

    folder = checkpoint.existing(trained)
    built = build(checkpoint.recipe(folder, ["model.llm.bits=32"]), torch.device("cpu"), REGISTRY, start=folder)
    parts = [("image", picture), ("text", "and"), ("imu", motion), ("text", "what is this?")]
    message = Message(role="user", parts=[Part(kind=kind, content=content) for kind, content in parts])
    asked = built.prepare.decode(Sample(key="k", shard="s", messages=[message]))
    prompt = embed_prompt(built.model, built.prepare.prompt.question(asked))
    assert said.rstrip("\n") == generate(built.model, built.tokenizer, [prompt], max_new_tokens=8)[0].text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--smell", "x"], "there is no such modality; known are: image, video, audio, imu"),
        (["--image", "nowhere.png"], "'nowhere.png' is none"),
        ([], "nothing was asked"),
        (["hello", "checkpoint=nowhere"], "nowhere holds no checkpoint"),
        (["hello", "bitz=4", "checkpoint=nowhere"], "there is no setting bitz; did you mean bits?"),
    ],
)
def test_chat_says_what_is_wrong(trained, arguments, said):
    given = arguments if any("checkpoint" in a for a in arguments) else [f"checkpoint={trained}", *arguments]
    done = python("launch/chat.py", *given, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr


def test_programs_keep_others_future_warnings_to_themselves(tiny_llm):
    from transformers import AutoModelForCausalLM

    def main() -> None:
        add_lora(AutoModelForCausalLM.from_pretrained(tiny_llm), LoraConfig(rank=2))
        warnings.warn("of somebody else", FutureWarning, stacklevel=1)

    with warnings.catch_warnings(record=True) as caught, pytest.raises(SystemExit):
        warnings.simplefilter("default")
        run_program(main)
    shown = [str(warning.message) for warning in caught if issubclass(warning.category, FutureWarning)]
    assert shown == ["of somebody else"]


def test_evaluate_writes_figures_and_media(trained, tmp_path):
    colours = ["red", "green", "blue"]
    with wds.TarWriter(str(tmp_path / "test.tar")) as tar:
        for i in range(6):
            question = [{"type": "image", "member": "png"}, {"type": "text", "text": "what is this?"}]
            turns = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": [{"type": "text", "text": colours[i % 3]}]},
            ]
            described = {"messages": turns, "options": colours}
            tar.write({"__key__": f"t{i}", "png": tiny_encoders.picture(size=(40 + i, 40)), "json": described})
    given = [f"checkpoint={trained}", f"sets.image={tmp_path / 'test.tar'}", f"out={tmp_path / 'out'}"]
    done = python("launch/evaluate.py", *given, "bits=[4,32]", "media=4", "workers=1")
    evaluation = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert list(evaluation["precisions"]) == ["4", "32"]
    result = evaluation["precisions"]["4"]["image"]
    assert result["n"] == 6 and result["chance"] == pytest.approx(1 / 3)
    right = [p["choice"] == p["answer"] for p in result["predictions"]]
    assert len(right) == 4 and 0 <= sum(right) <= 6 * result["own"]["accuracy"]
    for prediction in result["predictions"]:
        number = int(prediction["key"].removeprefix("t"))
        (name,) = prediction["media"]
        assert (tmp_path / "out" / name).read_bytes() == tiny_encoders.picture(size=(40 + number, 40))
    assert "image" in done.stdout and evaluation["trained_parameters"] > 0
    lines = (tmp_path / "out" / "records.jsonl").read_text().splitlines()
    assert len(lines) == 6 * 3 * 2 and {json.loads(line)["bits"] for line in lines} == {4, 32}

    folder = checkpoint.existing(trained)
    assert precision.note(folder, 4, 4) == ""
    own = [evaluation["precisions"][bits]["image"]["own"]["accuracy"] for bits in ("4", "32")]
    assert f"image accuracy {own[0]:.0%} → {own[1]:.0%} (n=6)" in precision.note(folder, 4, 32)
    assert "was not measured yet" in precision.note(folder, 4, 8)
    assert "trained beside its LLM at 4 bits; at 32" in done.stderr, "said where it is loaded"


def test_a_new_modality_is_one_file_and_one_line(tiny_llm, tmp_path):
    """Copied packages, one file added, one line added: train, and see a hostile medium refused."""
    for package in ("anymal", "adapters", "launch", "data_prep"):
        shutil.copytree(ROOT / package, tmp_path / package, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "adapters" / "smell.py").write_text(Path(smell.__file__).read_text())
    registry = tmp_path / "adapters" / "__init__.py"
    registry.write_text(registry.read_text().replace('    "imu.modality",\n', '    "imu.modality",\n    "smell",\n'))
    rng = np.random.default_rng(0)
    with wds.TarWriter(str(tmp_path / "smells.tar")) as tar:
        for i in range(40):
            reading = rng.normal(size=3).astype(np.float32).tobytes() if i != 7 else b"short"
            tar.write({"__key__": f"s{i}", "smell": reading, "txt": "a rose"})
    arguments = settings(tiny_llm, tmp_path, tmp_path / "run", str(tmp_path / "smells.tar"), [], optim__steps=12)
    arguments += ["model.modalities.smell.encoder=none", "model.modalities.smell.options.strength=2"]
    program = [sys.executable, str(tmp_path / "launch" / "pretrain.py"), *arguments]
    env = environment() | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(program, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    curve = losses(tmp_path / "run")
    assert curve[12] < curve[1]
    refused = json.loads((tmp_path / "run" / "quarantine.jsonl").read_text())
    assert refused["key"] == "s7" and "holds 5 bytes, a smell has 12" in refused["reason"]


def test_hostile_shards_are_named_and_trained_through(tiny_llm, tmp_path):
    folder = tmp_path / "shards"
    write_pairs(folder, KINDS, shards=2, per_shard=40)
    good_png, good_imu = tiny_encoders.picture(), tiny_encoders.npy(tiny_encoders.motion())
    with_nan = tiny_encoders.motion()
    with_nan[3, 2] = np.nan
    two_for_one = {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "image"}]},
            {"role": "assistant", "content": "yes"},
        ]
    }
    pickled = tiny_encoders.npy(np.array([{"a": 1}], dtype=object), allow_pickle=True)
    hostile = {
        "renamed": {"jpg": b"this is a text, not a picture", "txt": "a"},
        "huge": {"png": tiny_encoders.png_header(60000, 60000), "txt": "a"},
        "nan": {"imu.npy": tiny_encoders.npy(with_nan), "txt": "a"},
        "counts": {"png": good_png, "json": two_for_one},
        "pickled": {"png": good_png, "txt": "a", "pth": b"\x80\x04."},
        "object": {"imu.npy": pickled, "txt": "a"},
        "wordless": {"imu.npy": good_imu},
    }
    with wds.TarWriter(str(folder / "hostile.tar")) as tar:
        for key, members in hostile.items():
            tar.write({"__key__": key, **members})
    whole = (folder / "000.tar").read_bytes()
    (folder / "truncated.tar").write_bytes(whole[: len(whole) // 3])
    (folder / "empty.tar").write_bytes(b"")
    encoders = make_encoders(tmp_path / "encoders")
    more = {"optim__steps": 40, "data__workers": 2, "data__max_bad_share": 0.3, "data__shuffle": 0, "run__samples": 4}
    pretrain_here(None, *settings(tiny_llm, encoders, tmp_path / "run", str(folder), KINDS, **more))
    assert len(losses(tmp_path / "run")) == 40
    lines = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    named = {line["key"] for line in lines if line["shard"].endswith("hostile.tar")}
    assert named == set(hostile)
    shards = {Path(line["shard"]).name for line in lines}
    assert shards == {"hostile.tar", "truncated.tar", "empty.tar"}
    assert all(line["reason"] for line in lines)


def test_a_budget_of_zero_stops_at_the_first_bad_sample(tiny_llm, tmp_path):
    folder = tmp_path / "shards"
    write_pairs(folder, KINDS, shards=1, per_shard=8)
    with wds.TarWriter(str(folder / "bad.tar")) as tar:
        tar.write({"__key__": "renamed", "jpg": b"not a picture", "txt": "a"})
    encoders = make_encoders(tmp_path / "encoders")
    more = {"optim__steps": 40, "data__max_bad_in_a_row": 0}
    arguments = settings(tiny_llm, encoders, tmp_path / "run", str(folder), KINDS, **more)
    with pytest.raises(UserError, match=r"bad\.tar, key 'renamed'"):
        pretrain_here(None, *arguments)
