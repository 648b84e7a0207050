"""Images: a picture's bytes → pixels (in a loader worker) → patch features of a frozen vision encoder.

Any vision encoder of transformers: CLIP, SigLIP, SigLIP 2, DINOv2, …, by hub name or local folder. From a
two-tower model only the vision tower is kept. The encoder's own image processor prepares the pixels (its PIL variant,
so that results do not depend on whether torchvision is installed). Several encoders together: `anymal.adapters.image.mixture`.

    N images   H, W pixels after preprocessing   tokens features of an image   width channels of a feature
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anymal.adapters.image.tiles import cut, grid_rule, largest_grid
from anymal.adapters.pretrained import call, license_of, load_network, save_network
from anymal.errors import BadSample, UserError
from anymal.modality import Modality
from anymal.sample import Viewable, Views

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What is decoded. Pillow knows more; some of those start other programs, and none holds photos on the web."""
ANIMATED = ("GIF", "PNG", "WEBP")
"""Of these, those whose further frames are moments; a JPEG's are previews and depth maps of the same."""
ORIENTATION = 0x0112
"""The Exif tag that says how a camera was held."""
PADDING = (127, 127, 127)
"""Colour beside a picture that does not fill its tiles."""
LARGE = 1 << 24
"""Pixels of a picture that is decoded as it is (4096 x 4096): of a larger one, squares of 2 x 2 pixels (or more) are
averaged first, a strip at a time, since every copy of 64 million pixels takes 256 MB. No encoder sees as many."""
MAX_BYTES = 1 << 27
"""Of a picture's file."""
MAX_WEBP = 1 << 25
"""Pixels of a WebP, whose decoder holds each five times."""
MAX_EXIF = 64
"""Pieces (of 64 kB) of a JPEG's Exif data. Pillow joins them one by one: 2000 take a minute."""
MAX_SCANS = 32
"""Of a progressive JPEG. Encoders write about ten; each goes over the whole picture, and ten thousand take 26 s."""
MAX_SEGMENTS = 4096
"""Of a JPEG: scans, tables, and metadata in pieces of 64 kB."""
_MARKER = re.compile(
    rb"\xff[^\x00\x01\xff\xd0-\xd7]"
)  # of a JPEG's segment, or of its end; within scans it is never data
MAX_ASPECT = 50
"""Longest side over shortest. Encoders scale the short side to hundreds of pixels: a line of 1 x 60000 gets huge."""


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


