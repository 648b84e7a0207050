"""Compositions of image encoders: every leaf against transformers on the same pixels, every join against torch's."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import tiny_encoders as tiny
from anymal.adapters import REGISTRY
from anymal.adapters.image.modality import ImageOptions, load_image_encoder
from anymal.adapters.image.pictures import Pixels, pixels_for, square
from anymal.checkpoints.build import build_adapters, load_encoder
from anymal.config.schema import Config, ModalityConfig, ProjectorConfig
from anymal.config.settings import load
from anymal.data.feature_codec import identity
from anymal.errors import UserError
from anymal.modality import parts
from anymal.model.fake_tensors import shapes_only
from anymal.model.flops import forward_flops

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _load(tree, **options):
    return load_image_encoder(tree, ImageOptions(**options))


def _noise(size, media=2):
    return torch.from_numpy(np.random.default_rng(1).integers(0, 256, (media, 3, size, size), dtype=np.uint8))


def _picture(width, height, colour=None):
    from PIL import Image

    pixels = np.random.default_rng(2).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels) if colour is None else Image.new("RGB", (width, height), colour)


def _processed(folder, pictures):
    """What transformers' own image processor makes of uint8 [N, 3, S, S]."""
    from PIL import Image
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    images = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in pictures]
    return {key: torch.as_tensor(value) for key, value in processor(images=images, return_tensors="pt").items()}


# ------------------------------------------------------------------------------------------------------- pictures


def test_pad_keeps_the_shape_and_squash_fills_the_square():
    made = square(_picture(40, 20, (250, 10, 60)), 16, "pad")
    assert (made.dtype, made.shape) == (torch.uint8, (3, 16, 16))
    assert torch.equal(made.float().mean((1, 2)), torch.tensor([250.0, 10.0, 60.0])), "the bars have its mean colour"
    left_white = _picture(40, 20, (0, 0, 0))
    left_white.paste((255, 255, 255), (0, 0, 20, 20))
    padded, squashed = (square(left_white, 16, fit)[0] for fit in ("pad", "squash"))
    assert torch.all((padded[:4] >= 127) & (padded[:4] <= 128)) and torch.all(padded[12:] == padded[0])
    assert torch.all(padded[5:11, :6] == 255) and torch.all(padded[5:11, 10:] == 0)
    assert torch.all(squashed[:, :6] == 255) and torch.all(squashed[:, 10:] == 0)


@pytest.mark.parametrize("fit", ["pad", "squash"])
def test_a_square_picture_stays_what_it_is(fit):
    picture = _picture(16, 16)
    assert torch.equal(square(picture, 16, fit), torch.from_numpy(np.array(picture)).permute(2, 0, 1))


