"""A recipe of several stages → the settings of each. Between the command line and the runs.

    model: ...            # what all stages have in common
    stages:
      - name: align       # trained in run.dir/align
        train: [projectors]
      - {name: tune, train: [projectors, lora], optim: {lr: 1e-5}}      # goes on from align

A stage is the recipe with its own part merged over it; overrides of the command line beat both, in every stage.
docs/stages.md has examples.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf

from anymal.config.schema import Config, encoder_learns
from anymal.config.settings import derived, find_recipe, load
from anymal.errors import UserError, nearest

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
RESERVED = ("checkpoints", "wandb")  # what a run keeps in its own folder


@dataclass(frozen=True, kw_only=True)
class Recipe(Config):
    """A run, or several one after another."""

    stages: list[Any] = field(default_factory=list)
    """Stages in their order, each a name and the settings in which it differs from the rest of the recipe; a stage
    trains in run.dir/NAME, and starts from the checkpoint of the one before unless it sets model.checkpoint."""
    stage: str = ""
    """The name of the only stage to run; empty runs all, and passes over those that are done."""


R = TypeVar("R", bound=Recipe)


def load_stages(
    schema: type[R],
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    defaults: Sequence[str] = (),
) -> list[R]:
    """The settings of each stage that is to run, in order; of a recipe without stages, its own.

    Args:
        schema: `Recipe`, or what adds to it.
        recipe: As for `anymal.config.settings.load`.
        overrides: They apply to every stage, but for ``model.checkpoint``: there the first that is to run starts.
        defaults: As for `anymal.config.settings.load`.

    Raises:
        UserError: As `anymal.config.settings.load` for each stage; or stages are not a list, one has no name, one that
            cannot be a folder's or is taken, or sets what is not its own to set; or none has the name asked for.
    """
    if any(re.match(r"stages\b", override) for override in overrides):
        raise UserError("stages are listed in the recipe; to run one of them alone: stage=NAME")
    parts = _parts(recipe)
    wanted = next((o.removeprefix("stage=") for o in overrides if o.startswith("stage=")), "")
    if wanted and wanted not in parts:
        raise UserError(f"stage={wanted}: {recipe} has no such stage; {nearest(wanted, parts, 'it has')}")
    if not parts:
        return [load(schema, recipe, overrides, defaults)]
    chosen = [wanted] if wanted else list(parts)
    later = [override for override in overrides if not re.match(r"model\.checkpoint[.=]", override)]
    stages = []
    for name in chosen:
        own = overrides if name == chosen[0] else later
        whole = load(schema, recipe, own, defaults, (f"{recipe}, stage {name}", parts[name]))
        stages.append(_in_its_folder(whole, name))
    if len(stages) > 1 and stages[0].run.resume not in ("auto", "never"):
        raise UserError(f"run.resume={stages[0].run.resume} is one stage's checkpoint; say which by stage=NAME")
    return stages


def _in_its_folder(stage: R, name: str) -> R:
    """The settings of a stage, given them with the recipe's own ``run.dir``."""
    whole = stage.run.dir
    folder = derived("run.dir", str(Path(whole) / name), whole, f"/{name}")
    return replace(stage, stage=name, run=replace(stage.run, dir=folder, group=stage.run.group or whole))


def _parts(recipe: str | Path | None) -> dict[str, dict[str, Any]]:
    """The part of each stage by its name, with the stage before as where it starts; empty where there are none."""
    if recipe is None:
        return {}
    file = find_recipe(recipe)
    try:
        settings = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except Exception:  # not YAML: `load` says so
        return {}
    listed = settings.get("stages", []) if isinstance(settings, dict) else []
    if not isinstance(listed, list):
        raise UserError(f"{recipe}: stages is a list; each begins with - name: NAME")
    parts: dict[str, dict[str, Any]] = {}
    for number, stage in enumerate(listed, start=1):
        name = stage.get("name") if isinstance(stage, dict) else None
        if not isinstance(name, str) or not NAME.fullmatch(name) or name in RESERVED:
            raise UserError(f"{recipe}: stage {number} has the name {name!r}; wanted is one that can be a folder's")
        if name in parts:
            raise UserError(f"{recipe}: two stages have the name {name}")
        part = {key: value for key, value in stage.items() if key != "name"}
        for own in ("stage", "stages"):
            if own in part:
                raise UserError(f"{recipe}, stage {name}: a stage has no {own}")
        if "dir" in (part.get("run") or {}):
            raise UserError(f"{recipe}, stage {name}: run.dir is the whole recipe's; the stage's is its folder {name}")
        model = part.get("model") or {}
        if parts:  # ${run.dir} is the recipe's here
            model = {"checkpoint": f"${{run.dir}}/{list(parts)[-1]}"} | model
        parts[name] = part | {"model": model, "stages": []}
    return parts


def left_behind(stages: Sequence[Config]) -> dict[str, str]:
    """Where stages leave the encoders that they train → the name of what each is made from."""
    origins: dict[str, str] = {}
    for stage in stages:
        for name, modality in stage.model.modalities.items():
            if encoder_learns(name, stage.train):
                made_from = next(encoder_names(modality.encoder))
                origins[f"{stage.run.dir}/checkpoints/latest/encoders/{name}"] = origins.get(made_from, made_from)
    return origins


def encoder_names(encoder: Any) -> Iterator[str]:
    """Every hub name or folder in a recipe's ``encoder``: a name, or a composition's mapping."""
    if isinstance(encoder, str):
        yield encoder
    elif isinstance(encoder, dict):
        for key in ("name", "channels", "append"):
            yield from encoder_names(encoder.get(key, []))
    elif isinstance(encoder, list | tuple):
        for one in encoder:
            yield from encoder_names(one)


def load_untrained(
    schema: type[R],
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    defaults: Sequence[str] = (),
) -> list[R]:
    """As `load_stages`; encoders that an earlier stage leaves behind replaced by those that they are made from.

    These are there before anything is trained, and of the same shapes: all that ``anymal estimate`` asks for.
    """
    every = [override for override in overrides if not override.startswith("stage=")]
    origin = left_behind(load_stages(schema, recipe, every, defaults))

    def resolved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: resolved(item) for key, item in value.items()}
        if isinstance(value, list):
            return [resolved(item) for item in value]
        return origin.get(value, value) if isinstance(value, str) else value

    stages = []
    for stage in load_stages(schema, recipe, overrides, defaults):
        modalities = {n: replace(m, encoder=resolved(m.encoder)) for n, m in stage.model.modalities.items()}
        stages.append(replace(stage, model=replace(stage.model, modalities=modalities)))
    return stages


def config_of(stage: Recipe) -> Config:
    """A stage as the run that it is."""
    return Config(**{f.name: getattr(stage, f.name) for f in fields(Config)})
