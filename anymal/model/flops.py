"""The floating-point operations (FLOPs) of a training step, counted from shapes. Formulas: docs/cost.md.

    T  tokens   A  answer tokens   N  parameters of the LLM's body   V, D  vocabulary and width   t  tokens of a sample

The base is what the mathematics needs, whatever is recomputed: forward and gradient to the inputs through a frozen
body (4N a token), forward and both gradients where something learns, the head at answer positions only.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from anymal.modality import Projector, media_dtype
from anymal.model.cross_attention import MediaSpan, media_spans
from anymal.model.llm import base_model, output_layer, token_embedding
from anymal.model.lora import is_lora
from anymal.model.multimodal import AnyMAL
from anymal.sample import Batch

_log = logging.getLogger(__name__)
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # in transformers' configs


@dataclass(frozen=True, kw_only=True)
class LLMFlops:
    """What the LLM's FLOPs depend on."""

    body: int
    """N: parameters of the decoder, without embeddings, head and LoRA. Each is one multiply-add for each token. Of a
    mixture's experts, as many count as a token is sent to."""
    embeddings: int
    """Parameters of the embedding table. Looking up costs nothing."""
    head: int
    """V·D, whether or not its weights are the embedding table's."""
    lora: int
    """Parameters of LoRA, trainable or not, with the copies that are trained beside it, but for table and head."""
    attention: int
    """Layers × heads × width of a head: multiply-adds of a pair of tokens for scores, and as many for values."""
    recomputed: float
    """Share of the body's forward pass that is computed again in the backward pass: 1 with full checkpointing."""
    learns: bool = False
    """Whether the body is trained: the gradients to its weights then take as much as those to the inputs."""
    head_learns: bool = False
    """Whether the head is: with the LLM, or as one of ``model.lora.modules_to_save``."""

    @property
    def per_weight(self) -> int:
        """FLOPs of a training step for a weight of the body and a token: 4, or 6 if it learns."""
        return 6 if self.learns else 4

    @property
    def per_head_weight(self) -> int:
        """FLOPs of a training step for a weight of the head and an answer: likewise."""
        return 6 if self.head_learns else 4

    def model_flops(self, tokens: float, answers: float, squares: float) -> float:
        """FLOPs that a training step needs: 4N·T + 6·LoRA·T + 4·V·D·A + 6·attention·Σt²; 6 for 4 if the LLM learns.

        Args:
            tokens: T.
            answers: A.
            squares: Σt² over the samples: half of all pairs of a sample's tokens attend (causally), and a pair takes
                2 + 2 FLOPs forward and twice that backward for each unit of `attention`.
        """
        body = (self.per_weight * self.body + 6 * self.lora) * tokens
        return body + self.per_head_weight * self.head * answers + 6 * self.attention * squares

    def recomputed_flops(self, tokens: float, squares: float) -> float:
        """FLOPs of activation checkpointing on top: 2N·T, LoRA's and attention's forward pass, times `recomputed`."""
        return self.recomputed * (2 * (self.body + self.lora) * tokens + 2 * self.attention * squares)


def llm_flops(llm: nn.Module, checkpointing: str = "none") -> LLMFlops:
    """Read the counts off a causal LM of transformers: at any precision, with or without LoRA, weights or none.

    Args:
        llm: The LLM. Under ZeRO-3 it may be sharded.
        checkpointing: ``model.llm.checkpointing``. What ``selective`` recomputes is not matrix products, hence not
            counted.
    """
    base = base_model(llm)
    config = base.config.get_text_config()
    table, head = token_embedding(llm).weight, output_layer(llm).weight
    counts, learns, used = {"body": 0, "lora": 0}, False, _share_of_experts(config)
    for name, parameter in llm.named_parameters():
        if parameter is not table and parameter is not head and ".original_module." not in name:
            share = used if ".experts." in name else 1
            counts["lora" if is_lora(name) else "body"] += round(share * numel(parameter))
            learns = learns or (parameter.requires_grad and not is_lora(name))
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return LLMFlops(
        body=counts["body"],
        lora=counts["lora"],
        embeddings=numel(table),
        head=numel(head),
        attention=config.num_hidden_layers * heads * width,
        recomputed=float(checkpointing == "full"),
        learns=learns,
        head_learns=head.requires_grad,
    )


def _share_of_experts(config: Any) -> float:
    """How many of a mixture's experts a token is sent to, of all that it could be sent to."""
    every = next((getattr(config, name, None) for name in EXPERTS if getattr(config, name, None)), None)
    each = getattr(config, "num_experts_per_tok", None)
    return each / every if each and every else 1.0


