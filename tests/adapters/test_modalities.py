"""What every modality owes, over the registry: a new one is tested the moment that it is listed."""

import contextlib
import itertools
import pickle
import random
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from anymal.adapters import MODALITIES, PROJECTORS, REGISTRY
from anymal.checkpoints.build import build_adapters
from anymal.config.command_line import field_docs
from anymal.config.schema import ModalityConfig, ProjectorConfig
from anymal.config.settings import options
from anymal.errors import BadSample, UserError
from anymal.model.fake_tensors import shapes_only
from tiny_encoders import ENCODERS, MEDIA, OPTIONS, decoded, hostile

CASES = [(name, kind) for name in MODALITIES for kind in ENCODERS[name]]


def _load(name, folder):
    return MODALITIES[name].load(folder, options(MODALITIES[name].options, OPTIONS.get(name, {}), "test"))


@pytest.fixture(scope="module", params=CASES, ids=["-".join(case) for case in CASES])
def loaded(request, tmp_path_factory):
    name, kind = request.param
    return name, _load(name, ENCODERS[name][kind](tmp_path_factory.mktemp(kind)))


def test_features_have_the_stated_shape(loaded):
    name, encoder = loaded
    medium = decoded(encoder.decode, MEDIA[name]())
    assert medium.dtype in (torch.float32, torch.uint8)
    other = (medium.flip(-1) * 0.5).to(medium.dtype)  # a plain half would be the same to an encoder that normalises
    features = encoder(torch.stack([medium, other]))
    assert features.shape == (2, encoder.tokens, encoder.width)
    assert features.isfinite().all()
    alone = encoder(medium[None])
    assert torch.allclose(features[:1], alone, atol=1e-4), "a medium's features depend on its neighbours in the batch"
    assert not torch.allclose(features[0], features[1]), "features do not depend on the medium"


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_an_encoder_without_weights_has_the_same_sizes_and_runs(name, kind, tmp_path):
    folder = ENCODERS[name][kind](tmp_path)
    with shapes_only(fake := FakeTensorMode(allow_non_fake_inputs=True)):
        shapes = _load(name, folder)
    assert all(isinstance(p, FakeTensor) for p in shapes.parameters())
    real = _load(name, folder)
    assert (shapes.tokens, shapes.width, shapes.shape) == (real.tokens, real.width, real.shape)
    if kind == "siglip2":
        return  # transformers looks up in numbers how large a picture is: anymal estimate says so (test_estimate.py)
    with fake:
        assert shapes(torch.zeros(2, *shapes.shape)).shape == (2, real.tokens, real.width)


def test_encoder_is_frozen_and_of_fp32(loaded):
    _, encoder = loaded
    assert not encoder.training
    for path, parameter in encoder.named_parameters():
        assert not parameter.requires_grad, path
        assert parameter.dtype == torch.float32, path
    assert isinstance(encoder.license, str) and encoder.license


def test_encoder_runs_in_bf16(loaded):
    name, encoder = loaded
    medium = decoded(encoder.decode, MEDIA[name]())[None]
    exact = encoder(medium)
    try:
        rounded = encoder.to(torch.bfloat16)(medium.bfloat16() if medium.is_floating_point() else medium)
    finally:
        encoder.float()
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.1 * exact.norm()


def test_decoding_travels_to_workers_without_the_weights(loaded):
    name, encoder = loaded
    packed = pickle.dumps(encoder.decode)
    assert len(packed) < 300_000, "this is about the size of CLAP's filter banks; weights would be more"
    medium = MEDIA[name]()
    assert torch.equal(decoded(pickle.loads(packed), medium), decoded(encoder.decode, medium))


def test_decoding_draws_on_no_global_randomness(loaded):
    name, encoder = loaded
    medium = MEDIA[name]()
    first = decoded(encoder.decode, medium)
    for seed in range(5):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        assert torch.equal(decoded(encoder.decode, medium), first)


