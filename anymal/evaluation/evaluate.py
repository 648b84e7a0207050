"""Held-out samples → records: what a model says, and the log-likelihood of each answer, under three conditions.

    loader workers ──HeldOut──▶ encoders, once ──┬── own: its own media ─────────┐
                                                 ├── blank: media of all zeros ──┼──▶ LLM ──▶ a Record for each
                                                 └── shuffled: another's media ──┘

Blank and shuffled are controls: a model that answers from the wording of the question alone does the same in all three.
Only what lies above both controls was seen or heard. Every figure is computed from the records
(`anymal.evaluation.scores`).

Samples come in a shuffled order (`anymal.data.stream.samples_once`). For the shuffled control each is shown the media
of the one before it that has as many of each modality (its lender), and the first those of the last. So memory holds
one window of samples, however large the set is, and of a medium that is encoded only its features.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from anymal.data.prepare import Prepare
from anymal.errors import BadSample
from anymal.evaluation.scores import BLANK, OWN, SHUFFLED, Option, Record
from anymal.modality import media_dtype
from anymal.model.generate import Answer, embed_prompt, generate, log_likelihoods
from anymal.model.multimodal import AnyMAL
from anymal.sample import TEXT, Features, Sample, Tokens

T = TypeVar("T")
Media = dict[str, list[Features]]
"""The features of one sample's media (or views of them) by modality, in reading order."""


@dataclass(kw_only=True)
class HeldOut:
    """A held-out sample as the model meets it: a prompt, and the answers whose log-likelihood is wanted."""

    key: str
    """The sample's key."""
    shard: str
    """Its tar."""
    question: str
    """The text of the question."""
    answer: str
    """The right answer."""
    options: list[str]
    """The possible answers of a closed question."""
    tokens: Tokens
    """The prompt, its media included."""
    ids: list[list[int]]
    """The token ids, end token included, of each option, or of the right answer where there are none."""