def test_pixels_are_those_of_pillow_but_for_rounding():
    picture = _picture(48, 48)
    canonical = square(picture, 48, "pad")[None]
    for mode, number in (("bicubic", 3), ("bilinear", 2)):
        pixels = Pixels(size=20, mode=mode, mean=CLIP_MEAN, std=CLIP_STD)(canonical)[0]
        expected = torch.from_numpy(np.array(picture.resize((20, 20), number))).permute(2, 0, 1) / 255
        expected = (expected - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
        levels = (pixels - expected).abs() * 255 * torch.tensor(CLIP_STD)[:, None, None]
        # Pillow rounds, and bicubic clips, after each of its two passes.
        assert levels.mean() < 0.4 and levels.max() < (1.01 if mode == "bilinear" else 2.5)
        assert torch.equal(Pixels(size=20, mode=mode, mean=CLIP_MEAN, std=CLIP_STD)(canonical.bfloat16())[0], pixels)


# --------------------------------------------------------------------------------------------------------- leaves


@torch.no_grad()
def test_vision_transformers_give_their_patches(tmp_path):
    from transformers import CLIPModel, Dinov2Model, SiglipVisionModel

    pictures = _noise(tiny.SIZE)
    clip = CLIPModel.from_pretrained(tiny.clip(tmp_path / "clip")).vision_model
    states = clip(**_processed(tmp_path / "clip", pictures), output_hidden_states=True).hidden_states
    for layer, index in ((0, -2), (-1, -1), (-3, -3)):
        made = _load({"name": str(tmp_path / "clip"), "layer": layer, "keep_global": True})
        assert torch.allclose(made(pictures), states[index], atol=1e-5)
    for make, cls in ((tiny.dinov2, Dinov2Model), (tiny.siglip, SiglipVisionModel)):
        network = cls.from_pretrained(make(tmp_path / make.__name__))
        expected = network(**_processed(tmp_path / make.__name__, pictures)).last_hidden_state
        encoder = _load({"name": str(tmp_path / make.__name__)})
        assert torch.allclose(encoder(pictures), expected[:, -16:], atol=1e-5)
        assert (encoder.tokens, encoder.width, encoder.grid) == (16, 16, (4, 4))
    average = _load({"name": str(tmp_path / "siglip"), "keep_global": True})
    assert torch.allclose(average(pictures)[:, 0], expected.mean(1), atol=1e-5), "without a class token, the average"


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
def test_position_embeddings_are_resampled_as_transformers_does(kind, tmp_path):
    from transformers import CLIPModel, Dinov2Model, SiglipVisionModel

    folder = getattr(tiny, kind)(tmp_path)
    cls = {"clip": CLIPModel, "siglip": SiglipVisionModel, "dinov2": Dinov2Model}[kind]
    network = cls.from_pretrained(folder)
    network = getattr(network, "vision_model", network)
    encoder = _load({"name": folder, "size": 48, "layer": -1})
    pictures = _noise(48)
    pixels = encoder.tree.pixels(pictures)
    extra = {} if kind == "dinov2" else {"interpolate_pos_encoding": True}
    expected = network(pixel_values=pixels, **extra).last_hidden_state
    assert encoder.tokens == (48 // network.config.patch_size) ** 2 > _load(folder).tokens
    assert torch.allclose(encoder(pictures), expected[:, -encoder.tokens :], atol=1e-6)


@torch.no_grad()
def test_convnext_gives_its_last_map_or_all_stages(tmp_path):
    from transformers import ConvNextModel

    folder = tiny.convnext(tmp_path)
    last, stages = _load({"name": folder, "size": 64}), _load({"name": folder, "size": 64, "stages": True})
    pictures = _noise(64)
    states = ConvNextModel.from_pretrained(folder)(last.tree.pixels(pictures), output_hidden_states=True).hidden_states
    assert [tuple(state.shape[1:]) for state in states[1:]] == [(4, 16, 16), (8, 8, 8), (16, 4, 4), (32, 2, 2)]
    assert torch.allclose(last(pictures), states[-1].flatten(2).transpose(1, 2), atol=1e-5)
    joined = [F.interpolate(state, (16, 16), mode="bilinear", align_corners=False) for state in states[1:]]
    assert torch.allclose(stages(pictures), torch.cat(joined, 1).flatten(2).transpose(1, 2), atol=1e-5)
    assert (stages.tokens, stages.width) == (256, 4 + 8 + 16 + 32)


@torch.no_grad()
def test_sam_is_folded(tmp_path):
    from transformers import SamVisionModel

    folder = tiny.sam(tmp_path)
    encoder = _load({"name": folder, "unshuffle": 2})
    pictures = _noise(tiny.SIZE)
    expected = SamVisionModel.from_pretrained(folder)(encoder.tree.pixels(pictures)).last_hidden_state
    expected = F.pixel_unshuffle(expected, 2)
    assert torch.allclose(encoder(pictures), expected.flatten(2).transpose(1, 2), atol=1e-6)
    assert (encoder.tokens, encoder.width) == (16, 48)
    with pytest.raises(UserError, match="encoder: it cannot take pictures of 48 x 48"):
        _load({"name": folder, "size": 48})
    with pytest.raises(UserError, match="unshuffle is 3, its map 8 x 8"):
        _load({"name": folder, "unshuffle": 3})


@torch.no_grad()
def test_pix2struct_gets_the_patches_that_its_processor_cuts(tmp_path):
    from transformers import Pix2StructForConditionalGeneration

    folder = tiny.pix2struct(tmp_path)
    network = Pix2StructForConditionalGeneration.from_pretrained(folder).encoder
    encoder = _load({"name": folder})
    pictures = _noise(32)
    given = _processed(folder, pictures)
    expected = network(given["flattened_patches"], given["attention_mask"]).last_hidden_state
    assert (encoder.tree.size, encoder.tokens, encoder.width) == (20, 25, 16)
    assert expected.std(1).min() > 0.01, "the patches differ"
    assert torch.allclose(encoder(pictures), expected[:, :25], atol=1e-5)
    vision = tmp_path / "vision"
    network.save_pretrained(vision)
    (vision / "preprocessor_config.json").write_bytes((tmp_path / "preprocessor_config.json").read_bytes())
    assert torch.equal(_load({"name": str(vision)})(pictures), encoder(pictures))


@torch.no_grad()
def test_blip2_gives_its_queries(tmp_path):
    from transformers import Blip2Model

    folder = tiny.blip2(tmp_path)
    encoder = _load({"name": folder})
    pictures = _noise(tiny.SIZE)
    expected = Blip2Model.from_pretrained(folder).get_qformer_features(encoder.tree.pixels(pictures))
    expected = getattr(expected, "last_hidden_state", expected)
    assert expected.shape == (2, 6, 16) == (2, encoder.tokens, encoder.width)
    assert expected.std(1).min() > 0.01, "the queries differ"
    assert torch.allclose(encoder(pictures), expected, atol=1e-6)
    assert not [name for name, _ in encoder.named_parameters() if "language" in name or "vision_projection" in name]
    for more in ({"keep_global": True}, {"layer": -2}):
        with pytest.raises(UserError, match="queries form no map"):
            _load({"name": folder, **more})


# ---------------------------------------------------------------------------------------------------------- joins


@torch.no_grad()
@pytest.mark.parametrize("resize", ["bilinear", "nearest"])
def test_channels_are_resized_and_joined(resize, tmp_path):
    leaves = [{"name": tiny.clip(tmp_path / "a")}, {"name": tiny.convnext(tmp_path / "b"), "size": 64}]
    tree = {"channels": leaves, "grid": 4, "resize": resize, "keep_global": True}
    encoder = _load(tree)
    pictures = _noise(64)
    clip, convnext = (_load({**leaf, "keep_global": True})(pictures) for leaf in leaves)
    aligned = {"align_corners": False} if resize == "bilinear" else {}
    maps = [one[:, 1:].transpose(1, 2).unflatten(2, (side, side)) for one, side in ((clip, 8), (convnext, 2))]
    joined = torch.cat([F.interpolate(m, (4, 4), mode=resize, **aligned) for m in maps], 1)
    whole = torch.cat([clip[:, :1], convnext[:, :1]], 2)
    expected = torch.cat([whole, joined.flatten(2).transpose(1, 2)], 1)
    made = encoder(pictures)
    assert torch.allclose(made, expected, atol=1e-5)
    assert made.shape == (2, encoder.tokens, encoder.width) == (2, 17, 48)
    assert parts(encoder) == ((17, 48),) and encoder.shape == (3, 64, 64)
    assert torch.allclose(convnext[:, 0], maps[1].mean((2, 3)), atol=1e-6), "SPHINX's global average"
    assert _load({"channels": leaves}).grid == (8, 8), "by default the first one's"


@torch.no_grad()
def test_appended_features_keep_their_places(tmp_path):
    folder = tiny.convnext(tmp_path / "b")
    tree = {"append": [tiny.blip2(tmp_path / "a"), {"append": [{"channels": [folder, folder]}]}]}
    encoder = _load(tree)
    pictures = _noise(tiny.SIZE)
    queries, last = (_load({"name": name})(pictures) for name in (str(tmp_path / "a"), folder))
    expected = torch.cat([F.pad(queries, (0, 48)), torch.cat([last, last], 2)], 1)
    assert torch.allclose(encoder(pictures), expected, atol=1e-6)
    assert parts(encoder) == ((6, 16), (1, 64))
    assert (encoder.tokens, encoder.width, encoder.license) == (7, 64, "apache-2.0")


def test_decoding_is_the_same_for_all_and_travels_without_weights(tmp_path):
    encoder = _load(tiny.mixture(tmp_path), max_pixels=5000)
    medium = tiny.picture(size=(60, 40))
    decoded = encoder.decode(medium)
    assert (decoded.dtype, tuple(decoded.shape)) == (torch.uint8, encoder.shape)
    assert encoder.shape == (3, 64, 64), "the largest of the composition"
    packed = pickle.dumps(encoder.decode)
    assert len(packed) < 300
    assert torch.equal(pickle.loads(packed)(medium), decoded)


def test_a_recipe_states_a_composition(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    leaves = [tiny.clip(tmp_path / "a"), tiny.convnext(tmp_path / "b")]
    recipe.write_text(f"""
model:
  llm: {{name: none}}
  modalities:
    image:
      encoder:
        append:
          - {leaves[0]}
          - {{name: {leaves[1]}, size: 64, stages: true}}
        fit: squash
      projector: {{kind: mining, tokens: 0}}
data: {{shards: none}}
""")
    adapter = build_adapters(REGISTRY, load(Config, recipe).model.modalities, llm_width=24)["image"]
    medium = adapter.decode(tiny.picture())
    assert adapter.encoder.parts == ((64, 16), (256, 60))
    assert adapter.projector(adapter.encoder(medium[None])).shape == (1, 64, 24) == (1, adapter.tokens, 24)


def test_identity_tells_trees_apart(tmp_path):
    def leaf(**more):
        return {"name": str(tmp_path / "a"), **more}

    tiny.convnext(tmp_path / "a")
    trees = {
        "alone": leaf(),
        "larger": leaf(size=64),
        "squashed": leaf(fit="squash"),
        "another layer": leaf(layer=-2),
        "stages": leaf(stages=True),
        "with a global token": leaf(keep_global=True),
        "joined": {"channels": [leaf(), leaf(size=64)]},
        "in another order": {"channels": [leaf(size=64), leaf()]},
        "on another grid": {"channels": [leaf(), leaf(size=64)], "grid": 4},
        "repeated": {"channels": [leaf(), leaf(size=64)], "grid": 4, "resize": "nearest"},
        "appended": {"append": [leaf(), leaf(size=64)]},
    }
    found = {name: identity(_load(tree)) for name, tree in trees.items()}
    assert len(set(found.values())) == len(trees)
    (tmp_path / "copy").mkdir()
    for file in (tmp_path / "a").iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    again = _load({"channels": [{"name": str(tmp_path / "copy")}, {"name": str(tmp_path / "copy"), "size": 64}]})
    assert identity(again) == found["joined"]
    assert identity(_load({"name": tiny.blip2(tmp_path / "q")})) == identity(_load({"name": str(tmp_path / "q")}))


def test_video_takes_a_composition_of_maps(tmp_path):
    tree = {"channels": [tiny.clip(tmp_path / "a"), tiny.dinov2(tmp_path / "b")]}
    options = {"frames": 2, "pool": 4}
    encoder = load_encoder(REGISTRY, "video", ModalityConfig(encoder=tree, options=options))
    clips = encoder.decode(tiny.clip_bytes())
    assert (clips.dtype, tuple(clips.shape)) == (torch.uint8, (2, 3, 32, 32))
    assert encoder(clips[None]).shape == (1, 2 * 4, 32)
    with pytest.raises(UserError, match="of one kind"):
        load_encoder(REGISTRY, "video", ModalityConfig(encoder={"append": tree["channels"]}))
    with pytest.raises(UserError, match="one hub name or local folder"):
        load_encoder(REGISTRY, "audio", ModalityConfig(encoder=tree))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (["a"], r"encoder is \['a'\]; it is a name, or a mapping"),
        ({"nme": "a"}, r"encoder has the keys nme; .* did you mean name\?"),
        ({"chanels": ["a"]}, r"did you mean channels\?"),
        ({"name": "a", "append": ["b"]}, "encoder has the keys name, append; one of them is"),
        ({"name": "a", "sice": 3}, r"encoder: unknown option 'sice'; did you mean size\?"),
        ({"channels": ["a"], "gird": 3}, r"encoder: unknown option 'gird'; did you mean grid\?"),
        ({"append": [{"channels": [{"name": "a", "lyer": 1}]}]}, r"encoder.append\[0\].channels\[0\]: unknown .*layer"),
        ({"append": []}, "encoder.append lists no encoder"),
        ({"append": [3]}, r"encoder.append\[0\] is 3; it is a name"),
        ({"name": "a", "fit": "crop"}, "encoder.fit is 'crop'; it is pad or squash"),
        ({"append": [{"name": "a", "fit": "pad"}]}, r"encoder.append\[0\]: unknown option 'fit'"),
        ({"channels": ["a"], "resize": "cubic"}, r"encoder: resize is 'cubic'; it can be bilinear or nearest"),
        ({"name": "a", "layer": 2}, "layer counts from the end"),
        ({"name": "a", "layer": -2, "stages": True}, "set only one of them"),
        (
            {"name": "/nowhere/at/all"},
            "encoder: there is no folder /nowhere/at/all; .*give model.modalities.NAME.encoder=FOLDER",
        ),
    ],
)
def test_mistakes_are_named(tree, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
        _load(tree)


def test_what_does_not_fit_is_refused(tmp_path):
    queries, plain = tiny.blip2(tmp_path / "q"), tiny.siglip(tmp_path / "s")
    with pytest.raises(UserError, match=r"encoder.channels\[1\] gives no map"):
        _load({"channels": [plain, queries]})
    with pytest.raises(UserError, match=r"encoder.channels\[0\] has keep_global"):
        _load({"channels": [{"name": plain, "keep_global": True}]})
    with pytest.raises(UserError, match="encoder: stages is set, but the encoder has no stages"):
        _load({"name": plain, "stages": True})
    with pytest.raises(UserError, match="encoder: layer is -9, but the encoder has only 3 layers"):
        _load({"name": plain, "layer": -9})
    with pytest.raises(UserError, match="each has its layer"):
        _load({"name": plain}, layer=-2)


# ------------------------------------------------------------------------------- the published models, on shapes alone


def _folder(path: Path, config, processor: dict) -> str:
    path.mkdir()
    config.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(path)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Folders with configs of the published sizes, and no weights. Layers are few: they do not change any shape."""
    from transformers import (
        Blip2Config,
        CLIPVisionConfig,
        ConvNextConfig,
        Dinov2Config,
        Pix2StructVisionConfig,
        SamVisionConfig,
    )

    folder = tmp_path_factory.mktemp("real")
    few, height = {"num_hidden_layers": 2}, {"height": 224, "width": 224}
    vit = {"hidden_size": 1024, "num_attention_heads": 16, "patch_size": 14, **few}
    clip = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True}
    convnext = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 256}}
    dinov2 = {"image_processor_type": "BitImageProcessor", "do_center_crop": True, "crop_size": height}
    sam = SamVisionConfig(hidden_size=1024, num_attention_heads=16, global_attn_indexes=[1], **few)
    return {
        "clip-336": _folder(folder / "c336", CLIPVisionConfig(**vit, image_size=336), clip | {"crop_size": 336}),
        "clip-224": _folder(folder / "c224", CLIPVisionConfig(**vit, image_size=224), clip | {"crop_size": 224}),
        "convnext-xxl": _folder(
            folder / "xxl", ConvNextConfig(hidden_sizes=[384, 768, 1536, 3072], depths=[1, 1, 1, 1]), convnext
        ),
        "convnext-l": _folder(
            folder / "l", ConvNextConfig(hidden_sizes=[192, 384, 768, 1536], depths=[1, 1, 1, 1]), convnext
        ),
        "sam-l": _folder(
            folder / "sam", sam, {"image_processor_type": "SamImageProcessor", "size": {"longest_edge": 1024}}
        ),
        "pix2struct-l": _folder(
            folder / "p2s",
            Pix2StructVisionConfig(hidden_size=1536, d_ff=3968, d_kv=64, num_attention_heads=24, **few),
            {"image_processor_type": "Pix2StructImageProcessor", "max_patches": 2048},
        ),
        "dinov2-l": _folder(folder / "dl", Dinov2Config(**vit, image_size=518), dinov2),
        "dinov2-g": _folder(
            folder / "dg",
            Dinov2Config(hidden_size=1536, num_attention_heads=24, patch_size=14, image_size=518, **few),
            dinov2,
        ),
        "blip2": _folder(
            folder / "blip2",
            Blip2Config(vision_config=few, qformer_config=few, text_config={"model_type": "opt", **few}),
            {"image_processor_type": "BlipImageProcessor", "size": height},
        ),
    }


def _on_shapes(tree, **projector):
    config = ModalityConfig(encoder=tree, projector=ProjectorConfig(tokens=0, **projector) if projector else None)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with shapes_only(fake):
        if not projector:
            return load_encoder(REGISTRY, "image", config)
        adapter = build_adapters(REGISTRY, {"image": config}, llm_width=4096)["image"]
    with fake:
        features = adapter.encoder(torch.zeros(1, *adapter.encoder.shape, dtype=torch.uint8))
        assert adapter.projector(features).shape == (1, adapter.tokens, 4096)
    return adapter


def test_eagle_has_1024_tokens_of_7680_channels(real):
    leaves = [
        {"name": real["clip-336"], "size": 448},
        {"name": real["convnext-xxl"], "size": 1024},
        {"name": real["sam-l"], "unshuffle": 2},
        {"name": real["dinov2-l"], "size": 448},  # as wide as EVA-02-L-det, which transformers does not have
        real["pix2struct-l"],
    ]
    encoder = _on_shapes({"channels": leaves, "grid": 32})
    sizes = [(leaf.size, leaf.side, leaf.width) for leaf in encoder.tree.nodes]
    assert sizes == [(448, 32, 1024), (1024, 32, 3072), (1024, 32, 1024), (448, 32, 1024), (720, 45, 1536)]
    assert (encoder.tokens, encoder.width, encoder.shape) == (1024, 7680, (3, 1024, 1024))
    four = _on_shapes({"channels": leaves[:2] + leaves[3:], "grid": 32})
    assert (four.tokens, four.width) == (1024, 1024 + 3072 + 1024 + 1536)


def test_sphinx_has_291_tokens_a_view(real):
    joined = {
        "channels": [real["clip-224"], {"name": real["convnext-xxl"], "size": 256}, real["dinov2-g"]],
        "resize": "nearest",
        "keep_global": True,
    }
    adapter = _on_shapes({"append": [real["blip2"], joined]}, kind="each", layers=1, options={"tags": True})
    assert adapter.encoder.parts == ((32, 768), (257, 5632))
    assert adapter.tokens == 291
    assert forward_flops(adapter.encoder, (1, *adapter.encoder.shape)) > 1e11, "anymal estimate can count it"


def test_mini_gemini_mines_a_map_of_36864_positions(real):
    tree = {"append": [real["clip-336"], {"name": real["convnext-l"], "size": 768, "stages": True}]}
    adapter = _on_shapes(tree, kind="mining")
    assert adapter.encoder.parts == ((576, 1024), (192 * 192, 192 + 384 + 768 + 1536))
    assert adapter.encoder.parts[1] == (36864, 2880)
    assert (adapter.tokens, adapter.projector.cell) == (576, 8)


def test_an_encoder_of_flexible_resolution_is_refused(tmp_path):
    tree = {"name": tiny.siglip2(tmp_path)}
    with pytest.raises(UserError, match="flexible resolution cannot be part of a composition"):
        load_encoder(REGISTRY, "image", ModalityConfig(encoder=tree))


def test_pixels_as_timms_processor_says():
    """Of its processor only the ``data_config`` is read; it needs torchvision, of which PyPI has no build for CPUs."""
    found = {"input_size": [3, 256, 256], "interpolation": "bicubic", "mean": CLIP_MEAN, "std": CLIP_STD}
    processor = SimpleNamespace(data_config=found)
    assert pixels_for(processor, 0, "x") == Pixels(size=256, mode="bicubic", mean=CLIP_MEAN, std=CLIP_STD)
    assert pixels_for(processor, 1024, "x").size == 1024
    found["interpolation"] = "bilinear"
    assert pixels_for(processor, 0, "x").mode == "bilinear"
