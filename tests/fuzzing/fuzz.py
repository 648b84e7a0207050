"""Mutants of every format that a stream reads, through the real decoders: none may crash, hang, fill memory, or pass.

    python tests/fuzzing/fuzz.py --count 10000 --seed 0

Mutant N of a format depends on the seed, the format and N alone. Forked processes make and read them, a batch each;
this one watches. Four verdicts are findings:

    crash    the process dies by a signal
    hang     more than 20 s of processor time for one mutant, or asleep for as long
    memory   its process grew by more than 1 GB, for however short a time
    unnamed  anything but: a good sample (finite, of the promised shape, with no control token but the template's), a
             `Bad` with shard, key and a reason of less than 500 characters, a `UserError` that names the file

Each is printed with the command that repeats it, and its files are kept (--keep). Of each format of media 30% of the
mutants must get past the header: Pillow, FFmpeg, libsndfile or NumPy opens the file; JSON or a tar's first header
parses. The anymal that PYTHONPATH names is attacked, else the one beside this file.
"""

import argparse
import collections
import contextlib
import ctypes
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
if "PYTHONPATH" not in os.environ:
    sys.path.insert(1, str(Path(__file__).parents[2]))

import torch
from fuzz_target import FORMATS, MEDIA, WEIGHTED, Target

import anymal

BATCH = 20  # mutants of one process: few enough that a heap that one of them spoilt tells which one it was
PAST_HEADER = 0.3
_ROOM = 4 << 30  # bytes of addresses that a process may add to those it starts with, so that the machine survives


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one mutant may take."""

    seconds: float = 20.0
    """Of processor time, or of sleep."""
    wall: float = 60.0
    """Of time, however busy the machine is."""
    memory: int = 1 << 30
    """Bytes."""


@dataclass(kw_only=True)
class Report:
    """What a run found."""

    count: collections.Counter = field(default_factory=collections.Counter)
    """Mutants by format."""
    past: collections.Counter = field(default_factory=collections.Counter)
    """Those that got past the header, by format."""
    findings: list[tuple[str, str, int, str]] = field(default_factory=list)
    """Verdict, format, number, and what was seen."""
    slowest: dict[str, float] = field(default_factory=lambda: collections.defaultdict(float))
    """Seconds, by format."""
    largest: dict[str, float] = field(default_factory=lambda: collections.defaultdict(float))
    """Growth in MB, by format."""

    def verdicts(self) -> collections.Counter:
        """How many findings there are of each kind."""
        return collections.Counter(verdict for verdict, *_ in self.findings)

    def shallow(self) -> list[str]:
        """Formats of media too few of whose mutants got past the header."""
        return [kind for kind, n in self.count.items() if kind in MEDIA and self.past[kind] < PAST_HEADER * n]

    def met(self) -> bool:
        """Whether nothing was found, and the search went deep enough."""
        return not self.findings and not self.shallow()

    def last_line(self, seed: int, seconds: float, good: bool) -> str:
        """The figures in one line."""
        names = {"crashes": "crash", "hangs": "hang", "memory": "memory", "unnamed": "unnamed"}
        found = " ".join(f"{name}={self.verdicts()[verdict]}" for name, verdict in names.items())
        count = sum(self.count.values())
        share = f"{sum(self.past.values()) / count:.0%}"
        verdict = "met" if good else "missed"
        return f"seed={seed} count={count} {found} past_header={share} seconds={seconds:.0f} goal={verdict}"

    def table(self) -> str:
        """Figures by format."""
        lines = [f"{'format':10}{'mutants':>8}{'past header':>13}{'slowest s':>11}{'most MB':>9}  findings"]
        for kind in sorted(self.count, key=FORMATS.index):
            found = collections.Counter(verdict for verdict, of, *_ in self.findings if of == kind)
            told = ", ".join(f"{n} {verdict}" for verdict, n in found.items()) or "none"
            share = f"{self.past[kind] / self.count[kind]:.0%}"
            figures = f"{self.count[kind]:8}{share:>13}{self.slowest[kind]:11.2f}{self.largest[kind]:9.0f}"
            lines.append(f"{kind:10}{figures}  {told}")
        return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ in a process


def _status(name: str) -> int:
    """A figure of this process in bytes, such as VmRSS."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split(f"{name}:")[1].split()[0])


def _work(target: Target, seed: int, batch: Sequence[tuple[str, int]], folder: Path, limits: Limits, say) -> None:
    """Make and read a batch of mutants; never returns."""
    room = _status("VmSize") + _ROOM
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries tell there what they make of mutants
    faulthandler.disable()
    libc = ctypes.CDLL(None)
    try:
        for kind, number in batch:
            place = folder / f"{kind}-{number}"
            place.mkdir(parents=True)
            case, profile = target.mutant(seed, kind, number)
            case.write(place / "a.tar")
            libc.malloc_trim(0)  # else room that making it took would hide what reading it takes
            say.send(("start", kind, number))
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
            before, began = _status("VmRSS"), time.process_time()
            complaint = target.complaint(case, profile, place / "a.tar")
            grown, seconds = _status("VmHWM") - before, time.process_time() - began
            past = False
            with contextlib.suppress(Exception):
                past = bool(case.probe())
            verdict = "unnamed" if complaint else ""
            if grown > limits.memory or complaint.startswith("too much memory"):
                verdict, complaint = "memory", f"grew by {grown / 1e6:.0f} MB. {complaint}"
            say.send(("done", verdict, complaint, past, seconds, grown))
            if not verdict:
                shutil.rmtree(place)
    except BaseException:
        say.send(("broken", traceback.format_exc()))
    os._exit(0)


