"""Caption metrics against the COCO evaluation's own figures and a slow derivation; accuracy; the interval."""

import math

import pytest

from anymal.evaluation.metrics import accuracy, bleu, cider_d, rouge_l, says_no, wilson_interval, words, yes_no

CAPTIONS = [
    "a man is playing a guitar",
    "a dog runs in the grass grass grass",
    "rain falls on a roof",
    "an arm swings like a pendulum",
    "bird",
]
REFERENCES = [
    ["a man plays a red guitar on a stage", "someone is playing the guitar"],
    ["a dog runs over the green grass", "a brown dog running in a field of grass"],
    ["two people talk while rain falls", "rain falls and people are talking nearby"],
    ["an arm swings like a pendulum"],
    ["a dog barks twice and a bird sings", "a barking dog"],
]


def test_figures_are_those_of_the_coco_evaluation():
    # Computed with pycocoevalcap 1.2 (Cider, Rouge, Bleu), which is too heavy to depend on: 101 MB of Java archives.
    assert cider_d(CAPTIONS, REFERENCES) == pytest.approx(2.9656497956890706, abs=1e-9)
    assert rouge_l(CAPTIONS, REFERENCES) == pytest.approx(0.5706158453227557, abs=1e-9)
    theirs = [0.7772170384643834, 0.5967737228990893, 0.46538488902493996, 0.38679226039772596]
    ours = [bleu(CAPTIONS, REFERENCES, size=size) for size in (1, 2, 3, 4)]
    assert ours == pytest.approx(theirs, abs=1e-8)  # theirs adds 1e-9 to the denominators


