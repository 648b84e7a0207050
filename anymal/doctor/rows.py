"""A line of the doctor's table, and how its state is called."""

import subprocess
from dataclasses import dataclass

OK, NOTE, MISSING = "ok", "note", "missing"
GIB = 2**30


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    what: str
    state: str
    found: str
    todo: str = ""
    """What to do about it; empty if there is nothing to do."""


def output(*command: str) -> str:
    """The first line that a command says."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return (done.stdout.splitlines() or [""])[0].strip()
