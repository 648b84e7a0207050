"""The modality that docs/encoders.md shows is one: it loads, decodes, encodes, and can be looked up."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from anymal.adapters import PROJECTORS
from anymal.checkpoints.build import load_encoder
from anymal.config.schema import ModalityConfig
from anymal.data.feature_codec import identity
from anymal.errors import BadSample
from anymal.model.registry import Registry

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "encoders.md").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny DINOv2 of one channel."""
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dinov2")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2}
    Dinov2Model(Dinov2Config(**size, image_size=64, patch_size=16, num_channels=1)).save_pretrained(folder)
    return folder


def test_the_modality_that_the_page_shows_encodes(folder, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    (tmp_path / "page_depth.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    modality = importlib.import_module("page_depth").MODALITY
    registry = Registry(modalities={modality.name: modality}, projectors=PROJECTORS)
    assert registry.suffixes() == {"depth": "depth"}
    assert any("farthest" in line for line in registry.describe())
    encoder = load_encoder(registry, "depth", ModalityConfig(encoder=str(folder), options={"farthest": 2.0}))
    assert (encoder.tokens, encoder.width, encoder.license) == (16, 16, "unknown")
    distances = np.arange(64 * 64, dtype="<u2").reshape(64, 64)
    medium = encoder.decode(distances.tobytes())
    assert torch.equal(medium[0], (torch.from_numpy(distances.astype("float32")) / 1000).clamp(max=2.0))
    assert encoder(medium[None]).shape == (1, 16, 16)
    assert len(identity(encoder)) == 16
    with pytest.raises(BadSample, match="3 bytes; wanted are 8192"):
        encoder.decode(b"abc")


def test_files_that_the_page_names_are_there():
    paths = re.findall(r"`((?:adapters|anymal|launch|data_prep|tests|benchmarks|docs)/[\w./]*)`", PAGE)
    assert len(paths) > 8
    assert [path for path in paths if not (ROOT / path).exists()] == []
