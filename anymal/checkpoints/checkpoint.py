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
        manifest.json                          size and SHA-256 of every file, verified before anything is loaded
    RUN/checkpoints/latest                     a link to the newest

An LLM and encoders that were never trained are not in it, but named in the recipe. Nothing in it is a pickle.
`anymal.checkpoints.networks` is about those that are, `anymal.checkpoints.retention` about the folder,
`anymal.checkpoints.checksums` about the manifest.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from anymal.checkpoints import checksums, networks, retention
from anymal.checkpoints.networks import LLM, Start
from anymal.config import settings
from anymal.config.schema import Config
from anymal.data.feature_codec import weights_digest
from anymal.errors import UserError
from anymal.files import writing
from anymal.modality import Adapter, Encoder
from anymal.model.llm import add_lora, load_lora
from anymal.model.multimodal import AnyMAL

LATEST = retention.LATEST
OPTIMIZER = "optimizer.safetensors"
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_OLDEST = ("step", "bookmark", "wandb_id")
_DESCRIBED = (*_OLDEST, "world", "refused")
"""Fields of `TrainingState` in state.json; an older file may lack all but the oldest."""
_log = logging.getLogger(__name__)
_DIGESTS: WeakKeyDictionary[Encoder, str] = WeakKeyDictionary()


