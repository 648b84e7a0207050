"""The members of one tar sample → a `Sample`: a conversation, or a caption and what it describes.

Called by the stream's workers between reading and decoding. Knows JSON and UTF-8, decodes no medium, unpickles nothing.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import Any

from anymal.errors import BadSample, nearest
from anymal.modality import placeholder
from anymal.sample import TEXT, Message, Part, Sample

ROLES = ("system", "user", "assistant")
PICKLED = ("pickle", "pkl", "pyd", "pt", "pth")
LARGEST_JSON = 1 << 24  # bytes
MOST_MESSAGES = 512  # each answer's place is found by rendering the conversation up to it
MOST_OPTIONS = 1000
MOST_MEDIA = 1000
_LONG = 60  # characters of a stranger's text that a message repeats


def parse(
    shard: str,
    key: str,
    members: dict[str, bytes],
    suffixes: Mapping[str, str],
    modalities: Collection[str] | None = None,
) -> Sample:
    """The members of one sample → a conversation whose media are still bytes.

    With a ``json`` that has "messages" it is that conversation: each content is a string or a list of
    ``{"type": "text", "text": ...}`` and ``{"type": MODALITY, "member": "0.jpg"}``; without "member", media are taken
    in the members' order (2.jpg before 10.jpg). Otherwise ``txt`` is the caption of all the media.

    A medium of another modality than the run's is ignored, and the rest of its sample is used: one with a picture and a
    clip serves a run that sees pictures alone. Not so where the text refers to the clip, or nothing else is there.

    Args:
        shard, key, members: As `anymal.data.shards.read` gives them.
        suffixes: Suffix → modality, of all modalities that there are.
        modalities: Those of the run; None: all of them.

    Raises:
        BadSample: No text, invalid JSON or UTF-8, an unknown type or role, or media and parts that do not match; it
            refers to a medium that is not of the run's modalities, or has only such media.
    """
    for member in members:
        if member.rsplit(".", 1)[-1] in PICKLED:
            raise BadSample(f"its member {member!r} looks like a pickle, which is never unpickled; remove it")
    by_modality: dict[str, list[str]] = {modality: [] for modality in suffixes.values()}
    for member in sorted(members, key=_natural):
        modality = modality_of(member, suffixes)
        if modality is not None:
            by_modality[modality].append(member)
    media = {name: listed for name, listed in by_modality.items() if modalities is None or name in modalities}
    others = {name: listed for name, listed in by_modality.items() if name not in media}
    described = _json(members["json"]) if "json" in members else None
    if isinstance(described, dict) and "messages" in described:
        options = described.get("options") or []
        if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
            raise BadSample(f'its "options" are {_short(options)}; they must be a list of texts')
        if len(options) > MOST_OPTIONS:
            raise BadSample(f'has {len(options)} "options"; at most {MOST_OPTIONS} are taken')
        messages = _conversation(described["messages"], members, media, others)
    else:
        messages, options = _pair(members, media), []
    ignored = [name for name, listed in others.items() for _ in listed]
    if ignored:
        _require_rest(messages, members, media, ignored)
    return Sample(key=key, shard=shard, messages=messages, options=options, ignored=ignored)


def _require_rest(
    messages: list[Message], members: dict[str, bytes], media: dict[str, list[str]], ignored: list[str]
) -> None:
    """Refuse a sample of which too little is left once the media of these modalities are ignored."""
    if not any(media.values()):
        raise _no_medium(members, media)
    texts = ["".join(part.content for part in message.parts if part.kind == TEXT) for message in messages]
    for name in dict.fromkeys(ignored):
        if any(placeholder(name) in text for text in texts):
            raise BadSample(f"its text refers to its {name} by {placeholder(name)}, {_not_of_run(name, media)}")


def _no_medium(members: Collection[str], media: Collection[str]) -> BadSample:
    return BadSample(f"has no medium of this run's modalities ({', '.join(media)}); it holds {_listed(members)}")


def _not_of_run(name: str, media: Collection[str]) -> str:
    return f"but {name} is not one of this run's modalities ({', '.join(media)})"


def _json(data: bytes) -> Any:
    if len(data) > LARGEST_JSON:
        raise BadSample(f"its json has {len(data)} bytes; at most {LARGEST_JSON} are read")
    try:
        return json.loads(data)
    except ValueError as error:
        raise BadSample(f"its json is not valid: {error}") from error
    except RecursionError as error:
        raise BadSample("its json is nested too deeply") from error


def modality_of(member: str, suffixes: Mapping[str, str]) -> str | None:
    """The modality of a member by its longest suffix in `suffixes`; None if it holds no medium."""
    fitting = [suffix for suffix in suffixes if f".{member}".endswith(f".{suffix}")]
    return suffixes[max(fitting, key=len)] if fitting else None


@lru_cache(maxsize=1024)  # nearly every sample has the same few suffixes
def _natural(member: str) -> tuple[str | int, ...]:
    return tuple(int(piece) if i % 2 else piece for i, piece in enumerate(re.split(r"([0-9]+)", member)))


def _short(value: Any) -> str:
    try:
        text = json.dumps(value)
    except RecursionError:
        return f"a {type(value).__name__} that is nested deeply"
    return text if len(text) <= _LONG else f"{text[:_LONG]}…"


def _listed(names: Iterable[str]) -> str:
    text = ", ".join(names)
    return text if len(text) <= 5 * _LONG else f"{text[: 5 * _LONG]}…"


def _nearest(name: str, names: list[str], otherwise: str = "") -> str:
    """As `anymal.errors.nearest`; comparing takes the product of the names' lengths, so they are bounded."""
    return nearest(name[:_LONG], [known[:_LONG] for known in names[:100]], otherwise)


