"""A recipe and overrides → settings, checked; and settings → a recipe.

A run is stated by one YAML recipe; dotted overrides follow it on the command line:

    anymal pretrain launch/recipes/demo-pretrain.yaml optim.lr=1e-3 train=[projectors,lora]
    anymal pretrain demo-pretrain optim.lr=1e-3                # the same one: it comes with the package

OmegaConf merges and checks them against dataclasses such as `anymal.config.schema.Config`; unknown keys are errors that
name the nearest one.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import MISSING, OmegaConf, read_write
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from anymal.config.renamed import RENAMED, under_new_names
from anymal.errors import UserError, alternatives, nearest

RECIPES = Path(__file__).parents[1] / "launch" / "recipes"
"""Those that come with the package."""

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_BEFORE_HOST = re.compile(r"(?<=://)([^/\s]*@|[^/:\[\s]*:(?!\d*([/?#]|$))\S*@)")  # user:password@, with any / in it
_SECRET = re.compile(r"KEY|SECRET|TOKEN|PASSW", re.IGNORECASE)  # what names itself a secret in the environment
_SHORT = 8  # characters: what is shorter is no secret, and may well stand somewhere else by chance
_as_written: dict[tuple[str, str], str] = {}  # a setting's dotted name and its value → how the recipe has it
_environment: dict[str, str] = {}  # the variables of the environment that recipes were made of
_reading: ContextVar[str] = ContextVar("reading", default="values")  # what ${oc.env:NAME} becomes: see `_env`


def load(
    schema: type[T],
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    defaults: Sequence[str] = (),
    part: tuple[str, Any] | None = None,
    keep_unset: bool = False,
) -> T:
    """Defaults of `schema`, then `defaults`, the YAML recipe, and ``a.b=value`` overrides, checked against the types.

    Settings under an old name are read with a warning that says the new one (`anymal.config.renamed`).

    Args:
        schema: A dataclass; a frozen one, since what is resolved does not change.
        recipe: A YAML file, or the name of one that comes with the package.
        overrides: They beat all else.
        defaults: Overrides that the recipe beats.
        part: A name for messages, and settings that beat the recipe's: those of a stage.
        keep_unset: Whether ``${oc.env:NAME}`` stays as it is where that variable is not set: the recipe of a checkpoint
            names data that whoever chats with it does not need.

    Raises:
        UserError: The recipe is missing or not YAML, a key is unknown (the nearest is named), a value has the wrong
            type, or a setting without default is left out. The message names the recipe or override.
    """
    config = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.from_dotlist(list(defaults)))
    asked: set[str] = set()  # what the recipe leaves to the command line, as ???: a merge would drop it silently
    for source, read in _sources(recipe, part, overrides):
        try:
            settings = under_new_names(OmegaConf.to_container(read()), public_message(source))
            for setting, value in _set(settings):
                (asked.add if value == MISSING else asked.discard)(setting)
                if isinstance(value, list) and OmegaConf.is_dict(OmegaConf.select(config, setting)):
                    config = OmegaConf.merge(config, OmegaConf.from_dotlist([f"{setting}=null"]))  # it merges neither
            config = OmegaConf.merge(config, OmegaConf.create(settings))
        except UserError:
            raise
        except (OmegaConfBaseException, ValueError) as error:
            raise UserError(public_message(f"{source}: {_reason(error)}")) from error
        except Exception as error:  # YAML's own errors have no base class in common with OmegaConf's
            raise UserError(public_message(f"{source} is not valid YAML: {' '.join(str(error).split())}")) from error
    try:
        with _read_as("kept" if keep_unset else "values"):
            missing = sorted(OmegaConf.missing_keys(config) | asked)
            if missing:
                recipes = " or in a recipe, named first" if recipe is None and "." in missing[0] else ""
                names, how = ", ".join(missing), f"(written {missing[0]}=…{recipes})"
                raise UserError(f"these settings have no default and must be given: {names} {how}")
            resolved: Any = OmegaConf.to_object(_with_home(config))
            return resolved
    except OmegaConfBaseException as error:  # an interpolation of something that is not there
        raise UserError(f"{recipe or 'settings'}: {_reason(error)}") from error


def find_recipe(recipe: str | Path) -> Path:
    """The file of a recipe, given by its path or, like ``eagle-x4``, by the name of one that comes with the package.

    Raises:
        UserError: There is none; of those that come with the package, the nearest is named.
    """
    own = {path.stem: path for path in RECIPES.glob("*.yaml")}
    if Path(recipe).is_file():
        return Path(recipe)
    if str(recipe) in own:
        return own[str(recipe)]
    hint = nearest(Path(recipe).stem, sorted(own), "those that come with AnyMAL:")
    raise UserError(f"there is no recipe {recipe}; {hint}")


def _sources(
    recipe: str | Path | None, part: tuple[str, Any] | None, overrides: Sequence[str]
) -> list[tuple[str, Callable[[], Any]]]:
    """Where settings come from: the name of each source, and what reads it; later ones beat earlier ones."""
    given = [override.split("=", 1)[0] for override in overrides]
    names = [RENAMED.get(name, name) for name in given]
    for name in names:
        if (times := names.count(name)) > 1:
            hint = f"a brace pattern wants quotes: '{name}=a/{{0..9}}.tar'"
            for old in (old for old, new in RENAMED.items() if new == name and old in given):
                hint = f"{old} is its old name"
            raise UserError(f"{name} is given {times} times; {hint}")
    sources: list[tuple[str, Callable[[], Any]]] = []
    if recipe is not None:
        sources.append((str(recipe), partial(OmegaConf.load, find_recipe(recipe))))
    if part is not None:
        sources.append((part[0], partial(OmegaConf.create, part[1])))
    for override in overrides:
        if "=" not in override:
            raise UserError(
                f"{public_message(override)!r} is neither a recipe nor an override; an override is written a.b=value"
            )
        sources.append((override, partial(OmegaConf.from_dotlist, [override])))
    return sources


def _set(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted name of each setting in nested dicts, and what it is set to."""
    for key, value in settings.items() if isinstance(settings, dict) else ():
        yield f"{prefix}{key}", value
        yield from _set(value, f"{prefix}{key}.")


