"""From settings to the parts of a run: the one place where core and modalities meet. Every program here uses it."""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapters import MODALITIES, build_adapters
from adapters.pretrained import license_of
from anymal import networks, precision
from anymal.checkpoint import load_projectors, recipe, with_lora
from anymal.config import Config
from anymal.errors import UserError
from anymal.llm import load_llm, on_gpu
from anymal.modality import Adapter
from anymal.model import AnyMAL
from anymal.prompt import Prepare, prepare
from anymal.sample import Sample

OTHERS_FUTURE_WARNINGS = (
    "`is_gradient_checkpointing` is deprecated",  # PEFT 0.21, of transformers
    "`torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",  # DeepSpeed 0.19, of torch
)
"""Python shows these to everybody, and no user of a program can mend them. Any others are errors in the tests."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """A model and what belongs to it."""

    model: AnyMAL
    """LLM, encoders, projectors, on the device."""
    adapters: dict[str, Adapter]
    """What the model was made from, by modality."""
    tokenizer: Any
    """The LLM's, with the placeholder tokens."""
    prepare: Prepare
    """Decoding and prompt, for the stream's workers."""


def suffixes() -> dict[str, str]:
    """Which modality a shard member holds, by its suffix."""
    return {suffix: name for name, modality in MODALITIES.items() for suffix in modality.suffixes}


def unchanged(sample: Sample) -> Sample:
    """A `prepare` for `anymal.stream.samples_once` that leaves the media encoded."""
    return sample


def device() -> torch.device:
    """The GPU, if there is one."""
    return torch.device("cuda" if on_gpu() else "cpu")


def build(
    config: Config,
    place: torch.device,
    *,
    start: Path | None = None,
    partly: bool = False,
    train: Sequence[str] = (),
) -> Built:
    """Load the LLM and the encoders, make the projectors, and load what a checkpoint holds.

    Args:
        config: The settings.
        place: The device that everything goes to.
        start: A checkpoint whose projectors and LoRA are loaded, and encoders and LLM if they were trained.
        partly: Whether `start` may lack projectors of some modalities.
        train: What is about to be trained, as in the recipe: of encoders and LLM, it is held in float32.
    """
    config.model.llm.license = config.model.llm.license or license_of(config.model.llm.name)
    if start is not None and int(os.environ.get("RANK", 0)) == 0:
        note = precision.note(start, recipe(start).model.llm.bits, config.model.llm.bits)
        print(note, end="\n" if note else "", file=sys.stderr)
    torch.manual_seed(config.run.seed)  # fresh projectors and LoRA are the same on every rank
    llm, tokenizer = load_llm(networks.llm_of(config, start), place, learns="llm" in train)
    llm = with_lora(llm, config, start)
    table = llm.get_input_embeddings().weight
    std, layers = table.float().std().item(), llm.config.get_text_config().num_hidden_layers
    modalities = networks.encoders_of(config, start)
    adapters = build_adapters(modalities, table.shape[1], std, llm_layers=layers)
    networks.load_bare({name: adapter.encoder for name, adapter in adapters.items()}, start)
    model = AnyMAL(llm, adapters, train, low_precision=config.model.llm.bits != 32)
    if start is not None:
        load_projectors(model, adapters, start, partly=partly)
    return Built(
        model=model,
        adapters=adapters,
        tokenizer=tokenizer,
        prepare=prepare(tokenizer, adapters, config.prompt, config.data.max_tokens),
    )


def run_program(main: Callable[[], int | None]) -> None:
    """Run a program's `main`; what the user can mend is one line on stderr, without a traceback."""
    for theirs in OTHERS_FUTURE_WARNINGS:
        warnings.filterwarnings("ignore", message=theirs, category=FutureWarning)
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
