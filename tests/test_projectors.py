"""Projectors: the resampler against plain loops, pooling by its rule, scale, precision, gradients."""

import math

import pytest
import torch

from adapters.projectors import PROJECTORS, build_projector
from adapters.projectors.pooled import PooledProjector
from adapters.projectors.resampler import Resampler
from anymal.config import ProjectorConfig
from anymal.errors import UserError

SPLICED = [kind for kind in PROJECTORS if kind != "cross_attention"]
"""Those whose embeddings are all that the LLM sees; see test_cross_attention.py for the other."""


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


@pytest.mark.parametrize("kind", SPLICED)
@pytest.mark.parametrize("features", [1, 7, 8, 9, 50])
def test_shapes_and_gradients(kind, features):
    torch.manual_seed(0)
    config = ProjectorConfig(kind=kind, tokens=8, layers=2, heads=4)
    projector = build_projector(config, [(features, 16)], llm_width=24)
    embeddings = projector(torch.randn(3, features, 16))
    assert projector.tokens == 8
    assert embeddings.shape == (3, 8, 24)
    embeddings.pow(2).sum().backward()
    without = [
        name
        for name, p in projector.named_parameters()
        if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ]
    assert without == []
    assert all(p.dtype == torch.float32 for p in projector.parameters())


@pytest.mark.parametrize("kind", SPLICED)
def test_starts_at_the_scale_of_the_embeddings_whatever_the_encoder_gives(kind):
    torch.manual_seed(0)
    config = ProjectorConfig(kind=kind, tokens=8, layers=2, heads=4)
    projector = build_projector(config, [(16, 64)], llm_width=48, scale=0.1)
    for level in (0.01, 1.0, 100.0):
        std = projector(level * (torch.randn(16, 16, 64) + 3)).std().item()
        assert 0.08 < std < 0.12, f"{std} for features of scale {level}"


@pytest.mark.parametrize("kind", SPLICED)
def test_takes_bf16_features_with_and_without_autocast(kind):
    torch.manual_seed(0)
    config = ProjectorConfig(kind=kind, tokens=4, layers=2, heads=4)
    projector = build_projector(config, [(9, 16)], llm_width=24)
    features = torch.randn(2, 9, 16)
    exact = projector(features)
    rounded = projector(features.bfloat16())
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().max() < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        assert (projector(features.bfloat16()).float() - exact).abs().max() < 0.1


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
    with pytest.raises(UserError, match="width 10 cannot be split into 8 heads"):
        build_projector(ProjectorConfig(kind="resampler"), [(4, 10)], 16)
    assert build_projector(ProjectorConfig(kind="resampler", width=16), [(4, 10)], 16).tokens == 32
