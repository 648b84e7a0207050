"""pixel_shuffle against InternVL's and Idefics3's of transformers."""

import pytest
import torch
from torch import nn

from anymal.config.schema import ProjectorConfig
from anymal.errors import UserError
from toys import build_projector


def _build(features: int, **settings):
    return build_projector(ProjectorConfig(kind="pixel_shuffle", tokens=0, **settings), [(features, 6)], llm_width=12)


@pytest.mark.parametrize(("features", "factor"), [(16, 2), (36, 3), (64, 4), (9, 1)])
def test_equals_idefics3(features, factor):
    from transformers import Idefics3Config
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

    torch.manual_seed(0)
    text = {"hidden_size": 12, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Idefics3Config(vision_config={"hidden_size": 6}, text_config=text, scale_factor=factor)
    reference = Idefics3Connector(config)
    ours = _build(features, layers=1, options={"factor": factor})
    ours.layers[0].weight = reference.modality_projection.proj.weight
    media = torch.randn(3, features, 6)
    assert torch.equal(ours.cells(media), reference.pixel_shuffle(media, factor))
    assert (ours.layers(ours.cells(media)) - reference(media)).abs().max() < 1e-6  # Idefics3 has no norm
    assert (ours(media) - ours.layers(ours.norm(ours.cells(media)))).abs().max() == 0


def test_equals_internvl():
    from transformers import InternVLConfig, InternVLModel
    from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

    torch.manual_seed(0)
    text = {"model_type": "qwen2", "hidden_size": 12, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = InternVLConfig(vision_config={"hidden_size": 6, "num_attention_heads": 2}, text_config=text)
    reference = InternVLMultiModalProjector(config)
    for parameter in reference.parameters():
        nn.init.normal_(parameter)
    ours = _build(16, layers=2)
    names = {"norm": "layer_norm", "layers.0": "linear_1", "layers.2": "linear_2"}
    theirs = reference.state_dict()
    weights = {f"{our}.{key}": theirs[f"{their}.{key}"] for our, their in names.items() for key in ("weight", "bias")}
    ours.load_state_dict(weights)
    media = torch.randn(3, 16, 6)
    shuffled = InternVLModel.pixel_shuffle(None, media.unflatten(1, (4, 4)), scale_factor=0.5)
    expected = reference(shuffled.flatten(1, 2))
    assert expected.std() > 0.1
    assert (ours(media) - expected).abs().max() < 1e-5


def test_what_does_not_fit_is_named():
    assert _build(36).tokens == 9
    assert build_projector(ProjectorConfig(kind="pixel_shuffle", tokens=9), [(36, 6)], llm_width=12).tokens == 9
    with pytest.raises(UserError, match="tokens is 32, but pixel_shuffle by 2 makes 9 of 36 features"):
        build_projector(ProjectorConfig(kind="pixel_shuffle"), [(36, 6)], llm_width=12)
    with pytest.raises(UserError, match=r"factor is 4, but .* a grid of 6 x 6"):
        _build(36, options={"factor": 4})
    with pytest.raises(UserError, match="factor is 0"):
        _build(36, options={"factor": 0})
