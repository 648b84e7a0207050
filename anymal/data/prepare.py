"""What a loader worker does with one sample: decode its media, then tokenise it. Between `parse` and `packing`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anymal.config.schema import PromptConfig
from anymal.data import feature_codec
from anymal.data.prompt import Prompt
from anymal.errors import BadSample
from anymal.modality import Adapter
from anymal.sample import TEXT, Features, Message, Noted, Part, Sample, Tokens, Viewable, Views, with_note

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Decoded = tuple[Tensor | Viewable | Features, str]
"""What a medium's bytes are decoded to, and the decoder's note on it."""


@dataclass(kw_only=True)
class Prepare:
    """Decode and tokenise; picklable."""

    prompt: Prompt
    """How a sample becomes tokens."""
    decoders: dict[str, Callable[[bytes], Tensor | Noted | Viewable]]
    """How the bytes of each modality become what its encoder takes."""
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """[tokens, width] of each modality's features, for those that are read in place of media."""
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    """In which floating media of a modality travel, where that is not the decoder's float32: what their frozen encoder
    computes in, to which they would be cast on the device in any case."""

    def __call__(self, sample: Sample) -> Tokens:
        """Encoded media and texts → what the packing takes.

        Raises:
            BadSample: As `decode` and `anymal.data.prompt.Prompt.sample`.
        """
        return self.prompt.sample(self.decode(sample))

    def question(self, sample: Sample) -> Tokens:
        """The conversation up to its last answer, with the media as in training: views leave room for that answer.

        Raises:
            BadSample: As `decode` and `anymal.data.prompt.Prompt.question`.
        """
        decoded, answer, reserved = self.decode(sample), sample.answer(), 0
        if answer and any(isinstance(part.content, Viewable) for part in decoded.media()):
            reserved = len(self.prompt.answers(decoded, [answer])[0])
        return self.prompt.question(decoded, reserved=reserved)

    def decode(self, sample: Sample) -> Sample:
        """The sample with every medium's bytes decoded; bytes that are shown several times once.

        Raises:
            BadSample: A medium does not decode, or the model lacks its modality.
        """
        decoded: dict[tuple[str, int], Decoded] = {}
        messages = []
        for message in sample.messages:
            parts = [part if part.kind == TEXT else self._decoded(part, decoded) for part in message.parts]
            messages.append(Message(role=message.role, parts=parts))
        return replace(sample, messages=messages)

    def _decoded(self, part: Part, before: dict[tuple[str, int], Decoded]) -> Part:
        """The part decoded; `before` holds what was, by modality and identity of the bytes."""
        if part.kind not in self.decoders:
            raise BadSample(f"holds a medium of modality {part.kind!r}, which the model does not have")
        key = part.kind, id(part.content)
        if key not in before:
            before[key] = self._content(part)
        content, note = before[key]
        return replace(part, content=content, note=note)

    def _content(self, part: Part) -> Decoded:
        if isinstance(part.content, feature_codec.Stored):
            return Features(tensor=feature_codec.load(part.content, *self.shapes[part.kind])), ""
        content, note = with_note(self.decoders[part.kind](part.content))
        dtype = self.dtypes.get(part.kind)
        if isinstance(content, Viewable):
            return replace(content, views=_ViewsIn(content.views, dtype)), note
        feature_codec.check(content, f"the {part.kind} {part.member}, once decoded,")
        return _in(dtype, content), note


@dataclass(frozen=True)
class _ViewsIn:
    """Views of a medium in another dtype."""

    views: Callable[[int], Views]
    dtype: torch.dtype | None

    def __call__(self, count: int) -> Views:
        views = self.views(count)
        return replace(views, tensor=_in(self.dtype, views.tensor))


def _in(dtype: torch.dtype | None, medium: Tensor) -> Tensor:
    """A medium of floating numbers in that dtype; any other as it is."""
    return medium.to(dtype) if dtype is not None and medium.is_floating_point() else medium


def prepare(
    tokenizer: "PreTrainedTokenizerBase",
    adapters: dict[str, Adapter],
    config: PromptConfig,
    max_tokens: int,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> Prepare:
    """Build the worker's function for a model's adapters; `dtypes` as in `Prepare`."""
    names = {name: adapter.modality.placeholder for name, adapter in adapters.items()}
    length = {name: adapter.tokens for name, adapter in adapters.items()}
    prompt = Prompt(tokenizer=tokenizer, config=config, placeholder=names, length=length, max_tokens=max_tokens)
    return Prepare(
        prompt=prompt,
        decoders={name: adapter.decode for name, adapter in adapters.items()},
        shapes={name: (adapter.encoder.tokens, adapter.encoder.width) for name, adapter in adapters.items()},
        dtypes=dtypes or {},
    )
