"""Images: a picture's bytes → pixels (in a loader worker) → patch features of a frozen vision encoder.

Any vision encoder of transformers: CLIP, SigLIP, SigLIP 2, DINOv2, …, by hub name or local folder. From a
two-tower model only the vision tower is kept. The encoder's own image processor prepares the pixels (its PIL variant,
so that results do not depend on whether torchvision is installed). Several encoders together:
`anymal.adapters.image.mixture`.

    N images   H, W pixels after preprocessing   tokens features of an image   width channels of a feature
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from anymal.adapters.image.backbone import default_layer
from anymal.adapters.image.layers import find_exit, leave_out_head, output_of
from anymal.adapters.image.lookup import AS_BYTES, look_up, lookup_table
from anymal.adapters.image.mixture import Mixture, load_mixture
from anymal.adapters.image.pictures import SquareDecoder
from anymal.adapters.image.read import read_image
from anymal.adapters.image.tiles import Colour, Grid, Size, cut, grid_rule, largest_grid
from anymal.adapters.pretrained import load_image_processor, load_network, save_network
from anymal.errors import UserError
from anymal.modality import Encoder, Modality
from anymal.model.hub import license_of
from anymal.sample import Viewable, Views

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel

PADDING = (127, 127, 127)
"""Colour beside a picture that does not fill its tiles."""


@dataclass(kw_only=True)
class ImageOptions:
    """How images are decoded and encoded."""

    layer: int = 0
    """Whose output is used, counted from the end: -1 the last layer's, -2 the one before. 0 takes -2 for CLIP, whose
    last layer only serves its class token (as LLaVA does), and -1 for others."""
    max_pixels: int = 64_000_000
    """A picture with more pixels than this (or 179 million) is a bad sample. Judged by its header, not decoded."""
    tiles: str = "none"
    """Large pictures as several views, the whole one first: none, columns x rows such as 2x2 (SPHINX, Mini-Gemini-HD),
    any_resolution (LLaVA-NeXT) or area (Eagle 2.5). A view takes projector.tokens; where data.max_tokens would be
    passed, pictures get fewer views."""
    max_tiles: int = 12
    """Most tiles of a picture, beside the whole one (any_resolution and area)."""
    pad: bool = True
    """Whether a picture of another shape than its grid of tiles is padded with grey, or squashed. A tile that holds
    nothing but padding is not encoded: one learnt embedding stands in its place."""

    def __post_init__(self):
        if self.max_tiles < 1:
            raise UserError(f"max_tiles is {self.max_tiles}; it must be at least 1")
        if self.layer > 0:
            raise UserError(f"layer is {self.layer}; it counts from the end, so it is negative (or 0 for the default)")


@dataclass(frozen=True, kw_only=True)
class ImageDecoder:
    """bytes → [3, H, W] float32 or uint8 (or what else the encoder's processor makes of one picture)."""

    processor: "BaseImageProcessor"
    """The encoder's image processor."""
    max_pixels: int
    """As in `ImageOptions`."""
    square: bool = False
    """Squash pictures to squares first: for processors whose output would otherwise vary in shape."""
    as_bytes: bool = False
    """Whether pixels stay uint8, since the encoder looks up what the processor would have made of them."""

    def __call__(self, data: bytes) -> Tensor:
        """Raises `BadSample`."""
        return self.prepare([read_image(data, self.max_pixels)])["pixel_values"][0]

    def prepare(self, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Images of mode RGB → the processor's tensors, stacked over the pictures.

        ``pixel_values`` are float32, or uint8 where they are to be looked up.
        """
        if self.square:
            side = max(max(picture.size) for picture in pictures)
            pictures = [picture.resize((side, side)) for picture in pictures]
        arguments: dict[str, Any] = AS_BYTES if self.as_bytes else {}
        outputs = self.processor(images=list(pictures), return_tensors="pt", **arguments)
        tensors = {key: torch.as_tensor(value) for key, value in outputs.items()}
        return tensors if self.as_bytes else tensors | {"pixel_values": tensors["pixel_values"].float()}


def with_lookup(images: ImageDecoder) -> tuple[ImageDecoder, Tensor | None]:
    """The decoder with pixels as uint8 and the table of what they stand for, if its processor allows it to the bit."""
    table = lookup_table(images.processor)
    return replace(images, as_bytes=table is not None), table


@dataclass(frozen=True, kw_only=True)
class TilesDecoder:
    """bytes → a picture that can be cut into views [V, 3, H, W]."""

    images: ImageDecoder | SquareDecoder
    """Prepares each view."""
    rule: Callable[[Size, int, int], Grid]
    """As `anymal.adapters.image.tiles.grid_rule` gives it."""
    side: int
    """Pixels of a view's side."""
    most: int
    """Most tiles."""
    pad: Colour | None
    """As in `anymal.adapters.image.tiles.cut`."""

    @property
    def most_views(self) -> int:
        """The largest grid's tiles, and the whole picture."""
        tiles = largest_grid(self.rule, self.side, self.most)
        return tiles + (tiles > 1)

    def __call__(self, data: bytes) -> Viewable:
        """Raises `BadSample`."""
        picture = read_image(data, self.images.max_pixels)
        grids = {1: (1, 1)}  # by the number of views
        for most in range(1, self.most + 1):
            columns, rows = self.rule(picture.size, self.side, most)
            grids[columns * rows + (columns * rows > 1)] = (columns, rows)

        def views(count: int) -> Views:
            tiles = cut(picture, grids[count], self.side, pad=self.pad)
            pixels = self.images.prepare([tile for tile in tiles if tile is not None])["pixel_values"]
            return Views(tensor=pixels, skipped=tuple(tile is None for tile in tiles))

        return Viewable(choices=tuple(sorted(grids, reverse=True)), views=views)


class ImageEncoder(Encoder):
    """A frozen vision network that gives patch features: class and register tokens are dropped.

    Args:
        network: [N, 3, H, W] → an output with ``last_hidden_state`` [N, patches (+ others), width], or a feature map
            [N, width, h, w], which becomes h·w tokens in reading order.
        decode: Its decoding. What is kept of it gives pixels as uint8 where its processor allows that.
        layer: As in `ImageOptions`.
        license: The weights' licence.
    """

    savable = True
    pixel_table: Tensor | None
    """[3, 256], what each byte of each channel stands for (`anymal.adapters.image.lookup`)."""

    def __init__(self, network: "PreTrainedModel", decode: ImageDecoder, layer: int, license: str):
        super().__init__()
        self.network, self.license = network, license
        decode, table = with_lookup(decode)
        self.decode = self._images = decode
        self.register_buffer("pixel_table", table, persistent=False)
        self.media_dtype = torch.float32 if table is None else torch.uint8
        self.layer = layer or default_layer(network)
        self.constants: list[str] = []
        sample = decode.prepare([Image.new("RGB", (256, 256))])
        self.shape = tuple(sample["pixel_values"].shape[1:])
        for key, value in sample.items():  # NaFlex encoders also take a mask and a shape, the same for every square
            if key != "pixel_values":
                self.register_buffer(f"constant_{key}", value, persistent=False)
                self.constants.append(key)
        self.prefix = 0
        self.grid: tuple[int, int] | None = None
        leave_out_head(network)
        self._exit = None
        with torch.no_grad():
            self._exit = find_exit(network, self.layer, **self._inputs(sample["pixel_values"]))
            first = self._network(sample["pixel_values"])
        if first.ndim == 4:
            self.grid = (first.shape[2], first.shape[3])
        else:
            patches = self._patches(sample["pixel_values"])
            self.prefix = max(first.shape[1] - patches, 0) if patches else 0
            side = math.isqrt(first.shape[1] - self.prefix)
            self.grid = (side, side) if side * side == first.shape[1] - self.prefix else None
        _, self.tokens, self.width = self._tokens(first).shape
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] → [N, tokens, width]: of uint8 as `decode` gives it, or of pixels as the network takes them."""
        return self._tokens(self._network(pixels))

    @property
    def images(self) -> ImageDecoder:
        """Prepares whole pictures, whatever `decode` does."""
        return self._images

    def save_pretrained(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write a folder that the loader of this modality reads; `weights` are a whole state dict of this encoder."""
        save_network(self.network, self.images.processor, folder, weights, self.license)

    def _network(self, pixels: Tensor) -> Tensor:
        return output_of(self.network, self.layer, self._exit, **self._inputs(pixels))

    def _inputs(self, pixels: Tensor) -> dict[str, Tensor]:
        if pixels.dtype == torch.uint8 and self.pixel_table is not None:
            pixels = look_up(self.pixel_table, pixels)
        inputs = {"pixel_values": pixels}
        for key in self.constants:
            value = getattr(self, f"constant_{key}")
            inputs[key] = value.expand(len(pixels), *value.shape[1:])
        return inputs

    def _tokens(self, features: Tensor) -> Tensor:
        return features.flatten(2).transpose(1, 2) if features.ndim == 4 else features[:, self.prefix :]

    def _patches(self, pixels: Tensor) -> int:
        patch = getattr(self.network.config, "patch_size", None)
        if pixels.ndim == 3:  # patches were cut by the processor
            return pixels.shape[1]
        if not isinstance(patch, int):
            return 0
        return (pixels.shape[2] // patch) * (pixels.shape[3] // patch)


def load_image_encoder(name: str | Mapping[str, Any], options: ImageOptions) -> ImageEncoder | Mixture:
    """A vision encoder by hub name or local folder, or a composition; frozen, in fp32 on the CPU, with its decoding.

    Raises:
        UserError: It cannot be loaded, has no image processor, or not as many layers as `options.layer` asks for.
    """
    if not isinstance(name, str):
        if options.layer:
            raise UserError("options.layer is for an encoder that is named alone; in a composition each has its layer")
        return with_tiles(load_mixture(name, max_pixels=options.max_pixels), options)
    network = load_network(name, tower="vision_model")
    flexible = network.config.model_type.startswith("siglip2")
    decode = ImageDecoder(processor=load_image_processor(name), max_pixels=options.max_pixels, square=flexible)
    return with_tiles(ImageEncoder(network, decode, options.layer, license_of(name)), options)


def with_tiles(encoder: ImageEncoder | Mixture, options: ImageOptions) -> ImageEncoder | Mixture:
    """The encoder with a decoding that makes views of large pictures, if the options ask for it.

    Raises:
        UserError: There is no such rule.
    """
    if options.tiles != "none":
        rule = grid_rule(options.tiles)
        side = encoder.shape[-1]
        encoder.decode = TilesDecoder(
            images=encoder.images, rule=rule, side=side, most=options.max_tiles, pad=PADDING if options.pad else None
        )
        encoder.skips = options.pad
    return encoder


MODALITY = Modality(
    name="image",
    suffixes=("jpeg", "webp", "jpg", "png", "gif", "bmp"),
    options=ImageOptions,
    load=load_image_encoder,
)
