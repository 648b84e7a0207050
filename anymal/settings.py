"""A recipe and overrides → settings, checked; and settings → a recipe. Between the command line and `anymal.config`.

A run is stated by one YAML recipe; dotted overrides follow it on the command line:

    python launch/pretrain.py launch/recipes/demo.yaml optim.lr=1e-3 train=[projectors,lora]

OmegaConf merges and checks them against dataclasses such as `anymal.config.Config`; unknown keys are errors that name
the nearest one.
"""

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from anymal.errors import UserError


def load(
    schema: type,
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    defaults: Sequence[str] = (),
    part: tuple[str, Any] | None = None,
) -> Any:
    """Defaults of `schema`, then `defaults`, the YAML recipe, and ``a.b=value`` overrides, checked against the types.

    Args:
        schema: A dataclass.
        recipe: A YAML file.
        overrides: They beat all else.
        defaults: Overrides that the recipe beats.
        part: A name for messages, and settings that beat the recipe's: those of a stage.

    Raises:
        UserError: The recipe is missing or not YAML, a key is unknown (the nearest is named), a value has the wrong
            type, or a setting without default is left out. The message names the recipe or override.
    """
    config = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.from_dotlist(list(defaults)))
    sources: list[tuple[str, Any]] = []
    asked: set[str] = set()  # what the recipe leaves to the command line, as ???: a merge would drop it silently
    given = [override.split("=", 1)[0] for override in overrides]
    for name in given:
        if given.count(name) > 1:
            times = given.count(name)
            raise UserError(f"{name} is given {times} times; a brace pattern wants quotes: '{name}=a/{{0..9}}.tar'")
    if recipe is not None:
        if not Path(recipe).is_file():
            raise UserError(f"there is no recipe {recipe}")
        sources.append((str(recipe), lambda: OmegaConf.load(recipe)))
    if part is not None:
        sources.append((part[0], lambda: OmegaConf.create(part[1])))
    for override in overrides:
        if "=" not in override:
            raise UserError(f"{override!r} is neither a recipe nor an override; an override is written a.b=value")
        sources.append((override, lambda override=override: OmegaConf.from_dotlist([override])))
    for name, read in sources:
        try:
            settings = read()
            for setting, value in _set(OmegaConf.to_container(settings)):
                (asked.add if value == MISSING else asked.discard)(setting)
            config = OmegaConf.merge(config, settings)
        except (OmegaConfBaseException, ValueError) as error:
            raise UserError(f"{name}: {_first_lines(error)}") from error
        except Exception as error:  # YAML's own errors have no base class in common with OmegaConf's
            raise UserError(f"{name} is not valid YAML: {error}") from error
    try:
        missing = sorted(OmegaConf.missing_keys(config) | asked)
        if missing:
            raise UserError(f"these settings have no default and must be given: {', '.join(missing)}")
        return OmegaConf.to_object(_with_home(config))
    except OmegaConfBaseException as error:  # an interpolation of something that is not there
        raise UserError(f"{recipe or 'settings'}: {_first_lines(error)}") from error


def _set(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted name of each setting in nested dicts, and what it is set to."""
    for key, value in settings.items() if isinstance(settings, dict) else ():
        yield f"{prefix}{key}", value
        yield from _set(value, f"{prefix}{key}.")


def _with_home(config: Any) -> Any:
    """Put the home folder in place of a leading ``~/`` wherever a setting is a text."""
    for key in list(config) if OmegaConf.is_dict(config) else range(len(config)):
        if OmegaConf.is_missing(config, key):
            continue
        value = config[key]
        if OmegaConf.is_config(value):
            _with_home(value)
        elif isinstance(value, str) and value.startswith("~/"):
            config[key] = str(Path(value).expanduser())
    return config


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    place = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
    return f"{lines[0]} (at {place})" if place else lines[0]


def save(config: Any, path: Path) -> None:
    """Write the resolved settings as a recipe that `load` reads back."""
    path.write_text(to_yaml(config))


def to_yaml(config: Any) -> str:
    """The resolved settings as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def options(cls: type, values: dict[str, Any], where: str) -> Any:
    """Make the options dataclass `cls` from a recipe's dict; an unknown name is an error with the nearest one."""
    known = [f.name for f in dataclasses.fields(cls)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are: {', '.join(known) or 'none'}"
            raise UserError(f"{where}: unknown option {name!r}; {hint}")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), values))
    except OmegaConfBaseException as error:
        raise UserError(f"{where}: {_first_lines(error)}") from error
