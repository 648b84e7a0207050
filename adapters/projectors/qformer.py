"""``qformer``: BLIP-2's querying transformer, learned queries that attend to one another and to the features.

Source: arXiv 2301.12597, section 3.1. The network is transformers' own; queries, norms and the last layer are ours.

    N media   T features of one medium   W their width   K tokens of one medium   D the LLM's width   I inner width
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from anymal.adapters.pretrained import load_config, load_weights, quiet
from anymal.adapters.projectors.fit import asked_tokens, inner_width, scaled_linear
from anymal.config.schema import ProjectorConfig
from anymal.errors import UserError
from anymal.modality import Projector
from anymal.model.fake_tensors import without_weights
from anymal.model.registry import Fit

if TYPE_CHECKING:
    from transformers import Blip2QFormerConfig, PreTrainedConfig


@dataclass(kw_only=True)
class QFormerOptions:
    """Settings of a qformer alone."""

    cross_attention_frequency: int = 2
    """Every how many layers the queries attend to the features, the first one included (BLIP-2: 2)."""
    feed_forward: int = 0
    """Width inside the feed-forward layers; 0 takes 4 times the inner width (BLIP-2: 3072, which is that)."""
    init: str = ""
    """A BLIP-2 checkpoint (hub name or local folder) whose queries and Q-Former the training starts from; sizes must
    be its own. Features then go in as they come, for it expects them as its own encoder gives them."""

    def __post_init__(self):
        if self.cross_attention_frequency < 1 or self.feed_forward < 0:
            raise UserError("cross_attention_frequency must be at least 1, and feed_forward cannot be negative")


class QFormer(Projector):
    """K learned queries gather from T features, through layers of self- and cross-attention.

    Around transformers' `Blip2QFormerModel`: LayerNorm on the features; an embedding for each of the T positions, which
    BLIP-2 does not have, and which starts at zero (attention does not see order, and not every encoder's features carry
    it); LayerNorm and a linear layer from I to D. There is no dropout: a run that goes on must draw what it would have.

    Args:
        width, features, tokens, llm_width: W, T, K and D.
        config: Its `Blip2QFormerConfig`, of ``encoder_hidden_size`` W and ``hidden_size`` I.
        scale: Standard deviation of an embedding's elements at the start.
        normalise: Whether there is a LayerNorm on the features.
    """

    def __init__(
        self,
        *,
        width: int,
        features: int,
        tokens: int,
        llm_width: int,
        config: "Blip2QFormerConfig",
        scale: float = 1.0,
        normalise: bool = True,
    ):
        from transformers import Blip2QFormerModel

        super().__init__()
        self.tokens = tokens
        self.norm_in = nn.LayerNorm(width) if normalise else nn.Identity()
        self.positions = nn.Parameter(torch.zeros(features, width))
        self.queries = nn.Parameter(config.initializer_range * torch.randn(tokens, config.hidden_size))
        self.network = Blip2QFormerModel(config)
        self.norm_out = nn.LayerNorm(config.hidden_size)
        self.project_out = scaled_linear(config.hidden_size, llm_width, scale)

    def forward(self, features: Tensor) -> Tensor:
        """[N, T, W] → [N, K, D]."""
        return self.project_out(self.norm_out(self.gather(features)))

    def gather(self, features: Tensor) -> Tensor:
        """[N, T, W] → [N, K, I], the Q-Former's last hidden states."""
        features = self.norm_in(features.to(self.queries.dtype)) + self.positions
        queries = self.queries.expand(len(features), -1, -1)
        return self.network(query_embeds=queries, encoder_hidden_states=features).last_hidden_state


