"""How a stream fails: hostile shards, bad samples and their budget, workers that hang, err or die."""

import faulthandler
import io
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anymal.config.schema import DataConfig, DatasetConfig
from anymal.data.loader import each
from anymal.data.quarantine import Quarantine
from anymal.data.stream import Stream, merge_bookmarks
from anymal.errors import BadSample, BudgetExceeded, UserError
from anymal.sample import Sample, Tokens
from streams import (
    SUFFIXES,
    batches,
    folder,
    keys,
    listed,
    numbered,
    numbers,
    prepare,
    prepare_badly_by_thirds,
    stream,
    write,
)


def hang(sample: Sample) -> Tokens:
    time.sleep(600)


def miss_a_library(sample: Sample) -> Tokens:
    raise UserError("a library is not installed")


def picture(colour: int) -> bytes:
    written = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(written, "JPEG")
    return written.getvalue()


def hostile(path: Path, marker: Path) -> Path:
    """Two good shards, and every kind of bad one."""

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {marker}",))

    evil = pickle.dumps(Evil())
    objects = io.BytesIO()
    np.save(objects, np.array([Evil()], dtype=object), allow_pickle=True)
    image = {"type": "image"}
    text = {"type": "text", "text": "?"}
    messages = {"messages": [{"role": "user", "content": [image, text]}]}
    good = [{"__key__": f"good{i:02d}", "jpg": picture(i), "txt": f"{i}"} for i in range(30)]
    path.mkdir()
    write(path / "good.tar", good[:20])
    bad = [
        {"__key__": "textasjpg", "jpg": b"this is a text", "txt": "x"},
        {"__key__": "pickled", "jpg": picture(0), "txt": "x", "pyd": evil},
        {"__key__": "pickledpth", "jpg": picture(0), "txt": "x", "weights.pth": evil},
        {"__key__": "objectarray", "npy": objects.getvalue(), "txt": "x"},
        {
            "__key__": "toofew",
            "0.jpg": picture(0),
            "json": {"messages": [{"role": "user", "content": [image, image, text]}]},
        },
        {"__key__": "toomany", "0.jpg": picture(0), "1.jpg": picture(0), "json": messages},
        {"__key__": "badjson", "jpg": picture(0), "json": b"{"},
        {"__key__": "deepjson", "jpg": picture(0), "json": b"[" * 100_000},
        {"__key__": "nocaption", "jpg": picture(0)},
        {"__key__": "nomedium", "txt": "x"},
        {"__key__": "badtext", "jpg": picture(0), "txt": b"\xff\xfe\xff"},
        {"__key__": "halfjpg", "jpg": picture(0)[:300], "txt": "x"},
    ]
    mixed = [sample for pair in zip(good[20:], bad, strict=False) for sample in pair] + bad[10:]
    write(path / "mixed.tar", mixed)
    whole = write(path / "inmember.tar", [{"__key__": "cut0", "jpg": picture(0) * 9, "txt": "x"}]).read_bytes()
    (path / "inmember.tar").write_bytes(whole[:2000])
    write(path / "between.tar", [{"__key__": f"cut{i}", "jpg": picture(0), "txt": "x"} for i in (1, 2)])
    with tarfile.open(path / "between.tar") as tar:
        last = tar.getmembers()[-1].offset
    whole = (path / "between.tar").read_bytes()
    (path / "between.tar").write_bytes(whole[:last])
    (path / "empty.tar").touch()
    (path / "text.tar").write_text("this is not a tar\n" * 100)
    return path


NAMED = {
    ("mixed.tar", "textasjpg"): "UnidentifiedImageError",
    ("mixed.tar", "pickled"): "never unpickled",
    ("mixed.tar", "pickledpth"): "never unpickled",
    ("mixed.tar", "objectarray"): "allow_pickle=False",
    ("mixed.tar", "toofew"): "refers to 2 image members, it holds 1",
    ("mixed.tar", "toomany"): "refers to 1 image members, it holds 2",
    ("mixed.tar", "badjson"): "json is not valid",
    ("mixed.tar", "deepjson"): "nested too deeply",
    ("mixed.tar", "nocaption"): "has no text",
    ("mixed.tar", "nomedium"): "no medium",
    ("mixed.tar", "badtext"): "not UTF-8",
    ("mixed.tar", "halfjpg"): "OSError: ",
    ("inmember.tar", "cut0"): "cut or damaged",
    ("between.tar", "cut2"): "cut or damaged",
    ("empty.tar", ""): "is not a tar",
    ("text.tar", ""): "is not a tar",
}


