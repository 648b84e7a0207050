"""One run to a folder: ``RUN/run.lock`` says who trains there.

    {"job": "4711", "host": "node7", "machine": "…", "pid": 123, "began": "…", "since": "2026-11-24 08:00:00 UTC"}

Rank 0 makes it before anything is loaded and removes it at the end. While it lives, a thread touches it every `BEAT`
seconds. It is stale once it was not touched for `STALE` seconds by the file system's own clock, since the clocks of two
nodes may differ; or at once, if its process is known to be dead, so that a run that was killed starts again without a
wait. A pid means something only to the same machine, since its last boot, in the same container. A job that is started
again on another node waits for a sign of life of the first until there is one, or the lock is stale.
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from anymal.errors import UserError
from anymal.files import writing

LOCK = "run.lock"
BEAT = 15.0
"""Seconds between two signs of life."""
STALE = 120.0
"""Seconds without one after which a run elsewhere is taken for dead."""
_log = logging.getLogger(__name__)
_PAUSE = 0.05  # seconds between two looks at a lock that others are taking


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who trains in a folder."""

    text: str
    """The lock file's content, which is different for every lock."""
    job: str = ""
    """The Slurm job, if it is one."""
    host: str = "an unknown host"
    """The node's name."""
    machine: str = ""
    """Boot and pid namespace in which `pid` means something; empty if not known."""
    pid: int = 0
    """Of rank 0."""
    began: str = ""
    """When that process began, in the kernel's ticks: a pid may be given again."""
    since: str = "an unknown time"
    """When the lock was taken."""
    touched: float = 0.0
    """When the last sign of life was given, by the file system's clock."""
    silent: float = 0.0
    """Seconds since then."""

    @property
    def here(self) -> bool:
        """Whether its pid means something here."""
        return bool(self.machine) and self.machine == _machine()

    @property
    def alive(self) -> bool:
        """Whether it still trains, as far as this machine can know."""
        return _lives(self.pid, self.began) if self.here else self.silent <= STALE


def holder(folder: Path) -> Holder | None:
    """Who holds the lock of a run's folder, dead or alive; None if nobody does.

    Raises:
        UserError: There is something in its place that cannot be read.
    """
    path = folder / LOCK
    try:
        text, touched = path.read_text(errors="replace"), path.stat().st_mtime
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}; nobody can tell whether a run trains there"
        ) from error
    silent = max(0.0, _now(folder) - touched)
    seen = {"text": text, "touched": touched, "silent": silent}
    try:
        return Holder(**seen, **json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return Holder(**seen)


def require_no_other(folder: Path) -> None:
    """A run that slept for long may have been taken for dead; then it must not write any more.

    Raises:
        UserError: Another process holds the lock by now, or somebody took it away: others may have been there since.
    """
    owner = holder(folder)
    if owner is None:
        raise UserError(f"{folder / LOCK} was removed while this run trained, which ends without saving")
    if (owner.host, owner.machine, owner.pid) != (socket.gethostname(), _machine(), os.getpid()):
        raise UserError(f"{_in_use(folder, owner)}. This run was taken for dead, and ends without saving")


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, which is made if there is none.

    Raises:
        UserError: Another run holds it. Says who, since when, and how to go on.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    text = _take(folder)
    path, stop = folder / LOCK, threading.Event()
    threading.Thread(target=_beat, args=(path, text, stop), name="lock", daemon=True).start()
    try:
        yield
    finally:
        stop.set()
        if _text(path) == text:
            path.unlink(missing_ok=True)


def _take(folder: Path) -> str:
    described = {
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "began": _began(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }
    text, path = json.dumps(described), folder / LOCK
    for _ in range(200):
        if _create(path, text):
            _sweep(folder)
            return text
        owner = holder(folder)
        if owner is not None and owner.alive and not _falls_silent(folder, owner):
            raise UserError(_in_use(folder, holder(folder) or owner))
        if owner is not None:
            with writing(path):
                _break(path, owner)
    raise UserError(f"{folder}: several runs are being started there at once; start one of them again")


def _falls_silent(folder: Path, owner: Holder) -> bool:
    """Wait for the next sign of life of a process elsewhere; whether there is none until its lock is stale, or gone."""
    if owner.here:
        return False
    _log.warning("%s is held by process %d on %s; waiting for a sign of life", folder / LOCK, owner.pid, owner.host)
    while owner.silent <= STALE:
        time.sleep(1)
        now = holder(folder)
        if now is None or now.text != owner.text:
            return True
        if now.touched != owner.touched:
            return False
        owner = now
    return True


def _sweep(folder: Path) -> None:
    """Remove what processes left that were killed while they took a lock."""
    for path in folder.glob(f".{LOCK}-*"):
        with contextlib.suppress(OSError):
            if _now(folder) - path.stat().st_mtime > STALE:
                path.unlink()


def _create(path: Path, text: str) -> bool:
    """Make the lock with its content at once, so that none is ever seen empty; False if there is one."""
    temporary = path.with_name(f".{LOCK}-{socket.gethostname()}-{os.getpid()}")
    with writing(path):
        try:
            temporary.write_text(text)
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:
            if not temporary.exists() or temporary.read_text() != text:  # no room
                raise
            return _create_without_links(path, text)
        finally:
            temporary.unlink(missing_ok=True)
    return True


def _create_without_links(path: Path, text: str) -> bool:
    """On file systems without hard links."""
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _break(path: Path, dead: Holder) -> None:
    """Remove a dead run's lock if it is still there. One process at a time: another may have taken its own by now."""
    claim = path.with_name(f".{LOCK}-claim")
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        time.sleep(_PAUSE)
        with contextlib.suppress(FileNotFoundError):
            if _now(path.parent) - claim.stat().st_mtime > 100 * _PAUSE:  # of a process that was killed just there
                claim.unlink()
        return
    try:
        if _text(path) == dead.text:
            path.unlink()
    finally:
        claim.unlink()


def _in_use(folder: Path, owner: Holder) -> str:
    job = f"Slurm job {owner.job}, " if owner.job else ""
    return (
        f"{folder} is in use: {job}process {owner.pid} on {owner.host} trains there since {owner.since} (last sign of "
        f"life {owner.silent:.0f} s ago). Wait for it or stop it, or choose another run.dir; if it is certain that it "
        f"is dead, remove {folder / LOCK}"
    )


def _beat(path: Path, text: str, stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        with contextlib.suppress(OSError):
            if _text(path) == text:
                os.utime(path)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


def _now(folder: Path) -> float:
    """The time by the clock of the folder's file system, in seconds, or by this machine's if nothing can be written."""
    probe = folder / f".{LOCK}-{secrets.token_hex(8)}"
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now
    except OSError:
        return time.time()


def _machine() -> str:
    """What tells this machine, its boot and this container from all others; empty where the system does not say."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _began(pid: int) -> str:
    """When a process of this machine began, in ticks since boot; empty if it has ended, or cannot be looked into."""
    try:
        state, *more = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else more[18]  # a zombie has ended


def _lives(pid: int, began: str) -> bool:
    if now := _began(pid):
        return now == began
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's, and /proc does not show it
        return True
    return False  # a zombie