def _pair(members: dict[str, bytes], media: dict[str, list[str]]) -> list[Message]:
    if "txt" not in members:
        raise BadSample(f'has no text: neither a txt nor a json with "messages"; it holds {_listed(sorted(members))}')
    try:
        caption = members["txt"].decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadSample(f"its txt is not UTF-8: {error}") from error
    if not caption:
        raise BadSample("has no text: its txt is empty")
    kind_of = {member: modality for modality, names in media.items() for member in names}
    if not kind_of:
        raise _no_medium(members, media)
    names = sorted(kind_of, key=_natural)
    parts = [Part(kind=kind_of[member], content=members[member], member=member) for member in names]
    answer = Part(kind=TEXT, content=caption)
    return [Message(role="user", parts=parts), Message(role="assistant", parts=[answer])]


def _conversation(
    turns: Any, members: dict[str, bytes], media: dict[str, list[str]], others: dict[str, list[str]]
) -> list[Message]:
    """The messages, with each medium's bytes in its part, once it is certain that every medium has one place."""
    if not isinstance(turns, list) or not turns:
        raise BadSample(f'its "messages" are {_short(turns)}; they must be a list that is not empty')
    if len(turns) > MOST_MESSAGES:
        raise BadSample(f"has {len(turns)} messages; at most {MOST_MESSAGES} are taken")
    messages = [_message(turn, media, others) for turn in turns]
    parts = [part for message in messages for part in message.parts]
    if not any(part.kind == TEXT and part.content.strip() for part in parts):
        raise BadSample("has no text: no message says anything")
    if (count := sum(part.kind != TEXT for part in parts)) > MOST_MEDIA:
        raise BadSample(f"refers to {count} media; at most {MOST_MEDIA} are taken")
    for modality, listed in media.items():
        mine = [part for part in parts if part.kind == modality]
        named = {part.member for part in mine if part.member}
        for name in sorted(named - set(listed)):
            hint = _nearest(name, listed)
            raise BadSample(f"has no {modality} member {name[:_LONG]!r}{hint and f'; {hint}'}")
        unnamed = [part for part in mine if not part.member]
        if len(named) + len(unnamed) != len(listed):
            raise BadSample(
                f"its conversation refers to {len(named) + len(unnamed)} {modality} members, it holds {len(listed)}"
                + (f" ({_listed(listed)})" if listed else "")
            )
        following = iter(name for name in listed if name not in named)
        for part in mine:
            part.member = part.member or next(following)
            part.content = members[part.member]
    return messages


def _message(turn: Any, media: Collection[str], others: Collection[str]) -> Message:
    """One message; media have no content yet, only the member that they name, if they name one."""
    kinds = [TEXT, *media]
    if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
        raise BadSample(f'has the message {_short(turn)}; a message has "role" and "content"')
    if turn["role"] not in ROLES:
        raise BadSample(f"has the role {_short(turn['role'])}; roles are {', '.join(ROLES)}")
    content = turn["content"]
    if isinstance(content, str):
        content = [{"type": TEXT, "text": content}]
    if not isinstance(content, list):
        raise BadSample(f"has the content {_short(content)}; a content is a text or a list of parts")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind in others:
            raise BadSample(f"has the part {_short(part)}, {_not_of_run(kind, media)}")
        if not isinstance(kind, str) or kind not in kinds:
            hint = _nearest(kind if isinstance(kind, str) else "", kinds, "this run's types are")
            raise BadSample(f"has the part {_short(part)} of unknown type; {hint}")
        field = "text" if kind == TEXT else "member"
        if part.keys() - {"type", field} or not isinstance(part.get(field, "" if kind != TEXT else None), str):
            raise BadSample(f'has the part {_short(part)}; {kind} parts have "type" and the text "{field}"')
        parts.append(Part(kind=kind, content=part.get("text"), member=part.get("member", "").lower()))
    return Message(role=turn["role"], parts=parts)
