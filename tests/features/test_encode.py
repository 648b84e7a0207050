"""The feature cache from end to end: written by the real program, read by the real stream, trained on by a stage."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
import webdataset as wds

import anymal.model.multimodal
from anymal.adapters import MODALITIES, REGISTRY
from anymal.checkpoints import checkpoint
from anymal.checkpoints.build import build_adapters
from anymal.checkpoints.state import load_training_state
from anymal.config.schema import Config, DataConfig, ModalityConfig, ProjectorConfig, PromptConfig
from anymal.config.settings import load
from anymal.config.stages import Recipe, config_of, load_stages
from anymal.data import feature_cache, feature_codec, listing, shards
from anymal.data.prepare import prepare
from anymal.data.quarantine import Quarantine
from anymal.data.stream import Stream
from anymal.errors import BadSample, UserError
from anymal.features.encode import Encode, encode_all, encode_stage, frozen_encoders
from anymal.features.report import report
from anymal.model.llm import load_llm
from anymal.model.multimodal import run_encoder
from anymal.sample import PartlyEncoded
from anymal.training.run import run_stage, run_stages
from small_runs import ROOT, environment, losses, make_encoders, settings, write_pairs
from tiny_encoders import ENCODERS, MEDIA, OPTIONS, decoded, picture

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def encoders(tmp_path_factory) -> Path:
    return make_encoders(tmp_path_factory.mktemp("encoders"))


def recipe(tiny_llm, encoders, folder: Path, data, kinds: list[str], **more) -> Config:
    return load(Config, None, settings(tiny_llm, encoders, folder, str(data), kinds, **more), ["train=[projectors]"])


def encode_data(config: Config) -> list[str]:
    """Encode all that the recipe's data lack; what the report says."""
    made, paths = encode_of(config), listing.expand(config.data.shards)
    encode_all(made, paths)
    return report(made.all_written(paths), made.encoders, made.suffixes, made.precision)


def encode_of(config: Config) -> Encode:
    return Encode(config.data, frozen_encoders(config, REGISTRY), REGISTRY.suffixes(), CPU)


def samples_of(path: str) -> list[tuple[str, dict[str, bytes]]]:
    index = shards.index(path)
    return [shards.read(path, *index.place(i)) for i in range(len(index))]


# ------------------------------------------------------------------------------------------------------- training


def test_training_is_the_same_and_goes_on_where_it_was_without_features(tiny_llm, encoders, tmp_path, monkeypatch):
    kinds = ["image", "imu"]
    data = write_pairs(tmp_path / "data", kinds)
    more = {"optim__steps": 6, "run__save_every": 3, "data__batch_size": 10}

    def run(name: str, **also) -> dict[int, float]:
        run_stage(recipe(tiny_llm, encoders, tmp_path / name, data, kinds, **more, **also), REGISTRY)
        return losses(tmp_path / name)

    whole = run("whole")
    encode_data(recipe(tiny_llm, encoders, tmp_path, data, kinds, data__features="float32"))
    assert run("never", data__features="never") == whole
    monkeypatch.setattr(anymal.model.multimodal, "run_encoder", None)  # with features of all tars no encoder runs
    assert run("cached") == whole
    cut = tmp_path / "whole" / "checkpoints"  # as if killed after step 3, before there were features
    shutil.rmtree(cut / "step-00000006")
    (cut / "latest").unlink()
    (cut / "latest").symlink_to("step-00000003")
    assert load_training_state(checkpoint.existing(tmp_path / "whole")).step == 3
    assert run("whole", data__workers=2) == whole
    with pytest.raises(TypeError):
        run("others", data__features="bf16")  # there are none: the encoders are called
    monkeypatch.undo()
    for precision, near in (("bf16", 2e-3), ("int8", 1e-2)):
        said = encode_data(recipe(tiny_llm, encoders, tmp_path, data, kinds, data__features=precision))
        rounded = run(precision, data__features=precision)
        assert rounded == pytest.approx(whole, rel=near) and rounded != whole
        assert any(line.startswith("image: 20 media, 0 bad") and f"as {precision}" in line for line in said)
    assert any("for 1,000 media: encoding again costs" in line for line in said)


