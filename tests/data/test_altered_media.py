"""What is left out of media, or added to them, is counted and said."""

import io
import json
from contextlib import redirect_stdout

import pytest
import torch
import webdataset as wds

import tiny_encoders
from anymal.adapters import REGISTRY
from anymal.config.schema import Config
from anymal.config.settings import load
from anymal.data import listing
from anymal.data.packing import pack
from anymal.evaluation import run as evaluate
from anymal.features.encode import Encode, encode_all, frozen_encoders
from anymal.features.report import report
from anymal.sample import Features, Tokens
from anymal.serving import chat
from anymal.training.meter import Meter
from anymal.training.tracking import altered_media
from small_runs import losses, make_encoders, metrics, pretrain_here, settings, write_pairs

KINDS = ["image", "audio"]
CROPPED = "cropped to the middle 1 s"


@pytest.fixture(scope="module")
def trained(tiny_llm, tmp_path_factory):
    """A run over 10 pictures, and 10 sounds of 1.0 to 1.4 s of which 8 are longer than the encoder's second."""
    folder = tmp_path_factory.mktemp("trained")
    shards = write_pairs(folder / "pairs", KINDS, shards=1)
    said = io.StringIO()
    given = settings(tiny_llm, make_encoders(folder / "encoders"), folder / "run", shards, KINDS, optim__steps=5)
    with redirect_stdout(said):
        pretrain_here(None, *given)
    return folder / "run", said.getvalue()


def test_a_run_ends_with_what_it_did_not_see_whole(trained):
    run, said = trained
    assert f"media that are not as in their files: audio 8 of 10 {CROPPED}\n" in said
    media = json.loads((run / "throughput.json").read_text())["media"]
    assert media == {"audio": {"whole": 2, CROPPED: 8}, "image": {"whole": 10}}
    seen = [line.get("altered/audio", 0.0) for line in metrics(run)]
    assert any(seen) and all(0 <= share <= 1 for share in seen)
    assert not any("altered/image" in line for line in metrics(run))


def test_media_that_are_not_of_the_runs_modalities_are_ignored_and_counted(tiny_llm, tmp_path, capsys):
    """Clips and sounds beside pictures are nothing to a run that sees pictures alone: it trains as without them."""
    encoders, found = make_encoders(tmp_path / "encoders"), {}
    for also in (False, True):
        shards = tmp_path / str(also)
        shards.mkdir()
        with wds.TarWriter(str(shards / "000.tar")) as tar:
            for i in range(8):
                others = {"mp4": b"no clip", "0.wav": b"", "1.wav": b""} if also and i % 2 else {}
                picture = {"png": tiny_encoders.picture(size=(40 + i, 48)), "txt": f"number {i}"}
                tar.write({"__key__": f"{i}", **picture, **others})
        run = tmp_path / f"run-{also}"
        more = {"optim__steps": 4, "run__samples": 2, "run__save_every": 4}  # two epochs
        pretrain_here(None, *settings(tiny_llm, encoders, run, str(shards), ["image"], **more))
        said = capsys.readouterr().out
        assert not (run / "quarantine.jsonl").exists()
        found[also] = losses(run), json.loads((run / "throughput.json").read_text()).get("ignored")
        told = "media that were ignored, since this run does not have their modality: audio 16, video 8\n"
        assert said.count("ignored") == said.count(told) == also
    assert found[True][0] == found[False][0]
    assert (found[False][1], found[True][1]) == (None, {"audio": 16, "video": 8})


def test_evaluation_ignores_them_too(tmp_path):
    with wds.TarWriter(str(tmp_path / "a.tar")) as tar:
        for i in range(3):
            tar.write({"__key__": f"{i}", "png": b"a picture", "mp4": b"a clip", "txt": "x"})
    config = evaluate.EvaluateConfig(checkpoint="none", sets={"a": str(tmp_path)}, workers=0)
    found = list(evaluate.held_out(config, REGISTRY, "a", ["image"], evaluate.unchanged, 0))
    assert [([part.kind for part in one.media()], one.ignored) for one in found] == [(["image"], ["video"])] * 3
    kept = evaluate.write_media(config, REGISTRY, "a", ["image"], tmp_path / "media" / "a")
    assert sorted(name for names in kept.values() for name in names) == [f"media/a/000{i}-0.png" for i in range(3)]


def test_chat_says_it_too(trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "long.wav").write_bytes(tiny_encoders.sound(2.0))
    arguments = [f"checkpoint={trained[0]}", "max_new_tokens=1", "--audio", str(tmp_path / "long.wav"), "what is it?"]
    monkeypatch.setattr("sys.argv", ["chat.py", *arguments])
    chat.main("", REGISTRY)
    assert f"long.wav: {CROPPED}" in capsys.readouterr().err


def test_encoding_features_says_it_too(trained):
    config = load(Config, trained[0] / "recipe.yaml")
    encode, paths = (
        Encode(config.data, frozen_encoders(config, REGISTRY), REGISTRY.suffixes(), torch.device("cpu")),
        listing.expand(config.data.shards),
    )
    encode_all(encode, paths)
    said = "\n".join(report(encode.all_written(paths), encode.encoders, encode.suffixes, encode.precision))
    assert "audio: 10 media (8 cropped or filled up), 0 bad" in said and "image: 10 media, 0 bad" in said


def test_media_read_as_features_are_not_counted():
    def sample(key: str, medium, decoded) -> Tokens:
        runs = [("audio", 0, 1)]
        return Tokens(key=key, ids=[0, 5], labels=[-100, 5], runs=runs, media=[medium], decoded=decoded)

    raw, features = torch.zeros(4), Features(tensor=torch.zeros(2, 3))
    batch = pack([sample("a", raw, [("audio", CROPPED)]), sample("b", features, []), sample("c", raw, [("audio", "")])])
    assert batch.to("cpu").decoded == {("audio", CROPPED): 1, ("audio", ""): 1}
    meter = Meter()
    for _ in range(2):
        meter.add(batch, torch.ones(1, 2))
        assert meter.figures()["altered/audio"] == 0.5
    assert meter.summary()["media"] == {"audio": {"whole": 2, CROPPED: 2}}


def test_the_line_names_modalities_notes_and_numbers():
    media = {"audio": {"whole": 3688, CROPPED: 312}, "image": {"whole": 5}, "imu": {"filled up": 3, "cropped": 4}}
    assert altered_media(media) == f"audio 312 of 4,000 {CROPPED}; imu 3 of 7 filled up; imu 4 of 7 cropped"
    assert altered_media({"image": {"whole": 5}}) == ""
