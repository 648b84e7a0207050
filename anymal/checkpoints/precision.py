"""How a checkpoint does with its LLM at another precision than it was trained with.

Projectors learn to fit the LLM that they were trained with, rounding errors included; at another precision some answer
nothing. So a checkpoint's precision is remembered (``model.llm.bits`` of its recipe), and what ``anymal evaluate``
measures at several of them is kept beside it:

    CHECKPOINT/precision.json    {"trained": 4, "sets": {"image": {"4": {"accuracy": 0.7, ...}, "32": {...}}}}

Figures are compared where they are of the same samples, chosen by the same rule.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

NAME = "precision.json"
KEPT = ("n", "accuracy", "cider_d", "loss", "empty")
"""What is kept of a set's figures with its own media."""
MEASURED = ("samples", "rule")
"""What is kept of how they were measured."""


def save(folder: Path, trained: int, measured: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> bool:
    """Keep what was measured beside a checkpoint; whether its folder could be written to.

    Args:
        folder: The checkpoint.
        trained: The bits that it was trained beside.
        measured: Bits → set → `anymal.evaluation.scores.figures`, and `samples`, a digest of which they are. What
            earlier calls kept of other sets or bits stays.
    """
    sets = _read(folder)
    for bits, results in measured.items():
        for name, figures in results.items():
            kept = {key: figures["own"][key] for key in KEPT} | {key: figures[key] for key in MEASURED}
            sets.setdefault(name, {})[str(bits)] = kept
    temporary = folder / f".{NAME}.{os.getpid()}"
    try:
        temporary.write_text(json.dumps({"trained": trained, "sets": sets}, indent=1))
        temporary.replace(folder / NAME)
    except OSError:  # somebody else's checkpoint, perhaps: the figures are in evaluation.json, too
        temporary.unlink(missing_ok=True)
        return False
    return True


def note(folder: Path, trained: int, bits: int) -> str:
    """What there is to say when a checkpoint is loaded beside an LLM of so many bits; empty if nothing is."""
    if bits == trained:
        return ""
    text = f"{folder} was trained beside its LLM at {trained} bits; at {bits} it may answer differently"
    drifts = []
    with suppress(AttributeError, KeyError, TypeError, ValueError):  # whoever made the checkpoint wrote what they liked
        for name, of_set in _read(folder).items():
            before, now = of_set.get(str(trained)), of_set.get(str(bits))
            if before and now and all(before.get(key) == now.get(key) for key in MEASURED):
                drifts.append(f"{name} {_drift(before, now)} (n={now['n']})")
    if drifts:
        return f"{text}. Measured: {'; '.join(drifts)}"
    how = f"anymal evaluate checkpoint={folder} 'bits=[{trained},{bits}]' sets.NAME=SHARDS"
    return f"{text}, which was not measured yet: {how}"


def _drift(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if before.get("accuracy") is not None and now.get("accuracy") is not None:
        return f"accuracy {before['accuracy']:.0%} → {now['accuracy']:.0%}"
    return f"loss {before['loss']:.3f} → {now['loss']:.3f}"


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    """Set → bits → figures; empty where nothing was measured, or the file is missing or damaged."""
    try:
        sets = json.loads((folder / NAME).read_text())["sets"]
        return {name: dict(of_set) for name, of_set in sets.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