def test_some_tars_have_features_and_others_not(tiny_llm, encoders, tmp_path):
    data = write_pairs(tmp_path / "data", ["image"], shards=3, per_shard=8)
    one = str(Path(data) / "001.tar")
    encode_data(recipe(tiny_llm, encoders, tmp_path / "run", one, ["image"], data__features="float32"))
    found = {}
    for wanted in ("never", "auto"):
        more = {"data__features": wanted, "data__batch_size": 6, "optim__steps": 5}
        run_stage(recipe(tiny_llm, encoders, tmp_path / wanted, data, ["image"], **more), REGISTRY)
        found[wanted] = losses(tmp_path / wanted)
    assert found["auto"] == found["never"]
    mixed = [row.collate().media["image"] for row in islice(stream_of(tiny_llm, encoders, data, "auto"), 8)]
    assert any(isinstance(media, PartlyEncoded) and media.raw is not None for media in mixed)


# -------------------------------------------------------------------------------------------------------- stages

STAGES = """
stages:
  - {name: align, train: [projectors]}
  - {name: learn, train: [projectors, encoders.image]}
  - {name: tune, train: [projectors]}
"""


def test_each_stage_is_encoded_with_the_weights_that_it_loads(tiny_llm, encoders, tmp_path, monkeypatch, capsys):
    data = write_pairs(tmp_path / "data", ["image"], shards=1, per_shard=8)
    path = tmp_path / "recipe.yaml"
    path.write_text(STAGES)
    given = settings(tiny_llm, encoders, tmp_path / "run", data, ["image"], optim__steps=1, data__features="float32")
    stages = load_stages(Recipe, path, given)

    def encode_stages() -> list[str]:
        for number, stage in enumerate(stages):
            encode_stage(stage, REGISTRY, stages[:number], CPU)
        return sorted(folder.name for folder in Path(data, "features").iterdir())

    assert len(encode_stages()) == 1
    said = capsys.readouterr().out
    assert said.index("its encoder learns") < said.index("yet to be trained by an earlier stage")
    run_stages([config_of(stage) for stage in stages], REGISTRY)
    assert len(encode_stages()) == 2
    monkeypatch.setattr(anymal.model.multimodal, "run_encoder", None)
    raw = losses(tmp_path / "run/tune")
    shutil.rmtree(tmp_path / "run/tune")
    run_stages([config_of(stages[2])], REGISTRY)
    assert losses(tmp_path / "run/tune") == raw
    with pytest.raises(UserError, match="holds no checkpoint"):
        frozen_encoders(load_stages(Recipe, path, [*given, "model.checkpoint=nowhere", "stage=tune"])[0], REGISTRY)


ALIGNED = """
stages:
  - {name: align, train: [projectors, encoders], model: {modalities: {image: {encoder: "${oc.env:ENCODERS}/image"}}}}
  - name: combine # the aligned encoder as one like any other, a fresh projector
    train: [projectors]
    model: {checkpoint: null, modalities: {image: {encoder: "${run.dir}/align/checkpoints/latest/encoders/image"}}}
"""


