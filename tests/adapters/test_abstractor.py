"""The abstractor's blocks against transformers' RegNet, and what it can tell apart."""

import pytest
import torch
from torch import nn

from anymal.adapters.projectors.abstractor import Abstractor, ChannelNorm, ResidualBlock
from anymal.config.schema import ProjectorConfig
from anymal.errors import UserError
from toys import build_projector


def _with_honeybees_norms(block: nn.Module) -> nn.Module:
    """RegNet has BatchNorm, and ReLU in squeeze-excite; Honeybee sets LayerNorm over channels, and SiLU throughout."""
    for module in list(block.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, ChannelNorm(child.num_features))
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.SiLU())
    return block


@pytest.mark.parametrize(("before", "after"), [(8, 8), (8, 12)])
def test_a_block_equals_regnets(before, after):
    from transformers import RegNetConfig
    from transformers.models.regnet.modeling_regnet import RegNetYLayer

    torch.manual_seed(0)
    reference = RegNetYLayer(RegNetConfig(groups_width=1, hidden_act="silu"), before, after)
    reference, ours = _with_honeybees_norms(reference), ResidualBlock(before, after)
    for parameter in reference.parameters():
        nn.init.normal_(parameter, std=0.5)
    theirs = [*reference.layer.parameters(), *reference.shortcut.parameters()]
    mine = [*ours.layers.parameters(), *ours.shortcut.parameters()]
    assert [p.shape for p in mine] == [p.shape for p in theirs]
    with torch.no_grad():
        for to, source in zip(mine, theirs, strict=True):
            to.copy_(source)
    maps = torch.randn(2, before, 5, 5)
    expected = reference(maps)
    assert expected.std() > 0.1
    assert (ours(maps) - expected).abs().max() < 1e-5


def test_channels_are_normalised_at_each_place():
    maps = ChannelNorm(16)(5 * torch.randn(2, 16, 3, 4) + 2)
    assert maps.shape == (2, 16, 3, 4)
    assert maps.mean(1).abs().max() < 1e-5
    assert (maps.var(1, unbiased=False) - 1).abs().max() < 1e-3


def test_tokens_are_in_reading_order_and_know_their_neighbourhood():
    torch.manual_seed(0)
    sizes = {"width": 8, "side": 6, "tokens": 9, "llm_width": 5, "inner": 8, "blocks": 1, "readout": 1}
    model = Abstractor(**sizes)
    # Squeeze-excite looks at the whole map: without it only the neighbourhood of a change may change.
    for block in (*model.before, *model.after):
        block.layers[4] = nn.Identity()
    features = torch.randn(1, 36, 8)
    changed = features.clone()
    changed[:, 0] += torch.randn(8)  # the upper left corner
    difference = (model(changed) - model(features)).abs().sum(-1).view(3, 3)
    assert (difference[:2, :2] > 0).all(), "a convolution before the pooling and one after it"
    assert difference[2].max() == 0 and difference[:, 2].max() == 0


def test_tells_the_order_of_features():
    torch.manual_seed(0)
    model = build_projector(ProjectorConfig(kind="abstractor", tokens=1, layers=1), [(9, 8)], llm_width=5)
    features = torch.randn(1, 9, 8)
    assert (model(features) - model(features.flip(1))).abs().max() > 1e-3


def test_what_does_not_fit_is_named():
    with pytest.raises(UserError, match=r"tokens is 32, .*5 x 5 = 25 or 6 x 6 = 36"):
        build_projector(ProjectorConfig(kind="abstractor", tokens=32), [(36, 6)], llm_width=10)
    with pytest.raises(UserError, match="readout is 0"):
        build_projector(ProjectorConfig(kind="abstractor", tokens=4, options={"readout": 0}), [(36, 6)], llm_width=10)
