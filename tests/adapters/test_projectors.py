"""Projectors of every kind: shapes, scale, gradients, precision. The resampler against plain loops, pooling's rule."""

import math
import re
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from anymal.adapters import REGISTRY
from anymal.adapters.projectors import PROJECTORS
from anymal.adapters.projectors.pooled import PooledProjector
from anymal.adapters.projectors.resampler import Resampler
from anymal.checkpoints.build import build_adapters
from anymal.config.schema import ModalityConfig, ProjectorConfig
from anymal.errors import UserError
from anymal.model.fake_tensors import shapes_only
from anymal.model.flops import forward_flops
from tiny_encoders import siglip
from toys import build_projector

# No gradient reaches these: softmax does not see what all keys have in common, and one key leaves it no choice.
UNSEEN = {"qformer": r"\.key\.bias$"}
UNSEEN_ALONE = {"qformer": r"\.key\.bias$|\.crossattention\.attention\.(query|key)\."}


def suited(kind: str, features: int, tokens: int) -> tuple[ProjectorConfig, int]:
    """Settings for about so many tokens, and about so many features, as the kind takes them."""
    if kind == "abstractor":
        features, tokens = math.ceil(math.sqrt(features)) ** 2, math.ceil(math.sqrt(tokens)) ** 2
    if kind == "pixel_shuffle":  # a square grid of an even side
        features, tokens = 4 * math.ceil(math.sqrt(features) / 2) ** 2, 0
    if kind == "each":
        tokens = 0
    return ProjectorConfig(kind=kind, tokens=tokens, layers=2, heads=4), features


POOLING = [kind for kind in PROJECTORS if kind not in ("each", "mining", "cross_attention")]
"""Those that make any number of tokens, which are all that the LLM sees; the others have tests of their own."""


def _norm(vector, layer):
    mean = sum(vector) / len(vector)
    variance = sum((x - mean) ** 2 for x in vector) / len(vector)
    weight, bias = layer.weight.tolist(), layer.bias.tolist()
    return [(x - mean) / math.sqrt(variance + layer.eps) * w + b for x, w, b in zip(vector, weight, bias, strict=True)]


def _linear(vector, layer):
    bias = layer.bias.tolist() if layer.bias is not None else [0.0] * layer.out_features
    rows = layer.weight.tolist()
    return [sum(w * x for w, x in zip(row, vector, strict=True)) + b for row, b in zip(rows, bias, strict=True)]


