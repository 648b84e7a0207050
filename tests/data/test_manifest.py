"""The manifest: what is known of many tars without opening them, and offsets that are loaded when they are needed."""

import json
import os
import shutil
from pathlib import Path

import pytest
from test_shards import pairs, write

from anymal.data import index_files, manifest, shards
from anymal.errors import UserError


@pytest.fixture
def tars(tmp_path):
    """Three tars of 3, 4 and 5 samples, and one that is none."""
    folder = tmp_path / "d"
    folder.mkdir()
    found = [str(write(folder / f"{n}.tar", pairs(n))) for n in (3, 4, 5)]
    (folder / "none.tar").write_text("no tar")
    manifest.forget()
    return [*found, str(folder / "none.tar")]


def counts(tars: list[str], **options) -> list[int]:
    return [len(shard) for shard in manifest.survey(tars, **options).values()]


def test_second_start_opens_no_tar_and_no_index(tars, monkeypatch):
    assert counts(tars, start=0.5) == [3, 4, 5, 0]
    opened, index = [], shards.index
    monkeypatch.setattr(shards, "index", lambda path: opened.append(path) or index(path))
    found = manifest.survey(tars)
    assert list(found) == tars
    assert [len(shard) for shard in found.values()] == [3, 4, 5, 0]
    assert opened == tars[3:]  # what is no tar is looked at again
    assert "is not a tar" in found[tars[3]].problem
    assert [found[tars[0]].name, found[tars[0]].path] == [tars[0]] * 2


def test_a_tar_that_changed_is_counted_again(tars):
    counts(tars)
    write(Path(tars[0]), pairs(6))
    os.utime(tars[1])
    assert counts(tars) == [6, 4, 5, 0]
    assert counts(tars) == [6, 4, 5, 0]
    os.unlink(tars[2])
    with pytest.raises(UserError, match=r"5\.tar cannot be read"):
        counts(tars)


def test_damaged_manifests_are_made_again(tars):
    counts(tars)
    place = Path(tars[0]).with_name(manifest.NAME)
    good = json.loads(place.read_text())
    assert good["tars"].keys() == {"3.tar", "4.tar", "5.tar"}
    for damaged in (
        "",
        "[",
        "[]",
        "[" * 10**6,
        "{}",
        *map(json.dumps, (good | {"version": 99}, good | {"tars": {"3.tar": 3}})),
    ):
        place.write_text(damaged)
        assert counts(tars) == [3, 4, 5, 0]
        assert json.loads(place.read_text()) == good


def test_folder_that_cannot_be_written_to(tars, tmp_path, monkeypatch):
    """A folder in the manifest's place: unlike permissions, that stops root as well."""
    monkeypatch.setenv("ANYMAL_CACHE", str(tmp_path / "cache"))
    Path(tars[0]).with_name(manifest.NAME).mkdir()
    counts(tars)
    (kept,) = (tmp_path / "cache" / "index").iterdir()
    known = json.loads(kept.read_text())
    known["tars"]["3.tar"][2] = 33  # shows that it is read
    kept.write_text(json.dumps(known))
    assert counts(tars) == [33, 4, 5, 0]


def test_offsets_are_loaded_when_they_are_read(tars, monkeypatch):
    found = list(manifest.survey(tars[:3]).values())
    assert not manifest._loaded
    monkeypatch.setattr(manifest, "_LOADED", 2)
    for shard in [*found, *found]:
        index = manifest.load(shard)
        read = [shards.read(shard.path, *index.place(i))[0] for i in range(len(shard))]
        assert read == [f"s{i:04d}" for i in range(len(shard))]
        assert len(manifest._loaded) <= 2
    assert manifest.load(found[2]) is manifest.load(found[2])
    shutil.copy(tars[1], tars[0])
    with pytest.raises(UserError, match="held 3 samples at the start, now it holds 4"):
        manifest.load(found[0])


def test_pipes_and_devices_in_the_place_of_a_manifest(tars, no_waiting, tmp_path, monkeypatch):
    monkeypatch.setenv("ANYMAL_CACHE", str(tmp_path / "cache"))
    place = Path(tars[0]).with_name(manifest.NAME)
    for make in (os.mkfifo, lambda place: os.symlink("/dev/null", place)):
        make(place)
        assert counts(tars) == [3, 4, 5, 0]
        place.unlink()


def test_an_index_that_disagrees_with_the_tar_is_made_again(tars):
    """It is plausible by itself: it lacks a sample."""
    (shard,) = manifest.survey(tars[1:2]).values()
    beside = Path(f"{tars[1]}.index.json")
    good = json.loads(beside.read_text())
    beside.write_text(json.dumps(good | {"blocks": [*good["blocks"][:2], *good["blocks"][3:]]}))
    assert len(shards.index(tars[1])) == 3
    manifest.forget()
    assert len(manifest.load(shard)) == 4
    assert json.loads(beside.read_text()) == good


@pytest.mark.parametrize("writable", [True, False])
def test_a_manifest_that_disagrees_with_the_tars_is_mended(tars, tmp_path, monkeypatch, writable):
    monkeypatch.setenv("ANYMAL_CACHE", str(tmp_path / "cache"))
    counts(tars)
    place = Path(tars[0]).with_name(manifest.NAME)
    wrong = json.loads(place.read_text())
    wrong["tars"]["4.tar"][2] = 40
    place.write_text(json.dumps(wrong))
    assert counts(tars) == [3, 40, 5, 0]
    if not writable:
        write_json = index_files.write_json
        monkeypatch.setattr(index_files, "write_json", lambda value, places: write_json(value, list(places)[1:]))
    shard = manifest.survey(tars)[tars[1]]
    with pytest.raises(UserError, match=r"4\.tar held 40 samples at the start, now it holds 4.*anymal\.index\.json"):
        manifest.load(shard)
    assert counts(tars) == [3, 4, 5, 0], "started again, as the message says, it is right"
    assert (json.loads(place.read_text()) == wrong) == (not writable)