def _slow_cider_d(captions, references, sigma=6.0):
    """Straight from the formulas: lists instead of dicts, one term after another, no sharing between sizes."""

    def grams(text, n):
        tokens = text.split()
        return [" ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]

    def weight(gram, text, n):
        holding = sum(any(gram in grams(r, n) for r in several) for several in references)
        return grams(text, n).count(gram) * (math.log(len(references)) - math.log(max(holding, 1)))

    def norm(text, n):
        return math.sqrt(sum(weight(g, text, n) ** 2 for g in sorted(set(grams(text, n)))))

    scores = []
    for caption, several in zip(captions, references, strict=True):
        for reference in several:
            gap = len(grams(caption, 2)) - len(grams(reference, 2))
            for n in (1, 2, 3, 4):
                dot = sum(
                    min(weight(g, caption, n), weight(g, reference, n)) * weight(g, reference, n)
                    for g in sorted(set(grams(caption, n)))
                )
                norms = norm(caption, n) * norm(reference, n)
                cosine = dot / norms if norms else 0.0
                scores.append(cosine * math.exp(-(gap**2) / (2 * sigma**2)) / 4 / len(several))
    return 10 * sum(scores) / len(captions)


def test_cider_d_equals_a_slow_derivation():
    assert cider_d(CAPTIONS, REFERENCES) == pytest.approx(_slow_cider_d(CAPTIONS, REFERENCES), rel=1e-12)
    shifted = CAPTIONS[1:] + CAPTIONS[:1]
    assert cider_d(shifted, REFERENCES) == pytest.approx(_slow_cider_d(shifted, REFERENCES), rel=1e-12)


def test_cider_d_at_its_ends():
    long = [["one two three four five"], ["six seven eight nine ten"]]
    assert cider_d([several[0] for several in long], long) == pytest.approx(10.0)
    assert cider_d(["alpha beta", "gamma"], long) == 0.0
    assert cider_d(["a red cat"], [["a red cat"]]) == 0.0, "the n-grams of a one-medium corpus weigh nothing"
    assert cider_d(["cat", "dog"], [["cat"], ["dog"]]) == pytest.approx(2.5), "only 1 of the 4 sizes is there"
    assert cider_d(["", "dog"], [["cat"], ["dog"]]) == pytest.approx(1.25)


def test_repeating_a_word_does_not_pay():
    references = [["a dog runs on grass"], ["a cat sleeps"], ["it rains"]]
    honest = cider_d(["a dog runs", "a cat sleeps", "it rains"], references)
    assert cider_d(["a dog runs dog dog dog", "a cat sleeps", "it rains"], references) < honest


def test_words():
    assert words("A man, playing: the GUITAR!") == ["a", "man", "playing", "the", "guitar"]
    assert words("The dog\u2019s t-shirt isn't 3.5 m wide...") == [
        "the",
        "dog's",
        "t-shirt",
        "isn't",
        "3.5",
        "m",
        "wide",
    ]
    assert words(" - ") == []


@pytest.mark.parametrize(("captions", "references"), [([], []), (["a"], []), (["a"], [[]])])
def test_unusable_corpora_are_refused(captions, references):
    for metric in (cider_d, rouge_l, bleu):
        with pytest.raises(ValueError, match="at least one"):
            metric(captions, references)


def test_accuracy():
    assert accuracy(["Cat ", "dog", "bird"], ["cat", "dog", "fish"]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="2 predictions and 1 answers"):
        accuracy(["a", "b"], ["a"])


@pytest.mark.parametrize(
    ("answer", "no"),
    [
        ("No", True),
        ("no.", True),
        ("No, there is a cat.", True),
        ("There is not a dog. Yes.", True),
        ("I see\nno dog", True),
        ("Yes", False),
        ("Yes. There is no cat.", False),  # only the first sentence counts
        ("Nothing but a dog", False),
        ("It is another, notable one", False),
        ("There isn't", False),  # as in POPE's own evaluation
        ("NO", False),
        ("", False),
        (" . no", False),
    ],
)
def test_answers_are_read_as_pope_reads_them(answer, no):
    assert says_no(answer) is no


@pytest.mark.parametrize(
    ("found", "missed", "false_alarms", "rejected", "figures"),
    [  # accuracy, precision, recall, f1, yes_ratio, worked out by hand
        (3, 1, 1, 3, (0.75, 0.75, 0.75, 0.75, 0.5)),
        (2, 0, 2, 0, (0.5, 0.5, 1.0, 2 / 3, 1.0)),  # yes to everything
        (0, 2, 0, 2, (0.5, None, 0.0, 0.0, 0.0)),  # no to everything
        (1, 3, 2, 4, (0.5, 1 / 3, 0.25, 2 / 7, 0.3)),
        (0, 0, 0, 3, (1.0, None, None, None, 0.0)),
        (0, 0, 1, 0, (0.0, 0.0, None, 0.0, 1.0)),
    ],
)
def test_yes_no_figures(found, missed, false_alarms, rejected, figures):
    answers = ["yes"] * (found + missed) + ["No "] * (false_alarms + rejected)
    said = ["Yes, it is."] * found + ["no"] * missed + ["", "Sure"][:false_alarms] + ["No."] * rejected
    result = yes_no(said, answers)
    assert result.pop("n") == len(answers)
    assert tuple(result.values()) == pytest.approx(figures)
    assert list(result) == ["accuracy", "precision", "recall", "f1", "yes_ratio"]


def test_yes_no_refuses_other_answers():
    with pytest.raises(ValueError, match="'maybe' is neither yes nor no"):
        yes_no(["yes"], ["maybe"])
    for said, answers in ([], []), (["yes"], []), (["a"], ["yes", "no"]):
        with pytest.raises(ValueError, match="as many, and some"):
            yes_no(said, answers)


def test_wilson_interval_solves_its_equation():
    # Its ends are the shares p for which the seen share is z standard errors away.
    for k, n in [(7, 10), (1, 50), (49, 50)]:
        for p in wilson_interval(k, n):
            assert abs(k / n - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n))
    assert wilson_interval(0, 20)[0] == pytest.approx(0.0, abs=1e-12)
    assert wilson_interval(20, 20)[1] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="5 of 4"):
        wilson_interval(5, 4)
