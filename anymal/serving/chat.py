"""The program behind `anymal chat`: the command line → a prompt with media → the answer."""

import contextlib
import re
import sys
from collections.abc import Collection, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING

from anymal.checkpoints import checkpoint
from anymal.checkpoints.build import build
from anymal.checkpoints.process import process_as_found
from anymal.config.command_line import field_docs, parse_args
from anymal.errors import UserError, nearest
from anymal.model.llm import device
from anymal.model.registry import Registry
from anymal.sample import TEXT, Part
from anymal.serving.conversation import ContextTooLong, Conversation
from anymal.serving.draw import Painter, split

COMMANDS = ("reset", "help", "quit")
HELP = """\
Whatever you type is said to the model, together with all that was said before. A line that begins with / is a command:
  {media}: the file is seen or heard before the next message;
      an empty line sends it without a word
  /reset: begin anew, with nothing said or attached
  /quit, or Ctrl-D: end
Ctrl-C ends an answer. To say something that begins with /, put a blank before it."""


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """A question, or a conversation."""

    checkpoint: str = MISSING
    """A checkpoint folder, or the run folder that holds it (its latest)."""
    model: dict[str, Any] = field(default_factory=dict)
    """Settings of the checkpoint's recipe to override, such as model.llm.name=FOLDER for an LLM that was moved, or
    model.modalities.NAME.encoder=FOLDER for an encoder."""
    bits: int = 0
    """Precision of the LLM: 4, 8, 16 or 32; 0 takes the one it was trained with."""
    max_new_tokens: int = 128
    """Longest answer."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; higher values draw among the likely ones."""
    draw: str = ""
    """Hub name or local folder of a text-to-image pipeline of diffusers that draws what stands between <h> and </h> in
    the answer, which is shown once it is whole; empty draws nothing."""
    draw_out: str = "drawings"
    """Folder for the drawings."""
    draw_steps: int = 0
    """Denoising steps; 0 takes the pipeline's default."""
    draw_size: int = 0
    """Height and width in pixels; 0 takes the pipeline's default."""
    draw_seed: int = 0
    """Of the drawings."""


def split_arguments(arguments: list[str], modalities: Collection[str]) -> tuple[list[Part], list[str]]:
    """The command line → the message's parts in order, and the settings.

    Raises:
        UserError: An unknown setting or modality, or a file that cannot be read.
    """
    parts, settings = [], []
    remaining = iter(arguments)
    for argument in remaining:
        if argument in ("-h", "--help"):
            settings.append(argument)
        elif argument.startswith("--"):
            parts.append(medium(argument, argument[2:], next(remaining, ""), modalities))
        elif re.match(r"[A-Za-z_][\w.]*=", argument):
            settings.append(_known(argument))
        else:
            parts.append(Part(kind=TEXT, content=argument))
    return parts, settings


def _known(setting: str) -> str:
    """Refuse a ``name=value`` of which there is no setting; nested names are checked when the settings are read."""
    name, names = re.split(r"[.=]", setting)[0], list(field_docs(ChatConfig))
    if name in names:
        return setting
    hint = nearest(name, names)
    raise UserError(f"{setting}: there is no setting {name}; {hint} (a text that looks so is given by standard input)")


def medium(argument: str, name: str, file: str, modalities: Collection[str]) -> Part:
    """A file as a medium of modality `name`; `argument` is how that was written, for messages.

    Raises:
        UserError: There is no such modality or file, or the file cannot be read.
    """
    if name not in modalities:
        hint = nearest(name.partition("=")[0], modalities)
        raise UserError(f"{argument}: there is no such modality; {hint} (a setting is written name=value, without --)")
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"{argument} needs a file; {file!r} is none")
    try:
        return Part(kind=name, content=path.read_bytes(), member=path.name)
    except OSError as error:
        raise UserError(f"{argument} {file}: {error.strerror}") from error