def prepare_held_out(prepare: Prepare, sample: Sample) -> HeldOut:
    """Decode and tokenise a held-out sample. Runs in the loader's workers.

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
    turns = [message for message in sample.question().messages if message.role != "system"]
    question = " ".join(part.content for message in turns for part in message.parts if part.kind == TEXT)
    return HeldOut(
        key=sample.key,
        shard=sample.shard,
        question=question,
        answer=answer,
        options=sample.options,
        tokens=tokens,
        ids=ids,
    )


def evaluate(
    model: AnyMAL,
    tokenizer: PreTrainedTokenizerBase,
    samples: Iterable[HeldOut],
    *,
    max_new_tokens: int = 16,
    batch_size: int = 16,
) -> Iterator[Record]:
    """The records of a set: one for each sample and condition, samples nearly in their order.

    Args:
        model: The model.
        tokenizer: The LLM's.
        samples: The set, in an order that does not follow its answers.
        max_new_tokens: Longest free answer; 0 generates none.
        batch_size: Media encoded, and prompts answered, at once.

    Yields:
        Records of the conditions ``own``, ``blank`` (encoders' inputs all zeros) and ``shuffled``. A sample without
        media has the first alone; one for which no other sample has such media lacks the last.
    """
    for trials in _batches(_trials(model, samples, batch_size), batch_size):
        prompts = [embed_prompt(model, trial.tokens) for trial in trials]
        answers: Sequence[Answer | None] = [None] * len(trials)
        if max_new_tokens:
            answers = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
        likelihoods = log_likelihoods(model, prompts, [trial.sample.ids for trial in trials])
        for trial, answer, of_options in zip(trials, answers, likelihoods, strict=True):
            yield _record(trial, answer, of_options.tolist())


@dataclass(kw_only=True)
class _Trial:
    """A sample under one condition."""

    sample: HeldOut
    condition: str
    tokens: Tokens
    """The prompt, with features in place of its media."""
    lender: str | None = None
    """The key of the sample whose media these are, if they are another's."""


def _trials(model: AnyMAL, samples: Iterable[HeldOut], batch_size: int) -> Iterator[_Trial]:
    """Every sample under every condition."""
    blanks: dict[str, Features] = {}
    first: dict[tuple[str, ...], HeldOut] = {}  # of the samples with media of the same modalities
    last: dict[tuple[str, ...], tuple[HeldOut, Media]] = {}
    for window in _batches(samples, batch_size):
        for sample, media, blank in _encoded(model, window, batch_size, blanks):
            yield _Trial(sample=sample, condition=OWN, tokens=_with_features(sample.tokens, media))
            if not media:
                continue
            yield _Trial(sample=sample, condition=BLANK, tokens=_with_features(sample.tokens, blank))
            modalities = tuple(sorted(run[0] for run in sample.tokens.runs))
            if modalities in last:
                yield _shuffled(sample, *last[modalities])
            else:
                first[modalities] = sample
            last[modalities] = sample, media
    for modalities, sample in first.items():
        if last[modalities][0] is not sample:
            yield _shuffled(sample, *last[modalities])


def _shuffled(sample: HeldOut, lender: HeldOut, media: Media) -> _Trial:
    """The sample with the media of `lender`."""
    tokens = _with_features(sample.tokens, media)
    return _Trial(sample=sample, condition=SHUFFLED, tokens=tokens, lender=lender.key)


def _encoded(
    model: AnyMAL, window: Sequence[HeldOut], batch_size: int, blanks: dict[str, Features]
) -> Iterator[tuple[HeldOut, Media, Media]]:
    """Each sample, now without its media, with their features and those of blank media; `blanks` caches the latter."""
    by_sample: list[Media] = [{} for _ in window]
    for modality in model.projectors:
        media = [
            (i, medium)
            for i, sample in enumerate(window)
            for (name, *_), medium in zip(sample.tokens.runs, sample.tokens.media, strict=True)
            if name == modality and isinstance(medium, Tensor)
        ]
        if media and modality not in blanks:
            (blanks[modality],) = _features(model, modality, [_blank(model, modality, media[0][1])])
        for batch in _batches(media, batch_size):
            encoded = _features(model, modality, [medium for _, medium in batch])
            for (i, _), features in zip(batch, encoded, strict=True):
                by_sample[i].setdefault(modality, []).append(features)
    for sample, of_sample in zip(window, by_sample, strict=True):
        sample.tokens = replace(sample.tokens, media=[])
        yield sample, of_sample, {name: [blanks[name]] * len(several) for name, several in of_sample.items()}


def _blank(model: AnyMAL, modality: str, medium: Tensor) -> Tensor:
    """A medium of which the encoder's network sees zeros alone: not a zero byte, which stands for black."""
    as_bytes = media_dtype(model.encoders[modality]) == torch.uint8
    return torch.zeros_like(medium, dtype=torch.float32 if as_bytes else medium.dtype)


def _features(model: AnyMAL, modality: str, media: Sequence[Tensor]) -> list[Features]:
    encoded = model.encode({modality: torch.stack(list(media))})[modality]
    return [Features(tensor=features) for features in encoded.cpu()]


def _with_features(tokens: Tokens, media: Media) -> Tokens:
    """A prompt with these features, in the order in which it refers to them."""
    following = {name: iter(several) for name, several in media.items()}
    return replace(tokens, media=[next(following[name]) for name, *_ in tokens.runs])


def _record(trial: _Trial, answer: Answer | None, likelihoods: Sequence[float]) -> Record:
    sample = trial.sample
    texts = sample.options or [sample.answer]
    scored = [
        Option(text=text, log_likelihood=likelihood, tokens=len(ids))
        for text, likelihood, ids in zip(texts, likelihoods, sample.ids, strict=True)
    ]
    right = scored[texts.index(sample.answer)]
    return Record(
        key=sample.key,
        shard=sample.shard,
        condition=trial.condition,
        lender=trial.lender,
        question=sample.question,
        answer=sample.answer,
        loss=-right.log_likelihood / right.tokens,
        said=None if answer is None else answer.text,
        cut=answer is not None and answer.cut,
        options=scored if sample.options else [],
        altered=[f"{modality} {note}" for modality, note in sample.tokens.decoded if note]
        + [f"{modality} ignored, which the model does not have," for modality in sample.tokens.ignored],
    )


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch
