"""The errors that all rooms share, and how their messages are worded.

`UserError` is for whoever started the run. A loader worker that meets a bad sample raises `BadSample`; the stream turns
it into a line of ``quarantine.jsonl``, until `anymal.data.quarantine` has too many and raises `BudgetExceeded`.
"""

import difflib
from collections.abc import Iterable


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
