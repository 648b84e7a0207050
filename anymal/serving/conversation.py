"""A conversation with a model: its history, the media of the next question, and the answer, streamed.

    attach(medium) ─▶ attached ─┐
    ask(parts) ─────────────────┴▶ messages ──Prepare──▶ Tokens ──embed_prompt──▶ generate ──▶ pieces of text

A question is tokenised with the whole history, by the code that tokenises samples of several turns, so an answer is
what an evaluation of that sample would get. Nothing is printed here: a terminal (`anymal chat`) or
whatever else answers people shows the pieces.
"""

from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from queue import SimpleQueue

from torch import Tensor

from anymal.checkpoints.build import Built
from anymal.data.prompt import LONGEST_TOKEN
from anymal.errors import BadSample, UserError
from anymal.model.generate import Answer, Embedded, embed_prompt, generate
from anymal.model.llm import base_model
from anymal.sample import TEXT, Message, Part, Sample


class ContextTooLong(UserError):
    """The conversation has more tokens than the LLM reads."""


@dataclass(kw_only=True)
class Conversation:
    """The state of one conversation. One question at a time: the model under it is not to be used by two threads."""

    built: Built
    """The model."""
    max_new_tokens: int = 128
    """Longest answer."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; higher values draw among the likely ones."""
    messages: list[Message] = field(default_factory=list)
    """The history, media as encoded bytes; without the recipe's system message, which is always put first."""
    attached: list[Part] = field(default_factory=list)
    """Media that the next question begins with."""
    notes: list[str] = field(default_factory=list)
    """What decoding left out of the last question's media, or added: ``"b.wav: cropped to the middle 10 s"``."""
    cut: str = ""
    """Why the last answer was truncated; empty if it was not."""

    @property
    def limit(self) -> int | None:
        """The context length: the most tokens that the LLM reads, its answer included; None if it has no such bound."""
        text_config = base_model(self.built.model.llm).config.get_text_config()
        most = getattr(text_config, "max_position_embeddings", None)
        return most if most and most > 0 else None

    def attach(self, medium: Part) -> str:
        """Put a medium before the next question.

        Returns:
            The decoder's note on it; empty if it is seen whole.

        Raises:
            UserError: It does not decode, or the model lacks its modality. It is not attached.
        """
        try:
            (decoded,) = self._decoded([Message(role="user", parts=[medium])]).media()
        except BadSample as error:
            raise UserError(f"{medium.member}: {error}") from error
        self.attached.append(medium)
        return decoded.note

    def ask(self, parts: Sequence[Part]) -> Generator[str, None, None]:
        """Ask a question; only `attached`, if `parts` is empty.

        Until its answer is there the conversation stays as it was: a question that fails can be put in other words. If
        the answer is not read to its end (the iterator is closed, or interrupted), what was said of it is kept.

        Returns:
            The answer in pieces, as they come; together they are what `anymal.model.generate.generate` makes of it.

        Raises:
            ContextTooLong: There is no room for an answer. Raised here, not by the iterator.
            UserError: The question cannot be put to this model. Raised here, too.
        """
        question = Message(role="user", parts=[*self.attached, *parts])
        self._require(self._characters(question), LONGEST_TOKEN * self.built.prepare.prompt.max_tokens, "characters")
        try:
            decoded = self._decoded([*self.messages, question])
            tokens = self.built.prepare.prompt.question(decoded)
        except BadSample as error:
            raise UserError(self._undecodable(question) or f"the prompt: {error}") from error
        self.notes = [f"{part.member}: {part.note}" for part in decoded.messages[-1].parts if part.note]
        longest = self.max_new_tokens
        if self.limit is not None:
            self._require(len(tokens.ids), self.limit - 1, "tokens")
            longest = min(longest, self.limit - len(tokens.ids))
        return self._answer(question, embed_prompt(self.built.model, tokens), longest)

    def reset(self) -> None:
        """Forget all that was said, and what is attached."""
        self.messages, self.attached = [], []

    def _characters(self, question: Message) -> int:
        return sum(len(p.content) for m in [*self.messages, question] for p in m.parts if p.kind == TEXT)

    def _require(self, count: int, most: int, unit: str) -> None:
        if count > most:
            raise ContextTooLong(f"with this question the conversation has {count} {unit}; at most {most} can be read")

    def _decoded(self, messages: list[Message]) -> Sample:
        return self.built.prepare.decode(Sample(key="prompt", shard="conversation", messages=messages))

    def _undecodable(self, question: Message) -> str:
        """Which of a question's media does not decode, and why; empty if all do."""
        for part in question.parts:
            try:
                self._decoded([replace(question, parts=[part])])
            except BadSample as error:
                return f"{part.member}: {error}"
        return ""

    def _answer(self, question: Message, prompt: Embedded, longest: int) -> Generator[str, None, None]:
        """The pieces of the answer. It is generated in a thread of its own, which ends with this iterator."""
        built, streamer, ids, shown = self.built, _Streamer(), [], ""
        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature > 0 else {}
        with ThreadPoolExecutor(1) as thread:
            work: Future[list[Answer]] = thread.submit(
                generate, built.model, built.tokenizer, [prompt], max_new_tokens=longest, streamer=streamer, **sampling
            )
            work.add_done_callback(lambda _: streamer.queue.put(None))
            try:
                while (new := streamer.queue.get()) is not None:
                    ids += new
                    text = str(built.tokenizer.decode(ids, skip_special_tokens=True)).strip()
                    if text.startswith(shown) and not text.endswith("\ufffd"):  # that is half of a character
                        piece, shown = text[len(shown) :], text
                        if piece:
                            yield piece
                (answer,) = work.result()
                if answer.text[len(shown) :]:
                    yield answer.text[len(shown) :]
            except (GeneratorExit, KeyboardInterrupt):
                if shown:
                    self._keep(question, shown, "interrupted")
                raise
            finally:
                streamer.stopped = True
        why = f"max_new_tokens is {longest}" if longest == self.max_new_tokens else f"the LLM reads {self.limit} tokens"
        self._keep(question, answer.text, why if answer.cut else "")

    def _keep(self, question: Message, answer: str, cut: str) -> None:
        reply = Message(role="assistant", parts=[Part(kind=TEXT, content=answer)])
        self.messages, self.attached, self.cut = [*self.messages, question, reply], [], cut


class _Stopped(Exception):
    """Nobody reads the answer any more."""


class _Streamer:
    """A streamer, as ``generate`` of transformers takes one: hands token ids on, and ends the generation when stopped.

    That library's own ones give text whose blanks may differ from the answer's after a line break.
    """

    def __init__(self):
        self.queue: SimpleQueue[list[int] | None] = SimpleQueue()
        self.stopped = False

    def put(self, ids: Tensor) -> None:
        """Some more token ids; first those of the prompt, which are none where embeddings are given."""
        if self.stopped:
            raise _Stopped
        self.queue.put(ids.flatten().tolist())

    def end(self) -> None:
        """All has come; the thread's result says so, too."""
