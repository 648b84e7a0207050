"""Answer a prompt with media, given in the order in which the LLM shall read them.

    python launch/chat.py checkpoint=runs/demo/finetune --image a.jpg --audio b.wav "What do you see and hear?"
    python launch/chat.py checkpoint=runs/demo/finetune "Which is louder," --audio a.wav "or" --audio b.wav "?"
    python launch/chat.py checkpoint=runs/mmit-lora draw=stabilityai/stable-diffusion-xl-base-1.0 "Draw me a cat."

`--NAME FILE` is a medium of modality NAME; everything else that is not a setting is text. With `draw`, what the
answer holds between <h> and </h> is drawn (docs/evaluation.md says how a model learns that). An LLM or encoder that was
moved since the training is named anew: model.llm.name=FOLDER, model.modalities.image.encoder=FOLDER.
"""

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from adapters import MODALITIES
from anymal import checkpoint
from anymal.command_line import field_docs, parse_args
from anymal.errors import BadSample, UserError
from anymal.generate import embed_prompt, generate
from anymal.sample import TEXT, Message, Part, Sample
from launch.build import build, device, process_as_found, run_program
from launch.draw import Painter, split


@dataclass(kw_only=True)
class ChatConfig:
    """A question."""

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
    the answer; empty draws nothing."""
    draw_out: str = "drawings"
    """Folder for the drawings."""
    draw_steps: int = 0
    """Denoising steps; 0 takes the pipeline's default."""
    draw_size: int = 0
    """Height and width in pixels; 0 takes the pipeline's default."""
    draw_seed: int = 0
    """Of the drawings."""


def split_arguments(arguments: list[str]) -> tuple[list[Part], list[str]]:
    """The command line → the message's parts in order, and the settings.

    Raises:
        UserError: An unknown modality, or a file that cannot be read.
    """
    parts, settings = [], []
    remaining = iter(arguments)
    names = field_docs(ChatConfig)
    for argument in remaining:
        if argument in ("-h", "--help") or ("=" in argument and re.split(r"[.=]", argument)[0] in names):
            settings.append(argument)
        elif argument.startswith("--"):
            name = argument[2:]
            if name not in MODALITIES:
                raise UserError(f"{argument}: there is no such modality; known are: {', '.join(MODALITIES)}")
            path = Path(next(remaining, ""))
            if not path.is_file():
                raise UserError(f"{argument} needs a file; {str(path)!r} is none")
            parts.append(Part(kind=name, content=path.read_bytes(), member=path.name))
        else:
            parts.append(Part(kind=TEXT, content=argument))
    return parts, settings


@process_as_found()
def main() -> None:
    """Read the command line and print the answer."""
    parts, settings = split_arguments(sys.argv[1:])
    config = parse_args(ChatConfig, __doc__, settings)
    if not parts:
        raise UserError("nothing was asked; give a text, and media as --image FILE, --audio FILE, ...")
    painter = _painter(config)
    folder = checkpoint.existing(config.checkpoint)
    overrides = [f"model.llm.bits={config.bits}"] if config.bits else []
    built = build(checkpoint.recipe(folder, overrides, config.model), device(), start=folder)
    asked = Sample(key="prompt", shard="command line", messages=[Message(role="user", parts=parts)])
    try:
        decoded = built.prepare.decode(asked)
        question = built.prepare.prompt.question(decoded)
    except BadSample as error:
        raise UserError(f"the prompt {error}") from error
    for medium in decoded.media():
        if medium.note:
            print(f"{medium.member}: {medium.note}", file=sys.stderr)
    prompt = embed_prompt(built.model, question)
    sampling = {"do_sample": True, "temperature": config.temperature} if config.temperature > 0 else {}
    (said,) = generate(built.model, built.tokenizer, [prompt], max_new_tokens=config.max_new_tokens, **sampling)
    del built, prompt  # room for what draws
    say(said.text, painter, Path(config.draw_out))
    if said.cut:
        print(f"(cut off: max_new_tokens is {config.max_new_tokens})", file=sys.stderr)


def _painter(config: ChatConfig) -> Painter | None:
    """What draws, if anything shall."""
    if not config.draw:
        return None
    return Painter(
        name=config.draw, place=device(), steps=config.draw_steps, size=config.draw_size, seed=config.draw_seed
    )


def say(answer: str, painter: Painter | None, folder: Path) -> None:
    """Print the answer; with a painter the reply first, then a line for each picture that it asked for."""
    if painter is None:
        return print(answer)
    reply, prompts = split(answer)
    print(reply, flush=True)  # it stands, whatever comes of the drawing
    for path, prompt in zip(painter.draw(prompts, folder), prompts, strict=True):
        print(f"drawn: {path} ({prompt})")


if __name__ == "__main__":
    run_program(main)
