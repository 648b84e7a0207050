"""Records of an evaluation → figures: accuracies, caption metrics, losses, each beside its controls.

    evaluate.py ──Record──▶ records.jsonl ──▶ figures, agreement ──▶ evaluation.json, tables

Nothing here runs a model: whoever has the records can compute other figures from them. docs/evaluation.md says how
the log-likelihoods of options become a choice, and why.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from anymal.evaluation.metrics import accuracy, bleu, cider_d, rouge_l, wilson_interval, words, yes_no

OWN, BLANK, SHUFFLED = "own", "blank", "shuffled"
CONDITIONS = (OWN, BLANK, SHUFFLED)
"""With its own media, and the controls: with blank media, with another sample's."""
Rule = Literal["sum", "bytes", "blank"]
RULES: tuple[Rule, ...] = get_args(Rule)
"""By what an option is chosen: its log-likelihood; that by byte of its text, as lm-evaluation-harness's acc_norm; or
that less the same with a blank medium, as pointwise mutual information."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One possible answer of a closed question."""

    text: str
    """The answer."""
    log_likelihood: float
    """Natural logarithm of its probability (nats), end token included."""
    tokens: int
    """Its length, end token included."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One sample under one condition."""

    key: str
    """The sample's key."""
    shard: str
    """Its tar."""
    condition: str
    """One of `CONDITIONS`."""
    lender: str | None
    """The key of the sample whose media it was shown, if they were another's."""
    question: str
    """The text of the question."""
    answer: str
    """The right answer."""
    loss: float
    """Nats per token of the right answer, end token included."""
    said: str | None
    """The free answer, as it was generated; None if none was."""
    cut: bool
    """Whether the free answer was truncated: it had no end within ``max_new_tokens``."""
    options: list[Option] = field(default_factory=list)
    """Every option of a closed question, the right one among them."""
    altered: list[str] = field(default_factory=list)
    """What was left out of its media, or added: ``"audio cropped to the middle 10 s"``."""


def write_record(record: Record, **also: Any) -> str:
    """A line of JSON."""
    return json.dumps(also | asdict(record)) + "\n"


def read_records(path: Path, **wanted: Any) -> list[Record]:
    """The records of a file that have these values, such as ``set="image"``."""
    records = []
    with path.open() as lines:
        for line in lines:
            fields = json.loads(line)
            if all(fields.pop(name) == value for name, value in wanted.items()):
                options = [Option(**option) for option in fields.pop("options")]
                records.append(Record(**fields, options=options))
    return records


