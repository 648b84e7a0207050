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
        training/optimizer.safetensors         AdamW's moments, independent of the number of ranks; NAME.master, the
                                               float32 weights of a trained LLM that llm/ has in bfloat16
    RUN/checkpoints/latest                     a link to the newest

An LLM and encoders that were never trained are not in it, but named in the recipe. Nothing in it is a pickle.
`anymal.networks` is about those that are.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from anymal import networks, settings
from anymal.config import Config
from anymal.errors import UserError
from anymal.features import weights_digest
from anymal.llm import add_lora, load_lora
from anymal.modality import Adapter, Encoder
from anymal.model import AnyMAL
from anymal.networks import LLM, Start

LATEST = "latest"
_DIGESTS: WeakKeyDictionary[Encoder, str] = WeakKeyDictionary()


@dataclass(kw_only=True)
class TrainingState:
    """What a run needs, besides weights, to go on exactly where it stopped."""

    step: int = 0
    """Optimizer steps done."""
    bookmark: dict | None = None
    """The stream's place after the last sample trained on, as `anymal.stream.merge_bookmarks` gives it."""
    wandb_id: str | None = None
    """W&B's run id, so that a resumed run continues the same curve."""
    moments: dict[str, Tensor] = field(default_factory=dict)
    """AdamW's moments, as `anymal.engine.full_moments` gives them."""


def adapter_config(adapter: Adapter, config: Config) -> dict[str, Any]:
    """What a projector fits: modality, encoder, shapes, LLM."""
    name = adapter.modality.name
    return {
        "modality": name,
        "placeholder": adapter.modality.placeholder,
        **asdict(config.model.modalities[name]),
        "encoder_width": adapter.encoder.width,
        "encoder_tokens": adapter.encoder.tokens,
        "llm": config.model.llm.name,
    }


def save(
    model: AnyMAL,
    parameters: dict[str, Tensor],
    state: TrainingState,
    config: Config,
    adapters: dict[str, Adapter],
    tokenizer: Any,
    start: Start | None = None,
) -> Path:
    """Write a checkpoint of the run and move ``latest`` to it; keep the newest ``run.keep``. Rank 0 only.

    Args:
        model: For its structure; its weights are not read (under ZeRO they are sharded).
        parameters: Those of projectors, LoRA and what else learns by their names in `model`, whole.
        state: Where the run stands.
        config: The resolved settings.
        adapters: As the model was made from.
        tokenizer: With the placeholder tokens.
        start: What the run started from, if anything.
    """
    folder = checkpoints(config) / f"step-{state.step:08d}"
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    settings.save(config, temporary / "recipe.yaml")
    newest = _newest(config)
    before = start_at(newest) if newest else start
    networks.save(model, parameters, config, adapters, tokenizer, temporary, before)
    for name, adapter in adapters.items():
        place = temporary / "adapters" / name
        place.mkdir(parents=True)
        described = adapter_config(adapter, config)
        if name not in model.trained_encoders:
            described["encoder_weights"] = _digest(adapter.encoder)
        if not (temporary / LLM).is_dir():
            described["llm_weights"] = getattr(model.llm, "weights_digest", None)
        (place / "adapter_config.json").write_text(json.dumps(described, indent=2))
        save_file(_below(parameters, f"projectors.{name}."), place / "model.safetensors")
    _save_lora(model, parameters, temporary / "lora")
    tokenizer.save_pretrained(temporary / "tokenizer")
    training = temporary / "training"
    training.mkdir()
    save_file(state.moments | networks.masters(parameters, config), training / "optimizer.safetensors")
    described = {"version": 1, "step": state.step, "bookmark": state.bookmark, "wandb_id": state.wandb_id}
    (training / "state.json").write_text(json.dumps(described))
    (temporary / "README.md").write_text(model_card(config, adapters, state.step))
    _publish(temporary, folder)
    _prune(folder.parent, config.run.keep)
    return folder


def _below(parameters: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): p.contiguous() for n, p in parameters.items() if n.startswith(prefix)}


def _save_lora(model: AnyMAL, parameters: dict[str, Tensor], place: Path) -> None:
    lora = {name: p for name, p in _below(parameters, "llm.").items() if "lora_" in name}
    if not lora:
        return
    from peft import get_peft_model_state_dict

    place.mkdir()
    weights = get_peft_model_state_dict(model.llm, state_dict=lora, save_embedding_layers=False)  # "auto" asks the hub
    save_file(weights, place / "adapter_model.safetensors")
    model.llm.peft_config["default"].save_pretrained(place)


def _publish(temporary: Path, folder: Path) -> None:
    """Flush, rename into place, then move ``latest``: whoever reads meanwhile finds the old one or the new one."""
    for path in temporary.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    aside = folder.with_name(f".tmp-{folder.name}-old")
    if folder.exists():  # a run that went on from an older checkpoint comes by here again
        folder.rename(aside)
    temporary.rename(folder)
    link = folder.with_name(f".tmp-{LATEST}-{os.getpid()}")
    link.symlink_to(folder.name)
    link.replace(folder.with_name(LATEST))
    place = os.open(folder.parent, os.O_RDONLY)
    os.fsync(place)
    os.close(place)
    shutil.rmtree(aside, ignore_errors=True)


