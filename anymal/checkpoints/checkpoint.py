"""What was trained, where the stream stands, and the resolved recipe: written whole or not at all.

    RUN/checkpoints/step-00000100/
        README.md                              model card: what it is, what it was made from, licences
        recipe.yaml                            every setting of the run
        adapters/MODALITY/adapter_config.json  what the projector fits
        adapters/MODALITY/model.safetensors    the projector
        lora/                                  PEFT's own layout, if there is a LoRA
        encoders/MODALITY/                     an encoder that was trained: a folder for model.modalities.*.encoder
        llm/                                   an LLM that was trained, as transformers saves it, tokenizer included
        tokenizer/                             the LLM's tokenizer with the placeholder tokens
        training/state.json                    step, bookmark, W&B run id
        training/optimizer.safetensors         AdamW's moments; NAME.master, float32 weights that llm/ has in bfloat16
        manifest.json                          size and SHA-256 of every file, verified before anything is loaded
    RUN/checkpoints/latest                     a link to the newest

An LLM and encoders that were never trained are not in it, but named in the recipe. Nothing in it is a pickle.
`anymal.checkpoints.networks` is about those that are, `anymal.checkpoints.state` about ``training/``,
`anymal.checkpoints.retention` about the folder, `anymal.checkpoints.checksums` about the manifest.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from anymal.checkpoints import checksums, networks, retention, state
from anymal.checkpoints.built import Built
from anymal.checkpoints.model_card import model_card
from anymal.checkpoints.networks import LLM, Start, below, encoder_digest
from anymal.checkpoints.state import TrainingState
from anymal.config import settings
from anymal.config.schema import Config, RunConfig
from anymal.errors import UserError
from anymal.files import writing
from anymal.modality import Adapter
from anymal.model.lora import is_lora

LATEST = retention.LATEST
_log = logging.getLogger(__name__)


def adapter_config(adapter: Adapter, config: Config) -> dict[str, Any]:
    """What a projector fits: modality, encoder, shapes, LLM."""
    name, stated = adapter.modality.name, settings.public(config)["model"]
    return {
        "modality": name,
        "placeholder": adapter.modality.placeholder,
        **stated["modalities"][name],
        "encoder_width": adapter.encoder.width,
        "encoder_tokens": adapter.encoder.tokens,
        "llm": stated["llm"]["name"],
    }


def save(
    built: Built,
    parameters: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    now: TrainingState,
    config: Config,
    before: Start | None = None,
) -> Path:
    """Write a checkpoint of the run and move ``latest`` to it; keep the newest ``run.keep``. Rank 0 only.

    Args:
        built: The model, for its structure (its weights are not read: under ZeRO they are sharded), and what belongs to
            it.
        parameters: Those of projectors, LoRA and what else learns by their names in the model, whole.
        moments: AdamW's, as `anymal.training.optimizer_state.full_moments` gives them.
        now: Where the run stands.
        config: The resolved settings.
        before: The checkpoint that was saved before it, or what the run went on or started from, if any: networks that
            do not learn here are taken from there.

    Raises:
        UserError: The disk is full, or cannot be written to. The older checkpoints are as they were.
    """
    folder = checkpoints(config.run) / f"step-{now.step:08d}"
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    room = f"make room ({config.run.keep} checkpoints are kept, run.keep, and one more while it is written)"
    with writing(folder, f"{room}, and start the same command again: it goes on from the last checkpoint"):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            networks.save(built, parameters, config, temporary, before)
            _save_adapters(built, parameters, config, temporary)
            _save_lora(built, parameters, temporary / "lora")
            settings.save(config, temporary / "recipe.yaml")
            (temporary / "README.md").write_text(model_card(config, built.adapters, now.step, built.llm_license))
            built.tokenizer.save_pretrained(temporary / "tokenizer")
            masters = networks.masters(parameters, bits=config.model.llm.bits, train=config.train)
            state.save_training(temporary, now, {**moments, **masters})
            checksums.write(temporary)
            retention.publish(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    retention.prune(folder.parent, config.run.keep)
    return folder


def _save_adapters(built: Built, parameters: Mapping[str, Tensor], config: Config, checkpoint: Path) -> None:
    """The projectors, and what each fits; whole networks are there already."""
    for name, adapter in built.adapters.items():
        folder = checkpoint / "adapters" / name
        folder.mkdir(parents=True)
        described = adapter_config(adapter, config)
        if name not in built.model.trained_encoders:
            described["encoder_weights"] = encoder_digest(adapter.encoder)
        if not (checkpoint / LLM).is_dir():
            described["llm_weights"] = getattr(built.model.llm, "weights_digest", None)
        (folder / "adapter_config.json").write_text(json.dumps(described, indent=2))
        save_file(below(parameters, f"projectors.{name}."), folder / "model.safetensors")


def _save_lora(built: Built, parameters: Mapping[str, Tensor], folder: Path) -> None:
    lora = {name: tensor for name, tensor in below(parameters, "llm.").items() if is_lora(name)}
    if not lora:
        return
    from peft import PeftModel, get_peft_model_state_dict

    llm = built.model.llm
    assert isinstance(llm, PeftModel)
    folder.mkdir()
    weights = get_peft_model_state_dict(llm, state_dict=lora, save_embedding_layers=False)  # "auto" asks the hub
    save_file(weights, folder / "adapter_model.safetensors")
    llm.peft_config["default"].save_pretrained(str(folder))


def checkpoints(run: RunConfig) -> Path:
    """The folder that holds a run's checkpoints."""
    return Path(run.dir) / "checkpoints"


