"""Data preparation: the writer of shards, conversations, LLaVA's format, and what is held out.

The formats of the demo's models are in ``test_demo_formats.py``, its real packages in ``test_demo_packages.py``.
"""

import importlib
import io
import json
import os
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anymal.config.stages import Recipe, config_of, load_stages
from anymal.data.parse import parse
from anymal.data_prep.demo import assets as demo_assets
from anymal.data_prep.demo import conversations, instruments, moving_pictures, openmoji, smartwatch
from anymal.data_prep.demo import data as demo_data
from anymal.data_prep.demo import run as demo
from anymal.data_prep.demo.labelled import QUESTION, SPLITS, labelled_sample
from anymal.data_prep.sources import llava
from anymal.data_prep.steps import worker_pool
from anymal.data_prep.write import read_shards, write_shards
from anymal.errors import BudgetExceeded, UserError
from anymal.files import is_done, whole_folder

ROOM = Path(__file__).parents[2] / "data_prep"
SUFFIXES = {"jpg": "image", "flac": "audio", "imu.npy": "imu", "mp4": "video"}


def _pairs(count: int) -> list[dict]:
    return [
        labelled_sample(f"s{i:03d}", "imu", "imu.npy", np.full((4, 6), i, np.float32), f"number {i}")
        for i in range(count)
    ]


# Programs

