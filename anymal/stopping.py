"""What asks a run to stop: SIGTERM and SIGUSR1 (launchers, Slurm), SIGINT (Ctrl-C), SIGHUP (the terminal is gone), or
a launcher that died and left its ranks behind. While a run starts, a signal ends it; in training, the loop asks here.
"""

import os
import signal
import stat
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_LAUNCHERS = ("deepspeed", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run")
_noted: list[int] = []  # of the process: one that comes as a stage ends stops the next


def leave_on_signals() -> None:
    """From now on, until `note_signals`, a signal ends the process with one line and exit code 1."""
    _launchers()
    _handle_by(_leave)


def note_signals() -> None:
    """From now on a signal is noted for `asked`. A second SIGINT interrupts at once."""
    _launchers()
    _handle_by(_note)


def asked() -> bool:
    """Whether the run was asked to stop."""
    return bool(_noted) or _is_orphan()


def forget() -> None:
    """The run has stopped; what the process does next was not meant."""
    _noted.clear()


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
            if not stat.S_ISREG(os.fstat(output).st_mode):
                os.dup2(nowhere, output)
        os.close(nowhere)


@cache
def _launchers() -> list[int]:
    """This process's parent and, if that was started by another, its parent, as far as they are launchers of ranks."""
    found: list[int] = []
    pid = os.getppid()
    while "RANK" in os.environ and _is_launcher(pid):
        found.append(pid)
        pid = _parent(pid)
    return found


def _is_orphan() -> bool:
    """Whether a launcher died: DeepSpeed's ``deepspeed`` passes no signal on to the process that holds the ranks."""
    pid = os.getpid()
    for launcher in _launchers():
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