def _prune(place: Path, keep: int) -> None:
    """Drop the oldest checkpoints (by time: a run may go on from an early step), and what a killed process left."""
    latest = (place / LATEST).resolve()
    old = sorted(place.glob("step-*"), key=lambda folder: (folder / "recipe.yaml").stat().st_mtime_ns)[:-keep]
    for folder in [*old, *place.glob(".tmp-step-*")]:
        if folder.resolve() != latest:
            shutil.rmtree(folder, ignore_errors=True)


def checkpoints(config: Config) -> Path:
    """The folder that holds a run's checkpoints."""
    return Path(config.run.dir) / "checkpoints"


def find_resume(config: Config) -> Path | None:
    """The checkpoint that the run goes on from, or None for a fresh start.

    Raises:
        UserError: ``run.resume`` names no checkpoint, or it is ``never`` and the folder already holds one.
    """
    latest = _newest(config)
    if config.run.resume == "auto":
        return latest
    if config.run.resume == "never":
        if latest:
            raise UserError(f"{config.run.dir} already holds checkpoints; choose another run.dir, or run.resume=auto")
        return None
    return existing(config.run.resume)


def _newest(config: Config) -> Path | None:
    latest = checkpoints(config) / LATEST
    if not latest.exists():  # killed between two renames, or removed by hand: the newest whole one
        latest = max(checkpoints(config).glob("step-*"), default=None)
    return latest.resolve() if latest else None


def is_done(config: Config) -> bool:
    """Whether the run, as its folder stands, has all its steps behind it."""
    newest = _newest(config) if config.run.resume == "auto" else None
    if newest is None or not (newest / "training" / "state.json").is_file():
        return False
    return json.loads((newest / "training" / "state.json").read_text())["step"] >= config.optim.steps


def existing(place: str | Path) -> Path:
    """A checkpoint folder, given itself, ``latest``, or the run folder that holds it.

    Raises:
        UserError: There is none.
    """
    place = Path(place)
    for folder in (place, place / "checkpoints" / LATEST, place / LATEST):
        if (folder / "recipe.yaml").is_file() and (folder / "adapters").is_dir():
            return folder.resolve()
    raise UserError(f"{place} holds no checkpoint (a folder with recipe.yaml and adapters/)")


def recipe(folder: Path, overrides: Sequence[str] = (), model: Mapping[str, Any] | None = None) -> Config:
    """The settings that a checkpoint was made with.

    Args:
        folder: The checkpoint.
        overrides: Such as ``model.llm.bits=32``.
        model: Nested settings that beat those below its ``model``: ``{"llm": {"name": FOLDER}}`` for an LLM that moved.
    """
    part = ("a setting for the checkpoint", {"model": dict(model)}) if model else None
    return settings.load(Config, folder / "recipe.yaml", overrides, part=part)


def start_at(folder: Path) -> Start:
    """A run that goes on from one checkpoint, with all that it holds."""
    return Start(modalities=dict.fromkeys(modalities_in(folder), folder), llm=folder)


def with_lora(llm: Any, config: Config, start: Path | None) -> Any:
    """The LLM with the LoRA of the checkpoint it starts from, or a fresh one if `train` asks for it, or as it is."""
    if start is not None and (start / "lora").is_dir():
        return load_lora(llm, start / "lora", config.model.lora)
    return add_lora(llm, config.model.lora) if "lora" in config.train else llm


def load_projectors(
    model: AnyMAL,
    adapters: dict[str, Adapter],
    config: Config,
    starts: Mapping[str, Path],
    *,
    partly: bool = False,
) -> None:
    """Load the projectors of a checkpoint, or of several, into the model.

    Args:
        model: What they go into.
        adapters: As the model was made from.
        config: The recipe of the model.
        starts: By modality, the checkpoint that has its projector.
        partly: Whether some of the model's modalities may lack one (they keep their fresh weights), and may be of a
            stage with tiles where this one has none, or the other way round.

    Raises:
        UserError: A modality is missing, a file is damaged, a projector does not fit, or was trained on an encoder or
            LLM of other weights. Names file and what differs.
    """
    for name in adapters:
        folder = starts.get(name)
        path = folder / "adapters" / name / "model.safetensors" if folder else None
        if path is None or not path.is_file():
            if partly:
                continue
            folders = " and ".join(map(str, dict.fromkeys(starts.values()))) or "the checkpoint"
            raise UserError(f"{folders}: no projector for {name}, but for {', '.join(starts) or 'none'}")
        try:
            weights = load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is damaged: {error}; use an older checkpoint") from error
        projector = model.projectors[name]
        if partly and ("skip" in weights) != hasattr(projector, "skip"):
            weights.pop("skip", None)
            if hasattr(projector, "skip"):  # the embedding of skipped views keeps its fresh weights
                weights["skip"] = projector.skip.detach()
        described = description(path.with_name("adapter_config.json"))
        wanted = {key: tuple(p.shape) for key, p in projector.state_dict().items()}
        given = {key: tuple(p.shape) for key, p in weights.items()}
        if wanted != given:
            raise UserError(f"{path} does not fit {_misfit(name, config, described, wanted, given)}")
        projector.load_state_dict(weights)
        _require_same_weights(adapters[name], model.llm, described, path.with_name("adapter_config.json"))


