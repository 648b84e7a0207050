"""What the core is handed: the modalities and the kinds of projectors that a run may name.

`anymal.adapters` has our own; `anymal.launch.registry` adds those of other distributions. The core names none of them.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anymal.config.command_line import describe
from anymal.config.schema import ProjectorConfig
from anymal.errors import UserError, nearest
from anymal.modality import Modality, Projector


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What a projector stands between."""

    parts: Sequence[tuple[int, int]]
    """(T, W) of each kind of features that the encoder gives of one medium; mostly one. See `anymal.modality.parts`."""
    llm_width: int
    """D."""
    scale: float = 1.0
    """Standard deviation of an embedding's elements at the start, best that of the LLM's embedding table."""
    llm_layers: int = 0
    """Decoder layers of the LLM, for projectors that stand between them."""

    def only(self, config: ProjectorConfig) -> tuple[int, int]:
        """T and W, for projectors of one kind of features.

        Raises:
            UserError: There are several.
        """
        if len(self.parts) != 1:
            raise UserError(
                f"projector.kind is {config.kind}, but the encoder gives {len(self.parts)} kinds of features apart; "
                "a projector that takes several is wanted, or an encoder that joins them"
            )
        return self.parts[0]


@dataclass(kw_only=True)
class NoOptions:
    """Of a kind of projector that has no settings of its own."""


@dataclass(frozen=True, kw_only=True)
class ProjectorKind:
    """One entry of the registry: how ``projector.kind`` is made."""

    make: Callable[[ProjectorConfig, Any, Fit], Projector]
    """(settings, their ``options`` as `options`, fit) → a fresh projector [N, T, W] → [N, K, D]. The first line of its
    docstring is shown by ``--help``."""
    options: type = NoOptions
    """A keyword-only dataclass of what ``projector.options`` can hold, a docstring under each field."""


@dataclass(frozen=True, kw_only=True)
class Registry:
    """Everything that a recipe may name, by name."""

    modalities: Mapping[str, Modality]
    """By `anymal.modality.Modality.name`, as under ``model.modalities``."""
    projectors: Mapping[str, ProjectorKind]
    """By what ``projector.kind`` says."""

    def suffixes(self) -> dict[str, str]:
        """Which modality a shard member holds, by its suffix."""
        return {suffix: name for name, modality in self.modalities.items() for suffix in modality.suffixes}

    def modality(self, name: str) -> Modality:
        """The entry of that name.

        Raises:
            UserError: There is none; the nearest is named.
        """
        if name not in self.modalities:
            hint = nearest(name, self.modalities, "installed are:")  # of a plug-in that is not, nothing is known
            raise UserError(f"model.modalities.{name}: there is no such modality; {hint}")
        return self.modalities[name]

    def projector(self, kind: str) -> ProjectorKind:
        """The entry of that name.

        Raises:
            UserError: There is none; the nearest is named.
        """
        if kind not in self.projectors:
            raise UserError(f"projector.kind is {kind!r}; {nearest(kind, self.projectors, 'installed are:')}")
        return self.projectors[kind]

    def describe(self) -> list[str]:
        """Lines of ``--help``: the decoding options of each modality, and the kinds of projectors with theirs."""
        lines = []
        for name, modality in self.modalities.items():
            endings = ", ".join(f".{suffix}" for suffix in modality.suffixes)
            lines += ["", f"Options of {name} (shard members ending in {endings}):"]
            lines += describe(modality.options, f"model.modalities.{name}.options.")
        lines += ["", "Kinds of projectors (model.modalities.NAME.projector.kind), and their options:"]
        for name, kind in self.projectors.items():
            lines.append(f"  {name}: {(inspect.getdoc(kind.make) or '').partition(chr(10))[0]}")
            lines += describe(kind.options, "  model.modalities.NAME.projector.options.")
        return lines