@pytest.mark.parametrize("workers", [0, 2])
def test_hostile_shards_are_named_and_trained_through(tmp_path, workers):
    data, log = hostile(tmp_path / "d", tmp_path / "ran"), tmp_path / "quarantine.jsonl"
    for _ in range(2):  # the second run, as after a restart, lists nothing twice
        made = stream(data, path=log, workers=workers, batch_size=4)
        found = batches(made, 24)  # more than two epochs
        assert {key for batch in found for key in batch.keys} == {"cut1"} | {f"good{i:02d}" for i in range(30)}
        entries = {(Path(e["shard"]).name, e["key"]): e["reason"] for e in listed(log)}
        assert len(entries) == len(listed(log))
        assert entries.keys() == NAMED.keys()
        for place, says in NAMED.items():
            assert says in entries[place], (place, entries[place])
    assert not (tmp_path / "ran").exists()


def test_budget(tmp_path):
    data, log = hostile(tmp_path / "d", tmp_path / "ran"), tmp_path / "quarantine.jsonl"
    with pytest.raises(BudgetExceeded, match=r"empty\.tar"):
        stream(data, path=log, rows=0)
    assert len(listed(log)) == 1
    for unreadable in ("empty.tar", "text.tar"):
        (data / unreadable).unlink()
    log.unlink()
    with pytest.raises(BudgetExceeded, match=r"max_bad_in_a_row is 0"):
        batches(stream(data, path=log, rows=0, workers=2), 24)
    assert len(listed(log)) == 1
    with pytest.raises(BudgetExceeded):
        batches(stream(folder(tmp_path / "n", 9), with_=prepare_badly_by_thirds, share=0.0), 9)


def test_nothing_good_is_left(tmp_path):
    data = write(tmp_path / "a.tar", [{"__key__": f"{i}", "npy": np.zeros(1), "txt": "bad"} for i in range(5)])
    with pytest.raises(UserError, match="not one of the 5 samples is good"):
        batches(stream(data), 1)
    (tmp_path / "b.tar").touch()
    with pytest.raises(UserError, match="hold no sample"):
        stream(tmp_path / "b.tar")


