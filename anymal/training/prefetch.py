"""Prefetching: the next micro-batch goes to the device and through the frozen encoders while the LLM is busy with this.

Between packing and the model. On a GPU copies and encoders have a CUDA stream of their own, so the encoders of
micro-batch n+1 run beside the LLM's backward pass of micro-batch n. On a CPU they simply run.
"""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from anymal.model.multimodal import AnyMAL
from anymal.sample import Batch

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
        self._started: Encoded | None = None

    def start(self, batch: Batch) -> None:
        """Queue copies and encoders of a micro-batch; return at once."""
        with torch.cuda.stream(self._stream):  # for None it does nothing
            moved = batch.to(self.model.device)
            learn = self.model.trained_encoders  # those run with the LLM, in the engine's forward pass
            frozen = {name: media for name, media in moved.media.items() if name not in learn}
            self._started = moved, self.model.encode(frozen)

    def take(self) -> Encoded:
        """What was started, for use on the current stream.

        Raises:
            RuntimeError: Nothing was started since the last call.
        """
        if self._started is None:
            raise RuntimeError("no micro-batch was started")
        (moved, features), self._started = self._started, None
        if self._stream is not None:
            current = torch.cuda.current_stream(self.model.device)
            current.wait_stream(self._stream)
            for tensor in _tensors((moved, features)):
                tensor.record_stream(current)  # else its memory could be given away while the LLM still reads it
        return moved, features


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
