"""Held-out samples → records: what a model says, and how likely it finds each answer, under three conditions.

    stream's workers ──Asked──▶ encoders, once ──┬── its own media ──┐
                                                 ├── blank media ────┼──▶ LLM ──▶ a Record for each
                                                 └── another's ──────┘

A model that answers from the wording of the question alone does the same in all three; only what lies above both
controls was seen or heard. Every figure is computed from the records (`anymal.evaluation.scores`).

Samples come in a shuffled order (`anymal.data.stream.samples_once`); each is lent the media of the one before it that
has as many of each modality, and the first those of the last. So a window of samples is all that is held, however large
the set is; of each medium, once it is encoded, its features.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from anymal.data.prepare import Prepare
from anymal.errors import BadSample
from anymal.evaluation.scores import BLANK, OWN, SHUFFLED, Option, Record
from anymal.model.generate import Said, embed_prompt, generate, log_likelihoods
from anymal.model.multimodal import AnyMAL
from anymal.sample import TEXT, Features, Sample, Tokens

Media = dict[str, list[Features]]
"""The features of one sample's media (or views of them) by modality, in reading order."""


@dataclass(kw_only=True)
class Asked:
    """A held-out sample as the model meets it."""

    key: str
    """The sample's key."""
    shard: str
    """Its tar."""
    question: str
    """What is asked, in words."""
    answer: str
    """What is right."""
    options: list[str]
    """The possible answers of a closed question."""
    tokens: Tokens
    """The question, its media included."""
    ids: list[list[int]]
    """The token ids, end token included, of each option, or of the right answer where there are none."""


def ask(prepare: Prepare, sample: Sample) -> Asked:
    """Decode and tokenise a held-out sample. Runs in the stream's workers.

    Raises:
        BadSample: It has no answer, one that is not among its options, or is bad otherwise.
    """
    answer = sample.answer()
    if not answer.strip():
        raise BadSample("ends without an answer of the assistant, so there is nothing to compare with")
    if sample.options and answer not in sample.options:
        raise BadSample(f"has the answer {answer!r}, which is not among its options")
    decoded = prepare.decode(sample.question())
    ids = prepare.prompt.answers(decoded, sample.options or [answer])
    # Views leave room for the longest option, whichever is right: else their number would be a hint.
    longest = max(map(len, ids)) if sample.options else 0
    tokens = prepare.prompt.question(decoded, reserved=longest)
    length, most = len(tokens.ids) + longest, prepare.prompt.max_tokens
    if length > most:
        what = "with its longest option: " if longest else ""
        raise BadSample(f"{what}has {length} tokens, data.max_tokens is {most}; raise data.max_tokens")
    said = [message for message in sample.question().messages if message.role != "system"]
    question = " ".join(part.content for message in said for part in message.parts if part.kind == TEXT)
    return Asked(
        key=sample.key,
        shard=sample.shard,
        question=question,
        answer=answer,
        options=sample.options,
        tokens=tokens,
        ids=ids,
    )


def evaluate(
    model: AnyMAL, tokenizer: Any, asked: Iterable[Asked], *, max_new_tokens: int = 16, batch_size: int = 16
) -> Iterator[Record]:
    """The records of a set: one for each sample and condition, samples nearly in their order.

    Args:
        model: The model.
        tokenizer: The LLM's.
        asked: The set, in an order that does not follow its answers.
        max_new_tokens: Longest free answer; 0 asks for none.
        batch_size: Media encoded, and prompts answered, at once.

    Yields:
        Records of the conditions ``own``, ``blank`` (encoders' inputs all zeros) and ``shuffled``. A sample without
        media has the first alone; one that has nobody to lend it media lacks the last.
    """
    for trials in _batches(_trials(model, asked, batch_size), batch_size):
        prompts = [embed_prompt(model, trial.tokens) for trial in trials]
        said: Sequence[Said | None] = [None] * len(trials)
        if max_new_tokens:
            said = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
        likelihoods = log_likelihoods(model, prompts, [trial.asked.ids for trial in trials])
        for trial, answer, found in zip(trials, said, likelihoods, strict=True):
            yield _record(trial, answer, found.tolist())