def test_an_encoder_that_an_earlier_stage_trains_is_encoded_once_it_is_there(
    tiny_llm, encoders, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("ENCODERS", str(encoders))
    data = write_pairs(tmp_path / "data", ["image"], shards=1, per_shard=8)
    path = tmp_path / "recipe.yaml"
    path.write_text(ALIGNED)
    tokens = {"model__modalities__image__projector__tokens": 4}
    given = settings(tiny_llm, encoders, tmp_path / "run", data, [], optim__steps=1, **tokens)
    align, combine = load_stages(Recipe, path, given)
    assert frozen_encoders(combine, REGISTRY, [align]) == {}
    assert "yet to be trained by an earlier stage" in capsys.readouterr().out
    run_stages([config_of(align)], REGISTRY)
    assert list(frozen_encoders(combine, REGISTRY, [align])) == ["image"]


def test_media_in_views_are_passed_over(tiny_llm, encoders, tmp_path, capsys):
    data = write_pairs(tmp_path / "data", ["image", "imu"], shards=1, per_shard=4)
    tiles = {"model__modalities__image__options__tiles": "2x2"}
    found = frozen_encoders(recipe(tiny_llm, encoders, tmp_path, data, ["image", "imu"], **tiles), REGISTRY)
    assert list(found) == ["imu"]
    assert "image: how many views" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- the stream over features


def stream_of(tiny_llm, encoders, data, wanted: str, *, log: Path | None = None, kinds=("image",)) -> Stream:
    _, tokenizer = load_llm(load(Config, None, [f"model.llm.name={tiny_llm}", "model.llm.bits=32"]).model.llm, CPU)
    modalities = {
        kind: ModalityConfig(
            encoder=str(encoders / kind), projector=ProjectorConfig(tokens=4), options=OPTIONS.get(kind, {})
        )
        for kind in kinds
    }
    adapters = build_adapters(REGISTRY, modalities, 64)
    return Stream(
        DataConfig(shards=str(data), batch_size=4, workers=0, features=wanted),
        suffixes=REGISTRY.suffixes(),
        modalities=list(kinds),
        prepare=prepare(tokenizer, adapters, PromptConfig(), 2048),
        quarantine=Quarantine(log, max_in_a_row=10**9, max_share=1),
        seed=0,
        encoders={kind: feature_codec.identity(adapter.encoder) for kind, adapter in adapters.items()},
    )


def write_hostile(folder: Path) -> Path:
    """Good samples among all kinds of bad ones, a tar that was cut, one that is none, one without media."""
    folder.mkdir()
    good = [{"__key__": f"good{i:02d}", "png": picture(size=(40 + i, 48)), "txt": f"n {i}"} for i in range(12)]
    asked = [{"type": "image", "member": "1.png"}, {"type": "image", "member": "0.png"}, {"type": "text", "text": "?"}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": "yes"}]
    bad = [
        {"__key__": "noimage", "jpg": b"no picture", "txt": "x"},
        {"__key__": "half", "png": picture()[:300], "txt": "x"},
        {"__key__": "nocaption", "png": picture()},
        {"__key__": "pickled", "png": picture(), "txt": "x", "pkl": b"\x80\x04N."},
        {"__key__": "badjson", "png": picture(), "json": b"{"},
        {"__key__": "second", "0.png": b"?", "1.png": b"!", "json": {"messages": messages}},
        {"__key__": "both", "0.png": picture(), "1.png": picture(), "json": {"messages": messages}},
        {"__key__": "sound", "wav": MEDIA["audio"](), "txt": "x"},
        {"__key__": "reserved", "txt": "<image>", "png": picture()},
        {"__key__": "theirs", "png.safetensors": feature_codec.dump_bad("theirs"), "png": picture(), "txt": "fine"},
        {"__key__": "onlytheirs", "safetensors": b"x"},
        {"__key__": "zipped", "txt.gz": b"\x1f\x8b\x08", "png": picture(), "txt": "x"},
    ]
    with wds.TarWriter(str(folder / "mixed.tar")) as tar:
        for pair in zip(good, bad, strict=True):
            for one in pair:
                tar.write(one)
    with tarfile.open(folder / "mixed.tar", "a") as tar:  # a name twice: the sample cannot be read
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("twice.txt"))
    with wds.TarWriter(str(folder / "words.tar")) as tar:
        tar.write({"__key__": "words", "json": {"messages": [{"role": "user", "content": "a"}, messages[1]]}})
    with wds.TarWriter(str(folder / "cut.tar")) as tar:
        for i in range(3):
            tar.write({"__key__": f"cut{i}", "png": picture(), "txt": "x"})
    whole = (folder / "cut.tar").read_bytes()
    (folder / "cut.tar").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "text.tar").write_text("no tar\n" * 100)
    return folder


def test_bad_samples_are_the_same_for_the_same_reasons(tiny_llm, encoders, tmp_path):
    data = write_hostile(tmp_path / "data")
    seen, logs = {}, {}
    for wanted in ("never", "float32"):
        if wanted == "float32":
            said = encode_data(recipe(tiny_llm, encoders, tmp_path, data, ["image"], data__features=wanted))
            assert said[0].startswith("image: 21 media, 4 bad"), said
        log = tmp_path / f"{wanted}.jsonl"
        stream = stream_of(tiny_llm, encoders, data, wanted, log=log)
        assert len(stream.feature_tars) == (2 if wanted == "float32" else 0)
        seen[wanted] = [(row.keys, row.bookmark, row.collate().ids.tolist()) for row in islice(stream, 14)]
        logs[wanted] = [json.loads(line) for line in log.read_text().splitlines()]
    assert seen["float32"] == seen["never"]
    assert logs["float32"] == logs["never"]
    bad = {entry["key"]: entry["reason"] for entry in logs["never"]}
    assert "duplicate" in bad["twice"] and "cut or damaged" in bad["cut1"] and "b'!'" in bad["second"]
    media, texts = {"noimage", "half", "second"}, {"nocaption", "badjson", "reserved", "pickled", "onlytheirs", "sound"}
    assert set(bad) == media | texts | {"twice", "cut1", ""}