@process_as_found()
def main(usage: str, registry: Registry) -> None:
    """Read the command line, and answer or converse."""
    parts, settings = split_arguments(sys.argv[1:], registry.modalities)
    config = parse_args(ChatConfig, usage, settings)
    converses = not parts and sys.stdin is not None and sys.stdin.isatty()
    if not converses and all(part.kind != TEXT for part in parts):
        parts += _standard_input()
    if not parts and not converses:
        raise UserError("nothing was asked; give a text, and media as --image FILE, --audio FILE, ...")
    painter = _painter(config)
    folder = checkpoint.existing(config.checkpoint)
    overrides = [f"model.llm.bits={config.bits}"] if config.bits else []
    built = build(checkpoint.recipe(folder, overrides, config.model), device(), registry, start=folder)
    conversation = Conversation(built=built, max_new_tokens=config.max_new_tokens, temperature=config.temperature)
    del built
    if converses:
        return converse(conversation, painter, Path(config.draw_out))
    answer = conversation.ask(parts)
    _note(*conversation.notes)
    text = show(answer, quiet=painter is not None)
    cut = conversation.cut
    del conversation, answer  # room for what draws
    if painter is not None:
        print_and_draw(text, painter, Path(config.draw_out))
    if cut:
        _note(f"(cut off: {cut})")


def _standard_input() -> list[Part]:
    """What a pipe or a file says; nothing if there is none, or it is a terminal."""
    if sys.stdin is None or sys.stdin.isatty():
        return []
    try:
        text = sys.stdin.read().strip()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is no text: {error}") from error
    return [Part(kind=TEXT, content=text)] if text else []


def converse(conversation: Conversation, painter: Painter | None, drawings: Path) -> None:
    """Read lines from standard input and answer them, until /quit or the input's end."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() edits lines with it, and remembers them)
    print("Say something, or /help.")
    while True:
        try:
            line = input("> ")
            if line.rstrip() == "/quit":
                return
            if line.startswith("/"):
                _command(conversation, *line[1:].rstrip().partition(" ")[::2])
            elif line.strip() or conversation.attached:
                _turn(conversation, line.strip(), painter, drawings)
        except EOFError:
            return print()
        except KeyboardInterrupt:
            print()
        except ContextTooLong as error:
            _note(f"{error}: {'/reset begins a new one' if conversation.messages else 'ask for less at once'}")
        except (UserError, torch.OutOfMemoryError) as error:
            _note(str(error).splitlines()[0])


def _command(conversation: Conversation, name: str, file: str) -> None:
    modalities = conversation.built.adapters
    if name == "help":
        print(HELP.format(media=", ".join(f"/{name} FILE" for name in modalities)))
    elif name == "reset":
        conversation.reset()
    elif name in modalities:
        note = conversation.attach(medium(f"/{name}", name, file.strip().strip("'\""), modalities))
        _note(f"{conversation.attached[-1].member}: {note or 'attached'}")
    else:
        hint = nearest(f"/{name}", [f"/{known}" for known in (*modalities, *COMMANDS)])
        raise UserError(f"there is no /{name}; {hint} (/help says what each does)")


def _turn(conversation: Conversation, text: str, painter: Painter | None, drawings: Path) -> None:
    """Ask and show the answer."""
    answer = conversation.ask([Part(kind=TEXT, content=text)] if text else [])
    text = show(answer, quiet=painter is not None)
    if conversation.cut:
        _note(f"(cut off: {conversation.cut})")
    if painter is not None:
        print_and_draw(text, painter, drawings)


def show(answer: Generator[str, None, None], *, quiet: bool = False) -> str:
    """Print an answer as it comes, unless `quiet`, and return it. Interrupted, it ends the answer."""
    pieces = []
    with contextlib.closing(answer):
        for piece in answer:
            pieces.append(piece)
            if not quiet:
                print(piece, end="", flush=True)
    if not quiet:
        print()
    return "".join(pieces)


def _note(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr)


def _painter(config: ChatConfig) -> Painter | None:
    """What draws, if anything shall."""
    if not config.draw:
        return None
    return Painter(
        name=config.draw, device=device(), steps=config.draw_steps, size=config.draw_size, seed=config.draw_seed
    )


def print_and_draw(answer: str, painter: Painter | None, folder: Path) -> None:
    """Print the answer; with a painter the reply first, then a line for each picture that it asked for."""
    if painter is None:
        return print(answer)
    reply, prompts = split(answer)
    print(reply, flush=True)  # it stands, whatever comes of the drawing
    for path, prompt in zip(painter.draw(prompts, folder), prompts, strict=True):
        print(f"drawn: {path} ({prompt})")
