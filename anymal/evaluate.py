"""How much a model really perceives: held-out questions with the real medium, a blank one, and somebody else's.

A model that answers from the wording of the question alone scores the same in all three; only what lies above both
controls was seen or heard.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anymal.errors import BadSample, UserError
from anymal.generate import embed_prompt, generate, log_likelihoods
from anymal.metrics import accuracy, bleu, cider_d, rouge_l, wilson_interval, yes_no
from anymal.model import AnyMAL
from anymal.prompt import Prepare
from anymal.sample import Sample, Tokens

CONDITIONS = ("accuracy", "blank", "shuffled")
Features = dict[str, Tensor]  # one sample's encoded media: modality → [N, tokens, width]


def evaluate(
    model: AnyMAL,
    prepare: Prepare,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int = 16,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[int], Any] = lambda done: None,
) -> dict[str, Any]:
    """Score one held-out set.

    Closed questions (samples with options) are answered by the likeliest option, once with each sample's own media,
    once with blank media (the encoder's input all zeros) and once with another sample's media. All samples are also
    answered freely, and the answers compared with what is right.

    Args:
        model: The model.
        prepare: Its decoding and prompt.
        samples: Not yet decoded; the last message of each is the right answer.
        max_new_tokens: Longest free answer.
        batch_size: Media encoded, and answers generated, at once.
        seed: Of the exchange of media.
        progress: Called with the number of finished pieces of work; `pieces(samples)` in all.

    Returns:
        As `figures`, and ``predictions``: for each sample its key, shard, question, answer, choice, and what the model
        said.

    Raises:
        UserError: A sample is bad. Names shard and key.
    """
    said: dict[int, str] = {}
    choices: dict[str, dict[int, str]] = {name: {} for name in CONDITIONS}
    for window in _windows(model, prepare, samples, batch_size, seed):
        answers, chosen = _answer(model, prepare, window, max_new_tokens=max_new_tokens)
        said |= answers
        for name, numbers in chosen.items():
            choices[name] |= {i: samples[i].options[number] for i, number in numbers.items()}
        progress(len(answers) + sum(map(len, chosen.values())))
    said, choices = [said[i] for i in range(len(samples))], {n: dict(sorted(c.items())) for n, c in choices.items()}
    return figures(samples, said, choices) | {
        "predictions": [
            {
                "key": sample.key,
                "shard": sample.shard,
                "question": _asked(sample),
                "answer": sample.answer(),
                "choice": choices["accuracy"].get(i),
                "said": text,
            }
            for i, (sample, text) in enumerate(zip(samples, said, strict=True))
        ]
    }


def figures(samples: Sequence[Sample], said: Sequence[str], choices: dict[str, dict[int, str]]) -> dict[str, Any]:
    """What the answers of a set are worth.

    Args:
        samples: The set.
        said: The free answer to each.
        choices: For ``accuracy`` (its own media), ``blank`` and ``shuffled``: number of a closed question in `samples`
            → the chosen option.

    Returns:
        ``n``, ``accuracy`` with its 95% ``interval``, ``blank``, ``shuffled``, ``chance`` (1 / options), ``exact``
        (free answers that are right to the letter), ``cider_d``, ``rouge_l``, ``bleu_4``. Figures that need options are
        None without them. If all samples are yes/no questions, ``yes_no`` has `anymal.metrics.yes_no` of what was
        ``said``, of what was ``chosen``, and of the choices with ``blank`` and ``shuffled`` media.
    """
    answers = [sample.answer() for sample in samples]
    result: dict[str, Any] = {"n": len(samples), **dict.fromkeys([*choices, "chance", "interval"])}
    for name, chosen in choices.items():
        if chosen:
            result[name] = accuracy(list(chosen.values()), [answers[i] for i in chosen])
    if closed := [len(sample.options) for sample in samples if sample.options]:
        result["chance"] = float(np.mean([1 / options for options in closed]))
        result["interval"] = wilson_interval(round(result["accuracy"] * len(closed)), len(closed))
    result["exact"] = accuracy(said, answers)
    right = [[answer] for answer in answers]
    result |= {"cider_d": cider_d(said, right), "rouge_l": rouge_l(said, right), "bleu_4": bleu(said, right)}
    if all(sorted(option.strip().lower() for option in sample.options) == ["no", "yes"] for sample in samples):
        result["yes_no"] = {"said": yes_no(said, answers)}
        for name, chosen in choices.items():
            label = "chosen" if name == "accuracy" else name
            options = [option.lower() for option in chosen.values()]
            result["yes_no"][label] = yes_no(options, [answers[i] for i in chosen]) if chosen else None
    return result


def _read(prepare: Prepare, samples: Sequence[Sample]) -> tuple[list[Sample], list[Tokens]]:
    """The samples decoded, and each one's question."""
    decoded, questions = [], []
    for sample in samples:
        try:
            decoded.append(prepare.decode(_unanswered(prepare, sample)))
            questions.append(prepare.prompt.question(decoded[-1]))
        except BadSample as error:
            raise UserError(f"{sample.shard}, key {sample.key!r}: {error}; held-out data must be whole") from error
    return decoded, questions


def _unanswered(prepare: Prepare, sample: Sample) -> Sample:
    """A sample without a hint at its right answer: its views leave room for the longest option, whichever is right."""
    if not sample.options:
        return sample.question()
    return max(map(sample.answered, sample.options), key=prepare.prompt.text_tokens)


def _options(prepare: Prepare, sample: Sample) -> list[list[int]]:
    """The token ids of each option of a decoded sample."""
    try:
        return prepare.prompt.answers(sample, sample.options)
    except BadSample as error:
        raise UserError(
            f"{sample.shard}, key {sample.key!r}, with its longest option: {error}; raise data.max_tokens, or take "
            "fewer views"
        ) from error


@dataclass(kw_only=True)
class _Asked:
    """One sample of a window, decoded and encoded."""

    sample: Sample
    question: Tokens
    features: dict[str, Features | None]
    """Of its own media, of blank ones and of another's (``accuracy``, ``blank``, ``shuffled``); None where none are."""


def _windows(
    model: AnyMAL, prepare: Prepare, samples: Sequence[Sample], batch_size: int, seed: int
) -> Iterator[dict[int, _Asked]]:
    """All samples by their number, `batch_size` at a time, so that no more media are held, however large the set is."""
    lender = _lenders(prepare, samples, seed)
    order, zeros = list(lender), {}
    known: dict[int, Features] = {}  # of the window before, too: the first sample's lender is in it
    for start in range(0, len(order), batch_size):
        window = order[start : start + batch_size]
        needed = list(dict.fromkeys([*window, *(lender[i] for i in window if lender[i] is not None)]))
        decoded, questions = _read(prepare, [samples[i] for i in needed])
        fresh = [n for n, i in enumerate(needed) if i not in known]
        encoded = iter(_encode(model, [questions[n] for n in fresh], batch_size))
        known = {i: known[i] if i in known else next(encoded) for i in needed}
        yield {
            i: _Asked(
                sample=decoded[n],
                question=questions[n],
                features={
                    "accuracy": known[i],
                    "blank": _blank(model, questions[n], zeros),
                    "shuffled": None if lender[i] is None else known[lender[i]],
                },
            )
            for n, i in enumerate(window)
        }


def _answer(
    model: AnyMAL, prepare: Prepare, window: dict[int, _Asked], *, max_new_tokens: int
) -> tuple[dict[int, str], dict[str, dict[int, int]]]:
    """What is said of each sample with its own media; and condition → sample → number of its likeliest option."""
    prompts = [embed_prompt(model, asked.question, asked.features["accuracy"]) for asked in window.values()]
    said = generate(model, prepare.prompt.tokenizer, prompts, max_new_tokens=max_new_tokens)
    options = {i: _options(prepare, asked.sample) for i, asked in window.items() if asked.sample.options}
    chosen = {}
    for name in CONDITIONS:
        closed = [i for i in options if window[i].features[name] is not None]
        prompts = [embed_prompt(model, window[i].question, window[i].features[name]) for i in closed]
        likelihoods = log_likelihoods(model, prompts, [options[i] for i in closed]) if closed else []
        chosen[name] = {i: int(scores.argmax()) for i, scores in zip(closed, likelihoods, strict=True)}
    return dict(zip(window, said, strict=True)), chosen


def pieces(samples: Sequence[Sample]) -> int:
    """How many pieces of work `evaluate` reports as it goes."""
    return len(samples) + 3 * sum(bool(sample.options) for sample in samples)


def _asked(sample: Sample) -> str:
    asked = [message for message in sample.question().messages if message.role != "system"]
    return " ".join(part.content for message in asked for part in message.parts if part.kind == "text")


def _encode(model: AnyMAL, questions: Sequence[Tokens], batch_size: int) -> list[Features]:
    """Run the encoders over all media, `batch_size` at a time, and hand them back sample by sample."""
    found: list[Features] = [{} for _ in questions]
    for modality in model.projectors:
        place = [
            (i, medium)
            for i, question in enumerate(questions)
            for (name, *_), medium in zip(question.runs, question.media, strict=True)
            if name == modality
        ]
        for start in range(0, len(place), batch_size):
            chosen = place[start : start + batch_size]
            features = model.encode({modality: torch.stack([medium for _, medium in chosen])})[modality]
            for (i, _), feature in zip(chosen, features, strict=True):
                known = found[i].get(modality)
                found[i][modality] = feature[None] if known is None else torch.cat([known, feature[None]])
    return found


def _blank(model: AnyMAL, question: Tokens, known: Features) -> Features:
    """What the encoders make of media that are all zeros; `known` remembers it by modality."""
    for (modality, *_), medium in zip(question.runs, question.media, strict=True):
        if modality not in known:
            known[modality] = model.encode({modality: torch.zeros_like(medium)[None]})[modality]
    names = [run[0] for run in question.runs]
    return {name: known[name].expand(names.count(name), -1, -1) for name in dict.fromkeys(names)}


def _lenders(prepare: Prepare, samples: Sequence[Sample], seed: int) -> dict[int, int | None]:
    """Sample → another one with as many media of each modality, which lends it its own; None where there is no other.

    They stand in rings, each sample behind its lender: who goes through them in this order has seen the lender's media
    just before.
    """
    alike: dict[tuple, list[int]] = {}
    for i, sample in enumerate(samples):
        (question,) = _read(prepare, [sample])[1]
        alike.setdefault(tuple(sorted(run[0] for run in question.runs)), []).append(i)
    found: dict[int, int | None] = {}
    for members in alike.values():
        ring = np.random.default_rng([seed, len(members)]).permutation(members).tolist()
        found |= dict(zip(ring, [ring[-1], *ring[:-1]], strict=True)) if len(ring) > 1 else {ring[0]: None}
    return found
