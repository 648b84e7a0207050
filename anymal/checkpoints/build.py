"""From settings to the parts of a run: the one place where core and modalities meet. Every program here uses it."""

import atexit
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anymal import signals
from anymal.adapters import MODALITIES, build_adapters
from anymal.adapters.pretrained import license_of
from anymal.checkpoints import checksums, networks, precision
from anymal.checkpoints.checkpoint import load_projectors, recipe, start_at, with_lora
from anymal.checkpoints.networks import Start
from anymal.config import settings
from anymal.config.schema import Config
from anymal.data import manifest, pool, shards
from anymal.data.prompt import Prepare, prepare
from anymal.errors import UserError
from anymal.modality import Adapter
from anymal.model.llm import bars_on_terminals_only, load_llm, on_gpu
from anymal.model.multimodal import AnyMAL
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
    """A `prepare` for `anymal.data.stream.samples_once` that leaves the media encoded."""
    return sample


def device() -> torch.device:
    """The GPU, if there is one."""
    return torch.device("cuda" if on_gpu() else "cpu")


@bars_on_terminals_only()
def build(
    config: Config,
    place: torch.device,
    *,
    start: Path | Start | None = None,
    partly: bool = False,
    train: Sequence[str] = (),
) -> Built:
    """Load the LLM and the encoders, make the projectors, and load what a checkpoint holds.

    Args:
        config: The settings.
        place: The device that everything goes to.
        start: A checkpoint whose projectors and LoRA are loaded, and encoders and LLM if they were trained; or several.
        partly: Whether projectors of some modalities may be missing there.
        train: What is about to be trained, as in the recipe: of encoders and LLM, it is held in float32.
    """
    torch.manual_seed(config.run.seed)  # fresh projectors and LoRA are the same on every rank
    fresh = start is None
    start = start_at(start) if isinstance(start, Path) else start or Start(modalities={}, llm=None)
    _say_other_precisions(config, start)
    llm, tokenizer = load_llm(networks.llm_of(config, start.llm), place, learns="llm" in train)
    config.model.llm.license = config.model.llm.license or license_of(config.model.llm.name)
    llm = with_lora(llm, config, start.llm)
    table = llm.get_input_embeddings().weight
    std, layers = table.float().std().item(), llm.config.get_text_config().num_hidden_layers
    modalities = networks.encoders_of(config, start.modalities)
    adapters = build_adapters(modalities, table.shape[1], std, llm_layers=layers)
    networks.load_bare({name: adapter.encoder for name, adapter in adapters.items()}, start.modalities)
    model = AnyMAL(llm, adapters, train, low_precision=config.model.llm.bits != 32)
    if not fresh:
        load_projectors(model, adapters, config, start.modalities, partly=partly)
    return Built(
        model=model,
        adapters=adapters,
        tokenizer=tokenizer,
        prepare=prepare(tokenizer, adapters, config.prompt, config.data.max_tokens),
    )


def _say_other_precisions(config: Config, start: Start) -> None:
    """Name the checkpoints whose projectors were trained beside the LLM at other bits than it is loaded at."""
    if int(os.environ.get("RANK", 0)):
        return
    for folder in dict.fromkeys(start.modalities.values()):
        if note := precision.note(folder, recipe(folder).model.llm.bits, config.model.llm.bits):
            print(note, file=sys.stderr)


@contextmanager
def process_as_found() -> Iterator[None]:
    """Around a program's `main`, for callers whose process goes on, to another `main` perhaps: a notebook, a service.

    Signal handlers, torch's random numbers and what is noted of recipes are as before at the end, workers are gone, and
    what is known of files is forgotten, before and after: they may be others by the next call.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with ExitStack() as at_end:
        for restored in (signals.handlers_restored(), settings.notes_of_its_own(), torch.random.fork_rng(devices)):
            at_end.enter_context(restored)
        for forget in (checksums.forget, shards.note_unwritten.cache_clear, manifest.forget):
            forget()
            at_end.callback(forget)
        at_end.enter_context(pool.none_left())
        yield


def run_program(main: Callable[[], int | None]) -> None:
    """Run a program's `main`; what the user can mend is one line on stderr, without a traceback."""
    try:
        with warnings.catch_warnings():
            for theirs in OTHERS_FUTURE_WARNINGS:
                warnings.filterwarnings("ignore", message=theirs, category=FutureWarning)
            sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)


@atexit.register
def _leave_processes() -> None:
    """End gloo's threads. Left to the interpreter's end, they now and then abort the process, its exit code lost.

    NCCL's are left alone: where another rank is gone, to end them could wait for ever.
    """
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.destroy_process_group()
