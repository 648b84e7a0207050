"""Stage 1 on one GPU at AnyMAL's real sizes: tokens a second, memory, share of the peak; the estimate beside each.

AnyMAL's own model, batches and prefetcher; rows of ragged samples (log-normal lengths, seeded); AdamW. Without engine
and decoding: those are the stage `engine`'s, and the demo's.
"""

import gc
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from anymal.adapters import REGISTRY
from anymal.config.schema import DataConfig
from anymal.data.order import PENDING
from anymal.data.packing import Item, Packer, Row
from anymal.estimation.fake_step import FakeStep, Workload
from anymal.estimation.peak import Prediction, predict
from anymal.modality import Encoder, media_dtype
from anymal.model.flops import StepFlops, llm_flops
from anymal.model.trainable import trainable
from anymal.sample import IGNORED, Features, Tokens
from anymal.training.meter import Meter, memory_figures
from anymal.training.prefetch import Feed, Prefetcher
from gpu.measure import Clock, Scale, matmul_peak, synchronize
from gpu.models import random_model, settings

GIVEN = 8  # tokens of a sample that are neither medium nor answer
PLACE = {"rank": 0, "world": 1, "position": 0, PENDING: [], "done": [], "data": {}}  # a bookmark that nobody reads
DIFFERENT = 32  # media that samples share: made once


