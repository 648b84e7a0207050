"""An evaluation as tables: their titles, columns and cells, for the terminal and for the report's page.

`evaluation` is always what `anymal evaluate` wrote as evaluation.json. What is not there, or not defined, is a –.
"""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anymal.evaluation.metrics import words
from anymal.evaluation.scores import BLANK, OWN, RULES, SHUFFLED

YES_NO = {
    "n": "n",
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "F1": "f1",
    "says yes": "yes_ratio",
}
"""Columns of POPE's figures → their names in `anymal.evaluation.metrics.yes_no`."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells as text."""

    columns: list[str]
    """The first is the title of the names of the rows."""
    rows: list[list[str]]
    """The first cell is the row's name."""


def sets_of(evaluation: Mapping[str, Any]) -> Mapping[str, Any]:
    """The figures of each set, at the first of the precisions that were evaluated."""
    return next(iter(evaluation.get("precisions", {}).values()), {})


def tables(evaluation: Mapping[str, Any]) -> Iterator[Table]:
    """Every table that the evaluation has rows for."""
    for table in (_closed(evaluation), _free(evaluation), _yes_no(evaluation), _precisions(evaluation)):
        if table.rows:
            yield table


def _closed(evaluation: Mapping[str, Any]) -> Table:
    """Closed questions: the accuracy beside its controls, and by each way of choosing."""
    controls = ["accuracy", "95%", "blank", "shuffled", "× control", "chance"]
    columns = ["closed questions", "n", *controls, *(f"by {rule}" for rule in RULES)]
    rows = []
    for name, result in sets_of(evaluation).items():
        if not result.get("closed"):
            continue
        by = _of(result, OWN).get("accuracy_by", {})
        cells = [str(result["closed"]), percent(_of(result, OWN).get("accuracy")), _interval(result)]
        cells += [percent(_of(result, condition).get("accuracy")) for condition in (BLANK, SHUFFLED)]
        cells += [_times_control(result), percent(result.get("chance")), *(percent(by.get(rule)) for rule in RULES)]
        rows.append([name, *cells])
    return Table(columns=columns, rows=rows)


def _free(evaluation: Mapping[str, Any]) -> Table:
    """Free answers and the loss of the right ones, beside their controls."""
    columns = ["free answers", "n", "exact", "blank", "CIDEr-D", "blank", "shuffled", "empty", "cut"]
    columns += ["loss", "blank", "shuffled"]
    rows = []
    for name, result in sets_of(evaluation).items():
        own, blank, shuffled = (_of(result, condition) for condition in (OWN, BLANK, SHUFFLED))
        cells = [percent(own.get("exact")), percent(blank.get("exact"))]
        cells += [_number(one.get("cider_d")) for one in (own, blank, shuffled)]
        cells += [percent(own.get("empty")), percent(own.get("cut"))]
        cells += [_number(one.get("loss")) for one in (own, blank, shuffled)]
        rows.append([name, str(result.get("n", "–")), *cells])
    return Table(columns=columns, rows=rows)


def _yes_no(evaluation: Mapping[str, Any]) -> Table:
    """POPE's figures of each set of yes/no questions, once for each way of answering."""
    rows = [
        [f"{name}, {how}", str(scores["n"]), *(percent(scores[key]) for key in list(YES_NO.values())[1:])]
        for name, result in sets_of(evaluation).items()
        for how, scores in result.get("yes_no", {}).items()
        if scores
    ]
    return Table(columns=["yes/no questions", *YES_NO], rows=rows)


def _precisions(evaluation: Mapping[str, Any]) -> Table:
    """Each set at every precision of the LLM, where there are several."""
    several = evaluation.get("precisions", {})
    rows = []
    for name in sets_of(evaluation) if len(several) > 1 else ():
        for bits, sets in several.items():
            result, own = sets[name], _of(sets[name], OWN)
            cells = [percent(own.get("accuracy")), _interval(result), percent(result.get("same_choice"))]
            cells += [percent(own.get("exact")), _number(own.get("cider_d")), percent(own.get("empty"))]
            rows.append([f"{name}, {bits} bits", *cells, _number(own.get("loss"))])
    same = f"same choice as at {next(iter(several), '')}"
    return Table(columns=["precision", "accuracy", "95%", same, "exact", "CIDEr-D", "empty", "loss"], rows=rows)


