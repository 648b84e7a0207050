"""Pictures whose objects are known → yes/no questions about them.

    anymal negatives shards=data/coco out=data/coco-negatives questions=6
    anymal negatives shards=data/laion synonyms=objects.txt out=data/laion-negatives ways=[adversarial]

Models that never see a no say yes to everything that often goes with what they see (object hallucination). The
questions, "Is there a dog in the picture?", are POPE's (Li and others: "Evaluating Object Hallucination in Large
Vision-Language Models", arXiv 2305.10355), and so are the three ways of choosing what is not there, each of which
becomes a folder:

    random       any object of the data
    popular      those that most pictures of the data hold
    adversarial  those that are most often together with what is there

As many yes as no for every picture; the yes are the same in all ways. `anymal evaluate` reports POPE's figures for
such shards; for training, blend them as one of ``data.datasets``.

What a picture holds is read from its ``.json``: a list under "objects", of names or of ``{"name": …}``. Without one,
from the right answer of a closed question; without that, from its caption: the objects of `synonyms` that it names,
or, without a table, the whole caption (of at most 3 words). A caption does not tell all that is in a picture: a "no"
made from captions is wrong now and then; one made from complete annotations is not. An object that may be there under
another name (plural, synonym, a part of a name, a word of the caption) is never asked for as absent.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from omegaconf import MISSING
from tqdm import tqdm

from anymal.config.command_line import parse_args, run_program
from anymal.config.schema import DataConfig
from anymal.data import shards
from anymal.data.loader import RawSample
from anymal.data.quarantine import Quarantine
from anymal.data.stream import walk
from anymal.data_prep.objects import Names, read_table
from anymal.data_prep.write import write_shards
from anymal.errors import BadSample, UserError
from anymal.evaluation.metrics import words
from anymal.files import is_done

Way = Literal["random", "popular", "adversarial"]
WAYS: tuple[Way, ...] = get_args(Way)
_PICTURES = ("jpg", "jpeg", "png", "webp")
_LONGEST_NAME = 3  # words of a caption that is taken for the name of an object


@dataclass(kw_only=True)
class Settings:
    """Settings of this step."""

    shards: Any = MISSING
    """Tars of pictures with their objects: a path, a folder, a brace pattern, or a list of these."""
    out: str = MISSING
    """The folder to write a folder for each way into."""
    ways: list[Way] = field(default_factory=lambda: list(WAYS))
    """How what is not there is chosen: any of them."""
    questions: int = 6
    """Questions about a picture, half of them with the answer no; fewer where it holds fewer objects."""
    synonyms: str = ""
    """A text file with an object a line, its names between commas, the one to ask for first: person, man, woman."""
    seed: int = 0
    """Which objects are asked for."""
    per_shard: int = 2000
    """Questions in a shard."""
    max_bad_share: float = 0.1
    """Stop when more than this share of the samples is bad; 0 tolerates none."""
    max_bad_in_a_row: int = 100
    """Stop after more bad samples than this without a good one between."""

    def __post_init__(self):
        if self.questions < 2 or self.questions % 2:
            raise UserError(f"questions is {self.questions}; it must be even, for as many yes as no")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One sample of the source; its picture stays there."""

    number: int = 0
    """Its place among the good samples: begins the keys of its questions, and tells its random numbers from others'."""
    key: str
    """Its key."""
    location: tuple[str, int, int]
    """Tar, offset, size: what `anymal.data.shards.read` takes."""
    member: str
    """The suffix of the picture."""
    objects: list[str]
    """What it holds, each once."""
    caption: str
    """What else is said of it; may be empty."""


def describe(names: Names, raw: RawSample) -> Picture:
    """What is known of a sample.

    Raises:
        BadSample: It has not exactly one picture, or nothing that tells what is in it.
    """
    members = raw.members
    pictures = [member for member in members if member.rsplit(".", 1)[-1] in _PICTURES]
    if len(pictures) != 1:
        raise BadSample(f"it has {len(pictures)} pictures ({', '.join(_PICTURES)}); wanted is one")
    try:
        caption = members.get("txt", b"").decode("utf-8-sig").strip()
        described = json.loads(members.get("json", b"{}"))
    except (ValueError, RecursionError) as error:  # of UTF-8 and of JSON
        raise BadSample(f"its text is damaged: {error}") from error
    objects = _objects(described if isinstance(described, dict) else {}, caption, names)
    objects = list(dict.fromkeys(name for name in map(names.name, map(_bare, objects)) if name))
    return Picture(key=raw.key, location=raw.place, member=pictures[0], objects=objects, caption=caption)


def _objects(described: dict[str, Any], caption: str, names: Names) -> list[str]:
    """The names of the objects, as they are written in the sample."""
    if "objects" in described:
        listed = described["objects"]
        entries = [entry.get("name") if isinstance(entry, dict) else entry for entry in _list(listed)]
        found = [name for name in entries if isinstance(name, str)]
        if not isinstance(listed, list) or len(found) < len(entries):
            raise BadSample(f'its "objects" are {listed!r:.80}; wanted is a list of names, or of {{"name": …}}')
        return found
    if answer := _answer(described):
        return [answer]
    if not caption:
        raise BadSample('nothing tells what is in it: its json has no "objects" and asks for none, and no caption')
    if names:
        return names.found_in(caption)
    if len(words(caption)) > _LONGEST_NAME:
        raise BadSample(
            f"its caption {caption!r:.60} is no name of an object; give synonyms=FILE with those to look for"
        )
    return [caption]