class _Process:
    """A forked process and the mutant that it is at."""

    def __init__(self, target: Target, seed: int, batch: Sequence[tuple[str, int]], folder: Path, limits: Limits):
        self.batch, self.limits = list(batch), limits
        self.heard, say = multiprocessing.Pipe(duplex=False)
        arguments = (target, seed, self.batch, folder, limits, say)
        self.process = multiprocessing.get_context("fork").Process(target=_work, args=arguments)
        self.process.start()
        say.close()
        self.at: tuple[str, int] | None = None
        self.begun = 0

    def start(self, kind: str, number: int) -> None:
        """Note which mutant it reads."""
        self.at, self.since, self.begun = (kind, number), time.monotonic(), self.begun + 1
        self.busy, self.awake = self._seconds()[0], (self._seconds()[0], self.since)

    def _seconds(self) -> tuple[float, str]:
        """Processor time so far, and the state, such as S for asleep."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0, "Z"
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), fields[0]

    def hangs(self) -> str:
        """How it hangs, if it does."""
        if self.at is None:
            return ""
        (busy, state), now = self._seconds(), time.monotonic()
        if state != "S" or busy > self.awake[0]:
            self.awake = (busy, now)
        if busy - self.busy > self.limits.seconds:
            return f"{busy - self.busy:.0f} s of processor time"
        if now - self.awake[1] > self.limits.seconds:
            return f"asleep for {now - self.awake[1]:.0f} s"
        return f"{now - self.since:.0f} s of time" if now - self.since > self.limits.wall else ""


# ---------------------------------------------------------------------------------------------- who watches


def fuzz(
    target: Target,
    mutants: Iterable[tuple[str, int]],
    seed: int,
    *,
    folder: Path,
    processes: int = 2,
    limits: Limits | None = None,
) -> Report:
    """Read mutants, and say what became of them.

    Args:
        target: What is attacked.
        mutants: Format and number of each.
        seed: Of all of them.
        folder: Findings stay in it, each in a folder of its own.
        processes: How many at a time.
        limits: What one mutant may take.
    """
    limits, report = limits or Limits(), Report()
    left = collections.deque(mutants)
    running: list[_Process] = []
    while left or running:
        while left and len(running) < processes:
            batch = [left.popleft() for _ in range(min(BATCH, len(left)))]
            running.append(_Process(target, seed, batch, folder, limits))
        ready = multiprocessing.connection.wait([one.heard for one in running], timeout=0.3)
        for one in list(running):
            ended = one.heard in ready and not _hear(one, report, seed, folder)
            hangs = "" if ended else one.hangs()
            if hangs:
                one.process.kill()
                _finding(report, "hang", *one.at, hangs, seed, folder)
                report.count[one.at[0]] += 1
            if ended or hangs:
                one.process.join()
                running.remove(one)
                left.extendleft(reversed(one.batch[one.begun :]))
    return report


def _hear(one: _Process, report: Report, seed: int, folder: Path) -> bool:
    """Take one message from a process; False if it has ended."""
    try:
        kind, *rest = one.heard.recv()
    except EOFError:
        one.process.join()
        if one.at is not None:
            code = one.process.exitcode
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            report.count[one.at[0]] += 1
            report.past[one.at[0]] += 1
            _finding(report, "crash", *one.at, f"{how} (mutant {one.begun} of its process)", seed, folder)
        elif one.begun < len(one.batch):
            raise RuntimeError(f"the fuzzer itself died while it made {one.batch[one.begun]}") from None
        return False
    if kind == "broken":
        raise RuntimeError(f"the fuzzer itself failed: {rest[0]}")
    if kind == "start":
        one.start(*rest)
        return True
    (of, number), (verdict, complaint, past, seconds, grown) = one.at, rest
    one.at = None
    report.count[of] += 1
    report.past[of] += past
    report.slowest[of] = max(report.slowest[of], seconds)
    report.largest[of] = max(report.largest[of], grown / 1e6)
    if verdict:
        _finding(report, verdict, of, number, complaint, seed, folder)
    return True


def _finding(report: Report, verdict: str, kind: str, number: int, seen: str, seed: int, folder: Path) -> None:
    report.findings.append((verdict, kind, number, seen))
    again = f"python tests/fuzzing/fuzz.py --seed {seed} --formats {kind} --only {number}"
    print(f"{verdict}: {kind} {number}: {seen[:300]}\n    {again}\n    {folder / f'{kind}-{number}'}", flush=True)


def numbered(count: int, formats: Sequence[str] = FORMATS) -> list[tuple[str, int]]:
    """Formats and numbers of so many mutants, formats in turn."""
    turns = [kind for kind in WEIGHTED if kind in formats]
    return [(turns[number % len(turns)], number) for number in range(count)]


def main() -> None:
    """Read the command line, run, and print the figures last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=FORMATS, metavar="FORMAT", help=" ".join(FORMATS)
    )
    parser.add_argument("--only", nargs="+", type=int, help="only the mutants with these numbers, in one process")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="a folder for the files of findings (a temporary one, if not given)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    keep = given.keep or Path(tempfile.mkdtemp(prefix="fuzz-"))
    print(f"attacks {Path(anymal.__file__).parent}; findings stay in {keep}", flush=True)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["ANYMAL_CACHE"] = cache
        target = Target(Path(cache))
        mutants = numbered(given.count, given.formats)
        if given.only:
            mutants = [(kind, number) for number in given.only for kind in given.formats]
        report = fuzz(target, mutants, given.seed, folder=keep, processes=1 if given.only else given.processes)
    print(report.table())
    for kind in report.shallow():
        print(f"{kind}: fewer than {PAST_HEADER:.0%} of its mutants got past the header")
    good = not report.findings if given.only else report.met()
    print(report.last_line(given.seed, time.monotonic() - began, good))
    sys.exit(not good)


if __name__ == "__main__":
    main()
