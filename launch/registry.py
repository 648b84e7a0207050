"""What a recipe may name: our own modalities and kinds of projectors, and those that other distributions add.

A distribution adds them by entry points, as plug-ins of pytest do. In its pyproject.toml:

    [project.entry-points."anymal.modalities"]
    depth = "my_package.depth:MODALITY"          # an `anymal.modality.Modality`; its name is the recipe's

    [project.entry-points."anymal.projectors"]
    perceiver = "my_package.perceiver:KIND"      # an `anymal.model.registry.ProjectorKind`

Whatever was installed is trusted, as everything else that Python imports. A broken plug-in stops every program that
names modalities, also runs that do not use it: what is found must not depend on what is asked for.
"""

from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from anymal.adapters import REGISTRY
from anymal.errors import UserError
from anymal.modality import Modality
from anymal.model.registry import ProjectorKind, Registry
from anymal.sample import TEXT

OURS = "AnyMAL itself"


def registry() -> Registry:
    """Ours and those of other distributions.

    Raises:
        UserError: A plug-in cannot be loaded, is not what its group holds, or takes a name that is taken; its
            distribution is named.
    """
    modalities, projectors = dict(REGISTRY.modalities), dict(REGISTRY.projectors)
    takers = {TEXT: OURS} | dict.fromkeys(modalities, OURS)
    suffixes = {"txt": "captions", "json": "conversations"} | REGISTRY.suffixes()
    for point, modality in _plugins("anymal.modalities", Modality):
        if modality.name != point.name:
            raise _broken(point, f"its modality is called {modality.name!r}, so its entry point must be too")
        _take(point, takers)
        for suffix in modality.suffixes:
            if suffix in suffixes:
                raise _broken(point, f"members that end in .{suffix} are already of {suffixes[suffix]}")
            suffixes[suffix] = modality.name
        modalities[modality.name] = modality
    takers = dict.fromkeys(projectors, OURS)
    for point, kind in _plugins("anymal.projectors", ProjectorKind):
        _take(point, takers)
        projectors[point.name] = kind
    return Registry(modalities=modalities, projectors=projectors)


def _plugins(group: str, wanted: type) -> Iterator[tuple[EntryPoint, Any]]:
    """The entry points of a group and what they hold, in the order of their names: the same on every rank."""
    for point in sorted(entry_points(group=group), key=lambda point: (point.name, _distribution(point))):
        try:
            plugin = point.load()
        except (Exception, SystemExit) as error:  # whatever its import raises
            raise _broken(point, " ".join(f"{type(error).__name__}: {error}".split())) from error
        if not isinstance(plugin, wanted):
            raise _broken(point, f"it is a {type(plugin).__name__}; wanted is a {wanted.__module__}.{wanted.__name__}")
        yield point, plugin


def _take(point: EntryPoint, takers: dict[str, str]) -> None:
    """Note that this plug-in has its name, unless another has it."""
    if point.name in takers:
        raise _broken(point, f"the name {point.name} is taken, by {takers[point.name]}")
    takers[point.name] = _distribution(point)


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "unknown"


def _broken(point: EntryPoint, why: str) -> UserError:
    distribution = _distribution(point)
    return UserError(
        f"the plug-in {point.name} = {point.value} ({point.group}) of the distribution {distribution} cannot be used: "
        f"{why}; mend it, or pip uninstall {distribution}"
    )