def _gelu(x):
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def _resample_one(model, features):
    """Flamingo's resampler for one medium, with nothing but Python floats: loops over heads, queries and keys."""
    inputs = [
        [a + b for a, b in zip(_linear(_norm(f, model.norm_in), model.project_in), position, strict=True)]
        for f, position in zip(features.tolist(), model.positions.tolist(), strict=True)
    ]
    latents = model.latents.tolist()
    for block in model.blocks:
        width, heads = len(latents[0]), block.heads
        size = width // heads
        normed = [_norm(latent, block.norm_latents) for latent in latents]
        context = [_norm(x, block.norm_features) for x in inputs] + normed
        key_values = [_linear(x, block.key_value) for x in context]
        updated = []
        for latent, query in zip(latents, (_linear(x, block.query) for x in normed), strict=True):
            gathered = []
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                scores = [
                    sum(q * k for q, k in zip(query[part], kv[:width][part], strict=True)) / math.sqrt(size)
                    for kv in key_values
                ]
                weights = [math.exp(score) for score in scores]
                for channel in range(size):
                    values = [kv[width:][part][channel] for kv in key_values]
                    gathered.append(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
            latent = [a + b for a, b in zip(latent, _linear(gathered, block.out), strict=True)]
            norm, first, _, second = block.feed_forward
            hidden = [_gelu(x) for x in _linear(_norm(latent, norm), first)]
            updated.append([a + b for a, b in zip(latent, _linear(hidden, second), strict=True)])
        latents = updated
    return [_linear(_norm(latent, model.norm_out), model.project_out) for latent in latents]


def test_resampler_equals_plain_loops():
    torch.manual_seed(0)
    model = Resampler(width=10, features=7, tokens=3, llm_width=6, inner=8, blocks=2, heads=2, scale=0.5).double()
    for parameter in model.parameters():  # away from ones and zeros, so that each of them counts
        torch.nn.init.normal_(parameter, std=0.6)
    features = torch.randn(2, 7, 10, dtype=torch.float64) * 3 + 1
    ours = model(features)
    theirs = torch.tensor([_resample_one(model, one) for one in features], dtype=torch.float64)
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-10
    assert (model.float()(features) - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("kind", POOLING)
@pytest.mark.parametrize("features", [1, 7, 8, 9, 50])
def test_shapes_and_gradients(kind, features):
    torch.manual_seed(0)
    config, features = suited(kind, features, 8)
    projector = build_projector(config, [(features, 16)], llm_width=24)
    embeddings = projector(torch.randn(3, features, 16))
    if config.tokens:
        assert projector.tokens == config.tokens
    assert embeddings.shape == (3, projector.tokens, 24)
    embeddings.pow(2).sum().backward()
    unseen = (UNSEEN if features > 1 else UNSEEN_ALONE).get(kind, "$.")
    without = [
        name
        for name, p in projector.named_parameters()
        if p.grad is None or not p.grad.isfinite().all() or not (p.grad.any() or re.search(unseen, name))
    ]
    assert without == []
    assert all(p.dtype == torch.float32 for p in projector.parameters())
    assert list(projector.state_dict()) == [name for name, _ in projector.named_parameters()], (
        "checkpoints hold no more"
    )


@pytest.mark.parametrize("kind", POOLING)
def test_starts_at_the_scale_of_the_embeddings_whatever_the_encoder_gives(kind):
    torch.manual_seed(0)
    config, features = suited(kind, 16, 8)
    projector = build_projector(config, [(features, 64)], llm_width=48, scale=0.1)
    for level in (0.01, 1.0, 100.0):
        std = projector(level * (torch.randn(16, features, 64) + 3)).std().item()
        assert 0.08 < std < 0.12, f"{std} for features of scale {level}"


@pytest.mark.parametrize("kind", POOLING)
def test_takes_bf16_features_with_and_without_autocast(kind):
    torch.manual_seed(0)
    config, count = suited(kind, 9, 4)
    projector = build_projector(config, [(count, 16)], llm_width=24)
    features = torch.randn(2, count, 16)
    exact = projector(features)
    rounded = projector(features.bfloat16())
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().max() < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        assert (projector(features.bfloat16()).float() - exact).abs().max() < 0.1


@pytest.mark.parametrize("kind", [*POOLING, "each"])
def test_a_medium_has_the_same_embeddings_in_any_batch_every_time(kind):
    torch.manual_seed(0)
    config, count = suited(kind, 9, 4)
    projector = build_projector(config, [(count, 16)], llm_width=24).train()
    features = torch.randn(3, count, 16)
    together = projector(features)
    assert torch.equal(together, projector(features)), "a run that goes on would go elsewhere"
    assert (projector(features[1:2]) - together[1:2]).abs().max() < 1e-5


@pytest.mark.parametrize("kind", [*POOLING, "each"])
def test_is_made_and_run_without_weights(kind, tmp_path):
    config, count = suited(kind, 16, 4)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    recipe = {"image": ModalityConfig(encoder=siglip(tmp_path), projector=config)}
    with shapes_only(fake):
        adapter = build_adapters(REGISTRY, recipe, llm_width=24)["image"]
    assert adapter.encoder.tokens == count
    assert all(isinstance(p, FakeTensor) for p in adapter.projector.parameters())
    with fake:
        assert adapter.projector(torch.empty(2, count, 16)).shape == (2, adapter.tokens, 24)
    assert forward_flops(adapter.projector, (1, count, 16)) > 0


@pytest.mark.parametrize("kind", PROJECTORS)
def test_an_option_that_a_kind_does_not_have_is_named(kind):
    config, count = suited(kind, 9, 4)
    config = replace(config, options={"depth_of_field": 3})
    with pytest.raises(UserError, match=f"projector.options of {kind}: unknown option 'depth_of_field'"):
        build_projector(config, [(count, 16)], llm_width=24)


def test_no_number_of_tokens_means_one_for_each_feature():
    for kind in ("linear", "mlp"):
        projector = build_projector(ProjectorConfig(kind=kind, tokens=0), [(7, 16)], llm_width=24)
        features = torch.randn(2, 7, 16)
        assert projector.tokens == 7
        one_by_one = torch.stack([projector.layers(projector.norm(feature)) for feature in features.unbind(1)], 1)
        assert (projector(features) - one_by_one).abs().max() < 1e-5
    for kind in ("resampler", "qformer", "abstractor"):
        with pytest.raises(UserError, match=f"projector.tokens is 0, .* {kind} makes as many as it is asked for"):
            build_projector(ProjectorConfig(kind=kind, tokens=0), [(9, 16)], llm_width=24)


def test_pooling_follows_its_rule():
    def pooled(features, tokens):
        return PooledProjector(width=4, features=features, tokens=tokens, llm_width=5).pooled

    assert pooled(49, 32) == 32
    assert pooled(32, 32) == 32
    assert pooled(31, 32) == 16, "each of 16 averages makes two embeddings"
    assert pooled(1, 32) == 1, "one vector makes all 32, by one linear layer"
    assert pooled(5, 7) == 1


def test_pooling_keeps_the_order_of_features():
    projector = PooledProjector(width=4, features=12, tokens=3, llm_width=5)
    features = torch.randn(1, 12, 4)
    changed = features.clone()
    changed[:, 8:] += 1.0 * torch.tensor([1.0, -1.0, 2.0, 0.0])
    difference = (projector(changed) - projector(features)).abs().sum(-1)[0]
    assert difference[:2].max() == 0
    assert difference[2] > 0


def test_resampler_tells_the_order_of_features():
    torch.manual_seed(0)
    model = Resampler(width=8, features=6, tokens=2, llm_width=5, inner=8, blocks=1, heads=2)
    features = torch.randn(1, 6, 8)
    assert (model(features) - model(features.flip(1))).abs().max() > 1e-3


def test_mistakes_are_named():
    with pytest.raises(UserError, match="did you mean resampler"):
        build_projector(ProjectorConfig(kind="resample"), [(4, 8)], 16)
    for kind in ("resampler", "qformer"):
        with pytest.raises(UserError, match=f"a {kind} of width 10 cannot be split into 8 heads"):
            build_projector(ProjectorConfig(kind=kind), [(4, 10)], 16)
    for kind in ("abstractor", "pixel_shuffle"):
        with pytest.raises(UserError, match=f"{kind} takes features of a square grid, .* gives 50 .* 7 x 7 is 49"):
            build_projector(ProjectorConfig(kind=kind, tokens=4), [(50, 10)], 16)
    assert build_projector(ProjectorConfig(kind="resampler", width=16), [(4, 10)], 16).tokens == 32
