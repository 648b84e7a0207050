"""Sample → token ids, labels and placeholder runs: what the LLM reads and where it is asked to answer.

Runs in loader workers, between the stream and the packing. Every medium is one placeholder token in the text; once
tokenised, it is widened to the K positions that its embeddings will take. Labels come from token spans: the ids of a
conversation up to the answer must be a prefix of the ids of the conversation with the answer.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from torch import Tensor

from anymal import features
from anymal.budget import degrade
from anymal.config import PromptConfig
from anymal.errors import BadSample, UserError
from anymal.modality import Adapter
from anymal.sample import TEXT, Features, Message, Noted, Part, Sample, Tokens, Viewable, Views, told, with_note

IGNORED = -100  # label of a token that is given, not answered


@dataclass(kw_only=True)
class Prompt:
    """Turns decoded samples into tokens; picklable."""

    tokenizer: Any
    """The LLM's tokenizer; the placeholders are added to it. Their ids never reach the LLM: nothing is resized."""
    config: PromptConfig
    """Template, system message, instruction."""
    placeholder: dict[str, str]
    """The placeholder token of each modality."""
    length: dict[str, int]
    """K, the tokens that one medium takes, by modality."""
    max_tokens: int = 2048
    """Longest sample; a longer one is refused, never cut."""

    def __post_init__(self):
        self.tokenizer.add_tokens(list(self.placeholder.values()), special_tokens=True)
        if self.config.template == "chat" and not self.tokenizer.chat_template:
            raise UserError("this LLM's tokenizer has no chat template; set prompt.template=plain")
        self._modality_of_id = {self.tokenizer.convert_tokens_to_ids(p): m for m, p in self.placeholder.items()}
        special = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        reserved = {*special, *self.tokenizer.all_special_tokens, *self.placeholder.values()} - {""}
        self._reserved = re.compile("|".join(map(re.escape, sorted(reserved))))

    def sample(self, sample: Sample) -> Tokens:
        """A training sample: all messages, labels on what the assistant says.

        Raises:
            BadSample: No answer token, too long, reserved text, or placeholders that do not match the media.
        """
        tokens = self._labelled(sample)
        if len(tokens.ids) > self.max_tokens:
            raise BadSample(f"has {len(tokens.ids)} tokens, data.max_tokens is {self.max_tokens}")
        return tokens

    def _labelled(self, sample: Sample) -> Tokens:
        """As `sample`, however long it is."""
        messages = self._complete(sample.messages)
        ids, labels = self._plain(messages) if self.config.template == "plain" else self._chat(messages)
        tokens = self._widen(ids, labels, sample)
        if all(label == IGNORED for label in tokens.labels[1:]):  # nothing predicts the first token
            raise BadSample("has no answer token: the assistant says nothing")
        return tokens

    def question(self, sample: Sample) -> Tokens:
        """The conversation up to where the assistant answers: all labels are ignored."""
        asked = sample.question()
        ids = self._given(self._complete(asked.messages))
        return self._widen(ids, [IGNORED] * len(ids), asked)

    def answers(self, sample: Sample, texts: Sequence[str]) -> list[list[int]]:
        """For each text, however long, the ids (end token included) that would answer `question(sample)`."""
        found = []
        for text in texts:
            labels = self._labelled(sample.answered(text)).labels
            spans = [list(span) for given, span in groupby(labels, key=lambda label: label == IGNORED) if not given]
            found.append(spans[-1])
        return found

    def text_tokens(self, sample: Sample) -> int:
        """How many tokens a sample has without its media."""
        messages = self._complete(sample.messages)
        ids = self._plain(messages)[0] if self.config.template == "plain" else self._render(messages, asks=False)
        return len(ids) - len(sample.media())

    def _complete(self, messages: list[Message]) -> list[Message]:
        """Add the system message, and the instruction wherever a user sent media without a word."""
        completed = []
        if self.config.template == "chat" and self.config.system and messages[0].role != "system":
            completed.append(Message(role="system", parts=[Part(kind=TEXT, content=self.config.system)]))
        return completed + told(messages, self.config.instruction)

    def _text(self, message: Message) -> str:
        """The message with its media as placeholder tokens."""
        for part in message.parts:
            if part.kind == TEXT and (found := self._reserved.search(part.content)):
                raise BadSample(
                    f"its text holds the reserved token {found.group()!r}; a medium is written as a typed part"
                )
            if part.kind != TEXT and part.kind not in self.placeholder:
                raise BadSample(f"holds a medium of modality {part.kind!r}, which the model does not have")
        return "".join(part.content if part.kind == TEXT else self.placeholder[part.kind] for part in message.parts)

    def _plain(self, messages: list[Message]) -> tuple[list[int], list[int]]:
        """Messages one after another, tokenised one by one; each answer ends with the end-of-text token.

        Words that are given end with a line break. Without one the next thing to say after a question is that it ends,
        and to an LLM that has learnt to chat that is the very token that ends an answer: the answer was empty.
        """
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids = [] if start is None else [start]
        labels = [IGNORED] * len(ids)
        for message in messages:
            worded = message.role != "assistant" and any(part.kind == TEXT for part in message.parts)
            said = self.tokenizer.encode(self._text(message) + "\n" * worded, add_special_tokens=False)
            if message.role == "assistant":
                labels += [*said, end] if said else [IGNORED]
                ids += [*said, end]
            else:
                labels += [IGNORED] * len(said)
                ids += said
        return ids, labels

    def _chat(self, messages: list[Message]) -> tuple[list[int], list[int]]:
        """The tokenizer's chat template, with the token span of every answer, up to its end token, as labels."""
        ids = self._render(messages, asks=False)
        labels = [IGNORED] * len(ids)
        for i, message in enumerate(messages):
            if message.role != "assistant" or not self._text(message).strip():
                continue
            start = self._prefix(ids, messages[:i], asks=True)
            end = self._prefix(ids, messages[: i + 1], asks=False)
            while end > start and self.tokenizer.eos_token_id in ids[start : end - 1]:
                end -= 1  # what the template puts after the end token is never generated, so it is not learnt
            labels[start:end] = ids[start:end]
        return ids, labels

    def _given(self, messages: list[Message]) -> list[int]:
        """Ids of a conversation that waits for an answer."""
        return self._plain(messages)[0] if self.config.template == "plain" else self._render(messages, asks=True)

    def _render(self, messages: list[Message], *, asks: bool) -> list[int]:
        turns = [{"role": message.role, "content": self._text(message)} for message in messages]
        return self.tokenizer.apply_chat_template(turns, add_generation_prompt=asks, tokenize=True, return_dict=False)

    def _prefix(self, ids: list[int], messages: list[Message], *, asks: bool) -> int:
        """The length of the ids of `messages`, which must be how `ids` begins."""
        if not messages:
            raise BadSample("begins with the assistant; a conversation begins with the system or the user")
        prefix = self._render(messages, asks=asks)
        if ids[: len(prefix)] != prefix:
            raise BadSample(
                "the chat template rewrites earlier turns or the tokenizer merges across them, so the answer's tokens "
                "cannot be told apart; split the conversation into single answers, or set prompt.template=plain"
            )
        return len(prefix)

    def _widen(self, ids: list[int], labels: list[int], sample: Sample) -> Tokens:
        """Give every placeholder the positions of its medium, and check that there is one medium for each."""
        wanted = [part.kind for part in sample.media()]
        found = [self._modality_of_id[i] for i in ids if i in self._modality_of_id]
        if found != wanted:
            raise BadSample(
                f"{len(found)} placeholders ({', '.join(found)}) for {len(wanted)} media ({', '.join(wanted)}): "
                "the chat template dropped or moved some"
            )
        tokens, media = Tokens(key=sample.key, ids=[], labels=[], runs=[], media=[]), iter(sample.media())
        for token, label in zip(ids, labels, strict=True):
            modality = self._modality_of_id.get(token)
            if modality is None:
                tokens.ids.append(token)
                tokens.labels.append(label)
                continue
            medium = next(media)
            if not isinstance(medium.content, Features):
                tokens.decoded.append((modality, medium.note))
            views = _views(medium.content)
            tokens.views.append(sum(view is not None for view in views))
            for view in views:
                length = 1 if view is None else self.length[modality]
                if view is None:
                    tokens.skips.append((modality, len(tokens.ids)))
                else:
                    tokens.runs.append((modality, len(tokens.ids), length))
                    tokens.media.append(view)
                tokens.ids += [0] * length
                tokens.labels += [IGNORED] * length
        return tokens


