"""Small JSON files beside tars, or in the cache where a folder cannot be written to: indexes of tars and of folders.

All of them can be made again. They are anyone's: reading one is bounded, never waits, and raises nothing.
"""

import functools
import hashlib
import json
import logging
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

from anymal.files import file_mode

LARGEST_JSON = 1 << 25  # bytes of a file: the counts of 400,000 tars, or the offsets of 3 million samples
_log = logging.getLogger(__name__)


def cache_folder() -> str:
    """Where there is room for what can be made or downloaded again."""
    return os.environ.get("ANYMAL_CACHE") or os.path.expanduser("~/.cache/anymal")


def paths(beside: str, of: str) -> Iterator[str]:
    """Where the index of a tar or a folder may lie: beside it, or in the cache."""
    yield beside
    digest = hashlib.sha256(os.path.abspath(of).encode(errors="surrogateescape")).hexdigest()
    yield os.path.join(cache_folder(), "index", f"{digest}.json")


def read_json(path: str, most: int = LARGEST_JSON) -> Any:
    """The JSON in a regular file of at most `most` bytes; None if there is no such file. Never waits for a pipe.

    Files beside data are anyone's: links to devices, pipes, bombs.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a device may already do something
            return None
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            data = file.read(most + 1) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else b""
        return json.loads(data) if len(data) <= most else None
    except (OSError, ValueError, RecursionError):
        return None


def write_json(value: Any, paths: Iterable[str]) -> None:
    """Write to the first place where that is possible; several processes may do it at once, so by renaming.

    If none can be written, the run goes on without the file, and says so once: all of it can be made again.
    """
    failed = ""
    for path in paths:
        temporary = None
        try:
            folder = os.path.dirname(path) or "."
            os.makedirs(folder, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=folder, prefix=".index-", suffix=".tmp")
            with open(handle, "w") as file:
                json.dump(value, file, separators=(",", ":"))
            os.chmod(temporary, file_mode())  # mkstemp's own mode would keep other users from sharing it
            os.replace(temporary, path)
            return
        except OSError as error:
            failed = f"{path} could not be written: {error.strerror or error}"
            if temporary is not None:
                os.unlink(temporary)
    note_unwritten(failed)


@functools.cache
def note_unwritten(failed: str) -> None:
    """Warn, once until ``note_unwritten.cache_clear()``."""
    _log.warning(
        "%s; it is made again at every start: make room there, or in the folder that ANYMAL_CACHE names", failed
    )
