"""The contract that a modality fulfils, and nothing else.

A modality is one file in ``adapters/`` that makes a `Modality`, and one line in ``anymal.adapters.MODALITIES``:

    bytes ──decode (worker)──▶ [...] ──encoder (frozen)──▶ [N, tokens, width] ──projector (trained)──▶ [N, K, D]
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from anymal.sample import Noted, Viewable


class Encoder(Protocol):
    """A frozen pretrained network (an ``nn.Module``) that owns its preprocessing, width and token count."""

    width: int
    """Channels of a feature."""
    tokens: int
    """Features of one medium, before the projector."""
    license: str
    """The licence of the weights as far as it is known, for the model card; ``"unknown"`` otherwise."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one decoded medium, without N. Asked for by ``launch/estimate.py``, and where the encoder learns."""
        ...

    @property
    def savable(self) -> bool:
        """Whether its ``save_pretrained(folder, weights)`` writes a folder that the modality's loader takes.

        It may lack the attribute; once trained, it is then saved as its weights alone.
        """
        ...

    @property
    def decode(self) -> Callable[[bytes], Tensor | Noted | Viewable]:
        """Turns the bytes of one shard member into the encoder's input for one medium, or what is cut into views of it.

        A medium of which something was left out, or to which something was added, is a `Noted`: a run counts them.
        If that is a `Viewable`, it has an attribute ``most_views``: the most views of any medium.
        Runs in loader workers, so it must be picklable and must not hold the weights. Raises `anymal.errors.BadSample`
        with what was found and what is wanted: wrong format, channels, rate, length, NaN, or a size beyond its bounds.
        """
        ...

    def __call__(self, media: Tensor) -> Tensor:
        """[N, ...] decoded media → [N, tokens, width] features.

        Differentiable, for runs in which it learns. Those save it by its ``save_pretrained(folder, weights)``, if it
        has one: a whole state dict of it → a folder (with a config.json) that the modality's loader reads.
        """
        ...


def parts(encoder: Encoder) -> tuple[tuple[int, int], ...]:
    """(tokens, width) of each kind of features that an encoder gives of one medium: mostly one.

    An encoder that gives several, one after another in [N, tokens, width], has an attribute ``parts``; narrower ones
    are filled up with zeros to its width. A projector that takes several tells them apart by these numbers.
    """
    return getattr(encoder, "parts", ((encoder.tokens, encoder.width),))


def placeholder(name: str) -> str:
    """The token that stands for a medium of a modality in a prompt until it is spliced in."""
    return f"<{name}>"


@dataclass(frozen=True, kw_only=True)
class Modality:
    """One entry of the registry."""

    name: str
    """As recipes, samples and prompts call it, such as ``"image"``."""
    suffixes: tuple[str, ...]
    """Endings of the shard members that hold it, longest first, without the leading dot: ``("imu.npy",)``."""
    options: type
    """A keyword-only dataclass of its decoding settings, a docstring under each field (shown by ``--help``)."""
    load: Callable[[Any, Any], Encoder]
    """(hub name, local folder or a composition's mapping; options) → the encoder, on the CPU in fp32, in eval mode."""

    @property
    def placeholder(self) -> str:
        """The token that stands for a medium in a prompt until it is spliced in."""
        return placeholder(self.name)


@dataclass(frozen=True)
class Adapter:
    """All that one modality needs: decode + frozen encoder + trained projector."""

    modality: Modality
    """Its registry entry."""
    encoder: Encoder
    """The frozen encoder, an ``nn.Module``."""
    projector: nn.Module
    """[N, tokens, width] → [N, K, D], with an attribute ``tokens`` (K).

    One that also speaks to the LLM between its layers (`anymal.model.cross_attention`) has ``bridges``, a ModuleDict by
    the number of the decoder layer that each stands before, of modules (hidden [S, D], latents [N, R, C], looks) → [S,
    D]; ``context``, a module [N, tokens, width] → latents [N, R, C]; and ``last_only``: which media a token sees.
    """

    @property
    def decode(self) -> Callable[[bytes], Tensor | Noted | Viewable]:
        """The encoder's own decoding and preprocessing (picklable, holds no weights)."""
        return self.encoder.decode

    @property
    def tokens(self) -> int:
        """K, the tokens that one medium, or a view of it, takes in the LLM."""
        return self.projector.tokens

    @property
    def views(self) -> int:
        """In how many views a medium is shown at most."""
        return getattr(self.decode, "most_views", 1)