class RaggedRows:
    """A stream of rows of ragged samples, each a picture and its caption, in place of `anymal.data.stream.Stream`.

    Args:
        scale: Tokens of a medium, and of the median sample.
        row_tokens: Of a packed row.
        shape: Of a decoded medium, or of its features where they are `cached`.
        dtype: Of a decoded medium.
        cached: Whether features are read in place of media.
    """

    def __init__(self, scale: Scale, row_tokens: int, shape: tuple[int, ...], dtype: torch.dtype, *, cached: bool):
        self.scale, self.row_tokens, self.bookmark = scale, row_tokens, PLACE
        generator = torch.Generator().manual_seed(0)
        media = torch.rand(DIFFERENT, *shape, generator=generator)
        whole = not dtype.is_floating_point  # pixels
        self.media = list((255 * media).to(dtype) if whole else media.to(torch.bfloat16 if cached else dtype))
        self.cached = cached

    def __iter__(self) -> Iterator[Row]:
        packer = Packer(DataConfig(row_tokens=self.row_tokens, max_tokens=min(2048, self.row_tokens)))
        generator, position = torch.Generator().manual_seed(1), 0
        while True:
            spread = float(torch.randn((), generator=generator))
            sample = self.sample(position, round(self.scale.median * math.exp(0.3 * spread)))
            for row in packer.add(Item(position=position, dataset="data", tokens=sample)):
                yield Row(items=row, bookmark=PLACE)
            position += 1

    def sample(self, position: int, tokens: int) -> Tokens:
        """A picture, some text, and an answer for the rest of `tokens`, a quarter of them at least."""
        media = self.scale.media_tokens
        answers = max(tokens // 4, tokens - media - GIVEN, 1)
        length = min(max(tokens, media + answers), self.row_tokens)
        medium = self.media[position % len(self.media)]
        return Tokens(
            key=str(position),
            ids=[1] * length,
            labels=[IGNORED] * (length - answers) + [1] * answers,
            runs=[("image", 0, media)],
            media=[Features(tensor=medium) if self.cached else medium],
        )


class SameRow(RaggedRows):
    """The same row over and over: so many ragged samples, whose mean is exactly as given."""

    def __init__(self, scale: Scale, samples: int, mean: int, shape: tuple[int, ...], dtype: torch.dtype):
        super().__init__(scale, samples * mean, shape, dtype, cached=False)
        self.samples, self.mean = samples, mean

    def __iter__(self) -> Iterator[Row]:
        generator = torch.Generator().manual_seed(1)
        lengths = [round(self.mean * math.exp(0.2 * x)) for x in torch.randn(self.samples // 2, generator=generator)]
        lengths = [min(max(length, self.mean // 2 + 1), 2 * self.mean - self.mean // 2 - 1) for length in lengths]
        lengths += [2 * self.mean - length for length in lengths] + [self.mean] * (self.samples % 2)
        samples = [self.sample(n, length) for n, length in enumerate(sorted(lengths))]
        while True:
            yield Row(items=[Item(position=n, dataset="data", tokens=tokens) for n, tokens in enumerate(samples)])


def run_8b(scale: Scale, clock: Clock) -> dict[str, Any]:
    """Rows of several lengths, with cached features and with encoders."""
    figures: dict[str, Any] = {"rows": []}
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench("8b", Path(folder), scale, figures, "model.llm.checkpointing=selective")
        for row in scale.rows:
            for cached in (True, False):
                name = f"row_of_{row}_{'cached' if cached else 'inline'}"
                clock.within(figures, name, 45, lambda row=row, cached=cached: bench.rows_of(row, cached=cached))
    return figures | _worst(figures["rows"])


def run_70b(scale: Scale, clock: Clock) -> dict[str, Any]:
    """The row that must fit, with encoders."""
    figures: dict[str, Any] = {"rows": [], "fits": 0}
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench("70b", Path(folder), scale, figures, "model.llm.checkpointing=full")
        clock.within(figures, "row", 120, bench.whole)
    return figures | _worst(figures["rows"])


def _worst(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all rows, the largest error and the longest wait."""
    names = {"estimate_error", "wait_share"}
    return {name: max(row[name] for row in rows if name in row) for name in names if any(name in row for row in rows)}


class _Bench:
    """One LLM on the card."""

    def __init__(self, name: str, folder: Path, scale: Scale, figures: dict[str, Any], *more: str):
        self.scale, self.figures = scale, figures
        self.config = settings(name, folder, scale, "engine.zero=0", *more)
        self.peak, self.elsewhere = matmul_peak(scale), alive(scale)
        began = time.monotonic()
        self.model = random_model(self.config, scale)
        self.step_flops = StepFlops(self.model, llm_flops(self.model.llm, self.config.model.llm.checkpointing))
        self.fake_step = FakeStep(self.config, REGISTRY, gpu=not scale.rehearsed)
        synchronize(scale.device)
        figures |= {"matmul_tflops": self.peak / 1e12, "seconds_to_build": time.monotonic() - began}

    def rows_of(self, row_tokens: int, *, cached: bool) -> dict[str, Any]:
        """Packed rows of ragged samples."""
        encoder = self.model.encoders["image"]
        shape = (encoder.tokens, encoder.width) if cached else tuple(encoder.shape)
        stream = RaggedRows(self.scale, row_tokens, shape, travelling(encoder, self.scale), cached=cached)
        found = self._measure(stream, cached=cached)
        self.figures["rows"].append({"row_tokens": row_tokens, "cached": cached, **found})
        if row_tokens != self.scale.rows[0]:
            return {}
        return {f"{'cached' if cached else 'inline'}_tokens_per_s": found.get("tokens_per_s")}

    def whole(self) -> dict[str, Any]:
        """The row of `Scale.whole`; whether it fits."""
        encoder = self.model.encoders["image"]
        stream = SameRow(self.scale, *self.scale.whole, tuple(encoder.shape), travelling(encoder, self.scale))
        found = self._measure(stream, cached=False)
        self.figures["rows"].append(found)
        names = ("hardware_share", "model_share", "tokens_per_s", "reserved_gb")
        return {"fits": int("out_of_memory" not in found), **{name: found.get(name) for name in names}}

    def _measure(self, stream: RaggedRows, *, cached: bool) -> dict[str, Any]:
        """Speed and memory of steps over a stream's rows, the estimate beside them."""
        gc.collect()
        if not self.scale.rehearsed:
            torch.cuda.empty_cache()
        meter = Meter(self.step_flops)
        try:
            with _peak_of_tensors(self.scale, self.elsewhere + sum(medium.nbytes for medium in stream.media)) as peak:
                seconds, tokens, largest = self._train(stream, meter)
        except torch.OutOfMemoryError as error:
            return {"out_of_memory": str(error).partition("\n")[0]}
        sums = meter.figures()
        work = Workload(tokens=round(largest[1] / largest[0]), answers=largest[2] // largest[0], cached=cached)
        predicted = predict(self.fake_step, work, largest[0], world=1)
        flops = {"needed": meter.summary()["model_tflop"], "recomputed": meter.summary()["recomputed_tflop"]}
        share = 1e12 / seconds / self.peak
        return {
            "samples": largest[0],
            "tokens": largest[1],
            "tokens_per_s": tokens / seconds,
            "seconds_a_step": seconds / self.scale.steps,
            "model_share": flops["needed"] * share,
            "hardware_share": (flops["needed"] + flops["recomputed"]) * share,
            "wait_share": sums["wait_share"],
            **compared(predicted, peak, rehearsed=self.scale.rehearsed),
        }

    def _train(self, stream: RaggedRows, meter: Meter) -> tuple[float, int, tuple[int, int, int]]:
        """Steps of one micro-batch each, in the order of `anymal.training.loop`.

        Returns:
            Seconds and tokens of all steps but the first; of the longest row its samples, tokens and answers.
        """
        optimizer = torch.optim.AdamW(trainable(self.model).values(), lr=1e-4)
        feed: Any = Feed(stream, Prefetcher(self.model), 1, meter)
        feed.begin()
        began, tokens, largest = 0.0, 0, (1, 0, 0)
        for number in range(1 + self.scale.steps):
            if number == 1:
                synchronize(self.scale.device)
                meter.figures()  # the first step's are forgotten: it warms up
                began = time.perf_counter()
            batch, features = feed.take()
            total, per_group = self.model(batch, features)
            del features
            (total / len(batch.targets)).backward()
            del total
            feed.advance(read=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            largest = max(largest, (len(batch.keys), sum(batch.lengths), len(batch.targets)), key=lambda row: row[1])
            if number:
                meter.add(batch, per_group.detach())
                tokens += sum(batch.lengths)
        synchronize(self.scale.device)
        seconds = time.perf_counter() - began
        feed.end()
        return seconds, tokens, largest


def travelling(encoder: Encoder, scale: Scale) -> torch.dtype:
    """In which a decoded medium travels: floating ones in what their frozen encoder computes in."""
    dtype = media_dtype(encoder)
    return scale.dtype if dtype.is_floating_point else dtype


def compared(predicted: Prediction, peak: dict[str, float], *, rehearsed: bool) -> dict[str, Any]:
    """The estimate beside what was measured. What is reserved is to be no more than estimated, and gaps."""
    found = {**peak, "estimated_tensors_gb": predicted.tensors / 1e9, "estimated_gb": predicted.total / 1e9}
    found["tensors_error"] = predicted.tensors / 1e9 / peak["memory_gb"] - 1
    if not rehearsed:
        found["reserved_error"] = predicted.total / 1e9 / peak["reserved_peak_gb"] - 1
    return found | {"estimate_error": max(abs(found[name]) for name in found if name.endswith("_error"))}


@contextmanager
def _peak_of_tensors(scale: Scale, elsewhere: int) -> Iterator[dict[str, float]]:
    """Inside, the peak is measured; afterwards `memory_figures` of it are in what was yielded, in 10^9 bytes.

    Args:
        scale: On a CPU it is the profiler's peak, and what is there before, of which torch does not keep count.
        elsewhere: Of that, the bytes that are not the model's.
    """
    found: dict[str, float] = {}
    if not scale.rehearsed:
        torch.cuda.reset_peak_memory_stats()
        yield found
        found |= memory_figures(torch.cuda.memory_stats())
        return
    from torch.profiler import ProfilerActivity, profile

    before = alive(scale) - elsewhere
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield found
    now = most = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    found["memory_gb"] = (before + most) / 1e9


def alive(scale: Scale) -> int:
    """In a rehearsal, bytes of all tensors that Python knows; else 0, since torch knows better."""
    if not scale.rehearsed:
        return 0
    gc.collect()
    storages = {}
    for thing in gc.get_objects():  # not isinstance, which some modules' objects answer with a warning
        if issubclass(type(thing), torch.Tensor) and not isinstance(thing, FakeTensor) and thing.device.type == "cpu":
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())