def _bare(name: str) -> str:
    """A name without its article."""
    return re.sub(r"^(a|an|the)\s+", "", name.strip(), flags=re.IGNORECASE)


def _answer(described: dict[str, Any]) -> str:
    """The right answer, if this is a closed question with one answer that names something; else empty."""
    options, messages = _list(described.get("options")), _list(described.get("messages"))
    content = messages[-1].get("content") if messages and isinstance(messages[-1], dict) else None
    texts = [part.get("text") for part in _list(content) if isinstance(part, dict)] or [content]
    if len(texts) != 1 or not isinstance(texts[0], str) or texts[0] not in options:
        return ""
    return "" if re.fullmatch(r"yes|no|\w|[\d.,%]+", texts[0].strip(" .").lower()) else texts[0]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def survey(source: Any, names: Names, quarantine: Quarantine) -> list[Picture]:
    """What is known of every good sample of some tars, in their order.

    Raises:
        UserError: A tar is missing or cannot be read, or there is no sample.
        BudgetExceeded: Too many samples are bad.
    """
    pictures = walk(DataConfig(shards=source, workers=0), use=partial(describe, names), quarantine=quarantine)
    numbered = enumerate(tqdm(pictures, desc="pictures", unit="", leave=False))
    return [replace(picture, number=number) for number, picture in numbered]


class Chooser:
    """Chooses what is asked about each picture; the same for the same data and seed.

    Args:
        pictures: All of them: how often an object is there, and together with which others, is counted over them.
        names: Tells which names may mean the same.
        seed: Of all that is drawn.
    """

    def __init__(self, pictures: list[Picture], names: Names, seed: int):
        self.names, self.seed = names, seed
        self.count = Counter(name for picture in pictures for name in picture.objects)
        self.together: dict[str, Counter[str]] = {name: Counter() for name in self.count}
        for picture in pictures:
            for name in picture.objects:
                self.together[name].update(other for other in picture.objects if other != name)

    def questions(self, picture: Picture, way: Way, most: int) -> list[tuple[str, str]]:
        """(object, "yes" or "no") by turns, at most `most` and as many of each; none if the picture does not let us."""
        rng = random.Random(f"{self.seed}/{picture.number}/present")
        present = rng.sample(picture.objects, len(picture.objects))
        rng = random.Random(f"{self.seed}/{picture.number}/{way}")
        absent = (
            name
            for name in self._ranked(picture, way, rng)
            if not self.names.may_be(name, picture.objects, picture.caption)
        )
        pairs = zip(present[: most // 2], absent, strict=False)
        return [question for there, not_there in pairs for question in ((there, "yes"), (not_there, "no"))]

    def _ranked(self, picture: Picture, way: str, rng: random.Random) -> list[str]:
        """Every object of the data, the best to ask for first; what is as good stands in a drawn order."""
        ranked = rng.sample(sorted(self.count), len(self.count))
        if way == "popular":
            ranked.sort(key=lambda name: -self.count[name])
        elif way == "adversarial":
            ranked.sort(key=lambda name: (-sum(self.together[o][name] for o in picture.objects), -self.count[name]))
        return ranked


def samples(pictures: list[Picture], chooser: Chooser, way: Way, most: int) -> Iterator[dict[str, Any]]:
    """The conversations, as `write_shards` takes them: the picture's bytes as they are, one question each."""
    for picture in tqdm(pictures, desc=way, unit="", leave=False):
        questions = chooser.questions(picture, way, most)
        data = shards.read(*picture.location)[1][picture.member] if questions else b""
        for i, (name, answer) in enumerate(questions):
            text = f"Is there {'an' if name[0] in 'aeiou' else 'a'} {name} in the picture?"
            user = [{"type": "image", "member": picture.member}, {"type": "text", "text": text}]
            messages = [
                {"role": "user", "content": user},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ]
            described = {"messages": messages, "options": ["yes", "no"], "object": name, "way": way}
            key = f"{picture.number:08d}-{i:02d}"
            yield {"__key__": key, picture.member: data, "json": described | {"source": picture.key}}


def main(argv: list[str] | None = None) -> None:
    """The program."""
    settings = parse_args(Settings, __doc__, argv)
    out = Path(settings.out)
    ways = [way for way in settings.ways if not is_done(out / way)]
    if not ways:
        return
    names = Names(read_table(Path(settings.synonyms)) if settings.synonyms else ())
    log = out.with_name(f"{out.name}.skipped.jsonl")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    quarantine = Quarantine(log, max_in_a_row=settings.max_bad_in_a_row, max_share=settings.max_bad_share)
    pictures = survey(settings.shards, names, quarantine)
    chooser = Chooser(pictures, names, settings.seed)
    if not any(chooser.questions(picture, "random", 2) for picture in pictures):
        raise UserError(f"{len(pictures)} pictures with {len(chooser.count)} objects: in none is another one missing")
    for way in ways:
        written = write_shards(
            out / way, samples(pictures, chooser, way, settings.questions), per_shard=settings.per_shard
        )
        print(f"{written} questions in {out / way}")
    if "adversarial" in ways and not any(chooser.together.values()):
        print("no picture holds two objects, so that adversarial is the same as popular")
    if quarantine.bad:
        print(f"{quarantine.bad} samples skipped, see {log}")


def start() -> None:
    """Run the program, for the command line."""
    run_program(main)


if __name__ == "__main__":
    start()
