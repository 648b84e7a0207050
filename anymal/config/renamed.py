"""Settings that have another name by now. Recipes, overrides and checkpoints that say the old one still load."""

import os
import re
import warnings
from typing import Any

from anymal.errors import UserError

RENAMED = {
    "data.look_ahead": "data.packing_buffer",
    "optim.accumulate": "optim.gradient_accumulation",
}
"""Old dotted name → new."""
_INTERPOLATION = re.compile(r"\$\{[^{}]*")


class OldName(FutureWarning):
    """A setting is given under a name that it had before."""


def under_new_names(settings: Any, source: str) -> Any:
    """Nested settings with each under the name that it has now, and an `OldName` warning for each that had another.

    Args:
        settings: Plain dicts and lists, interpolations as they are written; they are changed.
        source: The recipe or override that they are from, for messages.

    Raises:
        UserError: A setting is given under both names.
    """
    for old, new in RENAMED.items():
        settings = _pointing(settings, re.compile(rf"(?<!\w)(?<!\w\.){re.escape(old)}(?!\w)"), new)
        *path, name = old.split(".")
        section = _section(settings, path)
        if not isinstance(section, dict) or name not in section:
            continue
        value = section.pop(name)
        *path, name = new.split(".")
        section = _section(settings, path, make=True)
        if name in section:
            raise UserError(f"{source} sets {new} twice: {old} is its old name; take that out")
        section[name] = value
        if int(os.environ.get("RANK", 0)) == 0:
            warnings.warn(f"{source}: {old} is called {new} now", OldName, stacklevel=2)
    return settings


def _section(settings: Any, path: list[str], *, make: bool = False) -> Any:
    """What is at a place in nested dicts; None if there is nothing, or a new dict."""
    for key in path:
        if not isinstance(settings, dict):
            return None
        settings = settings.setdefault(key, {}) if make else settings.get(key)
    return settings


def _pointing(value: Any, old: re.Pattern[str], new: str) -> Any:
    """Nested settings, their interpolations of `old` being of `new`: ``${old}``, ``${oc.select:old,1}`` and others."""
    if isinstance(value, dict):
        return {key: _pointing(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [_pointing(item, old, new) for item in value]
    if not isinstance(value, str):
        return value
    return _INTERPOLATION.sub(lambda found: old.sub(new, found[0]), value)
