"""One encoder of a composition: canonical pictures → a map of features. `anymal.adapters.image.mixture` joins several.

Any vision network of transformers that takes ``pixel_values``: CLIP, SigLIP, DINOv2 (a class token and patches),
ConvNeXt, SAM's image encoder (a map). Two that do not are wrapped: `Patches` cuts the patches for Pix2Struct; `Queries`
is BLIP-2's vision tower and Q-Former, whose features form no map.

    N pictures   S side of the canonical square   W width of a feature   h, w rows and columns of its map
"""

import inspect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from omegaconf import MISSING
from torch import Tensor, nn

from anymal.adapters.image.layers import find_exit, leave_out_head, output_of
from anymal.adapters.image.pictures import BILINEAR, Pixels, pixels_for
from anymal.adapters.pretrained import load_config, load_image_processor, load_network
from anymal.errors import UserError
from anymal.model.fake_tensors import on_shapes
from anymal.model.hub import license_of

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutput


@dataclass(kw_only=True)
class LeafConfig:
    """One encoder of a composition."""

    name: str = MISSING
    """Hub name or local folder."""
    size: int = 0
    """Side in pixels of the square that it gets; 0 takes its image processor's. Position embeddings are resampled."""
    layer: int = 0
    """Whose output is used, as in `anymal.adapters.image.modality.ImageOptions`."""
    stages: bool = False
    """Of a network whose map shrinks from stage to stage (ConvNeXt): the maps of all stages, resized to the first's and
    joined channel by channel, as Mini-Gemini does."""
    unshuffle: int = 1
    """Blocks of so many by so many features become one that is as much wider; Eagle takes 2 for SAM."""
    keep_global: bool = False
    """Put a feature of the whole picture before the map's: the class token, or the map's average if it has none."""

    def __post_init__(self):
        if self.stages and self.layer:
            raise UserError("stages takes the maps of all stages, and layer takes one: set only one of them")
        if self.layer > 0 or self.size < 0 or self.unshuffle < 1:
            raise UserError(
                f"layer is {self.layer}, size {self.size} and unshuffle {self.unshuffle}; layer counts from the end, "
                "size is a number of pixels or 0, and unshuffle at least 1"
            )


