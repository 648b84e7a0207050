"""A run's results as one page that can be mailed, and as a table for the terminal.

    python launch/report.py runs/demo        # writes runs/demo/report.html

It reads what the other programs left in the run's folder: ``evaluation.json``, and for each stage (a subfolder such
as ``pretrain``) ``metrics.jsonl`` and, where they are there, ``model.json`` (the rows of `anymal.model.table`) and
``recipe.yaml``. No modality is named here: how a medium is shown follows from its file's ending.
"""

import json
import math
import statistics
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

from anymal.errors import UserError
from anymal.metrics import wilson_interval, words

CARDS = 8
"""Predictions shown for each modality: the first ones that have a medium, not chosen ones."""
STAGES = ("pretrain", "finetune")
COLUMNS = ("n", "accuracy", "95%", "blank", "shuffled", "× control", "chance", "CIDEr-D")
YES_NO = ("n", "accuracy", "precision", "recall", "F1", "says yes")
_YES_NO_KEYS = ("accuracy", "precision", "recall", "f1", "yes_ratio")


def print_table(evaluation: Mapping[str, Any], predictions: int = 3) -> str:
    """The evaluation as aligned text: one line for each modality, then the first few predictions of each.

    Sets of yes/no questions have POPE's figures in a table of their own (see `anymal.metrics.yes_no`).
    """
    sets = evaluation["modalities"]
    lines = _aligned([["modality", *COLUMNS], *([name, *_figures(result)] for name, result in sets.items())])
    if any("yes_no" in result for result in sets.values()):
        lines += ["", *_aligned([["yes/no questions", *YES_NO], *_yes_no_rows(sets)])]
    for name, result in evaluation["modalities"].items():
        lines += ["", name]
        for prediction in result.get("predictions", [])[:predictions]:
            mark = "✓" if is_right(prediction) else "✗"
            said = textwrap.shorten(prediction.get("said") or prediction.get("choice") or "nothing", 60)
            chosen = f", chose {prediction['choice']}" if prediction.get("choice") else ""
            lines.append(f"  {mark} said “{said}”{chosen}; answer: {textwrap.shorten(prediction['answer'], 60)}")
    if (trained := evaluation.get("trained_parameters")) is not None:
        lines += ["", f"trained parameters: {trained:,}"]
    if (speed := evaluation.get("tokens_per_s")) is not None:
        lines.append(f"tokens/s in training: {speed:.0f}")
    return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the header, a rule, the rest; all but the first column flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *cells = (f"{cell:{'>' if i else '<'}{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        lines.append("  ".join([first, *cells]).rstrip())
    return [lines[0], "  ".join("─" * width for width in widths), *lines[1:]]


def _yes_no_rows(sets: Mapping[str, Any]) -> list[list[str]]:
    """The cells of `YES_NO` for each set of yes/no questions, once for each way of answering."""
    return [
        [f"{name}, {how}", str(found["n"]), *(_percent(found[key]) for key in _YES_NO_KEYS)]
        for name, result in sets.items()
        for how, found in result.get("yes_no", {}).items()
        if found
    ]


def is_right(prediction: Mapping[str, Any]) -> bool:
    """Whether the choice among the options, or what was said where there was no choice, is the answer."""
    given = prediction.get("choice") or prediction.get("said") or ""
    return words(given) == words(prediction["answer"])


def _figures(result: Mapping[str, Any]) -> list[str]:
    """The cells of one modality, in the order of `COLUMNS`."""
    n, accuracy = result.get("n"), result.get("accuracy")
    between = "–"
    if n and accuracy is not None:
        low, high = wilson_interval(round(accuracy * n), n)
        between = f"{low * 100:.0f}–{high:.0%}"
    cider = result.get("cider_d")
    return [
        "–" if n is None else str(n),
        _percent(accuracy),
        between,
        _percent(result.get("blank")),
        _percent(result.get("shuffled")),
        _times_control(result),
        _percent(result.get("chance")),
        "–" if cider is None else f"{cider:.2f}",
    ]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def _times_control(result: Mapping[str, Any]) -> str:
    """The accuracy as a multiple of the better of the two controls."""
    controls = [result[name] for name in ("blank", "shuffled") if result.get(name) is not None]
    if not controls or result.get("accuracy") is None:
        return "–"
    if max(controls) == 0:
        return "∞" if result["accuracy"] > 0 else "–"
    return f"{result['accuracy'] / max(controls):.1f}×"


def write_report(run: Path) -> Path:
    """Write ``report.html`` into the run's folder and return its path.

    Raises:
        UserError: There is nothing in the folder to report.
    """
    stages = _stages(run)
    evaluation_file = run / "evaluation.json"
    if not stages and not evaluation_file.is_file():
        raise UserError(f"{run} holds neither evaluation.json nor a stage with metrics.jsonl")
    evaluation = json.loads(evaluation_file.read_text()) if evaluation_file.is_file() else {"modalities": {}}
    body = [
        _header(run, stages, evaluation),
        _results(evaluation),
        *(_stage(stage) for stage in stages),
        *(_examples(run, name, result) for name, result in evaluation["modalities"].items()),
    ]
    style = Path(__file__).with_name("report.css").read_text()
    page = run / "report.html"
    page.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>AnyMAL – {escape(run.name)}</title><style>{style}</style></head>\n"
        f"<body>{''.join(body)}</body></html>\n"
    )
    return page