def find_resume(run: RunConfig) -> Path | None:
    """The checkpoint that the run goes on from, verified, or None for a fresh start.

    Raises:
        UserError: ``run.resume`` names no checkpoint or a damaged one, or it is ``never`` and the folder already holds
            one, or it is ``auto`` and all are damaged.
    """
    if run.resume not in ("auto", "never"):
        return existing(run.resume, training=True)
    folder = checkpoints(run)
    latest = retention.newest(folder)
    if latest is None:
        return None
    if run.resume == "never":
        raise UserError(f"{run.dir} already holds checkpoints; choose another run.dir, or run.resume=auto")
    damaged = checksums.damage(latest, training=True)
    if not damaged:
        return latest
    good = _newest_good(latest, training=True)
    if good is None:
        raise UserError(
            f"{damaged}; no other checkpoint in {folder} can be gone on from. Put the file back, or remove {folder} to "
            "begin anew"
        )
    _log.warning("%s; going on from %s, the newest checkpoint that verifies", damaged, good)
    return good


def _newest_good(damaged: Path, *, training: bool) -> Path | None:
    """The newest checkpoint beside a damaged one that verifies, with its state of training if that is asked for."""
    others = [folder for folder in retention.whole(damaged.parent) if folder != damaged]
    if training:
        others = [folder for folder in others if (folder / checksums.TRAINING).is_dir()]
    return next((folder for folder in others if not checksums.damage(folder, training=training)), None)


def is_done(run: RunConfig, steps: int) -> bool:
    """Whether the run, as its folder stands, has so many steps behind it."""
    newest = retention.newest(checkpoints(run)) if run.resume == "auto" else None
    try:
        return newest is not None and state.load_training_state(newest).step >= steps
    except (UserError, TypeError):  # stripped, or damaged: `find_resume` knows what to do
        return False


def existing(named: str | Path, *, training: bool = False) -> Path:
    """A checkpoint folder, given itself, ``latest``, or the run folder that holds it; verified.

    Args:
        named: What a user named.
        training: Whether the state of training is wanted, too: it is most of the bytes.

    Raises:
        UserError: There is none, or a file of it is damaged. Names the file, and the newest one that is whole.
    """
    named = Path(named)
    folders = (named if retention.is_whole(named) else None, *map(retention.newest, (named / "checkpoints", named)))
    folder = next((folder.resolve() for folder in folders if folder is not None), None)
    if folder is None:
        raise UserError(f"{named} holds no checkpoint (a folder with recipe.yaml and adapters/)")
    damaged = checksums.damage(folder, training=training)
    if damaged:
        good = _newest_good(folder, training=training)
        other = f"the newest beside it that verifies is {good}" if good else "use another checkpoint"
        raise UserError(
            f"{damaged}; {other} (if it was changed on purpose, take its entry out of {folder / checksums.MANIFEST})"
        )
    return folder


def recipe(folder: Path, overrides: Sequence[str] = (), model: Mapping[str, Any] | None = None) -> Config:
    """The settings that a checkpoint was made with.

    Args:
        folder: The checkpoint.
        overrides: Such as ``model.llm.bits=32``.
        model: Nested settings that beat those below its ``model``: ``{"llm": {"name": FOLDER}}`` for an LLM that moved.
    """
    part = ("a setting for the checkpoint", {"model": dict(model)}) if model else None
    return settings.load(Config, folder / "recipe.yaml", overrides, part=part, keep_unset=True)


def start_at(folder: Path) -> Start:
    """A run that goes on from one checkpoint, with all that it holds."""
    return Start(modalities=dict.fromkeys(modalities_in(folder), folder), llm=folder)


def modalities_in(folder: Path) -> list[str]:
    """The modalities of which a checkpoint holds projectors."""
    return sorted(path.name for path in (folder / "adapters").iterdir())


def description(path: Path) -> dict[str, Any]:
    """What an adapter_config.json says that a projector fits.

    Raises:
        UserError: It is missing or damaged.
    """
    try:
        described = json.loads(path.read_text())
        if not isinstance(described, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged: {error}; use an older checkpoint") from error
    return described
