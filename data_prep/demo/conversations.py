"""Labelled media → conversation shards for stage 2: several media of several modalities, asked about in varied words.

    python data_prep/demo/conversations.py media=data/demo folder=data/demo/conversations

Reads the shards that the demo's other steps wrote (``media/MODALITY/SPLIT``), and makes five forms of conversation from
their media and labels: a question in other words than stage 1's, a question in every turn, one about two media
together, one about which of two media, and a check (yes or no). Each split is made of that split's media only:
``validation`` and ``test`` are about objects, people and instruments that training never had. The last answer of a
conversation is one of its options.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from anymal.config.command_line import parse_args, run_program
from anymal.data_prep.demo.labelled import QUESTION, SPLITS
from anymal.data_prep.write import read_shards, write_shards
from anymal.errors import UserError
from anymal.files import is_done

MEMBERS = {"image": "jpg", "audio": "flac", "imu": "imu.npy", "video": "mp4"}
"""Modality → the suffix of its media in the demo's shards."""
QUESTIONS = {
    "image": (QUESTION, "What does the picture show?", "Name the kind of thing in the picture."),
    "audio": (QUESTION, "What is playing?", "Name what you hear."),
    "imu": (QUESTION, "Which exercise is this?", "Name what the arm is doing."),
    "video": (QUESTION, "How does it move?", "Name the motion."),
}
"""Ways to ask for a label."""


@dataclass(kw_only=True)
class Settings:
    """Settings of this step."""

    media: str = MISSING
    """The folder that holds image, audio, imu and video, each with the shards of every split."""
    folder: str = MISSING
    """The folder to write train, validation and test into."""
    train: int = 240
    """Training conversations."""
    validation: int = 100
    """Conversations for validation."""
    test: int = 300
    """Conversations for the test."""
    seed: int = 0
    """Which media are put together, and how they are asked about."""


@dataclass(frozen=True, kw_only=True)
class Medium:
    """One labelled medium."""

    modality: str
    """A key of `MEMBERS`."""
    label: str
    """What it is."""
    data: bytes
    """The member's bytes."""


Turns = list[tuple[list[Medium | str], str]]
"""What the user says (media and texts in order) and what is answered, turn by turn."""
Draw = Callable[[str | None], Medium]
"""Draws a medium of a modality, or of any."""
Form = Callable[[random.Random, Draw, dict[str, list[str]]], tuple[Turns, list[str]]]
"""Makes the turns of a conversation, and the options of its last answer, given the labels of each modality."""


def _ask(rng: random.Random, medium: Medium) -> list[Medium | str]:
    parts: list[Medium | str] = [medium, rng.choice(QUESTIONS[medium.modality])]
    return parts if rng.random() < 0.7 else parts[::-1]


def _single(rng: random.Random, draw: Draw, labels: dict[str, list[str]]) -> tuple[Turns, list[str]]:
    medium = draw(None)
    return [(_ask(rng, medium), medium.label)], labels[medium.modality]


def _in_turn(rng: random.Random, draw: Draw, labels: dict[str, list[str]]) -> tuple[Turns, list[str]]:
    media = [draw(modality) for modality in rng.sample(sorted(MEMBERS), rng.choice((2, 2, 3)))]
    return [(_ask(rng, medium), medium.label) for medium in media], labels[media[-1].modality]


def _together(rng: random.Random, draw: Draw, labels: dict[str, list[str]]) -> tuple[Turns, list[str]]:
    first, second = (draw(modality) for modality in rng.sample(sorted(MEMBERS), 2))
    number = rng.choice((0, 1))
    medium = (first, second)[number]
    text = f"What is the {('first', 'second')[number]} one?"
    return [([first, second, text], medium.label)], labels[medium.modality]


def _which(rng: random.Random, draw: Draw, labels: dict[str, list[str]]) -> tuple[Turns, list[str]]:
    first = draw(None)
    second = draw(first.modality)
    while second.label == first.label:
        second = draw(first.modality)
    answers = ["the first", "the second"]
    number = rng.choice((0, 1))
    return [([first, second, f"Which one is this: {(first, second)[number].label}?"], answers[number])], answers


def _check(rng: random.Random, draw: Draw, labels: dict[str, list[str]]) -> tuple[Turns, list[str]]:
    medium, right = draw(None), rng.random() < 0.5
    others = [label for label in labels[medium.modality] if label != medium.label]
    label = medium.label if right else rng.choice(others)
    return [([medium, f"Is this right: {label}?"], "yes" if right else "no")], ["yes", "no"]


FORMS: dict[str, tuple[Form, int]] = {
    "single": (_single, 6),
    "in turn": (_in_turn, 6),
    "together": (_together, 3),
    "which": (_which, 2),
    "check": (_check, 3),
}
"""Form → how to make one, and how often, relative to the others."""


def _sample(key: str, form: str, turns: Turns, options: list[str]) -> dict[str, Any]:
    """The tar members: each medium under a number and its suffix, and the conversation that names them."""
    sample: dict[str, Any] = {"__key__": key}
    messages = []
    for parts, answer in turns:
        content = []
        for part in parts:
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
                continue
            member = f"{len(sample) - 1}.{MEMBERS[part.modality]}"
            sample[member] = part.data
            content.append({"type": part.modality, "member": member})
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return sample | {"json": {"messages": messages, "options": options, "form": form}}


def make_conversations(media: list[Medium], count: int, seed: int, prefix: str) -> Iterator[dict[str, Any]]:
    """`count` samples made of `media`, as `write_shards` takes them; media and forms are drawn with `seed`.

    Modalities and labels are drawn evenly, however many media there are of each.
    """
    by_label: dict[str, dict[str, list[Medium]]] = {}
    for medium in media:
        by_label.setdefault(medium.modality, {}).setdefault(medium.label, []).append(medium)
    labels = {modality: sorted(of_modality) for modality, of_modality in by_label.items()}
    names, weights = list(FORMS), [weight for _, weight in FORMS.values()]
    for number in range(count):
        rng = random.Random(f"{seed}/{prefix}/{number}")

        def draw(modality: str | None, rng: random.Random = rng) -> Medium:
            modality = modality or rng.choice(sorted(by_label))
            return rng.choice(by_label[modality][rng.choice(labels[modality])])

        form = rng.choices(names, weights)[0]
        yield _sample(f"{prefix}-{number:04d}", form, *FORMS[form][0](rng, draw, labels))


def read_media(folder: Path, split: str) -> list[Medium]:
    """The labelled media of every modality's `split`.

    Raises:
        UserError: A modality's shards are not there.
    """
    media = []
    for modality, member in MEMBERS.items():
        tars = folder / modality / split
        if not tars.is_dir():
            raise UserError(f"{tars} is not there; make the shards of {modality} first")
        for sample in read_shards(tars):
            media.append(Medium(modality=modality, label=sample["json"]["label"], data=sample[member]))
    return media


def make(settings: Settings) -> None:
    """Write the shards of every split into the settings' folder, whichever is not there yet."""
    for split, count in zip(SPLITS, (settings.train, settings.validation, settings.test), strict=True):
        folder = Path(settings.folder, split)
        if not is_done(folder):
            media = read_media(Path(settings.media), split)
            write_shards(folder, make_conversations(media, count, settings.seed, f"talk-{split}"), per_shard=40)


def main(argv: list[str] | None = None) -> None:
    """The program."""
    make(parse_args(Settings, __doc__, argv))


def start() -> None:
    """Run the program, for the command line."""
    run_program(main)


if __name__ == "__main__":
    start()
