"""What can go wrong with one sample, and how much of it a run puts up with.

A worker that meets a bad sample raises `BadSample`; the stream turns it into a line of ``quarantine.jsonl`` and goes
on with the next one, until the `Quarantine`'s budget is spent.
"""

import difflib
import json
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """Something that the person who started the run must change. Shown without a traceback."""


class BadSample(ValueError):
    """One sample that cannot be used: a medium that does not decode, a missing answer, a wrong count.

    The message says what was found and what is wanted. The stream adds the shard and the key.
    """


class BudgetExceeded(UserError):
    """More bad samples than ``data.max_bad_in_a_row`` or ``data.max_bad_share`` allow."""


def shortened(text: str, longest: int = 300) -> str:
    """A stranger's text as it may stand in a log or a message: at most so many characters."""
    return text if len(text) <= longest else f"{text[: longest - 2]} …"


def nearest(name: str, known: Iterable[str], otherwise: str = "known are:") -> str:
    """A hint at what an unknown name was meant to be: ``did you mean X?``.

    Args:
        name: What was given.
        known: What could have been.
        otherwise: Where none of these is like it, the hint is this, followed by all of them; empty gives no hint then.
    """
    known = list(known)
    if near := difflib.get_close_matches(name, known, n=1):
        return f"did you mean {near[0]}?"
    return f"{otherwise} {', '.join(known) or 'none'}" if otherwise else ""


def alternatives(values: Iterable[object]) -> str:
    """``a, b or c``."""
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last


class Quarantine:
    """Counts good and bad samples, logs the bad ones, and stops the run when there are too many.

    Args:
        path: The JSON Lines file that bad samples are appended to, each once, also over restarts; None keeps no file.
        max_in_a_row: The longest run of bad samples without a good one between; 0 allows none at all.
        max_share: The largest share of bad samples, judged once `grace` samples were seen; 0 allows none at all.
        grace: How many samples must have been seen before the share is judged.
    """

    def __init__(self, path: Path | None, *, max_in_a_row: int, max_share: float, grace: int = 100):
        self.path, self.max_in_a_row, self.max_share, self.grace = path, max_in_a_row, max_share, grace
        self.good = self.bad = self.in_a_row = 0
        self._listed = set() if path is None or not path.exists() else _listed(path)

    def accept(self) -> None:
        """Count one good sample."""
        self.good += 1
        self.in_a_row = 0

    def reject(self, shard: str, key: str, reason: str) -> None:
        """Log one bad sample; of a long key or reason, the beginning.

        Raises:
            BudgetExceeded: The budget is spent; the message names the last sample and the log.
        """
        key, reason = shortened(key), shortened(reason)
        self.bad += 1
        self.in_a_row += 1
        if self.path is not None and (shard, key) not in self._listed:
            self._listed.add((shard, key))
            from anymal.files import append_line  # it raises what is defined here

            append_line(self.path, json.dumps({"shard": shard, "key": key, "reason": reason}))
        seen = self.good + self.bad
        share = self.bad / seen
        too_many = self.in_a_row > self.max_in_a_row
        too_large = share > self.max_share and (seen >= self.grace or self.max_share == 0)
        if too_many or too_large:
            raise BudgetExceeded(
                f"{self.bad} of {seen} samples are bad, {self.in_a_row} in a row; "
                f"data.max_bad_in_a_row is {self.max_in_a_row} and data.max_bad_share is {self.max_share}. "
                f"The last one: {shard}, key {key!r}: {reason}. "
                + (f"All are listed in {self.path}." if self.path else "")
            )


def _listed(path: Path) -> set[tuple[str, str]]:
    """The shard and key of every line. A last line that a crash tore is closed, so that the next does not join it."""
    text, found = path.read_text(), set()
    if text and not text.endswith("\n"):
        from anymal.files import append_line  # as above

        append_line(path, "")
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            found.add((entry["shard"], entry["key"]))
        except (ValueError, KeyError, TypeError):
            continue  # torn; at worst its sample is listed again
    return found