Shapes = dict[str, tuple[int, ...]]


def _misfit(name: str, config: Config, described: Mapping[str, Any], wanted: Shapes, given: Shapes) -> str:
    """By what a projector differs from the model's: its kind, its other settings, or else a tensor."""
    setting = f"model.modalities.{name}.projector"
    here, there = asdict(config.model.modalities[name].projector), described.get("projector")
    differing = [key for key in here if isinstance(there, dict) and key in there and there[key] != here[key]]
    if "kind" in differing:
        differing = ["kind"]  # the others follow from it
    if differing:
        listed = " ".join(f"{setting}.{key}={there[key]}" for key in differing)
        is_now = ", ".join(f"{key} {here[key]}" for key in differing)
        return f"{setting}, which has {is_now} here: it was trained with {listed}; set that, or start without it"
    first = next(key for key in sorted({*wanted, *given}) if wanted.get(key) != given.get(key))
    return (
        f"{setting}: {first} is {given.get(first)} there and {wanted.get(first)} in this model; is its encoder another?"
    )


def _digest(encoder: Encoder) -> str:
    """Of the weights of an encoder that does not change, or not yet: hashed once."""
    if encoder not in _DIGESTS:
        _DIGESTS[encoder] = weights_digest(encoder)
    return _DIGESTS[encoder]


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


def _require_same_weights(adapter: Adapter, llm: Any, described: Mapping[str, Any], path: Path) -> None:
    """A folder may hold other weights by now than the projector was trained on: those of a stage trained further."""
    name = adapter.modality.name
    held = [
        ("encoder_weights", "an encoder", f"model.modalities.{name}.encoder", lambda: _digest(adapter.encoder)),
        ("llm_weights", "an LLM", "model.llm.name", lambda: llm.weights_digest),
    ]
    for key, what, setting, now in held:
        digest = described.get(key)  # not there if it learnt, too: the checkpoint holds it then
        if digest is not None and digest != now():
            raise UserError(
                f"{path.parent}: this projector was trained on {what} with other weights than {setting} has now: name "
                "the one it was trained on, or train the projector again (or, to join them all the same, take "
                f"{key} out of {path.name})"
            )


def modalities_in(folder: Path) -> list[str]:
    """The modalities of which a checkpoint holds projectors."""
    return sorted(path.name for path in (folder / "adapters").iterdir())


def load_training_state(folder: Path) -> TrainingState:
    """Read step, bookmark, W&B id and the optimizer's moments back.

    Raises:
        UserError: The checkpoint was stripped of them, or they are damaged.
    """
    place = folder / "training"
    try:
        described = json.loads((place / "state.json").read_text())
        moments = load_file(place / "optimizer.safetensors")
        return TrainingState(
            step=described["step"], bookmark=described["bookmark"], wandb_id=described["wandb_id"], moments=moments
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"{place} cannot be read ({error}); to start a new run from these weights set model.checkpoint={folder}"
        ) from error


def model_card(config: Config, adapters: dict[str, Adapter], step: int) -> str:
    """A model card in Markdown: what it is, what it was made from, and under which licences."""
    llm = config.model.llm
    rows = [f"| LLM | {llm.name} | {llm.license or 'unknown'} |"]
    for name, adapter in adapters.items():
        rows.append(f"| {name} encoder | {config.model.modalities[name].encoder} | {adapter.encoder.license} |")
    datasets = ", ".join(config.data.datasets) or str(config.data.shards)
    rows.append(f"| data | {datasets} | {config.run.data_license or 'not stated (run.data_license)'} |")
    listed = "\n".join(rows)
    return f"""---
base_model: {llm.name}
library_name: anymal
---
# AnyMAL adapters for {llm.name}

Projectors for {", ".join(adapters)}, trained for {step} steps {_beside(config)}
(trained: {", ".join(config.train)}).

Beside the same LLM at another precision they may answer differently, or not at all: `precision.json`, if it is there,
says what was measured, and `launch/evaluate.py bits=[4,16,32]` measures it.

| part | source | licence |
|---|---|---|
{listed}

Use: `python launch/chat.py checkpoint=THIS_FOLDER "prompt"`. All settings are in `recipe.yaml`.
"""


def _beside(config: Config) -> str:
    if networks.llm_learns(config):
        return f"together with the LLM in `llm/` ({config.model.llm.bits} bits)"
    return f"with the LLM held frozen at {config.model.llm.bits} bits"
