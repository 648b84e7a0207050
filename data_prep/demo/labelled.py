"""Labelled media as the demo's samples: a pair to train on, or a closed question to test with."""

from collections.abc import Iterable
from typing import Any

SPLITS = ("train", "validation", "test")
"""The demo's splits: what is learnt from, what choices are made by, and what is reported, once."""
QUESTION = "What is this?"
"""What is asked about every held-out medium of the demo. Stage 1 learns to answer it: its ``prompt.instruction``."""


def labelled_sample(
    key: str, medium: str, member: str, data: Any, label: str, *, options: Iterable[str] = (), **about: Any
) -> dict[str, Any]:
    """A medium with a label, as `anymal.data_prep.write.write_shards` takes it.

    Args:
        key: Its key.
        medium: Its modality.
        member: Its suffix, such as ``jpg``.
        data: Its content: bytes, or an array.
        label: What it is; one of `options`, if there are any.
        options: With these it is a closed question: the medium, `QUESTION`, the label as the answer. Without, it is a
            pair whose caption is the label.
        about: What else is kept in ``json``, beside the label. The demo's steps give ``source``: the object, person or
            instrument that it is of, since samples of one are no independent evidence.
    """
    described: dict[str, Any] = {"label": label, **about}
    if not options:
        return {"__key__": key, member: data, "json": described, "txt": label}
    user = [{"type": medium, "member": member}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": [{"type": "text", "text": label}]}]
    described |= {"messages": messages, "options": list(options)}
    return {"__key__": key, member: data, "json": described}