@dataclass(kw_only=True)
class _Trial:
    """A sample under one condition."""

    asked: Asked
    condition: str
    tokens: Tokens
    """The question with the features that stand in its place of media."""
    lender: str | None = None
    """The key of the sample whose media these are, if they are another's."""


def _trials(model: AnyMAL, asked: Iterable[Asked], batch_size: int) -> Iterator[_Trial]:
    """Every sample under every condition."""
    zeros: dict[str, Features] = {}
    first: dict[tuple[str, ...], Asked] = {}  # of the samples with media of the same modalities
    last: dict[tuple[str, ...], tuple[Asked, Media]] = {}
    for window in _batches(asked, batch_size):
        for one, media, blank in _encoded(model, window, batch_size, zeros):
            yield _Trial(asked=one, condition=OWN, tokens=_with(one.tokens, media))
            if not media:
                continue
            yield _Trial(asked=one, condition=BLANK, tokens=_with(one.tokens, blank))
            alike = tuple(sorted(run[0] for run in one.tokens.runs))
            if alike in last:
                yield _lent(one, last[alike])
            else:
                first[alike] = one
            last[alike] = one, media
    for alike, one in first.items():
        if last[alike][0] is not one:
            yield _lent(one, last[alike])


def _lent(one: Asked, lender: tuple[Asked, Media]) -> _Trial:
    other, media = lender
    return _Trial(asked=one, condition=SHUFFLED, tokens=_with(one.tokens, media), lender=other.key)


def _encoded(
    model: AnyMAL, window: Sequence[Asked], batch_size: int, zeros: dict[str, Features]
) -> Iterator[tuple[Asked, Media, Media]]:
    """Each sample, now without its media, with their features and those of blank ones; `zeros` remembers the latter."""
    found: list[Media] = [{} for _ in window]
    for modality in model.projectors:
        place = [
            (i, medium)
            for i, one in enumerate(window)
            for (name, *_), medium in zip(one.tokens.runs, one.tokens.media, strict=True)
            if name == modality
        ]
        if place and modality not in zeros:
            (zeros[modality],) = _features(model, modality, [torch.zeros_like(place[0][1])])
        for chosen in _batches(place, batch_size):
            made = _features(model, modality, [medium for _, medium in chosen])
            for (i, _), features in zip(chosen, made, strict=True):
                found[i].setdefault(modality, []).append(features)
    for one, media in zip(window, found, strict=True):
        one.tokens = replace(one.tokens, media=[])
        yield one, media, {name: [zeros[name]] * len(several) for name, several in media.items()}


def _features(model: AnyMAL, modality: str, media: Sequence[Tensor]) -> list[Features]:
    encoded = model.encode({modality: torch.stack(list(media))})[modality]
    return [Features(tensor=features) for features in encoded.cpu()]


def _with(tokens: Tokens, media: Media) -> Tokens:
    """A question with these features, in the order in which it refers to them."""
    following = {name: iter(several) for name, several in media.items()}
    return replace(tokens, media=[next(following[name]) for name, *_ in tokens.runs])


def _record(trial: _Trial, said: Said | None, likelihoods: Sequence[float]) -> Record:
    asked = trial.asked
    texts = asked.options or [asked.answer]
    scored = [
        Option(text=text, log_likelihood=likelihood, tokens=len(ids))
        for text, likelihood, ids in zip(texts, likelihoods, asked.ids, strict=True)
    ]
    right = scored[texts.index(asked.answer)]
    return Record(
        key=asked.key,
        shard=asked.shard,
        condition=trial.condition,
        lender=trial.lender,
        question=asked.question,
        answer=asked.answer,
        loss=-right.log_likelihood / right.tokens,
        said=None if said is None else said.text,
        cut=said is not None and said.cut,
        options=scored if asked.options else [],
        altered=[f"{modality} {note}" for modality, note in asked.tokens.decoded if note]
        + [f"{modality} ignored, which the model does not have," for modality in asked.tokens.ignored],
    )


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch
