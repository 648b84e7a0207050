"""Cross-entropy where there is an answer token, as a sum: the training loop divides by the global number of them."""

import torch
import torch.nn.functional as F
from torch import Tensor


def answer_loss(logits: Tensor, targets: Tensor, group_of_row: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Sum of the negative log-likelihoods of the answer tokens, in float32.

    Args:
        logits: [A, V] the head's output at the positions whose next token is an answer.
        targets: [A] the answer tokens.
        group_of_row: [A] index of the group under which each token's loss is reported.
        groups: G, the number of groups.

    Returns:
        The sum (differentiable, a scalar), and [G, 2]: per group the sum and the number of tokens (detached).
    """
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    member = F.one_hot(group_of_row, groups).to(losses.dtype)  # a matrix product, since index_add is not deterministic
    per_group = member.T @ torch.stack([losses.detach(), torch.ones_like(losses)], dim=1)
    return losses.sum(), per_group
