"""What a run tells the person who follows it: the same figures as JSON Lines, in W&B, and in one progress bar.

    model ──per-group loss──▶ Meter ──figures──▶ Tracker ──▶ metrics.jsonl, W&B, the terminal

The training loop, on every rank:

    meter = Meter(step_flops, peak_tflops=config.run.peak_tflops)
    with Tracker(config.run, settings, rank=rank, steps=steps, start=start, run_id=run_id) as tracker:
        for step in range(start + 1, steps + 1):
            with meter.waiting():
                batch = next(batches)
            ...
            meter.add(batch, per_group)
            tracker.log(step, meter.figures(lr=lr, grad_norm=norm))
        tracker.summary(meter.summary())

``metrics.jsonl`` is the truth: it survives kill -9 to the last line, and a resumed run cuts off what its checkpoint
does not know about, so that it holds one curve. W&B gets the same lines; see `_start_wandb` for how a run in several
pieces stays one curve there.
"""

import json
import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from anymal.config.schema import RunConfig
from anymal.config.settings import public_text
from anymal.errors import UserError
from anymal.files import append_line, write_whole, writing

if TYPE_CHECKING:
    import wandb

SECONDS_BETWEEN_LINES = 10.0
"""Where the output is not a terminal, the bar is a line of text at most this often."""


