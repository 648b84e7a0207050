"""The heavy, real parts of the tests, which `make test` has no time for: `make integration`.

    python tests/integration.py              all of them
    python tests/integration.py demo         those that are named

A part is a command that sets itself up on a fresh machine (apt, npm, or pip into an environment of its own) and ends
with status 0 once everything in it has passed. One that could not run is no success: a part that ends with `SKIPPED`,
or in which pytest skipped a test, fails like one that broke. What an earlier ``make demo`` has done is not done again:
for all of its training, ``make clean`` first.
"""

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
SKIPPED = 77  # the exit status of a part that cannot run here; as automake has it
_SKIPPED_TESTS = re.compile(r"^=*\s*(?:\d+ \w+, )*\d+ (skipped|deselected)\b.* in [\d.]+s", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One heavy part."""

    name: str
    """What it is called on the command line."""
    minutes: float
    """What it usually takes on two CPU cores."""
    command: Sequence[str]
    """What runs it, from the repository's root."""


PARTS = [
    Part(name="demo", minutes=9, command=["make", "demo"]),
]


def main(parts: Sequence[Part], wanted: Sequence[str] = ()) -> int:
    """Run the parts one after another, whatever becomes of each; 0 if all of them passed."""
    unknown = set(wanted) - {part.name for part in parts}
    if unknown:
        print(f"error: there is no part {', '.join(sorted(unknown))}; there are {', '.join(p.name for p in parts)}")
        return 2
    chosen = [part for part in parts if not wanted or part.name in wanted]
    results = [(part, *_run(part)) for part in chosen]
    print("\nintegration:")
    for part, became, minutes in results:
        print(f"  {part.name:<16} {became:<24} {minutes:5.1f} min (usually {part.minutes:g})")
    failed = [part.name for part, became, _ in results if became != "passed"]
    print(f"integration: {len(results) - len(failed)} passed, {len(failed)} failed", *failed)
    return 1 if failed else 0


def _run(part: Part) -> tuple[str, float]:
    """What became of a part, and the minutes that it took; its output is shown as it comes."""
    print(f"== {part.name}: usually {part.minutes:g} min", flush=True)
    began, said = time.monotonic(), []
    with subprocess.Popen(
        part.command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            said.append(line)
    minutes = (time.monotonic() - began) / 60
    if process.returncode == SKIPPED or _SKIPPED_TESTS.search("".join(said)):
        return "failed: it was skipped", minutes
    return ("passed" if process.returncode == 0 else f"failed: status {process.returncode}"), minutes


if __name__ == "__main__":
    sys.exit(main(PARTS, sys.argv[1:]))