class Leaf(nn.Module):
    """A frozen network that gives a map of each picture, or tokens that form none.

    Args:
        network: Takes ``pixel_values``, see `anymal.adapters.image.layers.output_of`.
        processor: Its image processor, for whoever saves it.
        pixels: What it takes.
        config: Its settings.
        license: The weights' licence.
        where: The key in the recipe, for errors.

    Raises:
        UserError: The network cannot take pictures of this size, or its features are not what the settings ask for.
    """

    side: int | None
    """Rows and columns of its map; None if its features form none."""
    parts: tuple[tuple[int, int], ...]
    """As `anymal.modality.parts`."""

    def __init__(
        self,
        network: "PreTrainedModel | Patches | Queries",
        processor: "BaseImageProcessor",
        pixels: Pixels,
        config: LeafConfig,
        license: str,
        where: str,
    ):
        super().__init__()
        self.network, self.processor, self.pixels, self.license = network, processor, pixels, license
        self.layer, self.stages = config.layer or default_layer(network), config.stages
        self.unshuffle, self.keep_global = config.unshuffle, config.keep_global
        accepted = inspect.signature(network.forward).parameters
        self.resampled = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in accepted else {}
        self.size, self.prefix, self.side, self.parts = pixels.size, 0, None, ()
        leave_out_head(network)
        self._exit = None
        with on_shapes():
            self._measure(where)

    def _measure(self, where: str) -> None:
        plain = self.layer == -1 and not self.stages and self.unshuffle == 1 and not self.keep_global
        if isinstance(self.network, Queries) and not plain:
            raise UserError(f"{where}: a Q-Former's queries form no map; layer, stages and the like do not apply")
        try:
            black = torch.zeros(1, 3, self.size, self.size)
            if not self.stages:
                self._exit = find_exit(self.network, self.layer, **self._inputs(black))
            first = self._features(black)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{where}: it cannot take pictures of {self.size} x {self.size}: {error}") from error
        if first.ndim == 4:
            self.side = first.shape[-1]
        elif not isinstance(self.network, Queries):
            patch = getattr(self.network.config, "patch_size", None)
            patches = (self.size // patch) ** 2 if isinstance(patch, int) else first.shape[1]
            self.prefix = max(first.shape[1] - patches, 0)
            self.side = math.isqrt(first.shape[1] - self.prefix)
            if self.side**2 != first.shape[1] - self.prefix:
                raise UserError(f"{where}: its {first.shape[1]} features of a square form no square map")
        if self.side is not None:
            if self.side % self.unshuffle:
                raise UserError(f"{where}: unshuffle is {self.unshuffle}, its map {self.side} x {self.side}")
            self.side //= self.unshuffle
        _, self.tokens, self.width = self._tokens(first).shape
        self.parts = ((self.tokens, self.width),)

    @property
    def own_network(self) -> nn.Module:
        """The network as transformers has it."""
        return self.network.network if isinstance(self.network, Patches) else self.network

    def forward(self, pictures: Tensor) -> Tensor:
        """[N, 3, S, S] → [N, tokens, W]."""
        return self._tokens(self._features(pictures))

    def maps(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 3, S, S] → a map [N, W, h, w], and one feature of the whole picture [N, W]."""
        return self._maps(self._features(pictures))

    def _tokens(self, features: Tensor) -> Tensor:
        if self.side is None:
            return features
        maps, whole = self._maps(features)
        return as_tokens(maps, whole, self.keep_global)

    def _maps(self, features: Tensor) -> tuple[Tensor, Tensor]:
        maps = features
        if features.ndim == 3:
            maps = features[:, self.prefix :].transpose(1, 2)
            maps = maps.unflatten(2, (math.isqrt(maps.shape[2]), -1))
        maps = F.pixel_unshuffle(maps, self.unshuffle)
        has_class_token = self.prefix and self.unshuffle == 1
        return maps, features[:, 0] if has_class_token else maps.mean((2, 3))

    def _features(self, pictures: Tensor) -> Tensor:
        inputs = self._inputs(pictures)
        if not self.stages:
            return output_of(self.network, self.layer, self._exit, **inputs)
        depths = getattr(self.network.config, "depths", ())
        states = self.network(output_hidden_states=True, **inputs).hidden_states if depths else ()
        if not states or states[-1].ndim != 4:
            raise UserError("stages is set, but the encoder has no stages that give maps, as a ConvNeXt has")
        stages = states[-len(depths) :]  # before them stands what the first one gets
        return torch.cat([resized(m, stages[0].shape[-1], BILINEAR) for m in stages], 1)

    def _inputs(self, pictures: Tensor) -> dict[str, Any]:
        dtype = next(self.network.parameters()).dtype
        return {"pixel_values": self.pixels(pictures).to(dtype), **self.resampled}


def as_tokens(maps: Tensor, whole: Tensor, keep_global: bool) -> Tensor:
    """[N, W, h, w] → [N, h·w, W] in reading order, if wanted with [N, W] before it."""
    tokens = maps.flatten(2).transpose(1, 2)
    return torch.cat([whole[:, None], tokens], 1) if keep_global else tokens


def resized(maps: Tensor, side: int, mode: str) -> Tensor:
    """[N, W, h, w] → [N, W, side, side], in float32: ``"bilinear"`` (not antialiased, as Eagle) or ``"nearest"``."""
    if maps.shape[-1] == side:
        return maps
    aligned = {} if mode == "nearest" else {"align_corners": False}
    return F.interpolate(maps.float(), (side, side), mode=mode, **aligned).to(maps.dtype)


class Patches(nn.Module):
    """Pix2Struct's vision model for pixels: its patches are cut here, as its image processor would.

    Args:
        network: A ``Pix2StructVisionModel``.
    """

    def __init__(self, network: "PreTrainedModel"):
        super().__init__()
        self.network, self.config = network, network.config

    def forward(self, pixel_values: Tensor, **more: Any) -> "BaseModelOutput":
        """[N, 3, H, W] → ``last_hidden_state`` [N, patches, W]."""
        patch = math.isqrt(self.config.patch_embed_hidden_size // 3)
        cut = F.unfold(pixel_values, patch, stride=patch).unflatten(1, (3, -1))  # [N, 3, patch², patches]
        cut = cut.permute(0, 3, 2, 1).flatten(2)
        # They count from 1: 0 means padding.
        sides = [torch.arange(1, side // patch + 1, device=cut.device) for side in pixel_values.shape[2:]]
        positions = torch.cartesian_prod(*sides).to(cut.dtype).expand(len(cut), -1, -1)  # row and column of each
        mask = torch.ones(cut.shape[:2], device=cut.device)
        return self.network(flattened_patches=torch.cat([positions, cut], 2), attention_mask=mask, **more)


class Queries(nn.Module):
    """A BLIP-2 without its language model: what the Q-Former's queries gather from the vision model's features.

    Args:
        network: A ``Blip2VisionModelWithProjection``; its projection is left out.
    """

    def __init__(self, network: "PreTrainedModel"):
        super().__init__()
        self.vision_model, self.qformer = network.get_submodule("vision_model"), network.get_submodule("qformer")
        self.query_tokens, self.config = network.get_parameter("query_tokens"), network.config

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> "BaseModelOutput":
        """[N, 3, H, W] → ``last_hidden_state`` [N, queries, W]."""
        features = self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding).last_hidden_state
        queries = self.query_tokens.expand(len(features), -1, -1)
        return self.qformer(query_embeds=queries, encoder_hidden_states=features)


def load_leaf(config: LeafConfig, where: str) -> Leaf:
    """One encoder of a composition, frozen, in fp32 on the CPU.

    Raises:
        UserError: It cannot be loaded, has no image processor, or does not fit its settings.
    """
    network = _load(config.name)
    processor = load_image_processor(config.name)
    pixels = pixels_for(processor, config.size, where)
    return Leaf(network.requires_grad_(False), processor, pixels, config, license_of(config.name), where)


def _load(name: str) -> "PreTrainedModel | Patches | Queries":
    kind = load_config(name).model_type
    if kind == "blip-2":
        from transformers import Blip2VisionModelWithProjection

        return Queries(load_network(name, cls=Blip2VisionModelWithProjection))
    if kind == "pix2struct":
        from transformers import Pix2StructForConditionalGeneration

        return Patches(load_network(name, tower="encoder", cls=Pix2StructForConditionalGeneration))
    if kind == "pix2struct_vision_model":
        from transformers import Pix2StructVisionModel

        return Patches(load_network(name, cls=Pix2StructVisionModel))
    return load_network(name, tower="vision_encoder" if kind.startswith("sam") else "vision_model")


def default_layer(network: "PreTrainedModel | Patches | Queries") -> int:
    """Whose output is used where a recipe does not say: see `anymal.adapters.image.modality.ImageOptions`."""
    return -2 if network.config.model_type.startswith("clip") else -1
