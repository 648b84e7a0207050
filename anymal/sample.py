"""The values that travel from a shard to the loss.

    tar members ──parse──▶ Sample ──prepare──▶ Tokens ──packing──▶ Batch ──model──▶ loss

Legend of shapes, used everywhere:
    B  samples in a micro-batch        T  tokens of a micro-batch, all its samples end to end
    A  answer tokens (those with loss)  D  width of the LLM's embeddings
    N  media of one modality in a batch K  tokens that one medium takes in the LLM
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

TEXT = "text"
IGNORED = -100  # label of a token that is given, not answered: `torch.nn.functional.cross_entropy` passes it over


@dataclass(kw_only=True)
class Part:
    """A piece of a message: some text, or one medium."""

    kind: str
    """``"text"``, or the name of a modality."""
    content: Any
    """The text; for a medium its encoded bytes, and once decoded the tensor that its encoder takes (without N),
    `Views` of it, or `Features`."""
    member: str = ""
    """For a medium: the suffix of the shard member that it came from, such as ``"0.jpg"``."""
    note: str = ""
    """For a decoded medium: the note of its `Noted`, if it was one."""


@dataclass(frozen=True, kw_only=True)
class Noted:
    """A decoded medium that is not what the file holds: cropped, such as a long sound to its middle, or padded."""

    tensor: Tensor
    """What its encoder takes (without N)."""
    note: str
    """What decoding did, such as ``"cropped to the middle 10 s"``; it is counted, so like media have the same words."""


@dataclass(frozen=True, kw_only=True)
class Features:
    """What its encoder made of one medium, read in place of the medium (see anymal.data.feature_cache)."""

    tensor: Tensor
    """[tokens, width] float32 or bfloat16."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return tuple(self.tensor.shape)


@dataclass(frozen=True, kw_only=True)
class Views:
    """A medium that its encoder takes in pieces, such as the tiles of a large picture.

    Each view is encoded and projected as if it were a medium of its own; their embeddings follow one another where the
    medium stands.
    """

    tensor: Tensor
    """[V, ...] what the encoder takes of each."""
    skipped: tuple[bool, ...] = ()
    """For each place in reading order, whether there is nothing to see: the projector's one learnt skip embedding
    stands there, and no view. V places are not skipped; empty skips none."""


def with_note(decoded: "Tensor | Noted | Viewable") -> "tuple[Tensor | Viewable, str]":
    """What a decoder made of a medium, and its note; empty if there is none."""
    return (decoded.tensor, decoded.note) if isinstance(decoded, Noted) else (decoded, "")


@dataclass(frozen=True, kw_only=True)
class Viewable:
    """A decoded medium that can be shown in more or fewer views; `anymal.data.view_budget` says in how many."""

    choices: tuple[int, ...]
    """The possible numbers of views, the largest first."""
    views: Callable[[int], Views]
    """Cuts it into one of these numbers of views."""


@dataclass(kw_only=True)
class PartlyEncoded:
    """The media of one modality in a batch, if `Features` stand for some or all of them."""

    raw: Tensor | None
    """[M, ...] the encoder's inputs, for those of the N media that are not yet encoded; None if there are none."""
    features: Tensor
    """[N - M, tokens, width] the others' features."""
    order: Tensor
    """[N] int64: which row of the encoder's output for `raw`, followed by `features`, belongs to each medium."""