class Tracker:
    """Writes the figures of rank 0; on every other rank each method returns at once.

    A context manager: left by an exception, it marks the W&B run as failed.

    Args:
        run: Where the run lives, and whether W&B is used.
        config_dict: The settings without secrets (`anymal.config.settings.public`), for W&B.
        rank: This process's.
        steps: Optimizer steps of the whole run.
        start: The last step that is already done: 0, or the step of the checkpoint that the run resumes from. Later
            lines of ``metrics.jsonl`` and ``samples.jsonl`` come from a process that was killed; they are dropped.
        run_id: The W&B id stored in that checkpoint.

    Raises:
        UserError: W&B cannot be started.
    """

    def __init__(
        self,
        run: RunConfig,
        config_dict: Mapping[str, Any],
        *,
        rank: int,
        steps: int,
        start: int = 0,
        run_id: str | None = None,
    ):
        self.run_id = run_id or secrets.token_hex(4)  # not from `random`, which belongs to the training
        """The W&B id. Rank 0's goes into the checkpoint and comes back as `run_id` when the run resumes."""
        self._active = rank == 0
        if not self._active:
            return
        folder = Path(run.dir)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._metrics, self._samples = folder / "metrics.jsonl", folder / "samples.jsonl"
        for path in (self._metrics, self._samples):
            _keep_until(path, start)
        self._wandb = None if run.wandb == "disabled" else _start_wandb(run, config_dict, self.run_id)
        self._bar = _Bar(steps, start)
        self._since = f" since step {start}" if start else ""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Write the figures of optimizer step `step` (the first is 1)."""
        if not self._active:
            return
        append_line(self._metrics, json.dumps({"step": step, "time": time.time(), **figures}))
        if self._wandb:
            # Not log(step=...): W&B throws away what is logged to an earlier step than its last, and after a kill
            # the resumed run has fewer steps than W&B has seen.
            self._wandb.log({"step": step, **figures})
        self._bar.show(step, figures)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Write a table of samples, such as question, answer and what the model said, at step `step`."""
        if not self._active:
            return
        rows = [list(row) for row in rows]
        append_line(self._samples, json.dumps({"step": step, "name": name, "columns": list(columns), "rows": rows}))
        if self._wandb:
            import wandb

            with writing(self._metrics.parent / "wandb"):  # a table is a file of its own
                self._wandb.log({"step": step, name: wandb.Table(columns=list(columns), data=rows)})

    def note(self, text: str) -> None:
        """Print `text` above the bar."""
        if self._active:
            tqdm.write(text)

    def summary(self, figures: Mapping[str, Any]) -> None:
        """Write the figures of all steps that this process did to ``throughput.json``, and a line or two."""
        if not self._active or not figures:
            return
        write_whole(self._metrics.parent / "throughput.json", json.dumps(dict(figures), indent=2) + "\n")
        if self._wandb:
            self._wandb.summary.update({f"throughput/{name}": value for name, value in figures.items()})
        self.note(f"throughput: {_postfix(figures, _SUMMARY)}")
        if altered := altered_media(figures.get("media", {})):
            self.note(f"media{self._since} that are not as in their files: {altered}")
        if ignored := figures.get("ignored", {}):
            counts = ", ".join(f"{name} {count:,}" for name, count in ignored.items())
            self.note(f"media{self._since} that were ignored, since this run does not have their modality: {counts}")

    def close(self, *, failed: bool = False) -> None:
        """End the bar and the W&B run."""
        if not self._active:
            return
        self._active = False
        self._bar.close()
        if self._wandb:
            self._wandb.finish(exit_code=int(failed))

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.close(failed=kind is not None)


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, and a last line that was cut off; all at once or not at all."""
    if not path.is_file():
        return
    kept, text = [], path.read_text()
    for line in text.splitlines():
        with suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    if "".join(kept) != text:
        write_whole(path, "".join(kept))


def _start_wandb(run: RunConfig, config_dict: Mapping[str, Any], run_id: str) -> "wandb.Run":
    """A W&B run whose files lie under the run's folder.

    A resumed run is a second piece with the same id: online W&B appends to it; offline it is a folder of its own and
    ``wandb sync`` (0.31) uploads the pieces of one id in the order in which they began. W&B's own step counts lines,
    so steps that a killed process had logged already would be thrown away or moved. All figures are therefore drawn
    over a metric of ours, "step": a step that was trained twice is two points on the same spot.
    """
    import wandb

    offline, arguments = run.wandb == "offline", sys.argv
    sys.argv = arguments[:1]  # W&B would send the command line, and the signatures and secrets in it
    try:
        started = wandb.init(
            project=run.project,
            dir=run.dir,
            id=run_id,
            group=public_text(run.group) or None,
            resume="allow",
            mode=run.wandb,
            config=dict(config_dict),
            # The bar would be recorded as thousands of lines of console output. A run that the caller of ours has open
            # in this process must neither get our figures nor be finished.
            settings=wandb.Settings(console="off", silent=offline, reinit="create_new"),
        )
    except Exception as error:
        raise UserError(f"W&B did not start: {error}. Try run.wandb=offline, or run.wandb=disabled") from error
    finally:
        sys.argv = arguments
    started.define_metric("step", hidden=True)
    started.define_metric("*", step_metric="step")
    return started


class _Bar:
    """A tqdm bar on a terminal; elsewhere the same text without the bar, as a line now and then."""

    def __init__(self, steps: int, start: int):
        self._steps, self._start = steps, start
        self._began, self._last = time.monotonic(), -SECONDS_BETWEEN_LINES
        self._bar = None
        if sys.stderr.isatty():
            # A terminal inside a container may claim to have no columns and rows; tqdm would show nothing at all.
            known = os.get_terminal_size(sys.stderr.fileno()).columns > 0
            columns, rows = (None, None) if known else (100, 24)
            self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=known, ncols=columns, nrows=rows)

    def show(self, step: int, figures: Mapping[str, float]) -> None:
        postfix = _postfix(figures)
        if self._bar is not None:
            self._bar.set_postfix_str(postfix, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN_LINES and step < self._steps:
            return
        self._last = now
        line = tqdm.format_meter(
            step,
            self._steps,
            now - self._began,
            initial=self._start,
            unit="step",
            postfix=postfix,
            bar_format="{n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
        )
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


_POSTFIX = {
    "loss": "loss {:.3f}",
    "lr": "lr {:.1e}",
    "tokens_per_s": "{:.0f} tok/s",
    "utilisation": "{:.0%} of peak",
    "wait_share": "wait {:.0%}",
}
_SUMMARY = {
    "tokens_per_s": "{:.0f} tokens/s",
    "answer_tokens_per_s": "{:.0f} answer tokens/s",
    "padding_share": "padding {:.1%}",
    "wait_share": "waiting {:.1%}",
    "tflops": "{:.3g} model TFLOP/s",
    "utilisation": "{:.1%} of the peak",
}


def altered_media(media: Mapping[str, Mapping[str, int]]) -> str:
    """What decoding left out or added, in words; empty if all media are whole.

    Args:
        media: Modality → note, or ``"whole"`` → number of media, as `anymal.training.meter.Meter.summary` gives it.
    """
    return "; ".join(
        f"{name} {count:,} of {sum(counts.values()):,} {note}"
        for name, counts in media.items()
        for note, count in counts.items()
        if note != "whole"
    )


def _postfix(figures: Mapping[str, Any], texts: Mapping[str, str] = _POSTFIX) -> str:
    rates = {name: f"{name} {{:.1e}}" for name in figures if name.startswith("lr/")} if "lr" in texts else {}
    return ", ".join(text.format(figures[name]) for name, text in {**texts, **rates}.items() if name in figures)
