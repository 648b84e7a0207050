"""Images: pictures of any kind become RGB, bad ones are refused, features are those of transformers."""

import io

import numpy as np
import pytest
import torch

import tiny_encoders as tiny
from anymal.adapters.image.modality import ImageOptions, load_image_encoder
from anymal.adapters.image.read import read_image
from anymal.errors import BadSample, UserError
from tiny_encoders import picture


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGB", "JPEG"), ("L", "PNG"), ("CMYK", "JPEG"), ("P", "GIF"), ("1", "PNG")]
)
def test_pictures_of_any_mode_become_rgb(mode, kind):
    decoded = read_image(picture(mode, kind=kind), 10_000)
    assert (decoded.mode, decoded.size) == ("RGB", (48, 40))


def test_transparent_becomes_white():
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(stream, "PNG")
    assert read_image(stream.getvalue(), 100).getpixel((3, 3)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped():
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8), 128 * 256, np.uint16)).save(stream, "PNG")
    assert read_image(stream.getvalue(), 100).getpixel((3, 3)) == (128, 128, 128)


def test_orientation_of_a_photo_is_applied():
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    assert read_image(picture(kind="JPEG", exif=exif), 10_000).size == (40, 48)


def test_large_and_long_pictures_are_refused_by_their_header():
    with pytest.raises(BadSample, match=r"10000 x 10000 pixels; at most 64000000"):
        read_image(tiny.png_header(10_000, 10_000), 64_000_000)
    with pytest.raises(BadSample, match=r"too many pixels"):
        read_image(tiny.png_header(40_000, 40_000), 64_000_000)
    with pytest.raises(BadSample, match=r"60000 x 1 pixels; its sides may differ by a factor of 50"):
        read_image(tiny.png_header(60_000, 1), 64_000_000)


def frames(kind: str, count: int) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    first, *others = [Image.new("RGB", (8, 8), (30 * i, 0, 0)) for i in range(count)]
    first.save(stream, kind, save_all=True, append_images=others, **({"duration": 40} if kind != "MPO" else {}))
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animated_pictures_are_refused_by_name(kind):
    with pytest.raises(BadSample, match=f"an animated {kind}, .* convert it to a video"):
        read_image(frames(kind, 3), 10_000)
    assert read_image(frames(kind, 1), 10_000).size == (8, 8)


def test_a_photo_with_previews_is_no_animation():
    assert read_image(frames("MPO", 2), 10_000).size == (8, 8)


def test_program_starting_formats_are_refused():
    with pytest.raises(BadSample, match="no whole picture"):
        read_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", 10_000)


def test_clip_gives_the_patches_of_the_last_layer_but_one(tmp_path):
    from transformers import CLIPModel

    encoder = load_image_encoder(tiny.clip(tmp_path), ImageOptions())
    pixels = tiny.processed(str(tmp_path), tiny.opened(picture()))
    with torch.no_grad():
        states = CLIPModel.from_pretrained(tmp_path).vision_model(pixels, output_hidden_states=True).hidden_states
    assert torch.allclose(encoder(encoder.decode(picture())[None]), states[-2][:, 1:], atol=1e-6)
    last = load_image_encoder(str(tmp_path), ImageOptions(layer=-1))
    assert torch.allclose(last(last.decode(picture())[None]), states[-1][:, 1:], atol=1e-6)
    assert not any("text" in name for name, _ in encoder.named_parameters())
    with pytest.raises(UserError, match="only 3 layers"):
        load_image_encoder(str(tmp_path), ImageOptions(layer=-9))


def test_dinov2_and_siglip_give_their_patches(tmp_path):
    from transformers import Dinov2Model, Siglip2VisionModel, SiglipVisionModel

    for make, cls, skip in ((tiny.dinov2, Dinov2Model, 1), (tiny.siglip, SiglipVisionModel, 0)):
        encoder = load_image_encoder(make(tmp_path / cls.__name__), ImageOptions())
        pixels = tiny.processed(str(tmp_path / cls.__name__), tiny.opened(picture()))
        with torch.no_grad():
            expected = cls.from_pretrained(tmp_path / cls.__name__)(pixels).last_hidden_state[:, skip:]
        assert encoder.tokens == 16
        assert torch.allclose(encoder(encoder.decode(picture())[None]), expected, atol=1e-6)
    encoder = load_image_encoder(tiny.siglip2(tmp_path / "naflex"), ImageOptions())
    made = encoder.decode.processor(images=read_image(picture(size=(40, 40)), 10_000), return_tensors="pt")
    with torch.no_grad():
        expected = Siglip2VisionModel.from_pretrained(tmp_path / "naflex")(**made).last_hidden_state
    assert torch.allclose(encoder(encoder.decode(picture(size=(40, 40)))[None]), expected, atol=1e-6)
    assert encoder.decode(picture(size=(90, 30))).shape == encoder.decode(picture()).shape


def test_efficientnet_lite0_has_the_published_size():
    from anymal.adapters.architectures.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel

    model = EfficientNetLiteModel(EfficientNetLiteConfig()).eval()
    assert sum(p.numel() for p in model.parameters()) == 4_652_008
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 224, 224)).last_hidden_state.shape == (1, 1280, 7, 7)


def test_same_padding_is_tensorflows():
    from anymal.adapters.architectures.efficientnet_lite import SameConv2d

    conv = SameConv2d(1, 1, 3, stride=2)
    torch.nn.init.ones_(conv.weight)
    row = torch.arange(1.0, 5.0).expand(1, 1, 4, 4)  # nothing on the left, one zero on the right
    assert torch.equal(conv(row)[0, 0, 0], torch.tensor([18.0, 21.0]))


def test_missing_weights_are_not_made_up(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny.dinov2(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.1.mlp.fc1.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights of its encoder, such as encoder.layer.1.mlp.fc1.weight"):
        load_image_encoder(str(tmp_path), ImageOptions())
