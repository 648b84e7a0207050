"""The contract that a modality fulfils, and nothing else.

A modality is one file in ``adapters/`` that makes a `Modality`, and one line in ``FILES`` of `anymal.adapters`:

    bytes ──decode (worker)──▶ [...] ──encoder (frozen)──▶ [N, tokens, width] ──projector (trained)──▶ [N, K, D]
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anymal.sample import Noted, Viewable


class Encoder(nn.Module):
    """A frozen pretrained network that owns its preprocessing, width and token count.

    Called with [N, ...] decoded media, it gives [N, tokens, width] features. It is differentiable, for runs in which it
    learns. Any other ``nn.Module`` will do that has the attributes down to `decode`; it may lack those after it.
    """

    width: int
    """Channels of a feature."""
    tokens: int
    """Features of one medium, before the projector."""
    shape: tuple[int, ...]
    """Of one decoded medium, without N. Asked for by ``anymal estimate``, where the encoder learns, and
    to count FLOPs."""
    license: str
    """The licence of the weights as far as it is known, for the model card; ``"unknown"`` otherwise."""
    decode: Callable[[bytes], Tensor | Noted | Viewable]
    """Turns the bytes of one shard member into the encoder's input for one medium, or what can be cut into views of it.

    A medium of which something was left out, or to which something was added, is a `Noted`: a run counts them.
    If that is a `Viewable`, it has an attribute ``most_views``: the most views of any medium.
    Runs in loader workers, so it must be picklable and must not hold the weights. Raises `anymal.errors.BadSample`
    with what was found and what is wanted: wrong format, channels, rate, length, NaN, or a size beyond its bounds.
    """

    parts: tuple[tuple[int, int], ...]
    """(tokens, width) of each kind of its features, where there are several. See `parts`."""
    skips: bool
    """Whether some views of a medium may be skipped, since there is nothing to see."""
    media_dtype: torch.dtype = torch.float32
    """Of a decoded medium, as it travels from the worker to the device. An encoder of uint8 media takes floating ones,
    too, as its network takes them."""
    inputs_per_medium: int = 1
    """How many inputs of its network a medium is: the frames of a clip."""
    encoder_batch_size: int = 0
    """Most inputs of its network that are encoded at once while no gradient is wanted; 0: any number. The recipe says
    so (`anymal.checkpoints.build.load_encoder` sets it), and `anymal.model.multimodal.run_encoder` keeps to it; an
    encoder itself need not, unless a single medium may hold more."""

    @property
    def savable(self) -> bool:
        """Whether it has a `save_pretrained`. If not, it is saved as its weights alone once it was trained."""
        return False

    def save_pretrained(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write a folder (with a config.json) that its modality's loader reads; `weights` are a whole state dict."""
        raise NotImplementedError


class Projector(nn.Module):
    """A trained network: [N, tokens, width] features of an encoder → [N, K, D] embeddings for the LLM.

    This class holds no code: any ``nn.Module`` that has ``tokens`` will do.
    """

    tokens: int
    """K, the embeddings of one medium, or of a view of it."""
    skip: nn.Parameter
    """[D], what stands where a view was skipped. Only where the encoder has `Encoder.skips`."""
    bridges: nn.ModuleDict
    """Only where it also speaks to the LLM between its layers (`anymal.model.cross_attention`): the cross-attention
    blocks, by the number of the decoder layer that each stands before. Each is called with hidden states [S, D],
    latents [N, R, C] and the media spans of the S tokens, and gives [S, D]."""
    context: nn.Module
    """Only beside `bridges`: [N, tokens, width] → latents [N, R, C]."""
    last_only: bool
    """Only beside `bridges`: whether a token sees the last medium before it alone."""


def parts(encoder: Encoder) -> tuple[tuple[int, int], ...]:
    """(tokens, width) of each kind of features that an encoder gives of one medium: mostly one.

    An encoder that gives several, one after another in [N, tokens, width], has an attribute ``parts``; narrower ones
    are filled up with zeros to its width. A projector that takes several tells them apart by these numbers.
    """
    return getattr(encoder, "parts", ((encoder.tokens, encoder.width),))


def media_dtype(encoder: Encoder) -> torch.dtype:
    """Of the media of an encoder: float32, if it lacks `Encoder.media_dtype`."""
    return getattr(encoder, "media_dtype", torch.float32)


def zero_media(encoder: Encoder, count: int, device: torch.device) -> Tensor:
    """[count, ...] media of all zeros, as they travel: for who needs some medium, whichever."""
    return torch.zeros(count, *encoder.shape, dtype=media_dtype(encoder), device=device)


def in_chunks(encode: Callable[[Tensor], Tensor], media: Tensor, most: int) -> Tensor:
    """What `encode` makes of [N, ...] media, at most so many of them at a time (0: all at once). Without gradient."""
    if not 0 < most < len(media):
        return encode(media)
    joined: Tensor | None = None
    for start in range(0, len(media), most):
        chunk = encode(media[start : start + most])
        if joined is None:
            joined = chunk.new_empty(len(media), *chunk.shape[1:])
        joined[start : start + most] = chunk
    assert joined is not None
    return joined


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
    """[N, ...] → [N, tokens, width], frozen unless the recipe trains it."""
    projector: Projector
    """[N, tokens, width] → [N, K, D]."""

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
