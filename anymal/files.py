"""Writing files: whole or not at all, readable as the umask says, and a full disk reported in one line."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from anymal.errors import UserError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_ROOM = "make room, and start the same command again: it goes on from the last checkpoint"


@contextlib.contextmanager
def writing(path: Path, remedy: str = _ROOM) -> Iterator[None]:
    """Around code that writes `path`, a file or a folder.

    Raises:
        UserError: In place of an error of the system. Names `path`, and the remedy if the disk is full.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # tokenizers raises bare Exceptions, safetensors its own
        if _no_room(error):
            raise UserError(f"{path} could not be written: the disk is full; {remedy}") from error
        if not isinstance(error, OSError | SafetensorError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{getattr(error, 'filename', None) or path} could not be written: {reason}") from error


def _no_room(error: Exception) -> bool:
    """Whether the disk is full, or the quota; libraries in Rust, and shutil of a folder, say so in words alone."""
    marks = [text for code in _NO_ROOM for text in (f"(os error {code})", f"[Errno {code}]")]
    return getattr(error, "errno", None) in _NO_ROOM or any(mark in str(error) for mark in marks)


def append_line(path: Path, line: str) -> None:
    """Append a line, or leave the file as it was. Nothing is left in a buffer when the process is killed.

    Raises:
        UserError: As `writing`.
    """
    left = line.encode(errors="surrogateescape") + b"\n"
    with writing(path), path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(before)
            raise


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that whoever reads it, at any time and after any crash, finds the old one or the new one.

    Raises:
        UserError: As `writing`.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            with temporary.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def file_mode() -> int:
    """The mode that this process's new files have by its umask; safetensors and mkstemp make theirs private."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; it takes that name when the block ends, and vanishes if the block fails.

    So a folder that exists is complete, whatever happened to the process that was writing it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        mode = file_mode()  # mkdtemp's folders are private, and so are safetensors' files
        searchable = mode | (mode & 0o444) >> 2  # whoever may read a folder may enter it
        for path in (temporary, *temporary.rglob("*")):
            path.chmod(searchable if path.is_dir() else mode)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def is_done(folder: Path) -> bool:
    """Whether a step's output is there already; says so if it is."""
    done = folder.is_dir() and any(folder.iterdir())
    if done:
        print(f"{folder} is there already; remove it to make it again")
    return done
