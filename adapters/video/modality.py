"""Video: a clip's bytes → F frames spread evenly over it → features of a frozen encoder, frame after frame.

The encoder is either an image encoder, applied to each frame (AnyMAL-Image takes 4), or a video network (VideoMAE).
Without order a projector could not tell motion: features come frame by frame, and the resampler adds positions. How the
frames are decoded is in `anymal.adapters.video.frames`.

    N clips   F frames of a clip   tokens features of a clip   width channels of a feature
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from anymal.adapters.image.lookup import look_up
from anymal.adapters.image.mixture import Mixture
from anymal.adapters.image.modality import ImageDecoder, ImageEncoder, ImageOptions, load_image_encoder, with_lookup
from anymal.adapters.image.pictures import SquareDecoder
from anymal.adapters.pooling import pool_map
from anymal.adapters.pretrained import load_config, load_image_processor, load_network, save_network
from anymal.adapters.video.frames import read_frames
from anymal.errors import UserError
from anymal.modality import Encoder, Modality, in_chunks, parts
from anymal.model.hub import license_of
from anymal.sample import Viewable, Views

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

IMAGE_ENCODER_FRAMES = 4


@dataclass(kw_only=True)
class VideoOptions:
    """How clips are decoded and encoded."""

    frames: int = 0
    """F, frames of a clip, spread evenly over it. 0 takes the video network's own number, and 4 for an image encoder
    (AnyMAL: 4 frames through an image encoder, 8 through a video network)."""
    pool: int = 0
    """Features kept of each frame (of each pair of frames in VideoMAE): the frame's grid is averaged to a square grid
    of so many cells, so it is a square number. 0 keeps all."""
    layer: int = 0
    """Whose output is used of an image encoder, as for images."""
    views: bool = False
    """Whether each frame is projected by itself (image encoders only): a clip takes projector.tokens a frame, and fewer
    frames where data.max_tokens would be passed (as Eagle 2.5)."""
    max_seconds: float = 600.0
    """A longer clip is a bad sample."""
    max_pixels: int = 16_000_000
    """A clip whose frames have more pixels than this is a bad sample."""

    def __post_init__(self):
        if self.frames < 0 or self.pool < 0 or math.isqrt(self.pool) ** 2 != self.pool:
            raise UserError(f"frames is {self.frames} and pool is {self.pool}; frames ≥ 0, and pool a square number")


@dataclass(frozen=True, kw_only=True)
class VideoDecoder:
    """bytes → [F, 3, H, W] float32 or uint8, as `images` prepares them."""

    images: ImageDecoder | SquareDecoder
    """Prepares frames as the encoder wants them."""
    frames: int
    """F."""
    max_seconds: float
    """As in `VideoOptions`."""

    def __call__(self, data: bytes) -> Tensor:
        """Raises `BadSample`."""
        frames = read_frames(data, self.frames, self.max_seconds, self.images.max_pixels)
        return self.prepare([Image.fromarray(frame) for frame in frames])

    def prepare(self, pictures: list[Image.Image]) -> Tensor:
        """F images of mode RGB → [F, 3, H, W]."""
        pixels = self.images.prepare(pictures)["pixel_values"]
        return pixels[0] if pixels.ndim == 5 else pixels  # a video network's processor takes the frames as one clip


@dataclass(frozen=True, kw_only=True)
class FrameViewsDecoder:
    """bytes → a clip that can be shown in any number of frames up to F, spread evenly over it, [V, 3, H, W]."""

    clips: VideoDecoder
    """Reads F frames."""

    @property
    def most_views(self) -> int:
        """F."""
        return self.clips.frames

    def __call__(self, data: bytes) -> Viewable:
        """Raises `BadSample`."""
        frames = self.clips(data)

        def views(count: int) -> Views:
            return Views(tensor=frames[((torch.arange(count) + 0.5) * len(frames) / count).long()])

        return Viewable(choices=tuple(range(len(frames), 0, -1)), views=views)


class FramesEncoder(Encoder):
    """A frozen image encoder applied to each frame; tokens are the frames' features, one frame after the other."""

    def __init__(self, encoder: ImageEncoder | Mixture, decode: VideoDecoder, pool: int):
        super().__init__()
        self.encoder, self.decode, self.license, self.pool = encoder, decode, encoder.license, pool
        if pool:
            _check_pool(pool, encoder.grid)
        self.tokens, self.width = decode.frames * (pool or encoder.tokens), encoder.width
        self.shape = (decode.frames, *encoder.shape)
        self.media_dtype, self.inputs_per_medium = encoder.media_dtype, decode.frames
        self.eval()

    def forward(self, clips: Tensor) -> Tensor:
        """[N, F, 3, H, W] → [N, F · tokens of a frame, width]."""
        most = 0 if torch.is_grad_enabled() else self.encoder_batch_size
        features = in_chunks(self._frames, clips.flatten(0, 1), most)
        return features.unflatten(0, clips.shape[:2]).flatten(1, 2)

    def _frames(self, frames: Tensor) -> Tensor:
        return _pool(self.encoder(frames), self.encoder.grid, self.pool)

    @property
    def savable(self) -> bool:
        """Whether the image encoder is."""
        return self.encoder.savable

    def save_pretrained(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the image encoder, as a folder that images and video can be encoded with."""
        self.encoder.save_pretrained(folder, {n.removeprefix("encoder."): tensor for n, tensor in weights.items()})


class ClipEncoder(Encoder):
    """A frozen video network such as VideoMAE: features [N, time · rows · columns, width]."""

    savable = True
    pixel_table: Tensor | None
    """As `anymal.adapters.image.modality.ImageEncoder.pixel_table`."""

    def __init__(
        self,
        network: "PreTrainedModel",
        images: ImageDecoder,
        table: Tensor | None,
        decode: VideoDecoder,
        pool: int,
        license: str,
    ):
        super().__init__()
        self.network, self.decode, self.license, self.pool = network, decode, license, pool
        self._images = images
        self.register_buffer("pixel_table", table, persistent=False)
        config = network.config
        self.times, side = config.num_frames // config.tubelet_size, config.image_size // config.patch_size
        self.grid = (side, side)
        if pool:
            _check_pool(pool, self.grid)
        self.tokens, self.width = self.times * (pool or side * side), config.hidden_size
        self.shape = (config.num_frames, config.num_channels, config.image_size, config.image_size)
        self.media_dtype = torch.float32 if table is None else torch.uint8
        self.inputs_per_medium = config.num_frames
        self.eval()

    def forward(self, clips: Tensor) -> Tensor:
        """[N, F, 3, H, W] → [N, tokens, width]."""
        if clips.dtype == torch.uint8 and self.pixel_table is not None:
            clips = look_up(self.pixel_table, clips)
        features = self.network(pixel_values=clips).last_hidden_state
        features = _pool(features.unflatten(1, (self.times, -1)).flatten(0, 1), self.grid, self.pool)
        return features.unflatten(0, (len(clips), self.times)).flatten(1, 2)

    def save_pretrained(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write a folder that the loader of this modality reads; `weights` are a whole state dict of this encoder."""
        save_network(self.network, self._images.processor, folder, weights, self.license)


def _check_pool(pool: int, grid: tuple[int, int] | None) -> None:
    if grid is None or math.isqrt(pool) > min(grid):
        raise UserError(f"pool is {pool}, but the encoder's features of a frame form a grid of {grid or 'no shape'}")


def _pool(features: Tensor, grid: tuple[int, int] | None, pool: int) -> Tensor:
    """[M, rows · columns, width] → [M, pool, width], averaged over a square grid."""
    if not pool:
        return features
    maps = features.transpose(1, 2).unflatten(2, grid)
    return pool_map(maps, math.isqrt(pool)).flatten(2).transpose(1, 2)


def load_video_encoder(
    name: str | Mapping[str, Any], options: VideoOptions
) -> ClipEncoder | FramesEncoder | ImageEncoder | Mixture:
    """A video network, or an image encoder (a composition, too) for each frame; frozen, in fp32 on the CPU.

    Returns:
        With `options.views` the image encoder itself: it takes the frames as views.

    Raises:
        UserError: It cannot be loaded, or takes another number of frames than `options.frames`.
    """
    if isinstance(name, str) and hasattr(config := load_config(name), "tubelet_size"):
        return _load_clip_encoder(name, config, options)
    encoder = load_image_encoder(name, ImageOptions(layer=options.layer, max_pixels=options.max_pixels))
    if len(parts(encoder)) > 1:
        raise UserError("the encoder appends several kinds of features; those of frames have to be of one kind")
    frames = options.frames or IMAGE_ENCODER_FRAMES
    decode = VideoDecoder(images=encoder.images, frames=frames, max_seconds=options.max_seconds)
    if not options.views:
        return FramesEncoder(encoder, decode, options.pool)
    if options.pool:
        raise UserError("pool has no meaning with views=true: projector.tokens says what a frame takes")
    encoder.decode = FrameViewsDecoder(clips=decode)
    return encoder


def _load_clip_encoder(name: str, config: "PreTrainedConfig", options: VideoOptions) -> ClipEncoder:
    if options.views:
        raise UserError(f"views=true is for image encoders; {name!r} takes whole clips")
    if options.frames not in (0, config.num_frames):
        raise UserError(f"frames is {options.frames}, but {name!r} takes {config.num_frames}")
    network = load_network(name)
    images, table = with_lookup(ImageDecoder(processor=load_image_processor(name), max_pixels=options.max_pixels))
    decode = VideoDecoder(images=images, frames=config.num_frames, max_seconds=options.max_seconds)
    return ClipEncoder(network, images, table, decode, options.pool, license_of(name))


MODALITY = Modality(
    name="video", suffixes=("webm", "mp4", "mkv", "avi", "mov"), options=VideoOptions, load=load_video_encoder
)
