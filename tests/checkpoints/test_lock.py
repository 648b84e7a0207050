"""One run to a folder: who holds the lock, when a dead holder's is taken, and that only one of many takes it."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anymal.adapters import REGISTRY
from anymal.checkpoints import lock
from anymal.config.schema import Config
from anymal.config.settings import load
from anymal.errors import UserError
from anymal.training.run import run_stage
from small_runs import ROOT, environment, make_encoders, settings, write_pairs

FORK = multiprocessing.get_context("fork")


def hold_until_killed(folder: Path) -> None:
    with lock.hold(folder):
        time.sleep(60)


def holding(folder: Path) -> multiprocessing.Process:
    """Another process that holds the lock of a folder."""
    process = FORK.Process(target=hold_until_killed, args=(folder,))
    process.start()
    deadline = time.monotonic() + 30
    while lock.holder(folder) is None or lock.holder(folder).pid != process.pid:
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    return process


def held_elsewhere(folder: Path, silent: float) -> None:
    """Leave a lock of a process on another node, which gave its last sign of life so many seconds ago."""
    known = {"job": "7", "host": "node9", "machine": "another", "pid": os.getpid(), "began": "1", "since": "noon"}
    path = folder / lock.LOCK
    path.write_text(json.dumps(known))
    os.utime(path, (time.time() - silent,) * 2)


def test_a_second_run_is_told_who_holds_the_folder_since_when_and_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    other = holding(tmp_path)
    try:
        said = rf"is in use: Slurm job 4711, process {other.pid} on {socket.gethostname()} trains there since \d{{4}}-"
        with pytest.raises(
            UserError, match=said + r".*UTC.*Wait for it or stop it, or choose another run\.dir.*remove"
        ):
            lock.hold(tmp_path).__enter__()
    finally:
        other.kill()
        other.join()


def test_the_lock_goes_with_its_holder_however_it_ends(tmp_path):
    with lock.hold(tmp_path / "run"):
        assert lock.holder(tmp_path / "run").pid == os.getpid()
    assert not list((tmp_path / "run").iterdir())
    with pytest.raises(ValueError), lock.hold(tmp_path / "run"):
        raise ValueError
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("reaped", [True, False])
def test_after_a_kill_the_next_start_does_not_wait(tmp_path, reaped):
    """Nor where nobody takes note of the dead, as in a container without an init."""
    other = holding(tmp_path)
    os.kill(other.pid, signal.SIGKILL)
    if reaped:
        other.join()
    else:
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    with lock.hold(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [lock.LOCK]
    other.join()


def test_what_was_left_by_a_kill_in_between_is_removed(tmp_path):
    for name in (f".{lock.LOCK}-node9-1", f".{lock.LOCK}-claim"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1, 1))
    held_elsewhere(tmp_path, silent=2 * lock.STALE)
    with lock.hold(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [lock.LOCK]


def test_a_pid_that_was_given_again_is_another_process(tmp_path):
    with lock.hold(tmp_path):
        known = json.loads((tmp_path / lock.LOCK).read_text())
    (tmp_path / lock.LOCK).write_text(json.dumps(known | {"began": "1"}))
    with lock.hold(tmp_path):
        pass


def beating(folder: Path) -> None:
    while True:
        os.utime(folder / lock.LOCK)
        time.sleep(0.1)


def test_of_another_node_only_the_signs_of_life_count(tmp_path):
    held_elsewhere(tmp_path, silent=2 * lock.STALE)
    with lock.hold(tmp_path):
        assert lock.holder(tmp_path).host == socket.gethostname()
    held_elsewhere(tmp_path, silent=lock.STALE / 2)
    other = FORK.Process(target=beating, args=(tmp_path,))
    other.start()
    try:
        with pytest.raises(
            UserError, match=r"Slurm job 7, process \d+ on node9 trains there since noon \(last .* 0 s ago"
        ):
            lock.hold(tmp_path).__enter__()
    finally:
        other.kill()
        other.join()


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"pid": 1, "more": 2}'])
def test_a_start_elsewhere_waits_until_the_dead_is_known_to_be_dead(tmp_path, monkeypatch, text):
    """As when Slurm starts a job again on another node; also if the lock itself says nothing."""
    monkeypatch.setattr(lock, "STALE", 2.0)
    held_elsewhere(tmp_path, silent=1)
    if text is not None:
        (tmp_path / lock.LOCK).write_text(text)
        os.utime(tmp_path / lock.LOCK, (time.time() - 1,) * 2)
    began = time.monotonic()
    with lock.hold(tmp_path):
        assert 0.5 < time.monotonic() - began < 20


def test_a_holder_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.02)
    with lock.hold(tmp_path):
        os.utime(tmp_path / lock.LOCK, (1, 1))
        deadline = time.monotonic() + 20
        while lock.holder(tmp_path).silent > 100:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_one_that_was_taken_for_dead_writes_no_more(tmp_path):
    with lock.hold(tmp_path):
        lock.require_no_other(tmp_path)
        held_elsewhere(tmp_path, silent=0)
        with pytest.raises(UserError, match=r"on node9 .* This run was taken for dead, and ends without saving"):
            lock.require_no_other(tmp_path)
    assert lock.holder(tmp_path).host == "node9"  # it is not ours to remove


def test_one_whose_lock_was_removed_writes_no_more(tmp_path):
    """Somebody took it for dead; by now another run may have trained there and ended."""
    with lock.hold(tmp_path):
        (tmp_path / lock.LOCK).unlink()
        with pytest.raises(UserError, match=r"run\.lock was removed while this run trained, which ends without saving"):
            lock.require_no_other(tmp_path)


def test_what_cannot_be_read_in_a_locks_place_is_named(tmp_path):
    (tmp_path / lock.LOCK).mkdir()
    with pytest.raises(UserError, match=r"run\.lock cannot be read: Is a directory"), lock.hold(tmp_path):
        pass


def contend(folder: Path, start, done, won) -> None:
    start.wait()
    try:
        with lock.hold(folder):
            with won.get_lock():
                won.value += 1
            done.wait()
    except UserError:
        done.wait()


def test_of_many_that_find_a_dead_lock_one_takes_it(tmp_path):
    for _ in range(5):
        held_elsewhere(tmp_path, silent=2 * lock.STALE)
        start, done, won = FORK.Barrier(8), FORK.Barrier(8), FORK.Value("i", 0)
        contenders = [FORK.Process(target=contend, args=(tmp_path, start, done, won)) for _ in range(8)]
        for process in contenders:
            process.start()
        for process in contenders:
            process.join(timeout=60)
        assert [process.exitcode for process in contenders] == [0] * 8 and won.value == 1
        assert not list(tmp_path.iterdir())


def test_a_run_takes_the_lock_before_it_loads_anything_and_gives_it_back(tiny_llm, tmp_path):
    shards = write_pairs(tmp_path / "pairs", ["image"], shards=1)
    given = settings(tiny_llm, make_encoders(tmp_path / "encoders"), tmp_path / "run", shards, ["image"])
    config = load(Config, None, [*given, "optim.steps=1"])
    (tmp_path / "run").mkdir()
    other = holding(tmp_path / "run")
    try:
        with pytest.raises(UserError, match="is in use"):
            run_stage(load(Config, None, [text.replace(str(tiny_llm), "/nowhere") for text in given]), REGISTRY)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [lock.LOCK]
    finally:
        other.kill()
        other.join()
    assert run_stage(config, REGISTRY) == 0
    assert lock.holder(tmp_path / "run") is None


_RANK = """
import sys
import torch.distributed
from anymal.errors import UserError
from anymal.config.command_line import run_program
from anymal.training.ranks import on_rank_0

rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
assert on_rank_0(lambda: "decided") == "decided"

def refuse():
    raise UserError("in use")

run_program(lambda: on_rank_0(refuse))
"""


@pytest.mark.slow
def test_where_rank_0_refuses_the_others_end_without_a_word(tmp_path):
    (tmp_path / "rank.py").write_text(_RANK)
    command = [sys.executable, str(tmp_path / "rank.py")]
    more = {"env": environment() | {"PYTHONPATH": str(ROOT)}, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path / "meeting")], **more) for rank in (0, 1)]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert "error: in use" in said[0] and "error" not in said[1].lower()