def _of(result: Mapping[str, Any], condition: str) -> Mapping[str, Any]:
    return result.get(condition) or {}


def percent(share: float | None) -> str:
    """A share as text."""
    return "–" if share is None else f"{share:.0%}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _interval(result: Mapping[str, Any]) -> str:
    interval = result.get("interval")
    return "–" if interval is None else f"{interval[0] * 100:.0f}–{interval[1]:.0%}"


def _times_control(result: Mapping[str, Any]) -> str:
    """The accuracy as a multiple of the better of the two controls."""
    accuracy = _of(result, OWN).get("accuracy")
    controls = [_of(result, condition).get("accuracy") for condition in (BLANK, SHUFFLED)]
    controls = [control for control in controls if control is not None]
    if not controls or accuracy is None:
        return "–"
    if max(controls) == 0:
        return "∞" if accuracy > 0 else "–"
    return f"{accuracy / max(controls):.1f}×"


def chose_right(prediction: Mapping[str, Any]) -> bool | None:
    """Whether the chosen option is the answer; None without options."""
    return None if prediction.get("choice") is None else prediction["choice"] == prediction["answer"]


def said_right(prediction: Mapping[str, Any]) -> bool | None:
    """Whether the free answer is the right one, in the same words; None if none was generated."""
    if prediction.get("said") is None:
        return None
    said, answer = (words(text) or [text.strip()] for text in (prediction["said"], prediction["answer"]))
    return said == answer


def remarks(evaluation: Mapping[str, Any]) -> Iterator[str]:
    """What has to be known beside the tables: media that decoding changed, controls of fewer samples."""
    for name, result in sets_of(evaluation).items():
        for change, count in result.get("altered", {}).items():
            yield f"{name}: {change} in {count} of {result['n']}"
        for condition in (BLANK, SHUFFLED):
            n = _of(result, condition).get("n", result.get("n"))
            if n != result.get("n"):
                missing = "the others have no media, or nobody else has such"
                yield f"{name}: {condition} is of {n} of {result['n']} samples; {missing}"


def print_table(evaluation: Mapping[str, Any], examples: int = 3) -> str:
    """The evaluation as aligned text: its tables, then the first few predictions of each set."""
    lines: list[str] = []
    for table in tables(evaluation):
        lines += [*_aligned([table.columns, *table.rows]), ""]
    if notes := list(remarks(evaluation)):
        lines += [*notes, ""]
    for name, result in sets_of(evaluation).items():
        lines += [name, *(f"  {_prediction(one)}" for one in result.get("predictions", [])[:examples]), ""]
    if (trained := evaluation.get("trained_parameters")) is not None:
        lines.append(f"trained parameters: {trained:,}")
    if (speed := evaluation.get("tokens_per_s")) is not None:
        lines.append(f"tokens/s in training: {speed:.0f}")
    return "\n".join(lines).rstrip()


def _prediction(one: Mapping[str, Any]) -> str:
    """``✓ chose guitar, ✗ said “” (answer: guitar)``: an empty answer is shown as it is."""
    answers = []
    for right, how, text in (
        (chose_right(one), "chose", one.get("choice")),
        (said_right(one), "said", one.get("said")),
    ):
        if right is not None and text is not None:
            shown = textwrap.shorten(text, 60)
            answers.append(f"{'✓' if right else '✗'} {how} {shown if how == 'chose' else f'“{shown}”'}")
    return f"{', '.join(answers)} (answer: {textwrap.shorten(one['answer'], 60)})"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the header, a rule, the rest; all but the first column flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *cells = (f"{cell:{'>' if i else '<'}{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        lines.append("  ".join([first, *cells]).rstrip())
    return [lines[0], "  ".join("─" * width for width in widths), *lines[1:]]