def _by_condition(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records of each condition, in one order of samples."""
    by_condition: dict[str, list[Record]] = {name: [] for name in CONDITIONS}
    for record in records:
        by_condition[record.condition].append(record)
    return by_condition


Name = tuple[str, str]
"""Shard and key of a sample."""


def _name(record: Record) -> Name:
    return record.shard, record.key


def choices(records: Sequence[Record], rule: Rule) -> dict[str, dict[Name, str]]:
    """Condition → (shard, key) of each closed question → the option that is chosen by a rule of `RULES`.

    By the rule "blank" there is no choice with blank media, where all options are equal.
    """
    by_condition = _by_condition(records)
    blank = {_name(record): record for record in by_condition[BLANK]}

    def score(record: Record, number: int) -> float:
        option = record.options[number]
        if rule == "bytes":
            return option.log_likelihood / max(1, len(option.text.encode()))
        if rule == "blank":
            return option.log_likelihood - blank[_name(record)].options[number].log_likelihood
        return option.log_likelihood

    chosen: dict[str, dict[Name, str]] = {}
    for condition, of_condition in by_condition.items():
        chosen[condition] = {}
        for record in of_condition:
            if not record.options or (rule == "blank" and (condition == BLANK or _name(record) not in blank)):
                continue
            best = max(range(len(record.options)), key=lambda number: score(record, number))
            chosen[condition][_name(record)] = record.options[best].text
    return chosen


def figures(records: Sequence[Record], rule: Rule) -> dict[str, Any]:
    """What the records of one set are worth.

    Args:
        records: Of all samples and conditions.
        rule: By what options are chosen; see `RULES`.

    Returns:
        ``n`` samples, ``closed`` ones with options, ``altered``: how many have media that decoding changed, and how;
        ``chance`` (the mean of 1 / options), ``rule``, ``interval``, the accuracy's 95% confidence interval (Wilson's);
        and for each condition ``own``, ``blank`` and ``shuffled`` a dict or None: ``n``, ``accuracy`` (by `rule`),
        ``accuracy_by`` (each rule), ``loss`` (nats per token of the right answers, the mean over samples), and of the
        free answers ``exact`` (right to the letter), ``cider_d``, ``rouge_l``, ``bleu_4``, and the shares ``empty`` and
        ``cut``. What is not defined is None. If all samples are yes/no questions, ``yes_no`` has
        `anymal.evaluation.metrics.yes_no` of what was ``said``, of what was ``chosen``, and of the choices with
        ``blank`` and ``shuffled`` media.
    """
    by_condition = _by_condition(records)
    chosen = {name: choices(records, name) for name in RULES}
    own = by_condition[OWN]
    counts = [len(record.options) for record in own if record.options]
    result: dict[str, Any] = {"n": len(own), "closed": len(counts), "rule": rule, "chance": None, "interval": None}
    result["altered"] = dict(Counter(change for record in own for change in dict.fromkeys(record.altered)))
    for condition, of_condition in by_condition.items():
        result[condition] = _condition(of_condition, {r: chosen[r][condition] for r in RULES}, rule)
    if counts:
        result["chance"] = sum(1 / count for count in counts) / len(counts)
    if result[OWN] and result[OWN]["accuracy"] is not None:
        number = len(chosen[rule][OWN])
        result["interval"] = wilson_interval(round(result[OWN]["accuracy"] * number), number)
    if own and all(sorted(words(option.text) for option in record.options) == [["no"], ["yes"]] for record in own):
        result["yes_no"] = _yes_no(by_condition, chosen[rule])
    return result


def _condition(records: Sequence[Record], chosen: dict[Rule, dict[Name, str]], rule: Rule) -> dict[str, Any] | None:
    """The figures of one condition, given the choices by each rule."""
    if not records:
        return None
    right = {_name(record): record.answer for record in records}

    def share_right(options: dict[Name, str]) -> float | None:
        return sum(option == right[name] for name, option in options.items()) / len(options) if options else None

    result: dict[str, Any] = {"n": len(records), "loss": sum(record.loss for record in records) / len(records)}
    result["accuracy_by"] = {name: share_right(options) for name, options in chosen.items()}
    result["accuracy"] = result["accuracy_by"][rule]
    result |= dict.fromkeys(("exact", "cider_d", "rouge_l", "bleu_4", "empty", "cut"))
    said = [record.said for record in records if record.said is not None]
    if len(said) == len(records):
        answers = [record.answer for record in records]
        references = [[answer] for answer in answers]
        result |= {"exact": accuracy(said, answers), "cider_d": cider_d(said, references)}
        result |= {"rouge_l": rouge_l(said, references), "bleu_4": bleu(said, references)}
        result["empty"] = sum(not text.strip() for text in said) / len(said)
        result["cut"] = sum(record.cut for record in records) / len(said)
    return result


def _yes_no(by_condition: dict[str, list[Record]], chosen: dict[str, dict[Name, str]]) -> dict[str, Any]:
    own = by_condition[OWN]
    answers = {_name(record): " ".join(words(record.answer)) for record in own}  # "Yes." is a yes
    said = [record.said for record in own if record.said is not None]
    result: dict[str, Any] = {"said": yes_no(said, list(answers.values())) if len(said) == len(own) else None}
    for condition, label in ((OWN, "chosen"), (BLANK, BLANK), (SHUFFLED, SHUFFLED)):
        of_condition = chosen[condition]
        options = [option.lower() for option in of_condition.values()]
        result[label] = yes_no(options, [answers[name] for name in of_condition]) if of_condition else None
    return result


def agreement(records: Sequence[Record], others: Sequence[Record], rule: Rule) -> float | None:
    """The share of closed questions that two evaluations of one set answer alike, right or not; None without any."""
    ours, theirs = choices(records, rule)[OWN], choices(others, rule)[OWN]
    common = [name for name in ours if name in theirs]
    return sum(ours[name] == theirs[name] for name in common) / len(common) if common else None


def predictions(records: Sequence[Record], rule: Rule) -> Iterator[dict[str, Any]]:
    """What a person wants to read of each sample: question, answer, the choice and the free answer."""
    chosen = choices(records, rule)
    for record in _by_condition(records)[OWN]:
        yield {
            "key": record.key,
            "shard": record.shard,
            "question": record.question,
            "answer": record.answer,
            "choice": chosen[OWN].get(_name(record)),
            "said": record.said,
            "cut": record.cut,
        }
