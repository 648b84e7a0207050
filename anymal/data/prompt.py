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

from anymal.config.schema import PromptConfig
from anymal.data import feature_codec
from anymal.data.budget import degrade
from anymal.errors import BadSample, UserError
from anymal.modality import Adapter
from anymal.sample import (
    IGNORED,
    TEXT,
    Features,
    Message,
    Noted,
    Part,
    Sample,
    Tokens,
    Viewable,
    Views,
    told,
    with_note,
)

LONGEST_TOKEN = 64  # characters; a text of more a token is refused before it is tokenised, which takes a second a MB
_NO_CHARACTER = re.compile("[\0\ud800-\udfff]")


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
        unknown = self.tokenizer.unk_token_id  # stands for any character that the tokenizer does not have
        self._reserved_ids = set(self.tokenizer.convert_tokens_to_ids(sorted(reserved))) - {unknown}

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
        ids = self._plain(messages)[0] if self.config.template == "plain" else self._rendered(messages, asks=False)
        return len(ids) - len(sample.media())

    def _complete(self, messages: list[Message]) -> list[Message]:
        """Add the system message, and the instruction wherever a user sent media without a word."""
        completed = []
        if self.config.template == "chat" and self.config.system and messages[0].role != "system":
            completed.append(Message(role="system", parts=[Part(kind=TEXT, content=self.config.system)]))
        return completed + told(messages, self.config.instruction)

    def _texts(self, messages: list[Message]) -> list[str]:
        """Each message with its media as placeholder tokens.

        Raises:
            BadSample: A text holds a reserved token, within a part or over several; or what is no character; or the
                texts are too long to be tokenised; or a medium is of a modality that the model does not have.
        """
        texts = [part.content for message in messages for part in message.parts if part.kind == TEXT]
        characters, most = sum(map(len, texts)), LONGEST_TOKEN * self.max_tokens
        if characters > most:
            raise BadSample(
                f"has {characters} characters, more than {most} in {self.max_tokens} tokens (data.max_tokens)"
            )
        return [self._text(message) for message in messages]

    def _text(self, message: Message) -> str:
        pieces = []
        for kind, parts in groupby(message.parts, key=lambda part: part.kind):
            if kind != TEXT and kind not in self.placeholder:
                raise BadSample(f"holds a medium of modality {kind!r}, which the model does not have")
            if kind != TEXT:
                pieces += [self.placeholder[kind] for _ in parts]
                continue
            text = "".join(part.content for part in parts)  # a token may be cut in two by the parts
            if found := self._reserved.search(text):
                raise BadSample(
                    f"its text holds the reserved token {found.group()!r}; a medium is written as a typed part"
                )
            if found := _NO_CHARACTER.search(text):
                raise BadSample(f"its text holds U+{ord(found.group()):04X}, which is no character")
            pieces.append(text)
        return "".join(pieces)

    def _encode(self, text: str) -> list[int]:
        """The ids of a text, reserved tokens of the template included."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=False)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of tokenizers, whose Rust has no other base in common
                raise
            raise BadSample(f"the tokenizer fails over its text: {error}") from error

    def _plain(self, messages: list[Message]) -> tuple[list[int], list[int]]:
        """Messages one after another, tokenised one by one; each answer ends with the end-of-text token.

        Words that are given end with a line break. Without one the next thing to say after a question is that it ends,
        and to an LLM that has learnt to chat that is the very token that ends an answer: the answer was empty.
        """
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids = [] if start is None else [start]
        labels = [IGNORED] * len(ids)
        for message, text in zip(messages, self._texts(messages), strict=True):
            worded = message.role != "assistant" and any(part.kind == TEXT for part in message.parts)
            said = self._encode(text + "\n" * worded)
            media = sum(part.kind != TEXT for part in message.parts)
            self._require_reserved(said, media)
            if message.role == "assistant":
                labels += [*said, end] if said else [IGNORED]
                ids += [*said, end]
            else:
                labels += [IGNORED] * len(said)
                ids += said
        return ids, labels

    def _chat(self, messages: list[Message]) -> tuple[list[int], list[int]]:
        """The tokenizer's chat template, with the token span of every answer, up to its end token, as labels."""
        ids = self._rendered(messages, asks=False)
        if len(ids) > self.max_tokens:  # before it is rendered again for every answer
            raise BadSample(f"has {len(ids)} tokens, data.max_tokens is {self.max_tokens}")
        turns = self._turns(messages)
        whole, labels, known = self._render(turns, asks=False), [IGNORED] * len(ids), ("", 0)
        for i, turn in enumerate(turns):
            if turn["role"] != "assistant" or not turn["content"].strip():
                continue
            if not i:
                raise BadSample("begins with the assistant; a conversation begins with the system or the user")
            known = self._prefix(ids, whole, self._render(turns[:i], asks=True), known)
            start = known[1]
            known = self._prefix(ids, whole, self._render(turns[: i + 1], asks=False), known)
            end = known[1]
            while end > start and self.tokenizer.eos_token_id in ids[start : end - 1]:
                end -= 1  # what the template puts after the end token is never generated, so it is not learnt
            labels[start:end] = ids[start:end]
        return ids, labels

    def _given(self, messages: list[Message]) -> list[int]:
        """Ids of a conversation that waits for an answer."""
        return self._plain(messages)[0] if self.config.template == "plain" else self._rendered(messages, asks=True)

    def _turns(self, messages: list[Message]) -> list[dict[str, str]]:
        texts = self._texts(messages)
        return [{"role": message.role, "content": text} for message, text in zip(messages, texts, strict=True)]

    def _render(self, turns: list[dict[str, str]], *, asks: bool) -> str:
        return self.tokenizer.apply_chat_template(turns, add_generation_prompt=asks, tokenize=False)

    def _rendered(self, messages: list[Message], *, asks: bool) -> list[int]:
        """The ids of a whole conversation.

        Raises:
            BadSample: Its texts become reserved tokens where the template joins them, or once they are normalised.
        """
        ids = self._encode(self._render(self._turns(messages), asks=asks))
        wordless = [replace(message, parts=[_wordless(part) for part in message.parts]) for message in messages]
        own = self._encode(self._render(self._turns(wordless), asks=asks))
        self._require_reserved(ids, sum(token in self._reserved_ids for token in own))
        return ids

    def _require_reserved(self, ids: list[int], wanted: int) -> None:
        """Refuse ids with other reserved tokens than the template's own and the placeholders of the media."""
        found = [token for token in ids if token in self._reserved_ids]
        if len(found) != wanted:
            names = ", ".join(dict.fromkeys(self.tokenizer.convert_ids_to_tokens(found)))
            raise BadSample(
                f"its texts become reserved tokens when they are joined or normalised: {len(found)} ({names}) are in "
                f"the prompt, {wanted} are the template's own and its media's"
            )

    def _prefix(self, ids: list[int], whole: str, begins: str, known: tuple[str, int]) -> tuple[str, int]:
        """The text `begins` and how many of the ids of the text `whole` are its own.

        What follows an earlier such place (`known`) is tokenised alone; only where that does not fit the ids, as with
        tokenizers that put a blank before every text, all is tokenised again.
        """
        before, start = known
        if begins.startswith(before):
            tail = self._encode(begins[len(before) :])
            if ids[start : start + len(tail)] == tail and whole.startswith(begins):
                return begins, start + len(tail)
        prefix = self._encode(begins)
        if ids[: len(prefix)] != prefix:
            raise BadSample(
                "the chat template rewrites earlier turns or the tokenizer merges across them, so the answer's tokens "
                "cannot be told apart; split the conversation into single answers, or set prompt.template=plain"
            )
        return begins, len(prefix)

    def _widen(self, ids: list[int], labels: list[int], sample: Sample) -> Tokens:
        """Give every placeholder the positions of its medium, and check that there is one medium for each."""
        wanted = [part.kind for part in sample.media()]
        found = [self._modality_of_id[i] for i in ids if i in self._modality_of_id]
        if found != wanted:
            raise BadSample(
                f"{len(found)} placeholders ({', '.join(found)}) for {len(wanted)} media ({', '.join(wanted)}): "
                "the chat template dropped or moved some"
            )
        tokens = Tokens(key=sample.key, ids=[], labels=[], runs=[], media=[], ignored=sample.ignored)
        media = iter(sample.media())
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


