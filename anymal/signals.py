"""Signal handlers: what asks a run to stop gracefully, with a checkpoint.

SIGTERM and SIGUSR1 (launchers, Slurm's preemption and time limit), SIGINT (Ctrl-C), SIGHUP (the terminal is gone), or a
launcher that died and left its ranks behind. While a run starts, a signal ends it; in training the loop asks
`stop_requested` after each step.
"""

import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_LAUNCHERS = ("deepspeed", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run")
_noted: list[int] = []  # signals that came; kept between stages, so that one that comes as a stage ends stops the next
_outputs: dict[int, int] = {}  # descriptor → a copy of what it was, before the terminal was gone


def leave_on_signals() -> None:
    """From now on, until `note_signals`, a signal ends the process with one line and exit code 1."""
    _launchers(os.getpid())
    _handle_by(_leave)


def note_signals() -> None:
    """From now on a signal is noted for `stop_requested`. A second SIGINT interrupts at once."""
    _launchers(os.getpid())
    _handle_by(_note)


def stop_requested() -> bool:
    """Whether the run was asked to stop."""
    return bool(_noted) or _is_orphan()


@contextmanager
def handlers_restored() -> Iterator[None]:
    """Inside, `note_signals` may be called; afterwards handlers and outputs are as before, and no signal is noted.

    A program that called `leave_on_signals` ends next: its handlers stay.
    """
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler not in (None, _leave, signal.getsignal(number)):  # None: set by C code, which must set it again
                signal.signal(number, handler)
        _noted.clear()
        if _outputs:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        while _outputs:
            output, copy = _outputs.popitem()
            os.dup2(copy, output)
            os.close(copy)


def _handle_by(handler: Callable) -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup does, and shells with jobs in the background
            signal.signal(number, handler)


def _leave(number: int, _: object) -> None:
    # At once: an exception could be caught by whatever is being loaded, and there is nothing to save.
    name = signal.Signals(number).name
    os.write(2, f"error: stopped by {name} before training began; start the same command again\n".encode())
    os._exit(1)


def _note(number: int, _: object) -> None:
    _noted.append(number)
    if number == signal.SIGINT:
        signal.signal(number, signal.default_int_handler)
    if number == signal.SIGHUP:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for output in (1, 2):  # to write to a terminal that is gone would be an error before the state is saved
            if output not in _outputs and not stat.S_ISREG(os.fstat(output).st_mode):
                _outputs[output] = os.dup(output)
                os.dup2(nowhere, output)
        os.close(nowhere)


@cache
def _launchers(process: int) -> list[int]:
    """This process's parent and, if that was started by another, its parent, as far as they are launchers of ranks.

    Looked up before one can die. `process` is this one's pid: a fork has another parent.
    """
    launchers: list[int] = []
    pid = os.getppid()
    while "RANK" in os.environ and _is_launcher(pid):
        launchers.append(pid)
        pid = _parent(pid)
    return launchers


def _is_orphan() -> bool:
    """Whether a launcher died: DeepSpeed's ``deepspeed`` passes no signal on to the process that holds the ranks."""
    pid = os.getpid()
    for launcher in _launchers(pid):
        if _parent(pid) != launcher:
            return True
        pid = launcher
    return False


def _is_launcher(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:8]
    except (OSError, ValueError):
        return False
    return any(os.path.basename(word) in _LAUNCHERS for word in words)


def _parent(pid: int) -> int:
    """The parent of a process; 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return 0
