"""The program behind `anymal doctor`: runs the checks, each of which becomes rows of a table.

Libraries that may end a process, or hang, are looked at by processes of their own, which run beside one another.
"""

import dataclasses
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from anymal.doctor import gpus, libraries, machine
from anymal.doctor.rows import MISSING, NOTE, Row

PATIENCE = 120.0  # seconds until a library is taken for hanging; a cold network file system takes long
CHECKS: dict[str, tuple[Callable[[], Iterator[Row]], str]] = {
    "anymal": (libraries.installation, ""),
    "packages": (libraries.packages, ""),
    "adapters": (libraries.other_adapters, ""),
    "torch": (gpus.torch_and_gpus, "pip install --force-reinstall torch"),
    "NVIDIA driver": (machine.driver, ""),
    "bitsandbytes": (libraries.bitsandbytes_works, "install bitsandbytes anew, for this torch's CUDA"),
    "transformers": (libraries.transformers_works, "install transformers anew, and a torchaudio for this torch"),
    "DeepSpeed": (libraries.deepspeed_works, "install DeepSpeed anew; some versions want CUDA_HOME to be set"),
    "flash-attn": (libraries.flash_attention, "uninstall it, or install it anew for this torch"),
    "media": (libraries.media, "install av and soundfile anew"),
    "machine": (machine.machine, ""),
    "disks": (machine.disks, ""),
    "Slurm": (machine.slurm, ""),
    "accounts": (machine.accounts, ""),
}
"""What is looked at, and what to do if that fails. Where there is something to do, it runs in a process of its own."""


def examine() -> list[Row]:
    """All rows, in the table's order."""
    ends = time.monotonic() + PATIENCE
    started = {name: _start(name) for name, (_, todo) in CHECKS.items() if todo}
    here = {name: look(name) for name in CHECKS if name not in started}
    return [row for name in CHECKS for row in (here[name] if name in here else _end(name, started[name], ends))]


def look(name: str) -> list[Row]:
    """The rows of one check; what it raises is one."""
    check, todo = CHECKS[name]
    rows: list[Row] = []
    try:
        for row in check():
            rows.append(row)
    except Exception as error:  # whatever a broken library, or an unknown system, raises
        message = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        rows.append(Row(name, MISSING if todo else NOTE, message, todo or "this could not be looked at"))
    return rows


def _start(name: str) -> subprocess.Popen:
    """A process that looks at `name`; it imports what this one would, but nothing that lies beside the program."""
    path = [entry for entry in sys.path if entry and Path(entry) != Path(sys.argv[0]).resolve().parent]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-P", "-m", __spec__.name, name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def _end(name: str, process: subprocess.Popen, ends: float) -> list[Row]:
    """The rows that it found until then; it is ended if it takes longer."""
    try:
        output, errors = process.communicate(timeout=max(0.0, ends - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return [Row(name, MISSING, f"does not answer within {PATIENCE:.0f} s", CHECKS[name][1])]
    if process.returncode == 0:
        return [Row(*row) for row in json.loads(output.splitlines()[-1])]
    how = f"ends with code {process.returncode}"
    if process.returncode < 0:
        how = f"dies of {signal.Signals(-process.returncode).name}"
    return [Row(name, MISSING, f"{how}: {(errors.splitlines() or [''])[-1][:200]}", CHECKS[name][1])]


def table(rows: list[Row]) -> str:
    """The rows as text, what to do in lines of their own."""
    width = max(len(row.what) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"{row.state:<7}  {row.what:<{width}}  {row.found}")
        lines += [f"{'':<7}  {'':<{width}}  → {row.todo}"] if row.todo else []
    lacks = [row.what for row in rows if row.state == MISSING]
    return "\n".join([*lines, "", f"missing: {', '.join(lacks)}" if lacks else "all that a run needs is there"])


def main(usage: str) -> int:
    """Print the table; 0 if nothing is missing."""
    arguments = sys.argv[1:]
    if "-h" in arguments or "--help" in arguments:
        print(inspect.cleandoc(usage))
        return 0
    if arguments not in ([], ["json=true"], ["json=false"]):
        print(f"error: {' '.join(arguments)}: all that can be given is json=true, or --help", file=sys.stderr)
        return 2
    rows = examine()
    print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) if "json=true" in arguments else table(rows))
    return int(any(row.state == MISSING for row in rows))


if __name__ == "__main__":  # as `_start` starts it
    print(json.dumps([dataclasses.astuple(row) for row in look(sys.argv[1])]))