def qformer(config: ProjectorConfig, options: QFormerOptions, fit: Fit) -> Projector:
    """BLIP-2's Q-Former: learned queries attend to the features.

    It has `config.layers` layers of `config.heads` heads; its inner width is `config.width`, or the encoder's (BLIP-2:
    12, 12 and 768, for 32 tokens).

    Raises:
        UserError: No tokens are asked for, heads do not divide the inner width, or `QFormerOptions.init` cannot be
            loaded or has other sizes (all that differ are named).
    """
    from transformers import Blip2QFormerConfig

    features, width = fit.only(config)
    tokens, inner = asked_tokens(config), inner_width(config, width)
    sizes = {
        "num_hidden_layers": config.layers,
        "hidden_size": inner,
        "num_attention_heads": config.heads,
        "encoder_hidden_size": width,
        "cross_attention_frequency": options.cross_attention_frequency,
        "intermediate_size": options.feed_forward or 4 * inner,
    }
    around = {"width": width, "features": features, "tokens": tokens, "llm_width": fit.llm_width, "scale": fit.scale}
    if not options.init:
        std = 0.02 * (768 / inner) ** 0.5  # BLIP-2's at its width; at others, layers that pass on as much as there
        return QFormer(**around, config=Blip2QFormerConfig(**sizes, **NO_DROPOUT, initializer_range=std))
    blip2 = _blip2_config(options.init, {**sizes, "num_query_tokens": tokens})
    model = QFormer(**around, config=blip2.qformer_config, normalise=False)
    if not without_weights():
        _start_from(options.init, blip2, model)
    return model


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

SETTINGS = {
    "num_hidden_layers": "projector.layers",
    "hidden_size": "projector.width",
    "num_attention_heads": "projector.heads",
    "encoder_hidden_size": "the encoder's width",
    "cross_attention_frequency": "projector.options.cross_attention_frequency",
    "intermediate_size": "projector.options.feed_forward",
    "num_query_tokens": "projector.tokens",
}
"""What we call BLIP-2's sizes."""


def _blip2_config(name: str, sizes: Mapping[str, int]) -> "PreTrainedConfig":
    """The config of a BLIP-2 checkpoint of these sizes, its Q-Former's without dropout and without a text branch.

    Raises:
        UserError: It is no BLIP-2, or has other sizes.
    """
    config = load_config(name)
    if config.model_type != "blip-2":
        raise UserError(f"projector.options.init: {name!r} is a {config.model_type or 'nameless model'}, not a blip-2")
    theirs = {**config.qformer_config.to_dict(), "num_query_tokens": config.num_query_tokens}
    wrong = [f"{SETTINGS[key]} is {n}, but its {key} {theirs[key]}" for key, n in sizes.items() if theirs[key] != n]
    if wrong:
        raise UserError(f"projector.options.init: the Q-Former of {name!r} does not fit: {'; '.join(wrong)}")
    config.qformer_config.update({**NO_DROPOUT, "use_qformer_text_input": False})
    return config


def _start_from(name: str, config: "PreTrainedConfig", model: QFormer) -> None:
    """Copy the queries and the Q-Former of a BLIP-2 checkpoint into `model`; nothing else of it is read.

    Raises:
        UserError: It cannot be loaded, or lacks weights.
    """
    from transformers import Blip2PreTrainedModel, Blip2QFormerModel

    class Taken(Blip2PreTrainedModel):
        """Two attributes of `Blip2Model`, under its names."""

        def __init__(self, config: "PreTrainedConfig"):
            super().__init__(config)
            self.query_tokens = nn.Parameter(torch.zeros(1, *model.queries.shape))
            self.qformer = Blip2QFormerModel(config.qformer_config)
            self.post_init()

    with quiet():
        taken, report = load_weights("Q-Former", name, Taken, config=config)
    lacks = sorted(report["missing_keys"])
    if lacks:
        raise UserError(f"projector.options.init: {name!r} lacks {len(lacks)} weights, such as {lacks[0]}")
    with torch.no_grad():
        model.queries.copy_(taken.get_parameter("query_tokens")[0])
    model.network.load_state_dict(taken.get_submodule("qformer").state_dict())