@dataclass(kw_only=True)
class TrainingState:
    """What a run needs, besides weights and the optimizer's moments, to go on exactly where it stopped."""

    step: int = 0
    """Optimizer steps done."""
    bookmark: dict | None = None
    """The stream's place after the last sample trained on, as `anymal.data.stream.merge_bookmarks` gives it."""
    refused: list[list] = field(default_factory=list)
    """The samples that the stream passes over since their loss was not finite, as `Stream.refused`."""
    wandb_id: str | None = None
    """W&B's run id, so that a resumed run continues the same curve."""
    world: int = 0
    """Processes that trained; 0 in older checkpoints, which do not say."""


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
    model: AnyMAL,
    parameters: dict[str, Tensor],
    moments: dict[str, Tensor],
    state: TrainingState,
    config: Config,
    adapters: dict[str, Adapter],
    tokenizer: Any,
    before: Start | None = None,
) -> Path:
    """Write a checkpoint of the run and move ``latest`` to it; keep the newest ``run.keep``. Rank 0 only.

    Args:
        model: For its structure; its weights are not read (under ZeRO they are sharded).
        parameters: Those of projectors, LoRA and what else learns by their names in `model`, whole.
        moments: AdamW's, as `anymal.training.engine.full_moments` gives them.
        state: Where the run stands.
        config: The resolved settings.
        adapters: As the model was made from.
        tokenizer: With the placeholder tokens.
        before: The checkpoint that was saved before it, or what the run went on or started from, if any: networks that
            do not learn here are taken from there.

    Raises:
        UserError: The disk is full, or cannot be written to. The older checkpoints are as they were.
    """
    folder = checkpoints(config) / f"step-{state.step:08d}"
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    room = f"make room ({config.run.keep} checkpoints are kept, run.keep, and one more while it is written)"
    with writing(folder, f"{room}, and start the same command again: it goes on from the last checkpoint"):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            networks.save(model, parameters, config, adapters, tokenizer, temporary, before)
            _write(temporary, model, parameters, state, config, adapters)
            optimizer = moments | networks.masters(parameters, config)
            save_file(optimizer, temporary / checksums.TRAINING / OPTIMIZER)
            tokenizer.save_pretrained(temporary / "tokenizer")
            checksums.write(temporary)
            retention.publish(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    retention.prune(folder.parent, config.run.keep)
    return folder


def _write(
    place: Path,
    model: AnyMAL,
    parameters: dict[str, Tensor],
    state: TrainingState,
    config: Config,
    adapters: dict[str, Adapter],
) -> None:
    """All of a checkpoint but the tokenizer, the optimizer's file, and whole networks, which are there already."""
    settings.save(config, place / "recipe.yaml")
    for name, adapter in adapters.items():
        folder = place / "adapters" / name
        folder.mkdir(parents=True)
        described = adapter_config(adapter, config)
        if name not in model.trained_encoders:
            described["encoder_weights"] = _digest(adapter.encoder)
        if not (place / LLM).is_dir():
            described["llm_weights"] = getattr(model.llm, "weights_digest", None)
        (folder / "adapter_config.json").write_text(json.dumps(described, indent=2))
        save_file(_below(parameters, f"projectors.{name}."), folder / "model.safetensors")
    _save_lora(model, parameters, place / "lora")
    training = place / checksums.TRAINING
    training.mkdir()
    described = {name: getattr(state, name) for name in _DESCRIBED}
    (training / "state.json").write_text(json.dumps({"version": 1, **described}))
    (place / "README.md").write_text(model_card(config, adapters, state.step))


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


def checkpoints(config: Config) -> Path:
    """The folder that holds a run's checkpoints."""
    return Path(config.run.dir) / "checkpoints"


def find_resume(config: Config) -> Path | None:
    """The checkpoint that the run goes on from, verified, or None for a fresh start.

    Raises:
        UserError: ``run.resume`` names no checkpoint or a damaged one, or it is ``never`` and the folder already holds
            one, or it is ``auto`` and all are damaged.
    """
    if config.run.resume not in ("auto", "never"):
        return existing(config.run.resume, training=True)
    place = checkpoints(config)
    latest = retention.newest(place)
    if latest is None:
        return None
    if config.run.resume == "never":
        raise UserError(f"{config.run.dir} already holds checkpoints; choose another run.dir, or run.resume=auto")
    damaged = checksums.damage(latest, training=True)
    if not damaged:
        return latest
    good = _newest_good(latest, training=True)
    if good is None:
        raise UserError(
            f"{damaged}; no other checkpoint in {place} can be gone on from. Put the file back, or remove {place} to "
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


def is_done(config: Config) -> bool:
    """Whether the run, as its folder stands, has all its steps behind it."""
    newest = retention.newest(checkpoints(config)) if config.run.resume == "auto" else None
    if newest is None:
        return False
    try:
        return json.loads((newest / checksums.TRAINING / "state.json").read_text())["step"] >= config.optim.steps
    except (OSError, ValueError, KeyError, TypeError):  # stripped, or damaged: `find_resume` knows what to do
        return False


def existing(place: str | Path, *, training: bool = False) -> Path:
    """A checkpoint folder, given itself, ``latest``, or the run folder that holds it; verified.

    Args:
        place: What a user named.
        training: Whether the state of training is wanted, too: it is most of the bytes.

    Raises:
        UserError: There is none, or a file of it is damaged. Names the file, and the newest one that is whole.
    """
    place = Path(place)
    found = (place if retention.is_whole(place) else None, *map(retention.newest, (place / "checkpoints", place)))
    folder = next((folder.resolve() for folder in found if folder is not None), None)
    if folder is None:
        raise UserError(f"{place} holds no checkpoint (a folder with recipe.yaml and adapters/)")
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


def with_lora(llm: Any, config: Config, start: Path | None) -> Any:
    """The LLM with the LoRA of the checkpoint it starts from, or a fresh one if `train` asks for it, or as it is."""
    if start is not None and (start / "lora").is_dir():
        wrapped = load_lora(llm, start / "lora", config.model.lora)
        _require_whole_lora(wrapped, start / "lora" / "adapter_model.safetensors")
        return wrapped
    return add_lora(llm, config.model.lora) if "lora" in config.train else llm


def _require_whole_lora(llm: Any, path: Path) -> None:
    """PEFT only warns of tensors that are missing: half an update would be used as if it were the whole."""
    from peft import get_peft_model_state_dict

    held_here = {name: parameter for name, parameter in llm.named_parameters() if "lora_" in name}
    wanted = set(get_peft_model_state_dict(llm, state_dict=held_here, save_embedding_layers=False))
    try:
        with safe_open(path, "pt") as held:
            given = {name for name in held.keys() if "lora_" in name}  # noqa: SIM118  it is no dict
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is missing or damaged: {error}; use an older checkpoint") from error
    if wanted != given:
        name = min(wanted ^ given)
        raise UserError(
            f"{path} is not the LoRA of this LLM: {len(wanted - given)} of {len(wanted)} tensors are missing and "
            f"{len(given - wanted)} too many, such as {name}; use an older checkpoint"
        )


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
    """Read the state of training back, but for the optimizer's.

    Raises:
        UserError: The checkpoint was stripped of it, or it is damaged.
    """
    place = folder / checksums.TRAINING
    try:
        described = json.loads((place / "state.json").read_text())
        return TrainingState(**{name: described[name] for name in _DESCRIBED if name in described or name in _OLDEST})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _no_training(folder, error) from error


def optimizer_names(folder: Path) -> set[str]:
    """The names of the optimizer's tensors: moments, and the float32 weights of an LLM that was trained.

    Raises:
        UserError: The checkpoint was stripped of them, or they are damaged.
    """
    try:
        with safe_open(folder / checksums.TRAINING / OPTIMIZER, "pt") as held:
            return set(held.keys())
    except (OSError, SafetensorError) as error:
        raise _no_training(folder, error) from error


def read_optimizer(folder: Path, name: str) -> Tensor:
    """One of the optimizer's tensors, float32. It lies in the mapped file, whose pages go with it.

    Raises:
        UserError: It is missing, or damaged.
    """
    try:
        with safe_open(folder / checksums.TRAINING / OPTIMIZER, "pt") as held:  # anew, so that no read page stays
            return held.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise _no_training(folder, error) from error


def _no_training(folder: Path, error: Exception) -> UserError:
    place = folder / checksums.TRAINING
    state = f"cannot be read ({error})" if place.exists() else "is missing: the checkpoint was stripped of it"
    return UserError(
        f"{place} {state}; to start a new run from these weights set model.checkpoint={folder} and another run.dir"
    )


def model_card(config: Config, adapters: dict[str, Adapter], step: int) -> str:
    """A model card in Markdown: what it is, what it was made from, and under which licences."""
    llm, stated = config.model.llm, settings.public(config)
    name = stated["model"]["llm"]["name"]
    on_hub = name == llm.name and _HUB_NAME.fullmatch(name) and not Path(name).exists()  # others may not even be paths
    base = f"base_model: {name}\n" if on_hub else ""
    title = name if on_hub else Path(name).name
    rows = [f"| LLM | {name} | {llm.license or 'unknown'} |"]
    for name, adapter in adapters.items():
        encoder = stated["model"]["modalities"][name]["encoder"]
        rows.append(f"| {name} encoder | {encoder} | {adapter.encoder.license} |")
    datasets = ", ".join(config.data.datasets) or str(stated["data"]["shards"])
    rows.append(f"| data | {datasets} | {stated['run']['data_license'] or 'not stated (run.data_license)'} |")
    listed = "\n".join(rows)
    return f"""---
{base}library_name: anymal
---
# AnyMAL adapters for {title}

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
