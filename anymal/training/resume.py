"""What may change between the starts of one run, and what may not.

A resumed run goes on exactly where it stopped only if it computes the same as before. So a setting that changes what is
computed is refused, by name. One that is known to change nothing may change freely (`FREE`). One in between is noted
(`NOTED`). A setting that nobody has thought about yet is refused.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from anymal.config.schema import Config
from anymal.errors import UserError

FREE = (
    *("run.dir", "run.resume", "run.save_every", "run.keep", "run.log_every", "run.peak_tflops", "run.wandb"),
    *("run.project", "run.group", "run.data_license", "run.samples", "run.samples_from"),
    *("data.cache", "data.cache_gb", "data.workers", "data.timeout", "data.max_bad_in_a_row", "data.max_bad_share"),
    *("model.llm.checkpointing", "model.llm.license", "model.llm.allow_unquantized"),
    "train",  # what is trainable is compared with the optimizer's state, parameter by parameter
)
"""Settings that change nothing of what is trained."""
_SHARDS = "where the tars lie; their names and counts are compared next"
_ROUNDING = "results are rounded otherwise"
NOTED = {
    r"data\.shards|data\.datasets\.[^.]+\.shards": _SHARDS,
    r"data\.features": "features of another precision differ by rounding",
    r"engine\.(zero|deepspeed)|model\.llm\.attention|model\.modalities\.[^.]+\.encoder_batch_size": _ROUNDING,
    r"model\.checkpoint(\..+)?": "it has begun, and goes on from its own checkpoint (a new one takes another run.dir)",
    r"optim\.steps": "from here on the learning rate follows the schedule of a run of that length",
    r"model\.modalities\.[^.]+\.encoder": "the weights there are compared with those it was trained on",
}
"""Settings (patterns of dotted names) whose change is noted → what is said of it."""
_STEP = ("data.batch_size", "optim.gradient_accumulation")  # compared with the number of processes, by their product
_ENCODER = re.compile(r"model\.modalities\.[^.]+\.encoder")
_LONGEST = 100  # characters of a value in a message


def differences(saved: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    """The settings in which two runs differ, by their dotted names: what was, and what is; None if there is none."""
    was, new = (dict(_flat(asdict(config))) for config in (saved, now))
    names = dict.fromkeys([*was, *new])
    return {name: (was.get(name), new.get(name)) for name in names if not _same(was.get(name), new.get(name))}


def compare(saved: Config, now: Config, folder: Path, processes: tuple[int, int]) -> list[str]:
    """Notes on a run that goes on with other settings than those of its checkpoint.

    Args:
        saved: The settings in the checkpoint.
        now: Those of the recipe and the command line.
        folder: The checkpoint, for the message.
        processes: How many trained then (0 if that is not known), and how many do now.

    Raises:
        UserError: One changes what is computed. Names all such settings, with both values, and what to do.
    """
    changed = {name: values for name, values in differences(saved, now).items() if name not in FREE}
    step = {name: changed.pop(name) for name in _STEP if name in changed}
    refused, notes = _compare_steps(saved, now, processes, bool(step))
    for name, (was, new) in changed.items():
        reason = next((text for pattern, text in NOTED.items() if re.fullmatch(pattern, name)), None)
        if reason is None or (_ENCODER.fullmatch(name) and _nameless(was) != _nameless(new)):
            refused.append(f"{name} was {_shown(was)}, is {_shown(new)}")
        else:
            notes.append(f"{name} was {_shown(was)}, is {_shown(new)}: {reason}")
    if refused:
        moved = "; a folder that was moved: link it at its old place" if "model.llm.name" in changed else ""
        raise UserError(
            f"the run would go on from {folder}, but with other settings: {'; '.join(refused)}. Put them back{moved}; "
            f"or start a new run from its weights: model.checkpoint={folder} and another run.dir"
        )
    return notes


def _compare_steps(
    saved: Config, now: Config, processes: tuple[int, int], changed: bool
) -> tuple[list[str], list[str]]:
    """What to refuse and what to note of the effective batch size: a step must have as many samples as before.

    One process with eight micro-batches is eight data parallel processes with one.
    """
    if not changed and processes[0] in (0, processes[1]):
        return [], []
    (was, text_was), (new, text_new) = (_samples(c, p) for c, p in zip((saved, now), processes, strict=True))
    factors = ("" if now.data.row_tokens else "batch_size × ") + "optim.gradient_accumulation × processes"
    change = f"{factors} was {text_was}, is {text_new}"
    if processes[0] == 0:
        return [], [f"{change}: whether a step is as large as it was is for you to know"]
    if was == new:
        return [], [f"{change}: {_ROUNDING}"]
    return [change], []


def _samples(config: Config, processes: int) -> tuple[int, str]:
    """The samples, or packed rows, of one optimizer step; and how that comes about."""
    batch = [] if config.data.row_tokens else [config.data.batch_size]
    factors = [*batch, config.optim.gradient_accumulation, processes]
    product = 1
    for factor in factors:
        product *= factor
    return product, f"{' × '.join(str(factor or '?') for factor in factors)} = {product or '?'}"


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings → dotted name and value; an encoder's composition is one value."""
    if isinstance(value, Mapping) and not _ENCODER.fullmatch(name):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _same(was: Any, new: Any) -> bool:
    """Whether two values are equal, or name the same place on disk."""
    if was == new:
        return True
    if not (isinstance(was, str) and isinstance(new, str)):
        return False
    return os.path.exists(was) and os.path.exists(new) and os.path.samefile(was, new)


def _nameless(encoder: Any) -> Any:
    """An encoder's setting without the names of what it is made of: its structure, and all that it sets."""
    if isinstance(encoder, Mapping):
        names = ("name", "channels", "append")
        return {key: _nameless(value) if key in names else value for key, value in encoder.items()}
    if isinstance(encoder, Sequence) and not isinstance(encoder, str):
        return [_nameless(one) for one in encoder]
    return "" if encoder is not None else None


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False) if not isinstance(value, str) else value
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
