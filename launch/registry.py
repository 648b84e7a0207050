"""What a recipe may name: our own modalities and kinds of projectors, and those that other distributions add.

A distribution adds them by entry points, as plug-ins of pytest do. In its pyproject.toml:

    [project.entry-points."anymal.modalities"]
    depth = "my_package.depth:MODALITY"          # an `anymal.modality.Modality`; its name is the recipe's

    [project.entry-points."anymal.projectors"]
    perceiver = "my_package.perceiver:KIND"      # an `anymal.model.registry.ProjectorKind`

Whatever was installed is trusted, as everything else that Python imports.
"""

from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from anymal.adapters import REGISTRY
from anymal.errors import UserError
from anymal.modality import Modality
from anymal.model.registry import ProjectorKind, Registry


def registry() -> Registry:
    """Ours and those of other distributions.

    Raises:
        UserError: A plug-in cannot be loaded, is not what its group holds, or takes a name that is taken; its
            distribution is named.
    """
    modalities, suffixes = dict(REGISTRY.modalities), REGISTRY.suffixes()
    for point, modality in _plugins("anymal.modalities", Modality):
        if modality.name != point.name:
            raise _broken(point, f"its modality is called {modality.name!r}, so its entry point must be too")
        _require_new(point, point.name, modalities)
        for suffix in modality.suffixes:
            if suffix in suffixes:
                raise _broken(point, f"members that end in .{suffix} are already of {suffixes[suffix]}")
            suffixes[suffix] = modality.name
        modalities[modality.name] = modality
    projectors = dict(REGISTRY.projectors)
    for point, kind in _plugins("anymal.projectors", ProjectorKind):
        _require_new(point, point.name, projectors)
        projectors[point.name] = kind
    return Registry(modalities=modalities, projectors=projectors)


def _plugins(group: str, wanted: type) -> Iterator[tuple[EntryPoint, Any]]:
    """The entry points of a group and what they hold, in the order of their names: the same on every rank."""
    for point in sorted(entry_points(group=group), key=lambda point: (point.name, point.value)):
        try:
            found = point.load()
        except Exception as error:  # whatever its import raises
            raise _broken(point, f"{type(error).__name__}: {error}") from error
        if not isinstance(found, wanted):
            raise _broken(point, f"it is a {type(found).__name__}; wanted is a {wanted.__module__}.{wanted.__name__}")
        yield point, found


def _require_new(point: EntryPoint, name: str, taken: dict[str, Any]) -> None:
    if name in taken:
        raise _broken(point, f"there is already one called {name}")


def _broken(point: EntryPoint, why: str) -> UserError:
    distribution = point.dist.name if point.dist else "unknown"
    return UserError(
        f"the plug-in {point.name} = {point.value} ({point.group}) of the distribution {distribution} cannot be used: "
        f"{why}; mend it, or pip uninstall {distribution}"
    )