@pytest.mark.parametrize(
    ("factor", "reason"), [(1e12, "hold values up to"), (torch.inf, "hold NaN or infinite values")]
)
def test_features_that_no_projector_computes_with_are_bad(tiny_llm, encoders, tmp_path, factor, reason):
    data = write_pairs(tmp_path / "data", ["image"], shards=1, per_shard=2)
    encode = encode_of(recipe(tiny_llm, encoders, tmp_path, data, ["image"]))
    encode.encoders["image"].register_forward_hook(lambda encoder, media, made: made * factor)
    paths = listing.expand(data)
    encode_all(encode, paths)
    for _, members in samples_of(encode.all_written(paths)[paths[0]].path):
        stored = next(member for name, member in members.items() if name.endswith(feature_codec.ENDING))
        with pytest.raises(BadSample, match=f"the encoder's features {reason}"):
            feature_codec.load(stored, 4, 4)


def test_feature_tars_that_do_not_fit_are_not_used(tiny_llm, encoders, tmp_path):
    data = Path(write_pairs(tmp_path / "data", ["image"], shards=1, per_shard=6))
    tar = shards.index(str(data / "000.tar"))
    encode = encode_of(recipe(tiny_llm, encoders, tmp_path, data, ["image"]))
    encode_all(encode, [tar.path])
    mine = encode.identities
    cached = Path(encode.written(tar.path).path)
    assert cached.parent == data / "features" / f"image-{mine['image']}.bf16"
    assert set(feature_cache.find_all([tar], mine, "auto")) == {tar.path}
    assert set(feature_cache.find_all([tar], mine | {"imu": "0" * 16}, "bf16")) == {tar.path}
    for others, precision in (({"image": "0" * 16}, "auto"), ({}, "auto"), (mine, "int8"), (mine, "never")):
        assert not feature_cache.find_all([tar], others, precision)
    with pytest.raises(AssertionError):  # a new modality: the tar may hold some of it, so it is looked at again
        assert encode_of(recipe(tiny_llm, encoders, tmp_path, data, ["image", "imu"])).written(tar.path)
    good = cached.read_bytes()
    cached.write_bytes(good[: len(good) // 2])
    assert not feature_cache.find_all([tar], mine, "auto")  # cut
    cached.write_bytes(good[:512] + bytes(feature_cache.HEADER_SIZE) + good[512 + feature_cache.HEADER_SIZE :])
    assert not feature_cache.find_all([tar], mine, "auto")  # not finished
    cached.write_bytes(good)
    assert feature_cache.find_all([tar], mine, "auto")
    stamp = os.stat(tar.path)
    os.utime(tar.path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    assert not feature_cache.find_all([tar], mine, "auto")  # stale
    encode_all(encode, [tar.path])
    assert feature_cache.find_all([tar], mine, "auto")


def test_where_the_data_cannot_be_written_to_features_lie_in_the_cache(tiny_llm, encoders, tmp_path, monkeypatch):
    monkeypatch.setenv("ANYMAL_CACHE", str(tmp_path / "cache"))
    data = Path(write_pairs(tmp_path / "data", ["imu"], shards=1, per_shard=4))
    (data / "features").touch()  # no folder can be made; root could write into one without permission
    encode_data(recipe(tiny_llm, encoders, tmp_path, data, ["imu"]))
    stream = stream_of(tiny_llm, encoders, data, "auto", kinds=("imu",))
    (cached,) = stream.feature_tars.values()
    assert cached.path.startswith(str(tmp_path / "cache/features/"))
    assert isinstance(next(iter(stream)).collate().media["imu"], PartlyEncoded)


@pytest.mark.parametrize("name", MODALITIES)
def test_every_modality(tiny_llm, name, tmp_path):
    kind, make = next(iter(ENCODERS[name].items()))
    encoder = Path(make(tmp_path / name))
    options = {f"model__modalities__{name}__options__{key}": value for key, value in OPTIONS.get(name, {}).items()}
    (tmp_path / "data").mkdir()
    suffix = {"image": "png", "video": "mp4", "audio": "wav"}.get(name, MODALITIES[name].suffixes[0])
    with wds.TarWriter(str(tmp_path / "data" / "a.b.tar")) as tar:
        for i in range(3):
            tar.write({"__key__": f"deep/{i}", f"0.{suffix}": MEDIA[name](), f"1.{suffix}": b"?", "txt": f"{i}"})
    more = {"data__features": "float32", **options}
    encode = encode_of(recipe(tiny_llm, tmp_path, tmp_path, tmp_path / "data", [name], **more))
    encode_all(encode, [str(tmp_path / "data" / "a.b.tar")])
    assert encoder.exists() and kind
    held = samples_of(encode.written(str(tmp_path / "data" / "a.b.tar")).path)
    assert [(key, list(members)) for key, members in held] == [
        (f"deep/{i}", [f"0.{suffix}.safetensors", f"1.{suffix}.safetensors", "txt"]) for i in range(3)
    ]
    one = encode.encoders[name]
    exact = run_encoder(one, torch.stack([decoded(one.decode, MEDIA[name]())] * 3), CPU)[0]
    for _, members in held:
        assert torch.equal(feature_codec.load(members[f"0.{suffix}.safetensors"], one.tokens, one.width), exact)
        with pytest.raises(ValueError, match=r"b'\?'"):
            feature_codec.load(members[f"1.{suffix}.safetensors"], one.tokens, one.width)


# ------------------------------------------------------------------------------------------------------ processes


def test_a_file_is_claimed_by_one_process_and_free_when_that_dies(tmp_path):
    path = str(tmp_path / "x.partial")
    program = (
        "import sys, time; from anymal.data import feature_cache\n"
        "with feature_cache.claim(sys.argv[1], wait=False) as file:\n"
        "    file.write(b'half'); file.flush(); print('mine', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert holder.stdout.readline() == "mine\n"
    with feature_cache.claim(path, wait=False) as file:
        assert file is None and Path(path).read_bytes() == b"half"
    holder.kill()
    holder.wait()
    with feature_cache.claim(path, wait=False) as file:
        assert file is not None and Path(path).read_bytes() == b""
        with feature_cache.claim(path, wait=False) as second:
            assert second is None
        os.replace(path, tmp_path / "x.tar")
    with feature_cache.claim(path, wait=True) as file:
        assert file is not None  # a new one: what was renamed is left alone
    assert (tmp_path / "x.tar").exists()


@pytest.mark.slow
def test_killed_and_started_twice_every_tar_is_encoded_once(tiny_llm, encoders, tmp_path):
    data = Path(write_pairs(tmp_path / "data", ["image"], shards=6, per_shard=60))
    arguments = settings(tiny_llm, encoders, tmp_path, str(data), ["image"], data__features="float32")
    command = [sys.executable, str(ROOT / "launch/encode.py"), *arguments]
    options = {"env": environment(), "cwd": ROOT, "text": True}
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
    deadline = time.monotonic() + 120
    while not list(data.glob("features/image-*.float32/*.tar")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    first.kill()
    first.wait()
    kept = {tar.name: tar.stat().st_mtime_ns for tar in data.glob("features/image-*.float32/*.tar")}
    assert 1 <= len(kept) < 6
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) for _ in range(2)]
    said = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    counts = [int(line.split()[0]) for out, _ in said for line in out.splitlines() if "encoded by this process" in line]
    assert sum(counts) == 6 - len(kept) and len(counts) == 2
    made = sorted(data.glob("features/image-*.float32/*.tar"))
    assert [tar.name for tar in made] == [f"{i:03d}.tar" for i in range(6)]
    assert all(tar.stat().st_mtime_ns == kept[tar.name] for tar in made if tar.name in kept)
    assert not list(data.glob("features/.*.partial"))
    assert all(len(samples_of(str(tar))) == 60 for tar in made)
    assert "image: 360 media, 0 bad" in said[0][0]