@pytest.mark.parametrize("last", [False, True], ids=["alone", "last"])  # the last of images and video: a composition
@pytest.mark.parametrize("name", MODALITIES)
def test_hostile_bytes_are_bad_samples(name, last, tmp_path):
    decode = _load(name, list(ENCODERS[name].values())[-int(last)](tmp_path)).decode
    for what, data in hostile(name).items():
        with pytest.raises(BadSample) as caught:
            decode(data)
        message = str(caught.value)
        assert len(message) > 20, what
        assert "object at 0x" not in message, what


@pytest.mark.parametrize("name", MODALITIES)
def test_damaged_bytes_never_raise_anything_else(name, tmp_path):
    decode = _load(name, next(iter(ENCODERS[name].values()))(tmp_path)).decode
    good = MEDIA[name]()
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        data = bytearray(good)
        for position in torch.randint(len(data), (8,), generator=generator).tolist():
            data[position] = int(torch.randint(256, (1,), generator=generator))
        with contextlib.suppress(BadSample):
            assert decoded(decode, bytes(data)).isfinite().all()


@pytest.mark.parametrize("name", MODALITIES)
def test_registry_entry_is_whole(name):
    modality = MODALITIES[name]
    assert modality.name == name
    assert modality.suffixes and not any(suffix.startswith(".") for suffix in modality.suffixes)
    assert list(modality.suffixes) == sorted(modality.suffixes, key=len, reverse=True)
    documented = field_docs(modality.options)
    assert [f.name for f in fields(modality.options) if f.name not in documented] == []


def test_no_two_modalities_share_a_suffix():
    suffixes = [suffix for modality in MODALITIES.values() for suffix in modality.suffixes]
    assert len(suffixes) == len(set(suffixes))


@pytest.mark.parametrize("name", MODALITIES)
def test_missing_encoder_is_a_users_mistake(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="nowhere"):
        _load(name, str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=str(tmp_path)):
        _load(name, str(tmp_path))


def test_adapters_are_built_from_a_recipe(tmp_path):
    recipe = {
        name: ModalityConfig(
            encoder=next(iter(makers.values()))(tmp_path / name),
            projector=ProjectorConfig(kind=kind, tokens=4, layers=1, heads=2),
            options=OPTIONS.get(name, {}),
        )
        for (name, makers), kind in zip(ENCODERS.items(), itertools.cycle(["linear", "mlp", "resampler"]))
    }
    adapters = build_adapters(REGISTRY, recipe, llm_width=24, embedding_std=0.1, llm_layers=4)
    assert list(adapters) == list(recipe)
    for name, adapter in adapters.items():
        features = adapter.encoder(decoded(adapter.decode, MEDIA[name]())[None])
        assert adapter.tokens == (1 if recipe[name].projector.kind == "cross_attention" else 4)
        assert adapter.projector(features).shape == (1, adapter.tokens, 24)


def test_mistakes_in_a_recipe_are_named(tmp_path):
    with pytest.raises(UserError, match=r"model.modalities.imgae: .* did you mean image\?"):
        build_adapters(REGISTRY, {"imgae": ModalityConfig(encoder="x")}, 8)
    wrong = ModalityConfig(encoder="x", options={"max_pixel": 3})
    with pytest.raises(UserError, match=r"model.modalities.image.options: .*did you mean max_pixels\?"):
        build_adapters(REGISTRY, {"image": wrong}, 8)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for name in MODALITIES:
        with pytest.raises(UserError, match=f"^model.modalities.{name}: "):
            build_adapters(REGISTRY, {name: ModalityConfig(encoder=str(tmp_path), options=OPTIONS.get(name, {}))}, 8)


def test_options_are_described():
    text = "\n".join(REGISTRY.describe())
    for name, modality in MODALITIES.items():
        for field in fields(modality.options):
            assert f"model.modalities.{name}.options.{field.name}" in text
    for kind in PROJECTORS:
        assert f"  {kind}: " in text
    for kind in PROJECTORS.values():
        documented = field_docs(kind.options)
        for field in fields(kind.options):
            assert f"model.modalities.NAME.projector.options.{field.name} " in text
            assert documented[field.name].split()[0] in text


def test_listing_the_modalities_imports_no_heavy_library():
    program = "import anymal.adapters, sys; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["transformers", "torchaudio", "av", "soundfile"]
    ran = subprocess.run([sys.executable, "-c", program, *heavy], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