def _views(medium: Tensor | Views | Features) -> list[Tensor | Features | None]:
    """What is encoded of a medium, one after another; None for what is skipped."""
    if not isinstance(medium, Views):
        return [medium]
    views = iter(medium.tensor)
    return [None if skipped else next(views) for skipped in medium.skipped or [False] * len(medium.tensor)]


@dataclass(kw_only=True)
class Prepare:
    """What a loader worker does with a sample: decode its media, then tokenise it. Picklable."""

    prompt: Prompt
    """How it becomes tokens."""
    decoders: dict[str, Callable[[bytes], Tensor | Noted | Viewable]]
    """How the bytes of each modality become what its encoder takes."""
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """[tokens, width] of each modality's features, for those that are read in place of media."""

    def decode(self, sample: Sample) -> Sample:
        """The sample with every medium's bytes decoded, and cut into views where it has several.

        Raises:
            BadSample: A medium does not decode, or the model lacks its modality.
        """
        messages = []
        for message in sample.messages:
            parts = [part if part.kind == TEXT else self._decoded(part) for part in message.parts]
            messages.append(Message(role=message.role, parts=parts))
        decoded = replace(sample, messages=messages)
        self._cut(decoded)
        return decoded

    def _decoded(self, part: Part) -> Part:
        if part.kind not in self.decoders:
            raise BadSample(f"holds a medium of modality {part.kind!r}, which the model does not have")
        if isinstance(part.content, features.Stored):
            return replace(part, content=Features(tensor=features.load(part.content, *self.shapes[part.kind])))
        content, note = with_note(self.decoders[part.kind](part.content))
        return replace(part, content=content, note=note)

    def _cut(self, sample: Sample) -> None:
        """Cut what can be cut into views, into as many as the text and the other media leave room for."""
        viewable = [part for part in sample.media() if isinstance(part.content, Viewable)]
        if not viewable:
            return
        length = self.prompt.length
        fixed = sum(length[part.kind] for part in sample.media() if not isinstance(part.content, Viewable))
        room = self.prompt.max_tokens - self.prompt.text_tokens(sample) - fixed
        choices = [[length[part.kind] * n for n in part.content.choices] for part in viewable]
        for part, tokens in zip(viewable, degrade(choices, room), strict=True):
            part.content = part.content.views(tokens // length[part.kind])

    def __call__(self, sample: Sample) -> Tokens:
        """Encoded media and texts → what the packing takes."""
        return self.prompt.sample(self.decode(sample))


def prepare(tokenizer: Any, adapters: dict[str, Adapter], config: PromptConfig, max_tokens: int) -> Prepare:
    """Build the worker's function for a model's adapters."""
    names = {name: adapter.modality.placeholder for name, adapter in adapters.items()}
    length = {name: adapter.tokens for name, adapter in adapters.items()}
    prompt = Prompt(tokenizer=tokenizer, config=config, placeholder=names, length=length, max_tokens=max_tokens)
    return Prepare(
        prompt=prompt,
        decoders={name: adapter.decode for name, adapter in adapters.items()},
        shapes={name: (adapter.encoder.tokens, adapter.encoder.width) for name, adapter in adapters.items()},
    )
