"""LLaVA-style JSON and its folder of images → conversation shards.

    anymal llava json=llava_v1_5_mix665k.json images=data/llava folder=data/llava-shards
    anymal llava json=blip_laion_cc_sbu_558k.json images=images folder=shards max_bad_share=0

The format of LLaVA's training data, which many sets share: a JSON list (or JSON Lines) of records

    {"id": "…", "image": "coco/1.jpg",
     "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}

``image`` is a path in the folder of images, a list of paths, or absent; each ``<image>`` in what the human says stands
for one of them, in order. A record whose markers and images do not fit, whose images are missing, or whose turns make
no conversation is skipped, counted, and written to ``FOLDER.skipped.jsonl`` with its number, id and reason; too many of
them stop the run. Images are copied as they are, byte for byte.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from tqdm import tqdm

from anymal.config.command_line import parse_args, run_program
from anymal.data.quarantine import Quarantine
from anymal.data_prep.write import write_shards
from anymal.errors import BadSample, UserError
from anymal.files import is_done

MARKER = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_SUFFIXES = {".jpg": "jpg", ".jpeg": "jpeg", ".png": "png", ".webp": "webp"}


@dataclass(kw_only=True)
class Settings:
    """Settings of this step."""

    json: str = MISSING
    """The records: a .json list, or .jsonl."""
    images: str = MISSING
    """The folder that the records' paths start from."""
    folder: str = MISSING
    """The folder of shards to write."""
    per_shard: int = 2000
    """Conversations in a shard."""
    max_bad_share: float = 0.1
    """Stop when more than this share of the records is bad; 0 tolerates none."""
    max_bad_in_a_row: int = 100
    """Stop after more bad records than this without a good one between."""


def read_records(path: Path) -> list[Any]:
    """The records of a JSON list or of JSON Lines.

    Raises:
        UserError: It cannot be read; the message names the line.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    line = 0
    try:
        text = path.read_text("utf-8")
        if path.suffix != ".jsonl":
            records = json.loads(text)
        else:
            records = []
            for line, one in enumerate(text.split("\n"), 1):  # noqa: B007 (the error message names the line)
                records += [json.loads(one)] if one.strip() else []
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}{f', line {line}' if line else ''} is not valid JSON: {error}") from error
    if not isinstance(records, list):
        raise UserError(f"{path} holds one {type(records).__name__}; wanted is a list of records")
    return records


def convert(record: Any, number: int, images: Path) -> dict[str, Any]:
    """One record → one sample, as `write_shards` takes it; `number` becomes its key.

    Raises:
        BadSample: The record cannot be used; the message says what was found and what is wanted.
    """
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise BadSample('it has no list "conversations"')
    listed = record.get("image") or []
    paths = listed if isinstance(listed, list) else [listed]
    members = {}
    for number_of_image, path in enumerate(paths):
        file, suffix = _image(images, path)
        members[f"{number_of_image}.{suffix}"] = file.read_bytes()
    messages = [_message(turn) for turn in record["conversations"]]
    markers = [part for message in messages for part in message["content"] if part["type"] == "image"]
    if len(markers) != len(members):
        raise BadSample(f"it has {len(markers)} {MARKER} markers for {len(members)} images")
    for part, member in zip(markers, members, strict=True):
        part["member"] = member
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise BadSample(f"its turns are {roles}; wanted is the user and the assistant by turns, the assistant last")
    return {"__key__": f"{number:08d}", **members, "json": {"messages": messages, "id": str(record.get("id", number))}}


def _image(images: Path, path: Any) -> tuple[Path, str]:
    if not isinstance(path, str):
        raise BadSample(f"its image is {path!r}; wanted is a path")
    file = (images / path).resolve()
    if not file.is_relative_to(images.resolve()):  # data may come from anywhere: it must not name other files of ours
        raise BadSample(f"its image {path!r} is outside the folder of images")
    if file.suffix.lower() not in _SUFFIXES:
        raise BadSample(f"its image {path!r} is none of {', '.join(_SUFFIXES)}")
    if not file.is_file():
        raise BadSample(f"its image {path!r} is not in {images}")
    return file, _SUFFIXES[file.suffix.lower()]


def _message(turn: Any) -> dict[str, Any]:
    """One turn; the text around each marker without the line breaks that set it off."""
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or turn.get("from") not in _ROLES:
        raise BadSample(f'a turn is {turn!r:.80}; wanted are "from" (one of {", ".join(_ROLES)}) and "value"')
    role = _ROLES[turn["from"]]
    if role != "user":
        if MARKER in turn["value"]:
            raise BadSample(f"there is an {MARKER} in what the {role} says")
        return {"role": role, "content": [{"type": "text", "text": turn["value"].strip()}]}
    content: list[dict[str, str]] = []
    for markers_before, text in enumerate(turn["value"].split(MARKER)):
        content += [{"type": "image"}] if markers_before else []
        content += [{"type": "text", "text": text.strip("\n")}] if text.strip() else []
    return {"role": role, "content": content}


def samples(records: list[Any], images: Path, source: str, quarantine: Quarantine) -> Iterator[dict[str, Any]]:
    """The samples of all records that can be used; the others go to `quarantine`.

    Raises:
        BudgetExceeded: Too many cannot be used.
    """
    for number, record in enumerate(tqdm(records, desc="records", unit="")):
        try:
            sample = convert(record, number, images)
        except BadSample as error:
            name = record.get("id", number) if isinstance(record, dict) else number
            quarantine.reject(source, f"record {number}, id {name}", str(error))
            continue
        quarantine.accept()
        yield sample


def main(argv: list[str] | None = None) -> None:
    """The program."""
    settings = parse_args(Settings, __doc__, argv)
    folder = Path(settings.folder)
    if is_done(folder):
        return
    if not Path(settings.images).is_dir():
        raise UserError(f"there is no folder {settings.images}")
    records = read_records(Path(settings.json))
    log = folder.with_name(f"{folder.name}.skipped.jsonl")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    quarantine = Quarantine(log, max_in_a_row=settings.max_bad_in_a_row, max_share=settings.max_bad_share)
    good = samples(records, Path(settings.images), settings.json, quarantine)
    written = write_shards(folder, good, per_shard=settings.per_shard)
    skipped = f"; {quarantine.bad} records skipped, see {log}" if quarantine.bad else ""
    print(f"{written} conversations in {folder}{skipped}")


def start() -> None:
    """Run the program, for the command line."""
    run_program(main)


if __name__ == "__main__":
    start()
