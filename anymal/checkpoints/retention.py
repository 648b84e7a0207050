"""The folder ``RUN/checkpoints``: which checkpoints are in it, how one gets in, and how old ones and leftovers go.

A process may be killed at any moment, and people put things of their own beside ours. So only ``step-N`` folders count
that hold a recipe and adapters; whatever is written or removed has a name that begins with ``.tmp-`` meanwhile.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
from pathlib import Path

from anymal.files import file_mode

LATEST = "latest"
_NAME = re.compile(r"step-\d+")
_ASIDE = re.compile(r"\.tmp-(step-\d+)-old")


def is_whole(folder: Path) -> bool:
    """Whether a folder is a checkpoint."""
    return (folder / "recipe.yaml").is_file() and (folder / "adapters").is_dir()


def whole(checkpoints: Path) -> list[Path]:
    """The checkpoints of a run, the newest first: by time, since a run may go on from an early step."""
    try:
        folders = [path for path in checkpoints.iterdir() if _NAME.fullmatch(path.name) and is_whole(path)]
    except OSError:
        return []
    return sorted(folders, key=_time, reverse=True)


def _time(folder: Path) -> tuple[int, str]:
    described = folder / "manifest.json"
    if not described.is_file():
        described = folder / "recipe.yaml"
    return described.stat().st_mtime_ns, folder.name


def newest(checkpoints: Path) -> Path | None:
    """The checkpoint that ``latest`` names; the newest, if a process was killed before it moved that link."""
    latest = checkpoints / LATEST
    return latest.resolve() if is_whole(latest) else next(iter(whole(checkpoints)), None)


def clean(checkpoints: Path) -> None:
    """Remove what killed processes left. Only for who holds the run's lock."""
    for path in list(checkpoints.iterdir()) if checkpoints.is_dir() else []:
        aside = _ASIDE.fullmatch(path.name)
        if aside and is_whole(path) and not (checkpoints / aside[1]).exists():
            path.rename(checkpoints / aside[1])  # killed before its successor took the name
        elif path.name.startswith(".tmp-"):
            _delete(path)
        elif _NAME.fullmatch(path.name) and path.is_dir() and not is_whole(path):
            remove(path)
    latest = checkpoints / LATEST
    if latest.is_dir() and not latest.is_symlink():  # the run was copied by something that follows links
        free, step = checkpoints / f"{LATEST}-copy-{secrets.token_hex(4)}", None
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            step = checkpoints / f"step-{json.loads((latest / 'training' / 'state.json').read_text())['step']:08d}"
            free = free if step.exists() else step
        latest.rename(free)
        if step is not None and is_whole(step):  # a copy's times say nothing of which is the newest
            latest.symlink_to(step.name)


def publish(temporary: Path, folder: Path) -> None:
    """Flush, rename into place, then move ``latest``: whoever reads meanwhile finds the old one or the new one."""
    mode = file_mode()
    for path in temporary.rglob("*"):
        if path.is_file():
            if path.stat().st_nlink == 1:  # another checkpoint's file has its mode
                path.chmod(mode)
            with path.open("rb") as file:
                os.fsync(file.fileno())
    aside = folder.with_name(f".tmp-{folder.name}-old")
    _delete(aside)
    if folder.exists():  # a run that went on from an older checkpoint comes by here again
        folder.rename(aside)
    temporary.rename(folder)
    link = folder.with_name(f".tmp-{LATEST}-{os.getpid()}")
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    link.replace(folder.with_name(LATEST))
    parent = os.open(folder.parent, os.O_RDONLY)
    os.fsync(parent)
    os.close(parent)
    _delete(aside)


def prune(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and never the one that ``latest`` names."""
    latest = (checkpoints / LATEST).resolve()
    for folder in whole(checkpoints)[keep:]:
        if folder.resolve() != latest:
            remove(folder)


def remove(folder: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that nobody sees half of one."""
    gone = folder.with_name(f".tmp-gone-{folder.name}-{os.getpid()}")
    with contextlib.suppress(OSError):  # what does not go now, goes at the next start
        folder.rename(gone)
        _delete(gone)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
