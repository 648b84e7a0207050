"""Pixels that travel as bytes: the same features to the bit as through the image processor, and refused where not."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_encoders as tiny
from anymal.adapters import REGISTRY
from anymal.adapters.image.lookup import look_up, lookup_table
from anymal.adapters.image.modality import ImageOptions, load_image_encoder
from anymal.adapters.pretrained import load_image_processor
from anymal.adapters.video.frames import read_frames
from anymal.checkpoints.build import load_encoder
from anymal.config.schema import ModalityConfig
from anymal.modality import zero_media
from anymal.sample import Viewable

PROCESSORS = {
    "clip": (tiny.clip, {}),
    "siglip": (tiny.siglip, {}),
    "dinov2": (tiny.dinov2, {}),
    "convnext": (tiny.convnext, {}),
    "efficientnet_lite": (tiny.efficientnet_lite, {"image_mean": [0.498] * 3, "image_std": [0.502] * 3}),
    "not rescaled": (tiny.clip, {"do_rescale": False, "image_mean": [100.0, 110.0, 90.0], "image_std": [50.0] * 3}),
    "not normalised": (tiny.siglip, {"do_normalize": False}),
    "bytes as they are": (tiny.dinov2, {"do_rescale": False, "do_normalize": False}),
    "another factor": (tiny.siglip, {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}),
}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """float32 numbers as integers: zero and minus zero differ."""
    return tensor.contiguous().view(torch.int32)


def folder_of(make, folder: Path, **settings) -> str:
    """A tiny encoder whose image processor has other settings."""
    name = make(folder)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return name


@pytest.mark.parametrize("kind", PROCESSORS)
def test_features_through_bytes_are_those_through_floats(kind, tmp_path):
    make, settings = PROCESSORS[kind]
    name = folder_of(make, tmp_path, **settings)
    encoder = load_image_encoder(name, ImageOptions())
    for size in ((48, 40), (40, 90), (32, 32), (300, 200)):
        data = tiny.picture(size=size)
        medium, pixels = encoder.decode(data), tiny.processed(name, tiny.opened(data))
        assert (medium.dtype, medium.shape, encoder.media_dtype) == (torch.uint8, pixels[0].shape, torch.uint8)
        assert medium.nbytes * 4 == pixels.nbytes, "a quarter travels"
        assert torch.equal(bits(look_up(encoder.pixel_table, medium[None])), bits(pixels))
        assert torch.equal(bits(encoder(medium[None])), bits(encoder(pixels)))
    half = encoder.to(torch.bfloat16)
    assert torch.equal(half(medium[None]), half(pixels.bfloat16())), "as on a GPU"


@pytest.mark.parametrize("name", ["efficientnet_lite", "videomae"])
def test_frames_of_clips_travel_as_bytes(name, tmp_path):
    folder, data = getattr(tiny, name)(tmp_path), tiny.clip_bytes(20)
    encoder = load_encoder(REGISTRY, "video", ModalityConfig(encoder=folder, options={"frames": 4}))
    frames = [Image.fromarray(frame) for frame in read_frames(data, 4, 10, 10**6)]
    clip, pixels = encoder.decode(data), tiny.processed(folder, *frames)
    assert (clip.dtype, clip.shape, encoder.media_dtype) == (torch.uint8, encoder.shape, torch.uint8)
    assert torch.equal(bits(encoder(clip[None])), bits(encoder(pixels.reshape(1, *encoder.shape))))


def test_tiles_travel_as_bytes(tmp_path):
    encoder = load_image_encoder(tiny.clip(tmp_path), ImageOptions(tiles="2x2"))
    medium = encoder.decode(tiny.picture(size=(90, 64)))
    assert isinstance(medium, Viewable)
    views = medium.views(5).tensor
    assert (views.dtype, views.shape[1:]) == (torch.uint8, encoder.shape)
    whole = load_image_encoder(str(tmp_path), ImageOptions())
    assert torch.equal(views[0], whole.images.prepare([tiny_view(90, 64, whole.shape[-1])])["pixel_values"][0])


def tiny_view(width: int, height: int, side: int) -> Image.Image:
    """The whole picture as a view: scaled to fit, grey below."""
    from anymal.adapters.image.modality import PADDING
    from anymal.adapters.image.tiles import fit

    return fit(tiny.opened(tiny.picture(size=(width, height))), (side, side), PADDING)[0]


@pytest.mark.parametrize("make", [tiny.siglip2, tiny.pix2struct, tiny.sam], ids=lambda make: make.__name__)
def test_other_processors_are_refused(make, tmp_path):
    """One cuts patches, one normalises each picture by itself, one fills up after normalising."""
    assert lookup_table(load_image_processor(make(tmp_path))) is None


def test_a_processor_that_normalises_each_picture_by_itself_is_refused(tmp_path):
    from transformers import CLIPImageProcessorPil

    class ByItself(CLIPImageProcessorPil):
        def normalize(self, image: np.ndarray, mean, std, **more) -> np.ndarray:
            return (image - image.mean()) / image.std()

    plain = load_image_processor(tiny.clip(tmp_path))
    assert lookup_table(plain) is not None
    assert lookup_table(ByItself(**plain.to_dict())) is None


def test_an_encoder_that_is_refused_gets_floats_as_before(tmp_path):
    encoder = load_image_encoder(tiny.siglip2(tmp_path), ImageOptions())
    assert encoder.media_dtype == encoder.decode(tiny.picture()).dtype == torch.float32


def test_an_encoder_that_learns_takes_bytes(tmp_path):
    encoder = load_image_encoder(tiny.clip(tmp_path), ImageOptions()).requires_grad_(True)
    data = tiny.picture()
    gradients = []
    for medium in (encoder.decode(data)[None], tiny.processed(str(tmp_path), tiny.opened(data))):
        encoder.zero_grad()
        encoder(medium).square().sum().backward()
        gradients.append(encoder.network.embeddings.patch_embedding.weight.grad.clone())
    assert torch.equal(*gradients)


@pytest.mark.parametrize("kind", ["clip", "siglip2", "mixture"])
def test_zero_media_are_of_the_dtype_in_which_media_travel(kind, tmp_path):
    encoder = load_image_encoder(tiny.ENCODERS["image"][kind](tmp_path), ImageOptions())
    zeros = zero_media(encoder, 2, torch.device("cpu"))
    assert zeros.dtype == encoder.decode(tiny.picture()).dtype
    if kind != "siglip2":
        assert encoder(zeros).shape == encoder(zeros.float()).shape == (2, encoder.tokens, encoder.width)