def _with_home(config: Any, prefix: str = "") -> Any:
    """Put the home folder in place of a leading ``~/`` wherever a setting is a text, and note how that was written."""
    for key in list(config) if OmegaConf.is_dict(config) else range(len(config)):
        if OmegaConf.is_missing(config, key):
            continue
        value, name = config[key], f"{prefix}{key}"
        if OmegaConf.is_config(value):
            _with_home(value, f"{name}.")
        elif isinstance(value, str):
            try:
                with _read_as("written"):
                    written = config[key]
            except OmegaConfBaseException:  # of a resolver that takes an interpolation for nothing it knows
                written = _unresolved(config)[key]
            at_home = str(Path(value).expanduser()) if value.startswith("~/") else value
            if at_home != value:
                with read_write(config):
                    config[key] = at_home
            if written != value:
                _as_written[name, at_home] = written.replace("\0", "$")
    return config


def _unresolved(config: Any) -> Any:
    """Settings as plain dicts and lists, interpolations as they are written."""
    return OmegaConf.to_container(config, resolve=False)


@contextmanager
def _read_as(what: str) -> Iterator[None]:
    token = _reading.set(what)
    try:
        yield
    finally:
        _reading.reset(token)


@contextmanager
def notes_of_its_own() -> Iterator[None]:
    """Inside, the notes on how recipes were written begin empty; afterwards they are as before.

    Otherwise a value that one recipe took from the environment would be written as ``${oc.env:NAME}`` for a later
    recipe that happens to have the same value.
    """
    as_written, environment = dict(_as_written), dict(_environment)
    _as_written.clear()
    _environment.clear()
    try:
        yield
    finally:
        for notes in (_as_written, _environment):
            notes.clear()
        _as_written.update(as_written)
        _environment.update(environment)


def _env(key: str, *default: Any) -> str | None:
    """OmegaConf's oc.env, in three ways (`_reading`).

    As "values": the variable, or the default. As "written": the interpolation itself, with \\0 for its $, so that
    OmegaConf does not resolve it again. As "kept": the variable, or the interpolation where it is not set.
    """
    text = default[0] if default else None
    if _reading.get() == "written":
        literal = "null" if text is None else "'" + str(text).replace("\0", "$").replace("'", "\\'") + "'"
        return f"\0{{oc.env:{key},{literal}}}" if default else f"\0{{oc.env:{key}}}"
    if key in os.environ:
        _environment[key] = os.environ[key]
        return os.environ[key]
    if default:
        return None if text is None else str(text)
    if _reading.get() == "kept":
        return f"${{oc.env:{key}}}"
    raise KeyError(f"Environment variable '{key}' not found")