def read_image(data: bytes, max_pixels: int) -> Any:
    """Decode a picture, its orientation applied and its transparency put on white.

    Returns:
        A PIL image in mode RGB.

    Raises:
        BadSample: Not a picture of a known format, cut off, animated, or larger than the bounds.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if len(data) > MAX_BYTES:
        raise BadSample(f"a picture of {len(data)} bytes; at most {MAX_BYTES} are read")
    if data.count(b"Exif\0\0") > MAX_EXIF:
        raise BadSample(f"a picture with more than {MAX_EXIF} pieces of Exif data")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about large headers; we refuse them
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = picture.size
            if width * height > max_pixels:
                raise BadSample(
                    f"a picture of {width} x {height} pixels; at most {max_pixels} are decoded (max_pixels)"
                )
            if picture.format == "WEBP" and width * height > MAX_WEBP:
                raise BadSample(f"a WebP of {width} x {height} pixels; at most {MAX_WEBP} are decoded")
            check_aspect(width, height)
            if picture.format in ("JPEG", "MPO"):
                _check_scans(data)
            if picture.format in ANIMATED and getattr(picture, "is_animated", False):
                raise BadSample(
                    f"an animated {picture.format}, of which an image would be the first frame alone; convert it to a "
                    "video (mp4, webm) or to a single picture"
                )
            if width * height > LARGE:
                picture = _reduced(picture)
            return _rgb(ImageOps.exif_transpose(picture))
    except BadSample:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own bound, twice its MAX_IMAGE_PIXELS
        raise BadSample(f"a picture with too many pixels: {error}") from error
    except Exception as error:  # Pillow's decoders raise whatever their parsing stumbles over
        cause = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
        raise BadSample(
            f"{len(data)} bytes that begin with {data[:12]!r} are no whole picture ({', '.join(FORMATS)}){cause}"
        ) from error


def _check_scans(data: bytes) -> None:
    """Refuse a JPEG of very many scans. What follows its end is not looked at: the film of a motion photo, for example.

    Raises:
        BadSample: It is one.
    """
    scans, place = 0, 2
    for _ in range(MAX_SEGMENTS):
        found = _MARKER.search(data, place)
        if found is None or found[0] == b"\xff\xd9":
            return
        scans += found[0] == b"\xff\xda"
        if scans > MAX_SCANS:
            raise BadSample(f"a JPEG of more than {MAX_SCANS} scans")
        place = found.end() + int.from_bytes(data[found.end() : found.end() + 2])
    raise BadSample(f"a JPEG of more than {MAX_SEGMENTS} segments")


def _rgb(picture: Any) -> Any:
    """A PIL image of any mode → one of mode RGB."""
    from PIL import Image

    if picture.mode.startswith("I"):  # 16 bits a channel: convert() would clip it to white
        picture = picture.point(lambda value: value / 256).convert("L")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _reduced(picture: Any) -> Any:
    """A large PIL image → one of mode RGB and at most `LARGE` pixels, each the mean of a square of the picture's."""
    from PIL import Image

    width, height = picture.size
    factor = math.ceil(math.sqrt(width * height / LARGE))
    made = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    rows = 64 * factor
    for top in range(0, height, rows):
        strip = picture.crop((0, top, width, min(top + rows, height)))
        made.paste(_rgb(strip).reduce(factor), (0, top // factor))
    if orientation := picture.getexif().get(ORIENTATION):
        made.getexif()[ORIENTATION] = orientation
    return made


def check_aspect(width: int, height: int) -> None:
    """Refuse a picture that is so long and thin that scaling its short side up would fill the memory.

    Raises:
        BadSample: It is, or it is empty.
    """
    if min(width, height) < 1 or max(width, height) > MAX_ASPECT * min(width, height):
        raise BadSample(f"a picture of {width} x {height} pixels; its sides may differ by a factor of {MAX_ASPECT}")


@dataclass(frozen=True, kw_only=True)
class ImageDecoder:
    """bytes → [3, H, W] float32 (or what else the encoder's processor makes of one picture)."""

    processor: Any
    """The encoder's image processor."""
    max_pixels: int
    """As in `ImageOptions`."""
    square: bool = False
    """Squash pictures to squares first: for processors whose output would otherwise vary in shape."""

    def __call__(self, data: bytes) -> Tensor:
        """Raises `BadSample`."""
        return self.prepare([read_image(data, self.max_pixels)])["pixel_values"][0]

    def prepare(self, pictures: Sequence[Any]) -> dict[str, Tensor]:
        """PIL images of mode RGB → the processor's tensors, stacked over the pictures, ``pixel_values`` first."""
        if self.square:
            side = max(max(picture.size) for picture in pictures)
            pictures = [picture.resize((side, side)) for picture in pictures]
        made = self.processor(images=list(pictures), return_tensors="pt")
        tensors = {key: torch.as_tensor(value) for key, value in made.items()}
        return tensors | {"pixel_values": tensors["pixel_values"].float()}


@dataclass(frozen=True, kw_only=True)
class TilesDecoder:
    """bytes → a picture that can be cut into views [V, 3, H, W]."""

    images: ImageDecoder
    """Prepares each view."""
    rule: Callable[[tuple[int, int], int, int], tuple[int, int]]
    """As `anymal.adapters.image.tiles.grid_rule` gives it."""
    side: int
    """Pixels of a view's side."""
    most: int
    """Most tiles."""
    pad: tuple[int, int, int] | None
    """As in `anymal.adapters.image.tiles.cut`."""

    @property
    def processor(self) -> Any:
        """The encoder's image processor."""
        return self.images.processor

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
            found = cut(picture, grids[count], self.side, pad=self.pad)
            made = self.images.prepare([view for view in found if view is not None])["pixel_values"]
            return Views(tensor=made, skipped=tuple(view is None for view in found))

        return Viewable(choices=tuple(sorted(grids, reverse=True)), views=views)


def default_layer(network: nn.Module) -> int:
    """Whose output is used where a recipe does not say: see `ImageOptions`."""
    return -2 if network.config.model_type.startswith("clip") else -1


def output_of(network: nn.Module, layer: int, **inputs: Any) -> Tensor:
    """What a layer, counted from the end, makes of the inputs: [N, tokens, width], or a map [N, width, h, w].

    Raises:
        UserError: The network has fewer layers.
    """
    if layer == -1:
        return network(**inputs).last_hidden_state
    states = network(output_hidden_states=True, **inputs).hidden_states
    if len(states) < -layer:
        raise UserError(f"layer is {layer}, but the encoder has only {len(states) - 1} layers")
    return states[layer]


class ImageEncoder(nn.Module):
    """A frozen vision network that gives patch features: class and register tokens are dropped.

    Args:
        network: [N, 3, H, W] → an output with ``last_hidden_state`` [N, patches (+ others), width], or a feature map
            [N, width, h, w], which becomes h·w tokens in reading order.
        decode: Its decoding.
        layer: As in `ImageOptions`.
        license: The weights' licence.
    """

    def __init__(self, network: nn.Module, decode: ImageDecoder, layer: int, license: str):
        super().__init__()
        self.network, self.decode, self.license = network, decode, license
        self.layer = layer or default_layer(network)
        self.constants: list[str] = []
        sample = decode.prepare([_blank()])
        self.shape = tuple(sample["pixel_values"].shape[1:])
        for key, value in sample.items():  # NaFlex encoders also take a mask and a shape, the same for every square
            if key != "pixel_values":
                self.register_buffer(f"constant_{key}", value, persistent=False)
                self.constants.append(key)
        self.prefix, self.grid = 0, None
        with torch.no_grad():
            first = self._network(sample["pixel_values"])
        if first.ndim == 4:
            self.grid = tuple(first.shape[2:])
        else:
            patches = self._patches(sample["pixel_values"])
            self.prefix = max(first.shape[1] - patches, 0) if patches else 0
            side = math.isqrt(first.shape[1] - self.prefix)
            self.grid = (side, side) if side * side == first.shape[1] - self.prefix else None
        _, self.tokens, self.width = self._tokens(first).shape
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] → [N, tokens, width]."""
        return self._tokens(self._network(pixels))

    savable = True

    def save_pretrained(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write a folder that the loader of this modality reads; `weights` are a whole state dict of this encoder."""
        save_network(self.network, self.decode.processor, folder, weights, self.license)

    def _network(self, pixels: Tensor) -> Tensor:
        constants = {}
        for key in self.constants:
            value = getattr(self, f"constant_{key}")
            constants[key] = value.expand(len(pixels), *value.shape[1:])
        return output_of(self.network, self.layer, pixel_values=pixels, **constants)

    def _tokens(self, features: Tensor) -> Tensor:
        return features.flatten(2).transpose(1, 2) if features.ndim == 4 else features[:, self.prefix :]

    def _patches(self, pixels: Tensor) -> int:
        patch = getattr(self.network.config, "patch_size", None)
        if pixels.ndim == 3:  # patches were cut by the processor
            return pixels.shape[1]
        if not isinstance(patch, int):
            return 0
        return (pixels.shape[2] // patch) * (pixels.shape[3] // patch)


def _blank() -> Any:
    from PIL import Image

    return Image.new("RGB", (256, 256))


def load_image_encoder(name: str | Mapping[str, Any], options: ImageOptions) -> nn.Module:
    """A vision encoder by hub name or local folder, or a composition; frozen, in fp32 on the CPU, with its decoding.

    Raises:
        UserError: It cannot be loaded, has no image processor, or not as many layers as `options.layer` asks for.
    """
    if not isinstance(name, str):
        from anymal.adapters.image.mixture import load_mixture

        return with_tiles(load_mixture(name, options), options)
    network = load_network(name, tower="vision_model")
    from transformers import AutoImageProcessor

    processor = call(
        "image processor", name, AutoImageProcessor.from_pretrained, backend="pil", trust_remote_code=False
    )
    flexible = network.config.model_type.startswith("siglip2")
    decode = ImageDecoder(processor=processor, max_pixels=options.max_pixels, square=flexible)
    return with_tiles(ImageEncoder(network, decode, options.layer, license_of(name)), options)


def with_tiles(encoder: ImageEncoder, options: ImageOptions) -> ImageEncoder:
    """The encoder with a decoding that makes views of large pictures, if the options ask for it.

    Raises:
        UserError: There is no such rule.
    """
    if options.tiles != "none":
        rule = grid_rule(options.tiles)
        side = encoder.shape[-1]
        encoder.decode = TilesDecoder(
            images=encoder.decode, rule=rule, side=side, most=options.max_tiles, pad=PADDING if options.pad else None
        )
        encoder.skips = options.pad
    return encoder


MODALITY = Modality(
    name="image",
    suffixes=("jpeg", "webp", "jpg", "png", "gif", "bmp"),
    options=ImageOptions,
    load=load_image_encoder,
)
