"""Prefetching: a GPU that trains on one micro-batch never waits for the next.

    stream ──Feed──▶ rows of this step and the next, on the host ──Prefetcher──▶ one, on the GPU, encoded ──▶ the model

Between packing and the model. The answer tokens of a whole step, on all ranks, must be known before its first backward
pass. So a step's rows are all read while the step before it runs: row k of the next step while row k of this one is
trained on. On a GPU copies and encoders have a CUDA stream of their own, so the encoders of micro-batch n+1 run beside
the LLM's backward pass of micro-batch n. On a CPU they simply run.
"""

import dataclasses
from collections import deque
from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from anymal.data.packing import Row
from anymal.data.stream import Stream
from anymal.model.multimodal import AnyMAL
from anymal.sample import Batch
from anymal.training.meter import Meter

Encoded = tuple[Batch, dict[str, Tensor]]
"""A micro-batch on the device, and by modality its features [N, tokens, width]."""


class Prefetcher:
    """Takes one micro-batch at a time, and gives it back on the device with its features.

    Args:
        model: Its device and its frozen encoders are used.
    """

    def __init__(self, model: AnyMAL):
        self.model = model
        self._stream: torch.cuda.Stream | None = None
        if model.device.type == "cuda":
            self._stream = torch.cuda.Stream(model.device)
            self._stream.wait_stream(torch.cuda.current_stream(model.device))  # the weights are there from now on
        self.started: Encoded | None = None
        """What the next `take` gives; None if nothing was started."""

    def start(self, row: Row) -> None:
        """Collate a row, queue its copies and its frozen encoders, and return. Of its media only those stay that the
        encoders which learn will take, in the engine's forward pass."""
        with torch.cuda.stream(self._stream):  # for None it does nothing
            batch = row.collate(pinned=self._stream is not None).to(self.model.device)
            learn = self.model.trained_encoders
            features = self.model.encode({name: media for name, media in batch.media.items() if name not in learn})
            batch.media = {name: media for name, media in batch.media.items() if name in learn}
            self.started = batch, features

    def take(self) -> Encoded:
        """What was started, for use on the current stream.

        Raises:
            RuntimeError: Nothing was started since the last call.
        """
        if self.started is None:
            raise RuntimeError("no micro-batch was started")
        (batch, features), self.started = self.started, None
        if self._stream is not None:
            current = torch.cuda.current_stream(self.model.device)
            current.wait_stream(self._stream)
            for tensor in _tensors((batch, features)):
                tensor.record_stream(current)  # else its memory could be given away while the LLM still reads it
        return batch, features


class Feed:
    """The micro-batches of one rank, read a whole optimizer step ahead of the model.

    After `begin`, and after each `advance`, the next one is being copied to the device and encoded.

    Args:
        stream: This rank's rows; they are read from its bookmark on.
        prefetcher: Gets the next one.
        micro_batches: Of an optimizer step: gradient accumulation.
        meter: Is told of the time spent waiting for rows.
    """

    def __init__(self, stream: Stream, prefetcher: Prefetcher, micro_batches: int, meter: Meter):
        self.stream, self.prefetcher, self.micro_batches, self.meter = stream, prefetcher, micro_batches, meter
        self._rows: Generator[Row, None, None] | None = None
        self._waiting: deque[Row] = deque()  # read, but not started
        self._untrained: deque[tuple[int, dict]] = deque()  # answers and bookmark of each that was read, but not taken

    def begin(self) -> None:
        """Read a step from where the stream stands; what was read before is forgotten."""
        self.end()
        self._rows = iter(self.stream)
        for _ in range(self.micro_batches):
            self._read()
        self._start()

    def end(self) -> None:
        """Read no more, and end the stream's workers."""
        if self._rows is not None:
            self._rows.close()
        self._rows, self.prefetcher.started = None, None
        self._waiting.clear()
        self._untrained.clear()

    @property
    def answers(self) -> int:
        """Before the first `take` of a step: its answer tokens on this rank; zero if it was not read."""
        return sum(answers for answers, _ in self._untrained)

    @property
    def bookmark(self) -> dict:
        """Where the stream stood after the last row that was read: before a step's first `take`, after the step."""
        return self._untrained[-1][1]

    def take(self) -> Encoded:
        """The next micro-batch, as `Prefetcher.take`."""
        self._untrained.popleft()
        return self.prefetcher.take()

    def advance(self, *, read: bool) -> None:
        """Start the micro-batch that comes next, and read one of the next step. To be called while the GPU is busy.

        Args:
            read: Whether there is a next step.
        """
        self._start()
        if read:
            self._read()
            self._start()  # with a single micro-batch in a step, none was waiting before

    def _start(self) -> None:
        if self._waiting and self.prefetcher.started is None:
            self.prefetcher.start(self._waiting.popleft())

    def _read(self) -> None:
        assert self._rows is not None
        with self.meter.waiting():
            row = next(self._rows)
        self._waiting.append(row)
        self._untrained.append((row.answers, row.bookmark))


def _tensors(value: object) -> Iterator[Tensor]:
    """Every tensor in nested dataclasses, dicts and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