@dataclass(kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str
    """``"system"``, ``"user"`` or ``"assistant"``."""
    parts: list[Part]
    """Texts and media in the order in which the LLM reads them."""


@dataclass(kw_only=True)
class Sample:
    """A conversation with typed parts. A media-caption pair is one with one medium and one answer."""

    key: str
    """The WebDataset key: unique within its shard."""
    shard: str
    """The tar that it came from."""
    messages: list[Message]
    """The conversation."""
    instruction: str = ""
    """Of its dataset: the text that is put after the media where a user sent no text with them. Empty takes
    ``prompt.instruction``. `anymal.data.prompt` puts it in."""
    options: list[str] = field(default_factory=list)
    """The possible answers, if this is a closed question; the last message's text is the right one."""
    ignored: list[str] = field(default_factory=list)
    """The modality of each member that was left out, since the run does not have it."""

    def media(self) -> list[Part]:
        """Every medium, in reading order."""
        return [part for message in self.messages for part in message.parts if part.kind != TEXT]

    def answer(self) -> str:
        """The text of the last message if it is the assistant's, else an empty string."""
        last = self.messages[-1]
        return "".join(p.content for p in last.parts if p.kind == TEXT) if last.role == "assistant" else ""

    def question(self) -> "Sample":
        """The conversation up to where the assistant's last message, if it ends with one, begins."""
        if self.messages[-1].role != "assistant":
            return self
        return dataclasses.replace(self, messages=self.messages[:-1])

    def answered(self, text: str) -> "Sample":
        """Its question with another answer."""
        answer = Message(role="assistant", parts=[Part(kind=TEXT, content=text)])
        return dataclasses.replace(self, messages=[*self.question().messages, answer])


@dataclass(kw_only=True)
class Tokens:
    """One sample as the LLM reads it. Where a medium stands, `ids` holds zeros: its embeddings are spliced in there."""

    key: str
    """The sample's key, for error messages."""
    ids: list[int]
    """[t] token ids."""
    labels: list[int]
    """[t] the token at each position that must be predicted, or -100 where it is given."""
    runs: list[tuple[str, int, int]]
    """For each medium (or view of one) in reading order: its modality, the position of its first token, and its number
    of tokens."""
    skips: list[tuple[str, int]] = field(default_factory=list)
    """Modality and position of every skipped view's embedding."""
    media: list[Tensor | Features]
    """For each of `runs`: the tensor that its encoder takes, or the features that it once gave."""
    views: list[int] = field(default_factory=list)
    """For each medium in reading order, how many of `runs` are views of it; empty: each run is a medium."""
    decoded: list[tuple[str, str]] = field(default_factory=list)
    """Modality and note (empty: it is whole) of each medium; not of those whose features were read in its place."""
    ignored: list[str] = field(default_factory=list)
    """The modality of each member of the sample that was left out, since the run does not have it."""

    def group(self) -> str:
        """The name under which its loss is reported: its modalities, or ``"text"``."""
        return "+".join(sorted({run[0] for run in self.runs})) or TEXT


@dataclass(kw_only=True)
class Batch:
    """A micro-batch: B samples end to end in one row of T tokens. Nothing is padding."""

    ids: Tensor
    """[1, T] int64 token ids; zero where a medium stands, whose embeddings replace the token embeddings there."""
    positions: Tensor
    """[1, T] int64 position ids, from zero again with every sample: transformers tells samples apart by them."""
    lengths: list[int]
    """Tokens of each sample, T in all: what `anymal.model.attention` tells them apart by."""
    offsets: Tensor
    """[B + 1] int32, where each sample begins, and T: the same for a GPU's kernels, so that nothing is made of the
    lengths, or asked of the GPU, in a step."""
    answer_positions: Tensor
    """[A] int64, the positions (in T) whose next token is an answer token: the head is applied to these only."""
    targets: Tensor
    """[A] int64, the answer tokens."""
    answer_groups: Tensor
    """[A] int64, index into `groups` for each answer token."""
    groups: list[str]
    """Names under which losses are reported."""
    media: dict[str, Tensor | PartlyEncoded]
    """For each modality present, [N, ...] what its encoder takes; or less, where features were read."""
    media_positions: dict[str, Tensor]
    """For each modality present, [sum of K] int64: the positions (in T) of its embeddings, medium after medium."""
    counts: dict[str, Tensor]
    """For each modality present, [N] int64: the number of tokens K of each medium."""
    skips: dict[str, Tensor]
    """For each modality with skipped views, int64: the positions (in T) of their embeddings."""
    keys: list[str]
    """The samples' keys, for error messages."""
    media_starts: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """For each modality present, for each of N: the position (in T) of its first token, and the number (of N) of the
    first view of the same medium. Numbers, not a tensor: `anymal.model.cross_attention` cuts rows by them, and a GPU
    would be waited for."""
    to_encode: dict[str, int] = field(default_factory=dict)
    """For each modality present, how many of the N media its encoder still has to take: not those whose features were
    read. Holds when `media` are gone."""
    datasets: dict[str, int] = field(default_factory=dict)
    """How many of the samples come from each dataset."""
    decoded: dict[tuple[str, str], int] = field(default_factory=dict)
    """By modality and note: how many media were decoded."""
    ignored: dict[str, int] = field(default_factory=dict)
    """How many members were left out of each modality that the run does not have."""

    def to(self, device: torch.device | str) -> "Batch":
        """A copy with every tensor on `device`. Copies to a GPU are queued there; nobody waits for them."""
        queued = torch.device(device).type == "cuda"

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.pin_memory().to(device, non_blocking=True) if queued else value.to(device)
            if isinstance(value, dict):
                return {key: move(item) for key, item in value.items()}
            if dataclasses.is_dataclass(value):
                return type(value)(**{f.name: move(getattr(value, f.name)) for f in dataclasses.fields(value)})
            return value

        return move(self)
