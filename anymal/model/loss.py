"""Cross-entropy where there is an answer token, as a sum: the training loop divides by the global number of them.

The head is frozen, so the gradient of the loss with respect to the hidden states is computed in the forward pass, chunk
by chunk. The logits of one chunk are alive at a time, and [A, D] is all that is kept for the backward pass: memory does
not grow with vocabulary × tokens. (As Liger Kernel's fused linear cross-entropy, arXiv 2410.10989, does it.)
"""

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from anymal.environment import swapped
from anymal.model.llm import base_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from anymal.model.llm import CausalLM

CHUNK_BYTES = 128 * 2**20  # float32 logits of a chunk; its softmax and gradient take as much again, each
SCALES = ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")  # in transformers' configs
CAPS = ("final_logit_softcapping", "logits_soft_cap")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Head:
    """From the decoder's output to logits: a linear layer, then what some architectures do to its output."""

    weight: Tensor
    """[V, D]; it may be the embedding table. Kept as such: under ZeRO-3, to look it up in its layer would gather it."""
    bias: Tensor | None = None
    """[V]."""
    scale: float = 1.0
    """A factor on the logits (Cohere, Granite)."""
    cap: float | None = None
    """Logits are squeezed into (-cap, cap) by a tanh (Gemma 2)."""

    def frozen(self) -> bool:
        """Whether no gradient is wanted for the weights, as the chunked loss requires."""
        return not any(parameter.requires_grad for parameter in self._parameters())

    def whole(self) -> AbstractContextManager:
        """A context in which this process holds all of the weights: ZeRO-3 gathers them once, not once a chunk."""
        if not hasattr(self.weight, "ds_id"):
            return nullcontext()
        from deepspeed.runtime.zero import GatheredParameters

        return GatheredParameters(self._parameters())

    def logits(self, hidden: Tensor) -> Tensor:
        """[A, D] hidden states → [A, V] float32 logits."""
        logits = F.linear(hidden.to(self.weight.dtype), self.weight, self.bias).float()
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def _parameters(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]


def find_head(llm: nn.Module) -> Head | None:
    """The head of a causal LM of transformers (with or without LoRA); None if it is not understood.

    Architectures differ in what they do to the logits, and name it differently. What the config seems to say is
    therefore compared once with the model's own logits, with the decoder's output put in place of a run through it.
    """
    base = base_model(llm)
    linear, decoder = base.get_output_embeddings(), base.get_decoder()
    reason = "its logits are not those of its output layer"
    if type(linear) is not nn.Linear:
        reason = f"its output layer is a {type(linear).__name__}"
    else:
        try:
            for head in _candidates(base.config.get_text_config(), linear):
                if _agrees(base, decoder, head):
                    return head
        except Exception as error:  # an architecture of which we know nothing may fail in any way
            reason = f"{type(error).__name__}: {error}"
    _log.warning("%s: the loss takes the whole logits, not chunks of them (%s)", type(base).__name__, reason)
    return None


def _candidates(config: "PreTrainedConfig", linear: nn.Linear) -> list[Head]:
    cap = next((getattr(config, name) for name in CAPS if getattr(config, name, None)), None)
    scales = [1.0]
    for value in (getattr(config, name, None) for name in SCALES):
        scales += [value, 1 / value] if value else []  # some multiply, others divide by the same name
    return [Head(weight=linear.weight, bias=linear.bias, scale=scale, cap=cap) for scale in dict.fromkeys(scales)]


@torch.no_grad()
def _agrees(llm: "CausalLM", decoder: nn.Module, head: Head) -> bool:
    """Whether `head` makes the LLM's own logits out of hidden states, small ones and such as a cap would bend."""
    from transformers.modeling_outputs import MoeModelOutputWithPast

    weight = head.weight
    if weight.is_meta or isinstance(weight, FakeTensor):  # nothing to compare
        return True
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 4, weight.shape[1], generator=generator)
    # Plain logits of about 1, 4, 16 and 64: caps are around 30.
    size = weight[:256].float().norm(dim=1).mean().cpu()
    hidden = (hidden / size * torch.tensor([1.0, 4.0, 16.0, 64.0])[:, None]).to(weight.device, weight.dtype)
    output = MoeModelOutputWithPast(last_hidden_state=hidden)
    with swapped(decoder, "forward", lambda *_, **__: output):
        own = llm(inputs_embeds=hidden, use_cache=False).logits[0].float()
    tolerance = 1e-4 if weight.dtype == torch.float32 else 2e-2
    row = own.abs().amax(dim=1, keepdim=True)
    return bool(((head.logits(hidden[0]) - own).abs() <= tolerance * row).all())


class _WithGradient(torch.autograd.Function):
    """A value whose gradient with respect to `hidden` is known already."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return _known_gradient(ctx, *grad_outputs)


@once_differentiable
def _known_gradient(ctx: Any, incoming: Tensor) -> tuple[Tensor, None, None]:
    (gradient,) = ctx.saved_tensors
    return gradient * incoming.to(gradient.dtype), None, None


def chunked_loss(head: Head, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The negative log-likelihoods of the answer tokens, without ever holding all logits.

    Args:
        head: A frozen head.
        hidden: [A, D] the decoder's output at the positions whose next token is an answer.
        targets: [A] the answer tokens.

    Returns:
        Their sum in float32 (differentiable with respect to `hidden`, once), and [A] each of them (detached).
    """
    learns = torch.is_grad_enabled() and hidden.requires_grad
    losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    gradient = torch.empty_like(hidden) if learns else None
    with head.whole(), torch.set_grad_enabled(learns):
        rows = max(1, CHUNK_BYTES // (4 * len(head.weight)))
        for start in range(0, len(targets), rows):
            chunk = slice(start, start + rows)
            some = hidden[chunk].detach().requires_grad_(learns)
            each = F.cross_entropy(head.logits(some), targets[chunk], reduction="none")
            losses[chunk] = each.detach()
            if gradient is not None:
                (gradient[chunk],) = torch.autograd.grad(each.sum(), some)
    total = losses.sum()
    return (total if gradient is None else _WithGradient.apply(hidden, gradient, total)), losses


def plain_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """As `chunked_loss`, from [A, V] logits that are all there; differentiable as often as they are."""
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return losses.sum(), losses.detach()


def sums_per_group(losses: Tensor, answer_groups: Tensor, groups: int) -> Tensor:
    """[A] losses, and the index of each one's group → [G, 2]: per group the sum and the number of tokens."""
    # Not one_hot, which looks at the numbers on some devices; a product, since index_add is not deterministic.
    member = (answer_groups[:, None] == torch.arange(groups, device=losses.device)).to(losses.dtype)
    return member.T @ torch.stack([losses, torch.ones_like(losses)], dim=1)
