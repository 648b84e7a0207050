"""Sample → token ids, labels and placeholder runs: what the LLM reads and where it is asked to answer.

Runs in loader workers, between decoding and sequence packing. Every medium is one placeholder token in the text; once
tokenised, it is widened to the K positions of its embeddings, or to those of the views of it that there is room for.
Labels come from token spans: the ids of a conversation up to the answer must be a prefix of the ids of the conversation
with the answer. An instruction is put in here and nowhere else (`with_instruction`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

from torch import Tensor

from anymal.config.schema import PromptConfig
from anymal.data.view_budget import show
from anymal.errors import BadSample, UserError
from anymal.sample import IGNORED, TEXT, Features, Message, Part, Sample, Tokens, Views

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_TOKEN = 64  # characters; a text of more a token is refused before it is tokenised, which takes a second a MB
_NO_CHARACTER = re.compile("[\0\ud800-\udfff]")


@dataclass(kw_only=True)
class Prompt:
    """Turns decoded samples into tokens; picklable."""

    tokenizer: "PreTrainedTokenizerBase"
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
        self._reserved_ids = {self.tokenizer.convert_tokens_to_ids(token) for token in reserved} - {unknown}

    def sample(self, sample: Sample) -> Tokens:
        """A training sample: all messages, labels on what the assistant says.

        Raises:
            BadSample: No answer token, too long, reserved text, or placeholders that do not match the media.
        """
        ids, labels = self._labelled(sample)
        tokens = self._widen(ids, labels, sample, self.max_tokens)
        if len(tokens.ids) > self.max_tokens:
            raise BadSample(f"has {len(tokens.ids)} tokens, data.max_tokens is {self.max_tokens}")
        return tokens

    def question(self, sample: Sample, *, reserved: int = 0) -> Tokens:
        """The conversation up to where the assistant answers: all labels are ignored.

        Args:
            sample: The conversation; an answer at its end is left out.
            reserved: Tokens for which media in views leave room: those of an answer that is to follow.
        """
        asked = sample.question()
        messages = self._complete(asked)
        ids = self._plain(messages)[0] if self.config.template == "plain" else self._rendered(messages, asks=True)
        self._require_media(ids, asked)
        return self._widen(ids, [IGNORED] * len(ids), asked, self.max_tokens - reserved)

    def answers(self, sample: Sample, texts: Sequence[str]) -> list[list[int]]:
        """For each text, however long, the ids (end token included) that would answer `question(sample)`."""
        answers = []
        for text in texts:
            _, labels = self._labelled(sample.answered(text))
            spans = [list(span) for ignored, span in groupby(labels, key=lambda label: label == IGNORED) if not ignored]
            answers.append(spans[-1])
        return answers

    def _labelled(self, sample: Sample) -> tuple[list[int], list[int]]:
        """The ids of all messages, one placeholder for each medium, and their labels.

        Raises:
            BadSample: As `sample`, for other reasons than the length.
        """
        messages = self._complete(sample)
        ids, labels = self._plain(messages) if self.config.template == "plain" else self._chat(messages)
        self._require_media(ids, sample)
        labels = [IGNORED if token in self._modality_of_id else label for token, label in zip(ids, labels, strict=True)]
        if all(label == IGNORED for label in labels[1:]):  # nothing predicts the first token
            raise BadSample("has no answer token: the assistant says nothing")
        return ids, labels

    def _complete(self, sample: Sample) -> list[Message]:
        """The messages with the recipe's system message and the instruction, where they have none of their own."""
        messages = with_instruction(sample.messages, sample.instruction or self.config.instruction)
        if self.config.template == "chat" and self.config.system and messages[0].role != "system":
            system = Message(role="system", parts=[Part(kind=TEXT, content=self.config.system)])
            return [system, *messages]
        return messages

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

        A question ends with a line break. Without it an LLM that has learnt to chat continues a question with the
        end-of-text token, which also ends an answer: its answers were empty.
        """
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids = [] if start is None else [start]
        labels = [IGNORED] * len(ids)
        for message, text in zip(messages, self._texts(messages), strict=True):
            worded = message.role != "assistant" and any(part.kind == TEXT for part in message.parts)
            tokens = self._encode(text + "\n" * worded)
            media = sum(part.kind != TEXT for part in message.parts)
            self._require_reserved(tokens, media)
            if message.role == "assistant":
                labels += [*tokens, end] if tokens else [IGNORED]
                ids += [*tokens, end]
            else:
                labels += [IGNORED] * len(tokens)
                ids += tokens
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

    def _turns(self, messages: list[Message]) -> list[dict[str, str]]:
        texts = self._texts(messages)
        return [{"role": message.role, "content": text} for message, text in zip(messages, texts, strict=True)]

    def _render(self, turns: list[dict[str, str]], *, asks: bool) -> str:
        text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=asks, tokenize=False)
        assert isinstance(text, str), "which it is unless it is tokenised"
        return text

    def _rendered(self, messages: list[Message], *, asks: bool) -> list[int]:
        """The ids of a whole conversation.

        Raises:
            BadSample: Its texts become reserved tokens where the template joins them, or once they are normalised.
        """
        ids = self._encode(self._render(self._turns(messages), asks=asks))
        wordless = [replace(message, parts=[_without_words(part) for part in message.parts]) for message in messages]
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
        """The text `begins`, and how many of `ids` (those of the text `whole`) belong to it.

        `known` is the result for an earlier, shorter beginning: only what follows it is tokenised. If that does not fit
        the ids, as with tokenizers that put a blank before every text, `begins` is tokenised from its start.
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

    def _require_media(self, ids: list[int], sample: Sample) -> None:
        """Refuse ids whose placeholders are not those of the sample's media, one for each, in the same order."""
        wanted = [part.kind for part in sample.media()]
        there = [self._modality_of_id[token] for token in ids if token in self._modality_of_id]
        if there != wanted:
            raise BadSample(
                f"{len(there)} placeholders ({', '.join(there)}) for {len(wanted)} media ({', '.join(wanted)}): "
                "the chat template dropped or moved some"
            )

    def _widen(self, ids: list[int], labels: list[int], sample: Sample, most: int) -> Tokens:
        """Give every placeholder the positions of its medium; those in views take what is left of `most` tokens."""
        tokens = Tokens(key=sample.key, ids=[], labels=[], runs=[], media=[], ignored=sample.ignored)
        media = sample.media()
        contents = show(media, self.length, most - (len(ids) - len(media)))
        following = zip(media, contents, strict=True)
        for token, label in zip(ids, labels, strict=True):
            modality = self._modality_of_id.get(token)
            if modality is None:
                tokens.ids.append(token)
                tokens.labels.append(label)
                continue
            medium, content = next(following)
            if not isinstance(content, Features):
                tokens.decoded.append((modality, medium.note))
            views = _views(content)
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


def with_instruction(messages: list[Message], instruction: str) -> list[Message]:
    """The messages, with `instruction` (if any) after the media wherever a user sent media without a word."""
    if not instruction:
        return messages
    added = Part(kind=TEXT, content=instruction)
    return [
        Message(role=message.role, parts=[*message.parts, added] if _is_wordless(message) else message.parts)
        for message in messages
    ]


def _is_wordless(message: Message) -> bool:
    return message.role == "user" and all(part.kind != TEXT for part in message.parts)


def _without_words(part: Part) -> Part:
    """The part with nothing in its text that could become a token of its own."""
    return replace(part, content="x") if part.kind == TEXT and part.content.strip() else part


def _views(medium: Tensor | Views | Features) -> list[Tensor | Features | None]:
    """What is encoded of a medium, one after another; None for what is skipped."""
    if not isinstance(medium, Views):
        return [medium]
    views = iter(medium.tensor)
    return [None if skipped else next(views) for skipped in medium.skipped or [False] * len(medium.tensor)]
