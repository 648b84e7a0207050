"""The program behind `anymal report`: what the other programs left in a run's folder → one page, and a table.

No modality is named here: how a medium is shown follows from its file's ending.
"""

import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from anymal.config.command_line import parse_args
from anymal.errors import UserError
from anymal.evaluation.scores import CONDITIONS, OWN
from anymal.evaluation.tables import Table, chose_right, percent, print_table, remarks, said_right, sets_of, tables

CARDS = 8
"""Predictions shown for each modality: the first ones that have a medium, not chosen ones."""
STAGES = ("pretrain", "finetune")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Settings of a report."""

    run: str = MISSING
    """A run's folder; ``run=`` may be left out."""


def write_report(run: Path) -> Path:
    """Write ``report.html`` into the run's folder and return its path.

    Raises:
        UserError: There is nothing in the folder to report.
    """
    stages = _stages(run)
    evaluation_file = run / "evaluation.json"
    if not stages and not evaluation_file.is_file():
        raise UserError(f"{run} holds neither evaluation.json nor a stage with metrics.jsonl")
    evaluation = json.loads(evaluation_file.read_text()) if evaluation_file.is_file() else {}
    body = [
        _header(run, stages, evaluation),
        _results(evaluation),
        *(_stage(stage) for stage in stages),
        *(_examples(run, name, result) for name, result in sets_of(evaluation).items()),
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
    folders = {path.parent.name: path.parent for path in run.glob("*/metrics.jsonl")}
    return [folders.pop(name) for name in STAGES if name in folders] + [folders[name] for name in sorted(folders)]


def _header(run: Path, stages: Sequence[Path], evaluation: Mapping[str, Any]) -> str:
    sets = sets_of(evaluation)
    numbers = {"held-out sets": str(len(sets)), "stages": " → ".join(s.name for s in stages)}
    if "trained_parameters" in evaluation:
        numbers["trained parameters"] = f"{evaluation['trained_parameters']:,}"
    if "tokens_per_s" in evaluation:
        numbers["tokens/s"] = f"{evaluation['tokens_per_s']:,.0f}"
    notes = "".join(f"<li>{escape(note)}</li>" for note in evaluation.get("notes", []))
    return (
        f"<h1>AnyMAL · {escape(run.name)}</h1>"
        f'<p class="soft">A frozen language model, asked about {escape(", ".join(sets) or "nothing yet")}. '
        f"Written {time.strftime('%Y-%m-%d %H:%M')}.</p>{_numbers(numbers)}"
        + (f'<ul class="soft small">{notes}</ul>' if notes else "")
    )


def _numbers(numbers: Mapping[str, str]) -> str:
    items = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in numbers.items() if value)
    return f'<dl class="numbers">{"".join(items)}</dl>'


def _results(evaluation: Mapping[str, Any]) -> str:
    sets = sets_of(evaluation)
    if not sets:
        return ""
    shown = "".join(map(_table, tables(evaluation)))
    shown += "".join(f'<p class="soft small">{escape(remark)}</p>' for remark in remarks(evaluation))
    return (
        f"<h2>Held-out results</h2>{_bars(sets)}{shown}"
        '<p class="soft small">Accuracy: the right option is chosen. <b>Blank</b> and <b>shuffled</b> are the '
        "same model with an empty medium and with another sample’s; × control compares with the better of them. "
        "95% is the confidence interval (Wilson). CIDEr-D (0–10), exact, empty and cut are of what the model says "
        "freely; the loss is that of the right answers, in nats per token.</p>"
    )


def _table(table: Table) -> str:
    first, *others = map(escape, table.columns)
    head = f"<th>{first}</th>" + "".join(f'<th class="n">{name}</th>' for name in others)
    body = "".join(
        f"<tr><td>{escape(row[0])}</td>" + "".join(f'<td class="n">{escape(cell)}</td>' for cell in row[1:]) + "</tr>"
        for row in table.rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _bars(sets: Mapping[str, Any]) -> str:
    """The accuracy of each set of closed questions above its controls."""
    rows = []
    for name, result in sets.items():
        shares = {condition: (result.get(condition) or {}).get("accuracy") for condition in CONDITIONS}
        if shares[OWN] is None:
            continue
        bars = "".join(
            f'<div class="bar{" ours" if key == OWN else ""}" style="width:{100 * (share or 0):.1f}%" '
            f'title="{key}: {percent(share)}"></div>'
            for key, share in shares.items()
        )
        rows.append(
            f'<tr><td>{escape(name)}</td><td class="n">{percent(shares[OWN])}</td><td class="bars">{bars}</td></tr>'
        )
    head = '<tr><th>set</th><th class="n">accuracy</th><th>accuracy, blank, shuffled</th></tr>'
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>' if rows else ""


def _stage(stage: Path) -> str:
    from anymal.evaluation.report_media import loss_plot  # matplotlib: `print_table` must work without it

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
    right = sum(map(bool, map(_is_right, shown)))
    return (
        f"<h2>{escape(name)}</h2>"
        f'<p class="soft small">The first {len(shown)} of {result.get("n", len(predictions))} held-out samples, not '
        f"chosen; {right} of them right.</p>"
        f'<div class="grid">{"".join(_card(run, prediction) for prediction in shown)}</div>'
    )


def _is_right(prediction: Mapping[str, Any]) -> bool:
    """Whether the choice, or without options what was said, is the answer."""
    chosen = chose_right(prediction)
    return bool(said_right(prediction)) if chosen is None else chosen


def _card(run: Path, prediction: Mapping[str, Any]) -> str:
    from anymal.evaluation.report_media import medium_html

    shown = []
    for name in prediction.get("media", []):
        path = run / name
        if path.resolve().is_relative_to(run.resolve()):  # a page that is passed on holds nothing from elsewhere
            shown.append(medium_html(path))
    medium = "".join(shown) or '<p class="missing">This medium was not kept.</p>'
    if _is_right(prediction):
        mark = '<span class="mark right" title="right">✓ right</span>'
    else:
        mark = '<span class="mark wrong" title="wrong">✗ wrong</span>'
    chosen = f"<p>chose <b>{escape(prediction['choice'])}</b></p>" if prediction.get("choice") else ""
    said = "" if prediction.get("said") is None else f"<p>said “{escape(prediction['said'])}”</p>"
    question = f'<p class="soft small">{escape(prediction["question"])}</p>' if prediction.get("question") else ""
    return (
        f'<div class="card"><div class="medium">{medium}</div><div class="words">{question}<p>{mark}</p>'
        f"{chosen}{said}<p>answer: <b>{escape(prediction['answer'])}</b></p></div></div>"
    )


def main(usage: str, argv: Sequence[str] | None = None) -> None:
    """Write the report of the run named on the command line, and print the table."""
    run = Path(parse_args(ReportConfig, usage, argv, source="run").run)
    page = write_report(run)
    if (run / "evaluation.json").is_file():
        print(print_table(json.loads((run / "evaluation.json").read_text())), end="\n\n")
    print(page)
