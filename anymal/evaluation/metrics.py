"""Metrics: captions (CIDEr-D, ROUGE-L, BLEU), accuracy and its confidence interval, POPE's figures of yes/no questions.

`anymal.evaluation.scores` calls these with what the model said beside what is right. The caption metrics follow the
formulas of the COCO caption evaluation, whose usual implementation needs Java for its tokenizer. For the same words the
figures are the same as there (tests/evaluation/test_metrics.py holds them side by side). They are figures of a whole
corpus: do not average them over parts of one.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

Ngram = tuple[str, ...]


def words(caption: str) -> list[str]:
    """Lower-case words without punctuation.

    The COCO evaluation uses the Penn Treebank tokenizer (Java) and then drops punctuation. The difference: it
    splits contractions ("don't" → "do", "n't"; "dog's" → "dog", "'s"), here they stay one word. Numbers ("3.5") and
    hyphenated words stay whole in both. Text written without spaces becomes one word: split it first.
    """
    straight = caption.lower().replace("\u2019", "'")  # a typographic apostrophe
    return re.findall(r"\d+(?:[.,]\d+)+|[^\W_]+(?:['-][^\W_]+)*", straight)


def _ngrams(tokens: Sequence[str], size: int) -> Counter[Ngram]:
    return Counter(tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1))


def _tokenized(
    captions: Sequence[str], references: Sequence[Sequence[str]]
) -> Iterator[tuple[list[str], list[list[str]]]]:
    if not captions or len(captions) != len(references) or not all(references):
        raise ValueError(
            f"{len(captions)} captions and {len(references)} sets of references; there must be at least one "
            "caption, and at least one reference for each"
        )
    for caption, several in zip(captions, references, strict=True):
        yield words(caption), [words(reference) for reference in several]


def cider_d(captions: Sequence[str], references: Sequence[Sequence[str]], *, sigma: float = 6.0) -> float:
    """CIDEr-D of a corpus: 0 is nothing in common, 10 is every caption its only reference.

    Vedantam, Zitnick, Parikh: "CIDEr: Consensus-based Image Description Evaluation", 2015 (arXiv 1411.5726), eq. 2–5
    with the clipping and the length penalty of section 6: the cosine of TF-IDF vectors of 1- to 4-grams, averaged
    over sizes and references. Three things to know before reading a figure:

    - An n-gram that every medium's references hold weighs nothing, so a corpus of one medium scores 0.
    - References of fewer than 4 words have no 4-grams: a perfect two-word caption scores 5, a one-word caption 2.5.
    - The weights come from the references of this corpus; figures of different corpora do not compare.

    Args:
        captions: One for each medium.
        references: For each medium, its right captions.
        sigma: Standard deviation of the length penalty, in words.

    Raises:
        ValueError: The numbers do not match, or there are no captions or references.
    """
    corpus = list(_tokenized(captions, references))
    total = 0.0
    for size in range(1, 5):
        media_with: Counter[Ngram] = Counter()
        for _, several in corpus:
            media_with.update({ngram for reference in several for ngram in _ngrams(reference, size)})

        def weigh(tokens: list[str], size: int = size, media_with: Counter[Ngram] = media_with) -> dict[Ngram, float]:
            return {
                ngram: count * math.log(len(corpus) / max(1, media_with[ngram]))
                for ngram, count in _ngrams(tokens, size).items()
            }

        for caption, several in corpus:
            vector = weigh(caption)
            total += sum(
                _clipped_cosine(vector, weigh(reference))
                * math.exp(-(_length_gap(caption, reference) ** 2) / (2 * sigma**2))
                for reference in several
            ) / len(several)
    return 10.0 * total / 4 / len(corpus)


def _length_gap(a: list[str], b: list[str]) -> int:
    # The COCO code measures a caption by its number of 2-grams; it differs from words only for empty captions.
    return max(len(a) - 1, 0) - max(len(b) - 1, 0)


def _clipped_cosine(candidate: dict[Ngram, float], reference: dict[Ngram, float]) -> float:
    norms = math.sqrt(sum(w * w for w in candidate.values())) * math.sqrt(sum(w * w for w in reference.values()))
    if norms == 0:
        return 0.0
    common = (min(weight, reference.get(ngram, 0.0)) * reference.get(ngram, 0.0) for ngram, weight in candidate.items())
    return sum(common) / norms


def rouge_l(captions: Sequence[str], references: Sequence[Sequence[str]], *, beta: float = 1.2) -> float:
    """ROUGE-L of a corpus, 0 to 1: the F-measure of the longest common subsequence, averaged over media.

    Lin: "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, eq. 2–4; as in the COCO evaluation, recall
    weighs `beta` times as much as precision and each is the best over the references. Raises as `cider_d`.
    """
    scores = []
    for caption, several in _tokenized(captions, references):
        common = [_longest_common_subsequence(caption, reference) for reference in several]
        precision = max(common) / max(len(caption), 1)
        recall = max(c / max(len(reference), 1) for c, reference in zip(common, several, strict=True))
        both = precision and recall
        scores.append((1 + beta**2) * precision * recall / (recall + beta**2 * precision) if both else 0.0)
    return sum(scores) / len(scores)


def _longest_common_subsequence(a: list[str], b: list[str]) -> int:
    lengths = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, start=1):
            diagonal, lengths[j] = lengths[j], diagonal + 1 if x == y else max(lengths[j], lengths[j - 1])
    return lengths[-1]


def bleu(captions: Sequence[str], references: Sequence[Sequence[str]], *, size: int = 4) -> float:
    """BLEU of a corpus with n-grams up to `size`, 0 to 1, not smoothed: without any common `size`-gram it is 0.

    Papineni and others: "BLEU: a Method for Automatic Evaluation of Machine Translation", 2002; the effective
    reference length is that of the closest reference, the shorter one if two are as close. Raises as `cider_d`.
    """
    matched, possible = [0] * size, [0] * size
    length = reference_length = 0
    for caption, several in _tokenized(captions, references):
        length += len(caption)
        closest = [(abs(len(reference) - len(caption)), len(reference)) for reference in several]
        reference_length += min(closest)[1]
        for n in range(1, size + 1):
            counts, most = _ngrams(caption, n), Counter()
            for reference in several:
                most |= _ngrams(reference, n)
            matched[n - 1] += (counts & most).total()
            possible[n - 1] += counts.total()
    if not all(matched):
        return 0.0
    precision = math.exp(sum(math.log(m / p) for m, p in zip(matched, possible, strict=True)) / size)
    return precision * min(1.0, math.exp(1 - reference_length / length))


def accuracy(predicted: Sequence[str], answers: Sequence[str]) -> float:
    """The share of `predicted` that are the right answer, letter case and outer spaces aside.

    Raises:
        ValueError: There are none, or their numbers differ.
    """
    if not answers or len(predicted) != len(answers):
        raise ValueError(f"{len(predicted)} predictions and {len(answers)} answers; there must be as many, and some")
    right = sum(p.strip().lower() == a.strip().lower() for p, a in zip(predicted, answers, strict=True))
    return right / len(answers)


def says_no(answer: str) -> bool:
    """Whether a free answer to a yes/no question is a no, read as POPE's evaluation reads it.

    It is if one of the words "No", "no" or "not" stands in the first sentence, commas aside. Everything else counts as
    a yes, as there: "isn't", and an empty answer too.
    """
    first = answer.split(".")[0].replace(",", "")
    return not {"No", "no", "not"}.isdisjoint(first.split())


def yes_no(predicted: Sequence[str], answers: Sequence[str]) -> dict[str, float | None]:
    """POPE's figures of the answers to yes/no questions (object hallucination); yes is the positive class.

    Li and others: "Evaluating Object Hallucination in Large Vision-Language Models", 2023 (arXiv 2305.10355). Who says
    yes to everything has as accuracy the share of right yes, and recall and yes_ratio 1.

    Args:
        predicted: Answers in any words; see `says_no`.
        answers: The right ones, "yes" or "no" in any case.

    Returns:
        ``n``; ``accuracy``; ``precision``, the share of said yes that are right (None if none is said); ``recall``, the
        share of right yes that are said (None if there is none); ``f1``, 2 TP / (2 TP + FP + FN) (None if no yes is
        said or right); ``yes_ratio``, the share of said yes.

    Raises:
        ValueError: There are none, their numbers differ, or a right answer is neither yes nor no.
    """
    if not answers or len(predicted) != len(answers):
        raise ValueError(f"{len(predicted)} predictions and {len(answers)} answers; there must be as many, and some")
    right = [answer.strip().lower() for answer in answers]
    if unknown := set(right) - {"yes", "no"}:
        raise ValueError(f"{', '.join(map(repr, sorted(unknown)))} is neither yes nor no")
    seen = Counter((not says_no(s), r == "yes") for s, r in zip(predicted, right, strict=True))
    hits, claimed, positives = seen[True, True], seen[True, True] + seen[True, False], right.count("yes")
    return {
        "n": len(right),
        "accuracy": (hits + seen[False, False]) / len(right),
        "precision": hits / claimed if claimed else None,
        "recall": hits / positives if positives else None,
        "f1": 2 * hits / (claimed + positives) if claimed + positives else None,
        "yes_ratio": claimed / len(right),
    }


def wilson_interval(k: int, n: int, *, z: float = 1.96) -> tuple[float, float]:
    """The confidence interval of a share (95% at the default `z`), having seen `k` of `n`.

    Wilson: "Probable Inference, the Law of Succession, and Statistical Inference", 1927. Unlike k/n ± z·error, it
    holds for few samples and for shares near 0 and 1. In closed form, so no bootstrap is needed; like one over samples,
    it takes them for independent.

    Raises:
        ValueError: `k` is not within 0 and `n`, or `n` is 0.
    """
    if not 0 <= k <= n or n == 0:
        raise ValueError(f"{k} of {n} is not a share")
    share, extra = k / n, z * z / n
    middle = (share + extra / 2) / (1 + extra)
    half = z / (1 + extra) * math.sqrt(share * (1 - share) / n + extra / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)