def test_data_must_be_the_bookmarks(tmp_path):
    data = folder(tmp_path / "d", 5, 5)
    bookmark = merge_bookmarks([stream(data).bookmark])
    write(data / "001.tar", numbered(5, 6))
    with pytest.raises(UserError, match="had 10 samples in 2 shards, now 11 in 2"):
        stream(data, bookmark=bookmark)
    for wrong in ({"shards": None}, {"shards": "x", "datasets": {"a": DatasetConfig(shards="x")}}):
        with pytest.raises(UserError, match="one of them"):
            options = {"suffixes": SUFFIXES, "prepare": prepare, "seed": 0}
            Stream(DataConfig(**wrong), quarantine=Quarantine(None, max_in_a_row=0, max_share=0), **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_user_errors_of_a_decoder_stop_the_run(tmp_path, workers):
    with pytest.raises(UserError, match=r"^a library is not installed$"):
        batches(stream(folder(tmp_path / "d", 5), with_=miss_a_library, workers=workers), 1)


@pytest.mark.filterwarnings("error")  # the death of a worker that we kill is nobody else's news
def test_a_worker_that_hangs_stops_the_run(tmp_path):
    others = multiprocessing.active_children()  # of streams that another test left to the garbage collector
    with pytest.raises(UserError, match=r"sample \d \(counted from 0\) of .*000\.tar within data\.timeout = 1 s"):
        batches(stream(folder(tmp_path / "d", 5), with_=hang, workers=2, timeout=1), 1)
    assert set(multiprocessing.active_children()) <= set(others)


CRASH = """
import sys
sys.path[:0] = {tests!r}
from pathlib import Path
from streams import batches, folder, stream
from test_stream_faults import miss_a_library
batches(stream(Path({data!r}), with_=miss_a_library, workers=2), 1)
"""


def test_an_error_that_holds_the_loader_lets_the_process_end(tmp_path):
    """An uncaught exception keeps the loader alive until the very end, when multiprocessing waits for its workers."""
    folder(tmp_path / "d", 50)
    program = CRASH.format(tests=list(map(str, Path(__file__).parents[:2])), data=str(tmp_path / "d"))
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 1 and "a library is not installed" in ran.stderr


SIGNALS = {2: signal.SIGSEGV, 11: signal.SIGKILL}


def die_of_some(sample: Sample) -> Tokens:
    """A decoder that crashes over one sample, and one that the system kills over another."""
    if int(sample.key) in SIGNALS:
        faulthandler.disable()  # pytest's would report it
        os.kill(os.getpid(), SIGNALS[int(sample.key)])
    return prepare(sample)


def refuse_some(sample: Sample) -> Tokens:
    if int(sample.key) in SIGNALS:
        raise BadSample("simply bad")
    return prepare(sample)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_samples_that_kill_their_worker_are_bad_samples(tmp_path, workers):
    data, log = folder(tmp_path / "d", 7, 5, 9), tmp_path / "quarantine.jsonl"
    wanted = batches(stream(data, with_=refuse_some, workers=0), 14)
    found = batches(stream(data, path=log, with_=die_of_some, workers=workers), 14)  # two epochs
    assert [batch.keys for batch in found] == [batch.keys for batch in wanted]
    assert [batch.bookmark for batch in found] == [batch.bookmark for batch in wanted]
    assert all(numbers(a) == numbers(b) for a, b in zip(found, wanted, strict=True))
    reasons = {entry["key"]: entry["reason"] for entry in listed(log)}
    assert reasons == {
        "00002": "the decoder died (signal 11, SIGSEGV)",
        "00011": "its process was killed (signal 9, SIGKILL), probably for want of memory",
    }
    rest = stream(data, with_=die_of_some, workers=workers, bookmark=merge_bookmarks([found[4].bookmark]))
    assert keys(rest, 4) == [batch.keys for batch in wanted[5:9]]


def kill_self(sample: Sample) -> Tokens:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_loop_of_crashes_ends(tmp_path):
    with pytest.raises(BudgetExceeded, match=r"4 in a row.*SIGKILL"):
        batches(stream(folder(tmp_path / "d", 30), with_=kill_self, workers=2, rows=3), 1)


def read_or_die(i: int) -> int:
    if i == 1:
        os._exit(3)
    return i


def test_whoever_reads_something_else_says_what_stands_for_the_dead():
    data, dead = DataConfig(shards="x", workers=2), lambda i, reason: f"{i}: {reason}"
    found = list(each(3, read_or_die, data, on_crash=dead, name="a.tar"))
    assert found == [0, "1: the decoder ended its process (exit code 3)", 2]


def same(i: int) -> int:
    return i


def read_many() -> None:
    data = DataConfig(shards="x", workers=1, batch_size=8192)
    os._exit(0 if list(each(10_000, same, data, on_crash=None, name="a.tar")) == list(range(10_000)) else 1)


def test_a_batch_of_thousands_does_not_fill_the_pipes_from_both_ends():
    process = multiprocessing.get_context("fork").Process(target=read_many)
    process.start()
    process.join(20)
    process.kill()
    process.join()
    assert process.exitcode == 0


WITHOUT_FILES = """
import os, resource
from anymal.config.schema import DataConfig
from anymal.errors import UserError
from anymal.data.loader import each
data, other = DataConfig(shards="x", workers=3), DataConfig(shards="x", workers=1)
others = each(99, abs, other, on_crash=None, name="x")
next(others)
used = max(map(int, os.listdir("/proc/self/fd")))
for more in range(1, 9):
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + more, 10_000))
    try:
        list(each(9, abs, data, on_crash=None, name="a.tar"))
    except UserError as error:
        assert "a worker could not be started: Too many open files; try fewer" in str(error), error
    else:
        raise SystemExit("they were started")
"""


def test_workers_that_cannot_be_started_are_told_and_the_process_ends():
    command = [sys.executable, "-c", WITHOUT_FILES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def kill_once(sample: Sample) -> Tokens:
    with suppress(FileExistsError):
        Path(os.environ["ONCE"]).mkdir()
        os.kill(os.getpid(), signal.SIGKILL)
    return prepare(sample)


def test_a_worker_that_is_killed_by_chance_costs_nothing(tmp_path, monkeypatch):
    data, log = folder(tmp_path / "d", 20), tmp_path / "quarantine.jsonl"
    monkeypatch.setenv("ONCE", str(tmp_path / "once"))
    found = keys(stream(data, path=log, with_=kill_once, workers=2), 9)
    assert found == keys(stream(data), 9)
    assert (tmp_path / "once").exists() and not log.exists()


def test_long_reasons_are_cut(tmp_path):
    log = tmp_path / "quarantine.jsonl"
    with pytest.raises(BudgetExceeded) as raised:
        Quarantine(log, max_in_a_row=0, max_share=1).reject("a.tar", "k", "x" * 10**7)
    assert len(str(raised.value)) < 700 and len(listed(log)[0]["reason"]) == 300


def test_quarantine_survives_a_torn_line(tmp_path):
    log = tmp_path / "quarantine.jsonl"
    log.write_text('{"shard": "a", "key": "1", "reason": "x"}\n{"shard": "a", "ke')
    quarantine = Quarantine(log, max_in_a_row=9, max_share=1)
    for key in ("1", "2", "2"):
        quarantine.reject("a", key, "again")
    assert quarantine.bad == 3
    assert [json.loads(line)["key"] for line in log.read_text().splitlines() if line.endswith("}")] == ["1", "2"]
