"""How much goes wrong before a run stops: bad samples are counted, logged and, up to a budget, skipped.

A loader worker that meets a bad sample raises `anymal.errors.BadSample`; the stream turns it into a line of
``quarantine.jsonl`` and takes the next one, until the budget is spent.
"""

import json
from pathlib import Path

from anymal.errors import BudgetExceeded, shortened
from anymal.files import append_line


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
    text, entries = path.read_text(), set()
    if text and not text.endswith("\n"):
        append_line(path, "")
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            entries.add((entry["shard"], entry["key"]))
        except (ValueError, KeyError, TypeError):
            continue  # torn; at worst its sample is listed again
    return entries
