"""Projectors for encoders of several kinds of features: mining against plain loops, each part by its own projector."""

import math

import pytest
import torch
from test_projectors import _linear, _norm

from anymal.config.schema import ProjectorConfig
from anymal.errors import UserError
from toys import build_projector

PARTS = [(9, 6), (36, 10)]  # 3 x 3 queries, 6 wide, and a map of 6 x 6, 10 wide: 2 x 2 cells to each


def _features(parts, media=2, dtype=torch.float32):
    width = max(width for _, width in parts)
    filled = [torch.nn.functional.pad(torch.randn(media, t, w), (0, width - w)) for t, w in parts]
    return torch.cat(filled, 1).to(dtype)


def _mining(parts=PARTS, llm_width=8, **more):
    return build_projector(ProjectorConfig(kind="mining", tokens=0, **more), parts, llm_width, scale=0.5)


def _mine_one(model, features):
    """arXiv 2403.18814, section 3.2, for one medium: loops over queries and the cells of each; then the mlp."""
    queries = [row[:6] for row in features[:9].tolist()]
    cells = [row[:10] for row in features[9:].tolist()]

    def phi(vector, layers):
        return _linear(_norm(vector, layers[0]), layers[1])

    made = []
    for index, query in enumerate(queries):
        row, column = divmod(index, 3)
        own = [cells[(2 * row + i) * 6 + 2 * column + j] for i in range(2) for j in range(2)]
        asked = phi(query, model.query)
        scores = [sum(a * b for a, b in zip(asked, phi(cell, model.key), strict=True)) / math.sqrt(6) for cell in own]
        weights = [math.exp(score) for score in scores]
        values = [phi(cell, model.value) for cell in own]
        gathered = [sum(w * v[c] for w, v in zip(weights, values, strict=True)) / sum(weights) for c in range(6)]
        made.append([a + b for a, b in zip(query, gathered, strict=True)])
    return model.mlp(torch.tensor([made], dtype=features.dtype))[0]


def test_mining_equals_plain_loops():
    torch.manual_seed(0)
    model = _mining().double()
    for parameter in model.parameters():  # away from ones and zeros, so that each of them counts
        torch.nn.init.normal_(parameter, std=0.6)
    features = _features(PARTS, dtype=torch.float64) * 2 + 0.5
    theirs = torch.stack([_mine_one(model, one) for one in features])
    assert theirs.std() > 0.1
    assert (model(features) - theirs).abs().max() < 1e-10


def test_a_detail_changes_the_token_of_its_own_patch_alone():
    torch.manual_seed(0)
    model = _mining()
    features = _features(PARTS, media=1)
    before = model(features)
    for place in range(36):
        changed = features.clone()
        changed[0, 9 + place] += torch.randn(10)
        differs = (model(changed) != before)[0].any(-1)
        row, column = place // 6, place % 6
        assert differs.nonzero().flatten().tolist() == [row // 2 * 3 + column // 2]


def test_mini_geminis_cells_are_eight_by_eight():
    config = ProjectorConfig(kind="mining", tokens=0)
    with torch.device("meta"):
        model = build_projector(config, [(576, 1024), (192 * 192, 2880)], 4096)
        assert model(torch.empty(1, 576 + 36864, 2880)).shape == (1, 576, 4096)
    assert (model.tokens, model.cell) == (576, 8)


def test_each_part_has_its_projector_and_stands_between_tags():
    torch.manual_seed(0)
    parts = [(4, 6), (3, 10)]
    config = ProjectorConfig(kind="each", tokens=0, layers=1, options={"tags": True})
    model = build_projector(config, parts, 8, scale=0.1)
    features = _features(parts)
    made = model(features)
    assert made.shape == (2, model.tokens, 8) == (2, 4 + 3 + 2, 8)
    assert torch.equal(made[:, 0], model.tags[0].expand(2, -1))
    assert torch.equal(made[:, -1], model.tags[1].expand(2, -1))
    for project, start, count, width in ((model.each[0], 0, 4, 6), (model.each[1], 4, 3, 10)):
        norm, linear = project.norm, project.layers[0]
        kind = features[:, start : start + count, :width]
        expected = linear(torch.nn.functional.layer_norm(kind, (width,), norm.weight, norm.bias))
        assert torch.allclose(made[:, 1 + start : 1 + start + count], expected, atol=1e-6)
    assert build_projector(ProjectorConfig(kind="each", tokens=7), parts, 8).tokens == 7


def test_sphinxs_view_takes_291_tokens():
    config = ProjectorConfig(kind="each", tokens=0, layers=1, options={"tags": True})
    model = build_projector(config, [(32, 768), (257, 5632)], 64)
    assert model.tokens == 291
    assert model(torch.zeros(1, 289, 5632)).shape == (1, 291, 64)


@pytest.mark.parametrize("kind", ["each", "mining"])
def test_they_start_at_the_scale_of_the_embeddings_and_learn(kind):
    torch.manual_seed(0)
    parts = [(16, 32), (64, 48)]
    options = {"tags": True} if kind == "each" else {}
    config = ProjectorConfig(kind=kind, tokens=0, options=options)
    model = build_projector(config, parts, 48, scale=0.1)
    for level in (0.01, 1.0, 100.0):
        std = model(level * (_features(parts, media=8) + 3)).std().item()
        assert 0.08 < std < 0.12, f"{std} for features of scale {level}"
    rounded = model(_features(parts).bfloat16())
    assert rounded.dtype == torch.float32
    rounded.pow(2).sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # What is added to all scores of a query alike cancels in the softmax, so no gradient but rounding reaches it.
    assert [name for name in without if name != "key.1.bias"] == []


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"tokens is 32, but each makes 45 of these features; set it to 0"):
        build_projector(ProjectorConfig(kind="each"), PARTS, 8)
    with pytest.raises(UserError, match=r"projector.options of each: unknown option 'tag'; did you mean tags\?"):
        build_projector(ProjectorConfig(kind="each", tokens=0, options={"tag": True}), PARTS, 8)
    with pytest.raises(UserError, match="tokens is 8, but mining makes 9"):
        build_projector(ProjectorConfig(kind="mining", tokens=8), PARTS, 8)
    with pytest.raises(UserError, match="options of mining: unknown option 'tags'; known are: none"):
        _mining(options={"tags": True})
    for parts in ([(9, 6)], [(9, 6), (25, 6)], [(8, 6), (32, 6)], [(9, 6), (36, 6), (36, 6)]):
        with pytest.raises(UserError, match="appends two"):
            _mining(parts)
    with pytest.raises(UserError, match="gives 2 kinds of features apart"):
        build_projector(ProjectorConfig(kind="mlp"), PARTS, 8)
