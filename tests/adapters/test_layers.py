"""The output of one layer: to the bit what transformers gives, without the layers after it, and without the others."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import tiny_encoders as tiny
from anymal.adapters import REGISTRY
from anymal.adapters.image.modality import ImageOptions, load_image_encoder
from anymal.checkpoints.build import load_encoder
from anymal.config.schema import ModalityConfig
from anymal.errors import UserError
from anymal.estimation.memory import MemoryTracker
from anymal.model.flops import forward_flops

LAYERS = {
    tiny.clip: "encoder.layers",
    tiny.clip_vision: "encoder.layers",
    tiny.siglip: "encoder.layers",
    tiny.siglip2: "encoder.layers",
    tiny.dinov2: "encoder.layer",
}
"""Where transformers has the layers of each."""


def pictures(encoder, count: int = 3) -> torch.Tensor:
    """Pixels as an image encoder's network takes them."""
    return torch.rand(count, *encoder.shape, generator=torch.Generator().manual_seed(0))


def as_transformers_has_it(encoder, pixels: torch.Tensor, layer: int) -> torch.Tensor:
    """The layer's features among all hidden states."""
    more = {key: getattr(encoder, f"constant_{key}") for key in encoder.constants}
    more = {key: value.expand(len(pixels), *value.shape[1:]) for key, value in more.items()}
    state = encoder.network(output_hidden_states=True, pixel_values=pixels, **more).hidden_states[layer]
    return state.flatten(2).transpose(1, 2) if state.ndim == 4 else state[:, encoder.prefix :]


def called(network: torch.nn.Module, path: str) -> list[int]:
    """Which of the layers at a path run from now on, in a list that grows."""
    numbers: list[int] = []
    for number, layer in enumerate(network.get_submodule(path)):
        layer.register_forward_pre_hook(lambda module, given, number=number: numbers.append(number))
    return numbers


@pytest.mark.parametrize("layer", [-2, -3])
@pytest.mark.parametrize("make", LAYERS, ids=lambda make: make.__name__)
def test_layers_after_the_wanted_one_do_not_run(make, layer, tmp_path):
    encoder = load_image_encoder(make(tmp_path), ImageOptions(layer=layer))
    media = pictures(encoder)
    with torch.no_grad():
        expected = as_transformers_has_it(encoder, media, layer)
        ran = called(encoder.network, LAYERS[make])
        features = encoder(media)
    assert torch.equal(features, expected)
    assert ran == list(range(4 + layer)), "of three"
    assert len(encoder.network.get_submodule(LAYERS[make])) == 3


@pytest.mark.parametrize("layer", [-2, -3])
def test_a_network_that_needs_all_its_layers_gives_the_same(layer, tmp_path):
    encoder = load_image_encoder(tiny.convnext(tmp_path), ImageOptions(layer=layer))
    media = pictures(encoder)
    with torch.no_grad():
        assert torch.equal(encoder(media), as_transformers_has_it(encoder, media, layer))


@pytest.mark.parametrize(("make", "path"), [(tiny.clip, "encoder.layers"), (tiny.sam, "layers")])
def test_an_encoder_of_a_composition_is_left_there_too(make, path, tmp_path):
    name = make(tmp_path)
    mixture = load_image_encoder({"name": name, "layer": -2}, ImageOptions())
    leaf, media = mixture.tree, pictures(mixture)
    with torch.no_grad():
        pixels = leaf.pixels(media)
        state = leaf.network(output_hidden_states=True, pixel_values=pixels, **leaf.resampled).hidden_states[-2]
        ran = called(leaf.network, path)
        expected = state.flatten(2).transpose(1, 2) if state.ndim == 4 else state[:, leaf.prefix :]
        assert torch.equal(mixture(media), expected)
    assert ran == list(range(len(leaf.network.get_submodule(path)) - 1))


def test_the_head_of_siglip_does_not_run_and_is_still_saved(tmp_path):
    encoder = load_image_encoder(tiny.siglip(tmp_path), ImageOptions())
    encoder.network.head.register_forward_pre_hook(lambda *_: pytest.fail("the head runs"))
    encoder(pictures(encoder))
    assert any(".head." in name for name in encoder.state_dict())


def test_one_state_is_kept_of_many(tmp_path):
    """Peaks of bytes alive, without those of the media and of the weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    folder = tiny.clip_vision(tmp_path)
    CLIPVisionModel(CLIPVisionConfig(**tiny.VIT | {"num_hidden_layers": 24}, patch_size=4)).save_pretrained(folder)
    encoder = load_image_encoder(folder, ImageOptions())
    media = pictures(encoder, 16)
    peaks = []
    for run in (lambda: encoder(media), lambda: as_transformers_has_it(encoder, media, -2)):
        with torch.no_grad(), MemoryTracker() as tracker:
            run()
        peaks.append(tracker.peaks["step"].total())
    state = 16 * 65 * 16 * 4
    assert peaks[1] > 25 * state
    assert peaks[0] < 12 * state, "of one layer: its input, queries, keys, values, and twice as wide an MLP"


def test_an_encoder_that_learns_gets_the_same_gradients(tmp_path):
    encoder = load_image_encoder(tiny.clip(tmp_path), ImageOptions()).requires_grad_(True)
    media, gradients = pictures(encoder), []
    for features in (encoder(media), as_transformers_has_it(encoder, media, -2)):
        found = torch.autograd.grad(features.square().sum(), list(encoder.parameters()), allow_unused=True)
        gradients.append(found)
    for (name, _), ours, theirs in zip(encoder.named_parameters(), *gradients, strict=True):
        assert (ours is None) == (theirs is None) == (".layers.2." in name or "post_layernorm" in name), name
        assert ours is None or torch.equal(ours, theirs), name


def test_the_network_is_whole_again_whatever_happens(tmp_path):
    encoder = load_image_encoder(tiny.clip(tmp_path), ImageOptions())
    names, media = list(encoder.state_dict()), pictures(encoder)
    before = encoder(media)
    with pytest.raises((ValueError, RuntimeError)):
        encoder(torch.zeros(1, 3, 12, 12))
    assert list(encoder.state_dict()) == names
    assert torch.equal(encoder(media), before)


def test_threads_do_not_disturb_one_another(tmp_path):
    encoder = load_image_encoder(tiny.clip(tmp_path), ImageOptions())
    media = [medium[None] for medium in pictures(encoder)]
    alone = [encoder(medium) for medium in media]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(encoder, media * 20))
    assert all(torch.equal(one, alone[i % 3]) for i, one in enumerate(found))
    assert len(encoder.network.encoder.layers) == 3


def test_fewer_flops_are_counted_and_in_video_as_well(tmp_path):
    folder = tiny.clip(tmp_path)
    flops = {}
    for layer in (-1, -2, -3):
        encoder = load_encoder(REGISTRY, "image", ModalityConfig(encoder=folder, options={"layer": layer}))
        clips = load_encoder(REGISTRY, "video", ModalityConfig(encoder=folder, options={"layer": layer, "frames": 5}))
        flops[layer] = forward_flops(encoder, (1, *encoder.shape))
        assert forward_flops(clips, (1, *clips.shape)) == 5 * flops[layer]
    assert flops[-1] - flops[-2] == flops[-2] - flops[-3] > flops[-1] / 4


def test_a_network_that_gives_no_layers_says_so(tmp_path):
    with pytest.raises(UserError, match=r"layer is -2, but of this encoder \(a EfficientNetLiteModel\) the last alone"):
        load_image_encoder(tiny.efficientnet_lite(tmp_path), ImageOptions(layer=-2))