def _wordless(part: Part) -> Part:
    """The part with nothing in its text that could become a token of its own."""
    return replace(part, content="x") if part.kind == TEXT and part.content.strip() else part


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
        messages, known = [], {}
        for message in sample.messages:
            parts = [part if part.kind == TEXT else self._decoded(part, known) for part in message.parts]
            messages.append(Message(role=message.role, parts=parts))
        decoded = replace(sample, messages=messages)
        self._cut(decoded)
        return decoded

    def _decoded(self, part: Part, known: dict[tuple[str, int], Any]) -> Part:
        """The part decoded; `known` holds what was: a conversation may show the same bytes any number of times."""
        if part.kind not in self.decoders:
            raise BadSample(f"holds a medium of modality {part.kind!r}, which the model does not have")
        place = part.kind, id(part.content)
        if place not in known:
            known[place] = self._content(part)
        content, note = known[place]
        return replace(part, content=content, note=note)

    def _content(self, part: Part) -> tuple[Tensor | Viewable | Features, str]:
        """What a medium's bytes are decoded to, and the decoder's note on it."""
        if isinstance(part.content, feature_codec.Stored):
            return Features(tensor=feature_codec.load(part.content, *self.shapes[part.kind])), ""
        content, note = with_note(self.decoders[part.kind](part.content))
        if not isinstance(content, Viewable):
            feature_codec.check(content, f"the {part.kind} {part.member}, once decoded,")
        return content, note

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
            feature_codec.check(part.content.tensor, f"the {part.kind} {part.member}, once decoded,")

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