OmegaConf.register_resolver("oc.env", _env, replace=True)


def derived(name: str, value: str, source: str, ending: str) -> str:
    """`value`, which is `source` + `ending`; noted, so that it is written as `source` was, interpolations included."""
    if (name, source) in _as_written:
        _as_written[name, value] = _as_written[name, source] + ending
    return value


def public(config: Any) -> dict[str, Any]:
    """Settings as plain dicts and lists, as they may be written down or sent: no secret is in them.

    What came from an environment variable is its ``${oc.env:NAME}`` again, and addresses lack what follows the ``?``,
    which may be a signature.
    """
    return _public(OmegaConf.to_container(OmegaConf.structured(config)), "")


def _public(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _public(item, f"{name}.{key}" if name else str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_public(item, f"{name}.{i}") for i, item in enumerate(value)]
    return public_text(_as_written.get((name, value), value)) if isinstance(value, str) else value


def public_text(text: str) -> str:
    """A text without values of the environment that the settings hold; an address without its query, user, password."""
    text = _without(_environment, text)
    return _public_address(text) if _ADDRESS.match(text) else text


def public_message(text: str) -> str:
    """A message of a library or a server, without secrets.

    As `public_text`, for addresses anywhere in it; and environment variables whose names say that they are secret are
    named in place of their values.
    """
    secrets = {name: value for name, value in os.environ.items() if _SECRET.search(name)}
    text = _without(_environment | secrets, text)
    return re.sub(rf"{_ADDRESS.pattern}\S*[^\s:;,.'\")]", lambda found: _public_address(found[0]), text)


def _without(environment: Mapping[str, str], text: str) -> str:
    """The text with the names of variables in place of their values."""
    for key, value in sorted(environment.items(), key=lambda item: -len(item[1])):
        if len(value) >= _SHORT and os.environ.get(key) == value:
            text = text.replace(value, f"${{oc.env:{key}}}")
    return text


def _public_address(address: str) -> str:
    return re.split("[?#]", _BEFORE_HOST.sub("", address), maxsplit=1)[0]


def _reason(error: Exception) -> str:
    """What OmegaConf found wrong, and where: of a setting with few values all of them, and the nearest."""
    if isinstance(error, ValidationError) and (choices := _choices(error)):
        hint = nearest(str(error.value), map(str, choices), otherwise="")
        message = f"{error.full_key} is {error.value!r}; it can be {alternatives(choices)}"
        return f"{message}; {hint}" if hint else message
    lines = [line.strip() for line in str(error).splitlines()]
    name = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
    said = f"{lines[0]} (at {name})" if name else lines[0]
    if isinstance(error, ConfigKeyError) and "Did you mean" not in said and dataclasses.is_dataclass(error.object_type):
        said = f"{said}; known are: {', '.join(field.name for field in dataclasses.fields(error.object_type))}"
    if group := re.match(r"optim\.groups\.((?:projectors|encoders)\.\w+)$", name):
        said = f"{said}. A group of one modality has a dot in its name: 'optim.groups={{{group[1]}: {{lr: 1e-3}}}}'"
    return said


def _choices(error: ValidationError) -> tuple[Any, ...]:
    """What the setting that is wrong can be, if its type is a Literal, or a list of them; else nothing."""
    if dataclasses.is_dataclass(error.object_type):
        hint = get_type_hints(error.object_type).get(error.key)
    else:
        hint = next(iter(get_args(error.ref_type)), None)
    return get_args(hint) if get_origin(hint) is Literal else ()


def save(config: Any, path: Path) -> None:
    """Write the settings, without secrets (see `public`), as a recipe that `load` reads back."""
    path.write_text(to_yaml(config))


def to_yaml(config: Any) -> str:
    """The settings as YAML, without secrets (see `public`)."""
    return OmegaConf.to_yaml(OmegaConf.create(public(config)))


def options(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Make the options dataclass `cls` from a recipe's dict; an unknown name is an error with the nearest one."""
    known = [f.name for f in dataclasses.fields(cls)]
    for name in values:
        if name not in known:
            raise UserError(f"{where}: unknown option {name!r}; {nearest(name, known)}")
    try:
        resolved: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), dict(values)))
    except OmegaConfBaseException as error:
        raise UserError(f"{where}: {_reason(error)}") from error
    return resolved
