"""Names of objects: which of them mean the same thing, as far as plurals and a table of synonyms can tell.

`data_prep/negatives.py` must not ask for an object that is in the picture under another name, so that what is doubtful
counts as the same here.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from anymal.errors import UserError
from anymal.evaluation.metrics import words

_PLURALS = (
    *(("s", ""), ("es", ""), ("ies", "y"), ("ves", "f"), ("ves", "fe"), ("men", "man"), ("people", "person")),
    *(("children", "child"), ("feet", "foot"), ("teeth", "tooth"), ("geese", "goose"), ("mice", "mouse")),
)
"""Endings of English plurals, and what stands there in the singular."""


@lru_cache(maxsize=100_000)
def forms(word: str) -> frozenset[str]:
    """The word, and everything that it may be a plural of: "knives" → knives, knive, kniv, knif, knife."""
    return frozenset([word, *(word.removesuffix(end) + single for end, single in _PLURALS if word.endswith(end))])


def occurs(name: str, text: str) -> bool:
    """Whether all words of `name` stand together in `text`, each in the singular or the plural."""
    wanted, there = words(name), words(text)
    starts = range(len(there) - len(wanted) + 1) if wanted else ()
    return any(all(forms(a) & forms(b) for a, b in zip(wanted, there[start:], strict=False)) for start in starts)


class Names:
    """Every object under one name: the first on its line of the table, or its own words.

    Args:
        table: Lines of names that mean the same: ``["person", "man", "woman"]``.
    """

    def __init__(self, table: Iterable[list[str]] = ()):
        self._spellings: dict[str, list[str]] = {}
        self._name_of: dict[str, str] = {}
        for line in table:
            self._spellings[line[0]] = line
            for spelling in line:
                for form in _forms_of_all(words(spelling)):
                    self._name_of.setdefault(form, line[0])
        self._longest = max((len(words(s)) for line in self._spellings.values() for s in line), default=0)

    def __len__(self) -> int:
        return len(self._spellings)

    def name(self, spelling: str) -> str:
        """The one name of an object that somebody calls `spelling`."""
        spelled = words(spelling)
        known = (self._name_of[form] for form in _forms_of_all(spelled) if form in self._name_of)
        return next(known, " ".join(spelled))

    def found_in(self, text: str) -> list[str]:
        """The table's objects that a text names, each once; of names within names the longest: no dog in a hot dog."""
        of_text, found = words(text), []
        start = 0
        while start < len(of_text):
            for size in range(min(self._longest, len(of_text) - start), 0, -1):
                forms_there = _forms_of_all(of_text[start : start + size])
                name = next((self._name_of[form] for form in forms_there if form in self._name_of), None)
                if name is not None:
                    found.append(name)
                    break
            else:
                size = 1
            start += size
        return list(dict.fromkeys(found))

    def may_be(self, name: str, present: Iterable[str], text: str = "") -> bool:
        """Whether `name` may be among the objects `present`, or in a `text` about the same picture.

        So it is if one of its spellings is, or is a part of, one of theirs ("apple" and "red apple"), or stands in
        the text.
        """
        mine = self._spellings.get(name, [name])
        theirs = [spelling for other in present for spelling in self._spellings.get(other, [other])]
        return any(occurs(a, text) or any(occurs(a, b) or occurs(b, a) for b in theirs) for a in mine)


def _forms_of_all(name: list[str]) -> Iterator[str]:
    """The words with the last one in each of its forms: "fire trucks" → "fire trucks", "fire truck"."""
    for form in (name[-1], *sorted(forms(name[-1]))) if name else ():
        yield " ".join([*name[:-1], form])


def read_table(path: Path) -> list[list[str]]:
    """The lines of a table of synonyms: one object a line, its names between commas, the one to ask for first.

    Raises:
        UserError: It cannot be read or holds no name. Names the file.
    """
    if not path.is_file():
        raise UserError(f"synonyms: there is no file {path}")
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"synonyms: {path} is not UTF-8: {error}") from error
    table = [[name.strip().lower() for name in line.split(",") if words(name)] for line in lines]
    table = [line for line in table if line]
    if not table:
        raise UserError(f"synonyms: {path} names no object; each line is one: person, man, woman")
    return table