def numel(parameter: Tensor) -> int:
    """Numbers that a parameter stands for: two in a byte at 4 bits, more than are here under ZeRO-3."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return torch.Size(state.shape).numel()
    return getattr(parameter, "ds_numel", parameter.numel())


def forward_flops(module: nn.Module, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
    """FLOPs of one forward pass over an input of `shape`, of matrix products, convolutions and attention.

    The module runs on fake tensors, by torch's own counter: no weights are read and nothing is computed.
    """
    return _on_shapes(module, torch.empty(shape, dtype=dtype, device="meta"))[1]


def _on_shapes(module: nn.Module, *inputs: Any) -> tuple[Any, int]:
    """The module's output for inputs of which only the shapes count, and the FLOPs that it would take."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    # Not the meta device: transformers looks into masks there, but not into those of fake tensors.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        fake = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
        fake_inputs = [torch.empty(x.shape, dtype=x.dtype) if isinstance(x, Tensor) else x for x in inputs]
        # The counter knows of no fused attention on a CPU, only of the products that it stands for.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            output = functional_call(module, fake, tuple(fake_inputs))
    return output, counter.get_total_flops()


def _counted(what: str, module: nn.Module, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
    try:
        return forward_flops(module, shape, dtype)
    except Exception as error:  # a user's own module may need data; a run must not end for a figure about it
        _log.warning(
            "%s: its FLOPs are left out of the figures, since it does not run on shapes alone: %s", what, error
        )
        return 0


def _cross_attention_flops(projector: Projector, shape: Sequence[int]) -> tuple[int, int]:
    """FLOPs of a projector's context and cross-attention blocks for one medium, and for each token that sees one."""
    features = torch.empty(shape, device="meta")
    latents, context = _on_shapes(projector.context, features)
    width = _on_shapes(projector, features)[0].shape[-1]

    def for_tokens(tokens: int) -> int:
        hidden, seen = torch.empty(tokens, width, device="meta"), [MediaSpan(tokens, 0, 1)]
        return sum(_on_shapes(block, hidden, latents, seen)[1] for block in projector.bridges.values())

    token = for_tokens(2) - for_tokens(1)
    return context + for_tokens(1) - token, token


class StepFlops:
    """Counts the FLOPs of a run's micro-batches.

    Make it before DeepSpeed shards the model.

    Args:
        model: The model.
        llm: What `llm_flops` counts of its LLM.
    """

    def __init__(self, model: AnyMAL, llm: LLMFlops):
        self.llm = llm
        self.projector: dict[str, int] = {}
        """FLOPs of each projector for one medium: forward, and both gradients if it learns."""
        self.cross_attention: dict[str, int] = {}
        """FLOPs of the cross-attention blocks of projectors that have any, for one token that sees a medium: likewise.
        """
        for name, adapter in model.adapters.items():
            projector, shape = adapter.projector, (1, adapter.encoder.tokens, adapter.encoder.width)
            passes = 3 if any(p.requires_grad for p in projector.parameters()) else 1
            self.projector[name] = passes * _counted(f"projector of {name}", projector, shape)
            if hasattr(projector, "bridges"):
                medium, token = _cross_attention_flops(projector, shape)
                self.projector[name] += passes * medium
                self.cross_attention[name] = passes * token
        self.encoder: dict[str, int] = {}
        """FLOPs of each encoder for one medium, counted when the first one comes; where it learns, with gradients."""
        self._encoders = model.encoders
        for name in model.trained_encoders:  # ZeRO-3 shards it
            self.encoder_flops(name)

    def encoder_flops(self, name: str) -> int:
        """FLOPs of an encoder for one medium."""
        if name not in self.encoder:
            encoder = self._encoders[name]
            shape, dtype = getattr(encoder, "shape", None), media_dtype(encoder)
            if shape is None:
                _log.warning("encoder of %s: its FLOPs are left out of the figures, since it has no shape", name)
                self.encoder[name] = 0
                return 0
            if dtype.is_floating_point:  # as `anymal.model.multimodal.run_encoder` casts them
                dtype = next((p.dtype for p in encoder.parameters()), dtype)
            passes = 3 if any(p.requires_grad for p in encoder.parameters()) else 1
            self.encoder[name] = passes * _counted(f"encoder of {name}", encoder, (1, *shape), dtype)
        return self.encoder[name]

    def count(self, batch: Batch) -> tuple[float, float]:
        """FLOPs of a micro-batch: what it needs, and what is recomputed on top. Its media may be gone."""
        tokens, squares = sum(batch.lengths), sum(length**2 for length in batch.lengths)
        needed = self.llm.model_flops(tokens, len(batch.targets), squares)
        for name, encoded in batch.to_encode.items():
            needed += len(batch.counts[name]) * self.projector[name]
            if encoded:
                needed += encoded * self.encoder_flops(name)
        for name in self.cross_attention.keys() & batch.media_starts.keys():
            row = media_spans(batch.lengths, batch.media_starts[name], last_only=True)
            seeing = sum(span.tokens for span in row if span.first < span.last)
            needed = needed + self.cross_attention[name] * seeing
        return needed, self.llm.recomputed_flops(tokens, squares)