def read_lines(path: Path) -> list[dict]:
    """The objects of a JSON Lines file, without a last line that was cut off."""
    lines = []
    for line in path.read_text().splitlines():
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def _stages(run: Path) -> list[Path]:
    found = {path.parent.name: path.parent for path in run.glob("*/metrics.jsonl")}
    return [found.pop(name) for name in STAGES if name in found] + [found[name] for name in sorted(found)]


def _header(run: Path, stages: Sequence[Path], evaluation: Mapping[str, Any]) -> str:
    modalities = ", ".join(evaluation["modalities"]) or "none evaluated"
    numbers = {"modalities": str(len(evaluation["modalities"])), "stages": " → ".join(s.name for s in stages)}
    if "trained_parameters" in evaluation:
        numbers["trained parameters"] = f"{evaluation['trained_parameters']:,}"
    if "tokens_per_s" in evaluation:
        numbers["tokens/s"] = f"{evaluation['tokens_per_s']:,.0f}"
    notes = "".join(f"<li>{escape(note)}</li>" for note in evaluation.get("notes", []))
    return (
        f"<h1>AnyMAL · {escape(run.name)}</h1>"
        f'<p class="soft">A frozen language model given {escape(modalities)}. '
        f"Written {time.strftime('%Y-%m-%d %H:%M')}.</p>{_numbers(numbers)}"
        + (f'<ul class="soft small">{notes}</ul>' if notes else "")
    )


def _numbers(numbers: Mapping[str, str]) -> str:
    items = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in numbers.items() if value)
    return f'<dl class="numbers">{"".join(items)}</dl>'


def _results(evaluation: Mapping[str, Any]) -> str:
    if not evaluation["modalities"]:
        return ""
    head = "<th>modality</th>" + "".join(f'<th class="n">{name}</th>' for name in COLUMNS)
    rows = []
    for name, result in evaluation["modalities"].items():
        cells = "".join(f'<td class="n">{escape(cell)}</td>' for cell in _figures(result))
        bars = "".join(
            f'<div class="bar{kind}" style="width:{100 * (result.get(key) or 0):.1f}%" title="{key}"></div>'
            for key, kind in (("accuracy", " ours"), ("blank", ""), ("shuffled", ""))
        )
        rows.append(f'<tr><td>{escape(name)}</td>{cells}<td class="bars">{bars}</td></tr>')
    return (
        "<h2>Held-out results</h2>"
        f'<div class="scroll"><table><tr>{head}<th>accuracy, blank, shuffled</th></tr>{"".join(rows)}</table></div>'
        '<p class="soft small">Accuracy: the right option is the likeliest. <b>Blank</b> and <b>shuffled</b> are the '
        "same model with an empty medium and with another sample’s; × control compares with the better of them. "
        "95% is the Wilson interval. CIDEr-D (0–10) is of what the model says freely.</p>"
    )