PROGRAMS = [path for path in sorted(ROOM.rglob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_every_program_starts_from_the_console_script_and_says_what_it_sets(path, monkeypatch, capsys):
    module = importlib.import_module(".".join(["anymal", "data_prep", *path.relative_to(ROOM).with_suffix("").parts]))
    monkeypatch.setattr("sys.argv", [path.stem, "--help"])
    with pytest.raises(SystemExit) as ended:
        module.start()
    assert ended.value.code == 0 and "Settings:" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [path.stem, "no_such_setting=1"])
    with pytest.raises(SystemExit) as ended:
        module.start()
    assert ended.value.code == 2 and "no_such_setting" in capsys.readouterr().err


# Shards


def test_shards_are_split_ordered_and_readable(tmp_path):
    assert write_shards(tmp_path / "out", _pairs(5), per_shard=2) == 5
    assert [tar.name for tar in sorted((tmp_path / "out").iterdir())] == ["000000.tar", "000001.tar", "000002.tar"]
    found = list(read_shards(tmp_path / "out"))
    assert [sample["__key__"] for sample in found] == [f"s{i:03d}" for i in range(5)]
    assert found[3]["txt"] == b"number 3" and found[3]["json"] == {"label": "number 3"}
    assert np.array_equal(np.load(io.BytesIO(found[3]["imu.npy"])), np.full((4, 6), 3, np.float32))


def test_same_samples_give_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_shards(tmp_path / name, _pairs(3), per_shard=2)
    for tar in (tmp_path / "a").iterdir():
        assert tar.read_bytes() == (tmp_path / "b" / tar.name).read_bytes()


def test_a_failure_leaves_nothing_behind(tmp_path):
    def samples():
        yield from _pairs(3)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_shards(tmp_path / "out", samples(), per_shard=2)
    assert list(tmp_path.iterdir()) == []
    assert not is_done(tmp_path / "out")


@pytest.mark.parametrize(
    "samples",
    [
        [],
        [{"__key__": "a.b", "txt": "x"}],
        [{"__key__": "a", "txt": "x"}, {"__key__": "a", "txt": "y"}],
        [{"__key__": "a"}],
        [{"txt": "x"}],
    ],
)
def test_unusable_samples_are_refused(tmp_path, samples):
    with pytest.raises(UserError, match="out"):
        write_shards(tmp_path / "out", samples, per_shard=2)
    assert not (tmp_path / "out").exists()


def test_labelled_samples_are_read_as_pair_or_question(tmp_path):
    pair = labelled_sample("a", "image", "jpg", b"bytes", "animal", name="cat")
    asked = labelled_sample("b", "image", "jpg", b"bytes", "animal", options=["animal", "food"], name="cat")
    write_shards(tmp_path / "out", [pair, asked], per_shard=2)
    read = [{name: value for name, value in s.items() if name[0] != "_"} for s in read_shards(tmp_path / "out")]
    raw = [{name: json.dumps(v).encode() if name == "json" else v for name, v in sample.items()} for sample in read]
    first, second = (parse("0.tar", key, members, SUFFIXES) for key, members in zip("ab", raw, strict=True))
    assert first.answer() == second.answer() == "animal"
    assert [part.kind for part in first.messages[0].parts] == ["image"] and first.options == []
    assert [part.content for part in second.messages[0].parts] == [b"bytes", QUESTION]
    assert second.options == ["animal", "food"]


def test_whole_folder_is_readable_by_others(tmp_path):
    with whole_folder(tmp_path / "out") as temporary:
        (temporary / "file").write_text("x")
        (temporary / "file").chmod(0o600)
    assert (tmp_path / "out" / "file").stat().st_mode & 0o777 == (tmp_path / "out").stat().st_mode & 0o666


def test_whole_folder_is_as_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        with whole_folder(tmp_path / "out") as folder:
            (folder / "below").mkdir(mode=0o700)
            (folder / "below" / "weights").touch(mode=0o600)
    finally:
        os.umask(before)
    made = [tmp_path / "out", tmp_path / "out" / "below", tmp_path / "out" / "below" / "weights"]
    assert [path.stat().st_mode & 0o777 for path in made] == [0o750, 0o750, 0o640]


def test_worker_pool_keeps_the_order():
    with worker_pool(2) as pool:
        assert list(pool.map(abs, range(-5, 0), chunksize=2)) == [5, 4, 3, 2, 1]


# Downloads


def test_pins_are_the_eight_packages():
    assert len(demo_assets.pins()) == 8
    assert all(len(digest) == 64 for _, digest in demo_assets.pins().values())


def test_only_the_pinned_wheel_is_read(tmp_path, monkeypatch):
    import hashlib

    monkeypatch.setattr(demo_assets, "PINS", tmp_path / "pins.txt")
    (tmp_path / "wheels").mkdir()
    file = tmp_path / "wheels" / "some_package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("some/data.bin", b"content")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    demo_assets.PINS.write_text(f"some-package==1.0 --hash=sha256:{digest}\n")
    assert demo_assets.read("some-package", "some/data.bin", tmp_path) == b"content"
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(UserError, match="pinned is"):
        demo_assets.read("some-package", "some/data.bin", tmp_path)
    file.unlink()
    with pytest.raises(UserError, match="python data_prep/demo/assets"):
        demo_assets.read("some-package", "some/data.bin", tmp_path)


def test_cache_folder_comes_from_argument_environment_or_home(monkeypatch):
    monkeypatch.setenv("ANYMAL_CACHE", "/somewhere")
    assert demo_assets.cache_folder() == Path("/somewhere")
    assert demo_assets.cache_folder("/else") == Path("/else")
    monkeypatch.delenv("ANYMAL_CACHE")
    assert demo_assets.cache_folder() == Path.home() / ".cache/anymal/demo"


# What is held out


def test_held_out_pictures_share_no_word_with_others():
    names = {
        "animal": ["cat", "cat face", "owl", "whale", "spouting whale", "snake"],
        "plant": ["rose", "tulip", "fern"],
    }
    for kind in openmoji.KINDS:
        names.setdefault(kind, [f"one {kind}", f"lone{kind}", f"sole{kind}"])
    found = [
        openmoji.Picture(key=f"{number:x}", name=name, kind=kind)
        for number, (kind, name) in enumerate((kind, name) for kind, all_of in names.items() for name in all_of)
    ]
    splits = openmoji.split(found, 3, validation=1, test=1)
    assert len(splits["validation"]) == len(splits["test"]) == len(openmoji.KINDS)
    assert sorted(p.key for of in splits.values() for p in of) == sorted(p.key for p in found)
    assert {p.name for name in SPLITS[1:] for p in splits[name] if p.kind == "animal"} == {"owl", "snake"}
    assert openmoji.split(list(found), 3, validation=1, test=1) == splits
    assert any(openmoji.split(found, seed, validation=1, test=1) != splits for seed in range(4, 9))


def test_presets_that_share_recordings_are_one_instrument():
    recordings = {1: {10}, 2: {11}, 3: {12, 13}, 4: {10, 13}, 5: {14}}
    assert sorted(map(sorted, instruments.instruments_of(recordings, recordings.get))) == [[1, 3, 4], [2], [5]]


def _recordings(people: int) -> list[smartwatch.Recording]:
    motion = np.zeros((1, 6), np.float32)
    return [
        smartwatch.Recording(number=number, person=number % people, side="left", exercise="row", motion=motion)
        for number in range(3 * people)
    ]


def test_a_person_is_in_one_split():
    splits = smartwatch.split(_recordings(10), seed=0)
    people = {name: {recording.person for recording in splits[name]} for name in SPLITS}
    assert {name: len(found) for name, found in people.items()} == {"train": 5, "validation": 2, "test": 3}
    assert set().union(*people.values()) == set(range(10)) and sum(map(len, splits.values())) == 30
    assert len({str(smartwatch.split(_recordings(10), seed)["test"]) for seed in range(5)}) > 1


def test_data_of_another_seed_are_not_added_to(tmp_path):
    demo_data.claim(tmp_path / "data", 0)
    demo_data.claim(tmp_path / "data", 0)
    with pytest.raises(UserError, match="other splits than those of seed=1"):
        demo_data.claim(tmp_path / "data", 1)
    (tmp_path / "old" / "image" / "train").mkdir(parents=True)
    (tmp_path / "old" / "image" / "train" / "000000.tar").touch()  # made before there was validation
    with pytest.raises(UserError, match="other splits"):
        demo_data.claim(tmp_path / "old", 0)


def test_the_demo_of_another_seed_reads_and_writes_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("ANYMAL_CACHE", str(tmp_path))
    for seed, data, run in ((0, tmp_path / "data", "runs/demo"), (1, tmp_path / "data-1", "runs/demo-1")):
        steps = dict(demo.commands(tmp_path, demo.Settings(seed=seed)))
        for title in ("stage 1: projectors", "stage 2: projectors and LoRA"):
            _, recipe, *overrides = steps[title]
            (config,) = map(config_of, load_stages(Recipe, recipe, overrides))
            shards = {name: dataset.shards for name, dataset in config.data.datasets.items()}
            assert shards == {name: str(data / name / "train") for name in shards}
            assert config.model.modalities["imu"].encoder == str(data / "imu-encoder")
            assert Path(config.run.dir).parent == Path(run)
        assert config.model.checkpoint == f"{run}/pretrain"
        evaluated = [word for word in steps["evaluate"] if word.startswith("sets.")]
        assert len(evaluated) == 5 and all(word.endswith("/test") for word in evaluated)
        assert not any(word.endswith("/test") for title in steps if title != "evaluate" for word in steps[title])


def test_windows_are_balanced_and_inside():
    rng = np.random.default_rng(0)
    found = [
        smartwatch.Recording(
            number=number,
            person=1,
            side="left",
            exercise=exercise,
            motion=rng.normal(size=(1000, 6)).astype(np.float32),
        )
        for number, exercise in enumerate(smartwatch.EXERCISES.values())
    ]
    taken = smartwatch.windows(found, 4, stride=250, seed=0)
    assert len(taken) == 28 and len({(recording.number, start) for recording, start in taken}) == 28
    assert all(start % 250 == 0 and start + 250 <= 1000 for _, start in taken)
    with pytest.raises(UserError, match="there are 4 windows of pendulum swing; wanted are 5"):
        smartwatch.windows(found, 5, stride=250, seed=0)


# Moving pictures


def _centre_and_area(frame: Image.Image) -> tuple[float, float, int]:
    dark = np.asarray(frame.convert("L")) < 100
    rows, columns = np.nonzero(dark)
    return columns.mean(), rows.mean(), int(dark.sum())


@pytest.mark.parametrize("motion", moving_pictures.MOTIONS)
def test_clips_move_as_they_say(motion):
    import av

    square = Image.new("RGBA", (130, 130), (0, 0, 0, 255))
    clip = moving_pictures.encode(moving_pictures.move(square, motion, random.Random(1)), 8)
    assert clip == moving_pictures.encode(moving_pictures.move(square, motion, random.Random(1)), 8)
    with av.open(io.BytesIO(clip)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        frames = [frame.to_image() for frame in container.decode(video=0)]
    assert len(frames) == 16 and frames[0].size == (160, 160)
    (x0, y0, area0), (x1, y1, area1) = _centre_and_area(frames[0]), _centre_and_area(frames[-1])
    right, down, closer = moving_pictures.MOTIONS[motion]
    assert np.sign(round((x1 - x0) / 20)) == right and np.sign(round((y1 - y0) / 20)) == down
    assert area1 > 2 * area0 if closer > 0 else area1 < area0 / 2 if closer < 0 else abs(area1 / area0 - 1) < 0.4


def test_phrases_fill_the_clip_within_the_keys():
    notes = instruments.phrase(range(60, 72), 3.0, random.Random(0), melodic=True)
    assert notes == instruments.phrase(range(60, 72), 3.0, random.Random(0), melodic=True)
    assert 3 <= len(notes) <= 10 and all(0 <= start < 2.7 for start, *_ in notes)
    assert all(60 <= key <= 71 + 12 and 1 <= velocity <= 127 for _, _, key, velocity in notes)


# Conversations


def _media() -> list[conversations.Medium]:
    return [
        conversations.Medium(modality=modality, label=label, data=f"{modality} {label} {number}".encode())
        for modality, labels in {"image": "xy", "audio": "pqr", "imu": "mn", "video": "uvw"}.items()
        for label in labels
        for number in range(3)
    ]


def test_conversations_name_their_media_and_answers(tmp_path):
    made = list(conversations.make_conversations(_media(), 60, 0, "talk"))
    assert made == list(conversations.make_conversations(_media(), 60, 0, "talk"))
    assert {sample["json"]["form"] for sample in made} == set(conversations.FORMS)
    write_shards(tmp_path / "out", made, per_shard=20)
    modalities = set()
    for sample in read_shards(tmp_path / "out"):
        members = {name: value for name, value in sample.items() if name[0] != "_"}
        raw = members | {"json": json.dumps(members["json"]).encode()}
        parsed = parse("0.tar", sample["__key__"], raw, SUFFIXES)  # refuses media that nothing refers to
        kinds = [part.kind for message in parsed.messages for part in message.parts if part.kind != "text"]
        assert len(kinds) == len(members) - 1
        modalities.add(tuple(sorted(set(kinds))))
        assert parsed.messages[-1].parts[0].content in parsed.options
        if members["json"]["form"] == "in turn":
            media = [p.content for m in parsed.messages for p in m.parts if p.kind != "text"]
            answers = [m.parts[0].content for m in parsed.messages if m.role == "assistant"]
            assert [medium.decode().split()[1] for medium in media] == answers
    assert any(len(kinds) > 1 for kinds in modalities)


def test_conversations_need_every_modality(tmp_path):
    with pytest.raises(UserError, match="make the shards of image first"):
        conversations.read_media(tmp_path, "train")


# LLaVA's format


def _turn(speaker: str, value: str) -> dict:
    return {"from": speaker, "value": value}


def _llava(tmp_path, records: list, **overrides) -> Path:
    (tmp_path / "images").mkdir(exist_ok=True)
    for name in ("a.jpg", "b.PNG"):
        (tmp_path / "images" / name).write_bytes(name.encode())
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    file = tmp_path / "records.json"
    file.write_text(json.dumps(records))
    settings = {"json": file, "images": tmp_path / "images", "folder": tmp_path / "out"} | overrides
    llava.main([f"{name}={value}" for name, value in settings.items()])
    return tmp_path / "out"


ASKED = [_turn("human", "<image>\nWhat is this?"), _turn("gpt", "A cat.")]


def test_llava_records_become_conversations(tmp_path):
    both = [_turn("human", "Compare <image>\nand <image>."), _turn("gpt", "No.")]
    text = [_turn("system", "Be brief."), _turn("human", "Hello"), _turn("gpt", "Hi")]
    records = [
        {"id": 7, "image": "a.jpg", "conversations": ASKED},
        {"id": "two", "image": ["a.jpg", "b.PNG"], "conversations": both},
        {"id": "none", "conversations": text},
    ]
    one, two, none = read_shards(_llava(tmp_path, records))
    assert one["0.jpg"] == b"a.jpg" and one["json"]["id"] == "7"
    assert one["json"]["messages"] == [
        {"role": "user", "content": [{"type": "image", "member": "0.jpg"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]
    kinds = [part.get("member", part.get("text")) for part in two["json"]["messages"][0]["content"]]
    assert kinds == ["Compare ", "0.jpg", "and ", "1.png", "."] and two["1.png"] == b"b.PNG"
    assert [message["role"] for message in none["json"]["messages"]] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"image": "a.jpg", "conversations": [_turn("human", "What?"), _turn("gpt", "A cat.")]}, "0 <image> markers"),
        ({"conversations": ASKED}, "1 <image> markers for 0 images"),
        ({"image": "c.jpg", "conversations": ASKED}, "'c.jpg' is not in"),
        ({"image": "../secret.jpg", "conversations": ASKED}, "outside the folder"),
        ({"image": "a.gif", "conversations": ASKED}, "none of .jpg"),
        ({"image": 3, "conversations": ASKED}, "wanted is a path"),
        ({"image": "a.jpg", "conversations": ASKED[::-1]}, "the assistant last"),
        ({"image": "a.jpg", "conversations": [{"from": "human"}]}, "a turn is"),
        ({"conversations": [_turn("human", "hi"), _turn("gpt", "<image>")]}, "in what the assistant says"),
        ({"image": "a.jpg"}, 'no list "conversations"'),
        ("nonsense", 'no list "conversations"'),
    ],
)
def test_bad_llava_records_are_skipped_and_named(tmp_path, capsys, record, reason):
    good = {"id": "good", "image": "a.jpg", "conversations": ASKED}
    record = record | {"id": "bad"} if isinstance(record, dict) else record
    folder = _llava(tmp_path, [good, record], max_bad_share=0.5)
    assert len(list(read_shards(folder))) == 1
    (line,) = (tmp_path / "out.skipped.jsonl").read_text().splitlines()
    logged = json.loads(line)
    assert reason in logged["reason"] and logged["key"].startswith("record 1, id")
    assert "1 records skipped" in capsys.readouterr().out


def test_too_many_bad_llava_records_stop(tmp_path):
    with pytest.raises(BudgetExceeded, match="record 0, id x"):
        _llava(tmp_path, [{"id": "x"}], max_bad_share=0)
    assert not (tmp_path / "out").exists()


def test_llava_files_that_are_not_json_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n{"id": \n')
    with pytest.raises(UserError, match=r"a.jsonl, line 2 is not valid JSON"):
        llava.read_records(tmp_path / "a.jsonl")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UserError, match="wanted is a list"):
        llava.read_records(tmp_path / "a.json")
    with pytest.raises(UserError, match="there is no file"):
        llava.read_records(tmp_path / "b.json")


def test_a_second_run_does_nothing(tmp_path, capsys):
    _llava(tmp_path, [{"image": "a.jpg", "conversations": ASKED}])
    before = (tmp_path / "out" / "000000.tar").stat().st_mtime_ns
    _llava(tmp_path, [])
    assert (tmp_path / "out" / "000000.tar").stat().st_mtime_ns == before
    assert "is there already" in capsys.readouterr().out
