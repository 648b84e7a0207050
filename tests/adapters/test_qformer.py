"""The Q-Former against BLIP-2 of transformers, and starting from a BLIP-2 checkpoint."""

import json

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from anymal.config.schema import ProjectorConfig
from anymal.errors import UserError
from anymal.model.fake_tensors import new_tensors, shapes_only
from toys import build_projector

VISION = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
QFORMER = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {"model_type": "opt", "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "ffn_dim": 16}
FEATURES = 17  # 4 x 4 patches and the class token


def _blip2(cls=None):
    """A tiny BLIP-2 of random weights in all places, its text model included."""
    from transformers import Blip2Config, Blip2Model

    torch.manual_seed(0)
    config = Blip2Config(
        vision_config=VISION | {"image_size": 32, "patch_size": 8},
        qformer_config=QFORMER,
        text_config=TEXT | {"num_attention_heads": 2, "word_embed_proj_dim": 16, "max_position_embeddings": 8},
        num_query_tokens=5,
    )
    model = (cls or Blip2Model)(config).eval()
    for parameter in (model.query_tokens, *model.qformer.parameters(), *model.vision_model.parameters()):
        nn.init.normal_(parameter, std=0.3)
    return model


def _build(init: object = "", **settings):
    given = {"kind": "qformer", "tokens": 5, "layers": 3, "width": 16, "heads": 4} | settings
    own = {"feed_forward": 40, "init": str(init)}
    return build_projector(ProjectorConfig(**given, options=own), [(FEATURES, 24)], llm_width=10, scale=0.1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder as Salesforce's are: half precision, in several files."""
    from transformers import Blip2ForConditionalGeneration

    folder = tmp_path_factory.mktemp("blip2")
    _blip2(Blip2ForConditionalGeneration).half().save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_equals_blip2():
    reference, ours = _blip2(), _build()
    ours.network.load_state_dict(reference.qformer.state_dict())
    ours.queries.data = reference.query_tokens.data[0]
    nn.init.ones_(reference.vision_model.post_layernorm.weight)  # what it gives is normalised then, as by ours
    nn.init.zeros_(reference.vision_model.post_layernorm.bias)
    pixels = torch.randn(3, 3, 32, 32)
    features = reference.vision_model(pixels).last_hidden_state
    assert features.shape == (3, FEATURES, 24)
    expected = reference.get_qformer_features(pixels)
    assert expected.std() > 0.1
    assert (ours.train().gather(features) - expected).abs().max() < 1e-5


def test_starts_from_a_checkpoint(checkpoint):
    from transformers import Blip2Model

    reference, ours = Blip2Model.from_pretrained(checkpoint, dtype=torch.float32), _build(checkpoint).train()
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    pixels = torch.randn(3, 3, 32, 32)
    features = reference.vision_model(pixels).last_hidden_state
    expected = reference.get_qformer_features(pixels)
    assert expected.std() > 0.1
    assert (ours.gather(features) - expected).abs().max() < 1e-5
    assert 0.08 < ours(features).std() < 0.12, "its last norm has weights, yet embeddings start at the LLM's scale"


def test_what_does_not_fit_a_checkpoint_is_named(checkpoint, tmp_path):
    both = r"projector.tokens is 4, but its num_query_tokens 5"
    with pytest.raises(UserError, match=rf"projector.layers is 2, but its num_hidden_layers 3; {both}"):
        _build(checkpoint, layers=2, tokens=4)
    with pytest.raises(UserError, match="the encoder's width is 8, but its encoder_hidden_size 24"):
        given = {"tokens": 5, "layers": 3, "width": 16, "heads": 4, "options": {"feed_forward": 40, "init": checkpoint}}
        build_projector(ProjectorConfig(kind="qformer", **given), [(9, 8)], llm_width=10)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(UserError, match="is a clip, not a blip-2"):
        _build(tmp_path)
    with pytest.raises(UserError, match="nowhere"):
        _build(tmp_path / "nowhere")


def test_a_checkpoint_without_the_weights_is_refused(tmp_path):
    reference = _blip2()
    weights = {key: value for key, value in reference.state_dict().items() if "layer.1.crossattention" not in key}
    lost = [key for key in weights if "layer.1.attention" in key]
    reference.save_pretrained(tmp_path, state_dict={key: weights[key] for key in weights if key not in lost})
    with pytest.raises(UserError, match=rf"lacks {len(lost)} weights, such as qformer.encoder.layer.1.attention"):
        _build(tmp_path)


def test_only_the_config_of_a_checkpoint_is_read_where_there_are_no_weights(checkpoint, tmp_path):
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    with shapes_only(FakeTensorMode(allow_non_fake_inputs=True)), new_tensors():
        model = _build(tmp_path)
    assert all(isinstance(p, FakeTensor) for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in _build(checkpoint).parameters())
    with pytest.raises(UserError, match="cannot load the Q-Former"):
        _build(tmp_path)


def test_queries_look_at_the_features_in_every_second_layer():
    assert [layer.has_cross_attention for layer in _build().network.encoder.layer] == [True, False, True]


def test_can_learn_the_order_of_features():
    torch.manual_seed(0)
    model = _build()
    features = torch.randn(1, FEATURES, 24)
    assert (model(features) - model(features.flip(1))).abs().max() < 1e-5, "as BLIP-2's, at the start"
    nn.init.normal_(model.positions)
    assert (model(features) - model(features.flip(1))).abs().max() > 1e-4


def test_options_out_of_bounds_are_named():
    for options in ({"cross_attention_frequency": 0}, {"feed_forward": -1}):
        with pytest.raises(UserError, match="cross_attention_frequency must be at least 1"):
            build_projector(ProjectorConfig(kind="qformer", options=options), [(4, 16)], llm_width=10)
