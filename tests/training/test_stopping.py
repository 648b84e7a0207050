"""What stops a run: signals, and a launcher that dies and leaves its ranks behind. The state is saved in any case."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from anymal import signals
from anymal.adapters import REGISTRY
from anymal.checkpoints import checkpoint
from anymal.checkpoints.state import load_training_state
from anymal.training.run import main
from small_runs import ROOT, environment, losses, make_encoders, settings, write_pairs


@pytest.fixture(scope="module")
def start(tiny_llm, tmp_path_factory):
    """Settings of a run that would last for minutes, given its folder."""
    encoders = make_encoders(tmp_path_factory.mktemp("encoders"))
    shards = write_pairs(tmp_path_factory.mktemp("pairs"), ["imu"])
    more = {"optim__steps": 5000, "run__save_every": 5000, "data__workers": 2}
    return lambda run: settings(tiny_llm, encoders, run, shards, ["imu"], **more)


@contextmanager
def piped() -> Iterator[int]:
    """The descriptor of a pipe that standard output is inside."""
    (_, pipe), before = os.pipe(), os.dup(1)
    os.dup2(pipe, 1)
    try:
        yield pipe
    finally:
        os.dup2(before, 1)
        os.close(before)


def wait_for(condition, process: subprocess.Popen | None = None, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert (process is None or process.poll() is None) and time.monotonic() < deadline
        time.sleep(0.05)


def assert_saved(run: Path) -> None:
    assert load_training_state(checkpoint.existing(run)).step == max(losses(run))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_finishes_the_step_saves_and_ends(start, tmp_path, number):
    before = [signal.getsignal(known) for known in signals._SIGNALS]

    def send() -> None:
        wait_for((tmp_path / "metrics.jsonl").exists)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    with piped() as pipe:
        assert main("", REGISTRY, ["train=[projectors]"], start(tmp_path)) == 1
        assert os.path.samestat(os.fstat(1), os.fstat(pipe))
    sender.join()
    assert_saved(tmp_path)
    assert not signals.stop_requested(), "what the process does next was not meant"
    assert [signal.getsignal(known) for known in signals._SIGNALS] == before


def leave(number: int) -> None:
    signals.leave_on_signals()
    os.kill(os.getpid(), number)
    time.sleep(10)


def ignore(number: int) -> None:
    signal.signal(number, signal.SIG_IGN)  # as nohup does
    signals.leave_on_signals()
    signals.note_signals()
    os.kill(os.getpid(), number)
    time.sleep(0.1)
    assert not signals.stop_requested()


def interrupt_twice(number: int) -> None:
    signals.note_signals()
    os.kill(os.getpid(), number)
    time.sleep(0.1)
    assert signals.stop_requested()
    try:
        os.kill(os.getpid(), number)
        time.sleep(10)
    except KeyboardInterrupt:
        os._exit(7)


UNDER_A_LAUNCHER = """
import os
from anymal import signals
signals.note_signals()
if pid := os.fork():
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
signals.note_signals()
os._exit(signals.stop_requested())
"""


def test_a_fork_of_a_rank_is_no_orphan():
    launcher = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {UNDER_A_LAUNCHER!r}]))"
    ended = subprocess.run([sys.executable, "-c", launcher, "torchrun"], env=environment() | {"RANK": "0"}, cwd=ROOT)
    assert ended.returncode == 0, "its parent is no launcher, but a rank"


@pytest.mark.parametrize(
    ("do", "number", "code", "says"),
    [
        (leave, signal.SIGTERM, 1, "error: stopped by SIGTERM before training began; start the same command again\n"),
        (leave, signal.SIGINT, 1, "error: stopped by SIGINT before training began; start the same command again\n"),
        (ignore, signal.SIGHUP, 0, ""),
        (interrupt_twice, signal.SIGINT, 7, ""),
    ],
)
def test_signals_at_other_times(capfd, do, number, code, says):
    process = multiprocessing.get_context("fork").Process(target=do, args=(number,))
    process.start()
    process.join()
    assert (process.exitcode, capfd.readouterr().err) == (code, says)


def ranks_of(run: Path) -> list[int]:
    """The processes that have a run's folder on their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if f"run.dir={run}" in entry.read_text().split("\0"):
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_ranks_whose_launcher_is_killed_save_and_end(start, tmp_path):
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [launcher, "--num_gpus", "2", "--no_local_rank", "--master_port", str(20000 + os.getpid() % 20000)]
    command += [ROOT / "launch/pretrain.py", *start(tmp_path)]
    env = environment() | {"PATH": f"{launcher.parent}:{os.environ['PATH']}"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(list(map(str, command)), env=env, cwd=ROOT, **quiet)
    wait_for((tmp_path / "metrics.jsonl").exists, process)
    process.terminate()  # it passes nothing on to its child, which holds the ranks
    process.wait()
    try:
        wait_for(lambda: not ranks_of(tmp_path), seconds=60)
    finally:
        for pid in ranks_of(tmp_path):
            os.kill(pid, signal.SIGKILL)
    assert_saved(tmp_path)
