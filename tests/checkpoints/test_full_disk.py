"""A disk that fills, for real: a file system of 8 MB. One clear line, and nothing is lost or left behind."""

import errno
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from anymal.checkpoints import checkpoint, lock
from anymal.config.schema import RunConfig
from anymal.data import shards
from anymal.data.quarantine import Quarantine
from anymal.errors import UserError
from anymal.files import append_line, write_whole, writing
from anymal.training.tracking import Tracker
from small_runs import losses, make_encoders, pretrain_here, settings, write_pairs

SIZE = 8 << 20


@pytest.fixture
def disk(tmp_path):
    """The folder of a small file system."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, left: int = 0) -> Path:
    """Fill the file system but for about `left` bytes; returns the file that does so."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError as error:
            assert error.errno == errno.ENOSPC
        file.truncate(file.tell() - left)
    return path


def test_a_save_that_finds_no_room_leaves_the_last_checkpoint_and_nothing_else(tiny_llm, tmp_path, disk):
    data = write_pairs(tmp_path / "pairs", ["image"], shards=1)
    more = {"run__save_every": 2, "model__lora__rank": 4, "train": "[projectors,lora]"}
    given = settings(tiny_llm, make_encoders(tmp_path / "encoders"), disk / "run", data, ["image"], **more)
    pretrain_here(None, *given, "optim.steps=2")
    place = disk / "run/checkpoints"
    size = sum(path.stat().st_size for path in (place / "step-00000002").rglob("*"))
    for left in (size // 4, size // 2, size):  # where it happens: the projector, the optimizer, the tokenizer, ...
        filler = fill(disk, left)
        with pytest.raises(UserError, match=r"^[^\n]*/step-00000004 could not be written: the disk is full; make room"):
            pretrain_here(None, *given, "optim.steps=4")
        assert sorted(path.name for path in place.iterdir()) == ["latest", "step-00000002"]
        assert checkpoint.existing(disk / "run", training=True).name == "step-00000002"
        filler.unlink()
    pretrain_here(None, *given, "optim.steps=4")
    assert sorted(losses(disk / "run")) == [1, 2, 3, 4]
    assert checkpoint.existing(disk / "run", training=True).name == "step-00000004"


def test_figures_that_find_no_room_are_named(disk):
    with pytest.raises(UserError, match=r"metrics\.jsonl could not be written: the disk is full; make room, and start"):  # noqa: SIM117
        with Tracker(RunConfig(dir=str(disk)), {}, rank=0, steps=9) as tracker:
            tracker.log(1, {"loss": 1.0})
            tracker.table("samples", ["said"], [["word"]], 1)
            filler = fill(disk)
            with pytest.raises(UserError, match=r"samples\.jsonl could not be written: the disk is full"):
                tracker.table("samples", ["said"], [["word" * 10_000]], 2)
            for step in range(2, 1000):
                tracker.log(step, {"loss": 1.0})
    lines = (disk / "metrics.jsonl").read_text()
    assert lines.endswith("}\n") and all(map(json.loads, lines.splitlines()))
    with pytest.raises(UserError, match=r"metrics\.jsonl could not be written: the disk is full"):
        Tracker(RunConfig(dir=str(disk)), {}, rank=0, steps=9, start=1)
    filler.unlink()
    Tracker(RunConfig(dir=str(disk)), {}, rank=0, steps=9, start=1)
    assert sorted(path.name for path in disk.iterdir()) == ["metrics.jsonl", "samples.jsonl"]
    assert len((disk / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_quarantine_that_finds_no_room_is_named(disk):
    quarantine = Quarantine(disk / "quarantine.jsonl", max_in_a_row=10**6, max_share=1)
    quarantine.reject("a.tar", "1", "no picture")
    fill(disk)
    with pytest.raises(UserError, match=r"quarantine\.jsonl could not be written: the disk is full"):
        for key in range(1000):
            quarantine.reject("a.tar", str(key), "no picture" * 10)
    assert all(map(json.loads, (disk / "quarantine.jsonl").read_text().splitlines()))


def test_a_folder_that_finds_no_room_is_named(disk, tmp_path):
    """As a trained encoder that the next checkpoint takes over, where there are no hard links."""
    for name in "ab":
        (tmp_path / "from" / name).mkdir(parents=True)
        (tmp_path / "from" / name / "weights").write_bytes(bytes(SIZE))
    said = r"taken could not be written: the disk is full; make room"
    with pytest.raises(UserError, match=said), writing(disk / "taken"):
        shutil.copytree(tmp_path / "from", disk / "taken")


def test_a_recipe_is_written_whole_or_not_at_all(disk):
    write_whole(disk / "recipe.yaml", "a: 1\n")
    append_line(disk / "log", "one")
    fill(disk, 1 << 14)
    with pytest.raises(UserError, match=r"recipe\.yaml could not be written: the disk is full"):
        write_whole(disk / "recipe.yaml", "b: 2\n" * 10**5)
    with pytest.raises(UserError, match=r"log could not be written: the disk is full"):
        append_line(disk / "log", "two" * 10**5)
    assert (disk / "recipe.yaml").read_text() == "a: 1\n" and (disk / "log").read_text() == "one\n"
    assert sorted(path.name for path in disk.iterdir()) == ["filler", "log", "recipe.yaml"]


def test_a_lock_that_finds_no_room_is_named_and_holds_nobody_up(disk):
    filler = fill(disk)
    with pytest.raises(UserError, match=r"run\.lock could not be written: the disk is full"):
        lock.hold(disk).__enter__()
    filler.unlink()
    with lock.hold(disk):
        assert [path.name for path in disk.iterdir()] == [lock.LOCK]


def test_an_index_that_finds_no_room_is_said_and_made_in_memory(disk, monkeypatch, caplog):
    write_pairs(disk / "pairs", ["image"], shards=1)
    monkeypatch.setenv("ANYMAL_CACHE", str(disk / "cache"))
    filler = fill(disk)
    assert len(shards.index(str(disk / "pairs/000.tar"))) == 20
    assert "could not be written: No space left on device; it is made again at every start: make room" in caplog.text
    filler.unlink()
    assert not list(disk.rglob("*.tmp"))
    assert len(shards.index(str(disk / "pairs/000.tar"))) == 20
    assert (disk / "pairs/000.tar.index.json").is_file()