def _stage(stage: Path) -> str:
    from launch.report_media import loss_plot  # matplotlib: `print_table` must work without it

    lines = read_lines(stage / "metrics.jsonl")
    if not lines:
        return f'<h2>{escape(stage.name)}</h2><p class="missing">Nothing was logged.</p>'
    numbers = {
        "steps": str(lines[-1]["step"]),
        "loss, first → last tenth": _first_to_last(lines),
        "tokens/s": _median(lines, "tokens_per_s", "{:,.0f}"),
        "answer tokens/s": _median(lines, "answer_tokens_per_s", "{:,.0f}"),
        "waiting for data": _median(lines, "wait_share", "{:.1%}"),
        "padding": _median(lines, "padding_share", "{:.1%}"),
        "memory": _median(lines, "memory_gb", "{:.1f} GB"),
    }
    details = ""
    if (stage / "model.json").is_file():
        table = _model_table(json.loads((stage / "model.json").read_text()))
        details += f"<details><summary>What is frozen and what learns</summary>{table}</details>"
    if (stage / "recipe.yaml").is_file():
        recipe = escape((stage / "recipe.yaml").read_text())
        details += f"<details><summary>The resolved recipe</summary><pre>{recipe}</pre></details>"
    caption = "<figcaption class=small>Loss per modality: every step, and its running mean.</figcaption>"
    return (
        f"<h2>Stage: {escape(stage.name)}</h2>{_numbers(numbers)}<figure>{loss_plot(lines)}{caption}</figure>{details}"
    )


def _first_to_last(lines: Sequence[Mapping[str, Any]]) -> str:
    losses = [line["loss"] for line in lines if math.isfinite(line.get("loss", math.nan))]
    tenth = max(1, len(losses) // 10)
    return f"{statistics.mean(losses[:tenth]):.2f} → {statistics.mean(losses[-tenth:]):.2f}" if losses else ""


def _median(lines: Sequence[Mapping[str, Any]], name: str, text: str) -> str:
    values = [line[name] for line in lines if name in line]
    return text.format(statistics.median(values)) if values else ""


def _model_table(rows: Sequence[Mapping[str, Any]]) -> str:
    body = "".join(
        f'<tr><td>{escape(str(row["module"]))}</td><td class="n">{row["parameters"]:,}</td>'
        f'<td>{escape(str(row["dtype"]))}</td><td class="n">{escape(str(row["bits"]))}</td>'
        f"<td>{'<b>learns</b>' if row['trainable'] else 'frozen'}</td></tr>"
        for row in rows
    )
    head = '<th>module</th><th class="n">parameters</th><th>dtype</th><th class="n">bits</th><th></th>'
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _examples(run: Path, name: str, result: Mapping[str, Any]) -> str:
    predictions = result.get("predictions", [])
    shown = [p for p in predictions if p.get("media")][:CARDS] or predictions[:CARDS]
    right = sum(map(is_right, shown))
    return (
        f"<h2>{escape(name)}</h2>"
        f'<p class="soft small">The first {len(shown)} of {result.get("n", len(predictions))} held-out samples, not '
        f"chosen; {right} of them right.</p>"
        f'<div class="grid">{"".join(_card(run, prediction) for prediction in shown)}</div>'
    )


def _card(run: Path, prediction: Mapping[str, Any]) -> str:
    from launch.report_media import medium_html

    shown = []
    for name in prediction.get("media", []):
        path = run / name
        if path.resolve().is_relative_to(run.resolve()):  # a page that is passed on holds nothing from elsewhere
            shown.append(medium_html(path))
    medium = "".join(shown) or '<p class="missing">This medium was not kept.</p>'
    if is_right(prediction):
        mark = '<span class="mark right" title="right">✓ right</span>'
    else:
        mark = '<span class="mark wrong" title="wrong">✗ wrong</span>'
    chosen = f"<p>chose <b>{escape(prediction['choice'])}</b></p>" if prediction.get("choice") else ""
    said = f"<p>said “{escape(prediction['said'])}”</p>" if prediction.get("said") else ""
    question = f'<p class="soft small">{escape(prediction["question"])}</p>' if prediction.get("question") else ""
    return (
        f'<div class="card"><div class="medium">{medium}</div><div class="words">{question}<p>{mark}</p>'
        f"{chosen}{said}<p>answer: <b>{escape(prediction['answer'])}</b></p></div></div>"
    )


def main(arguments: Sequence[str]) -> None:
    """Write the report of the run named on the command line, and print the table."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise SystemExit(__doc__)
    run = Path(arguments[0])
    try:
        page = write_report(run)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    if (run / "evaluation.json").is_file():
        print(print_table(json.loads((run / "evaluation.json").read_text())), end="\n\n")
    print(page)


if __name__ == "__main__":
    main(sys.argv[1:])
