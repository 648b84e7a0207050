"""AdamW: which parameters share a learning rate and a weight decay, and the rate of each step.

    what learns ──parameter_groups──▶ AdamW ──▶ DeepSpeed        step ──learning_rate──▶ set_learning_rate ──▶ figures

Without ``optim.groups`` all that learns is one group. ZeRO shards each group by itself; checkpoints hold moments by the
names of parameters (`anymal.training.optimizer_state`), so they do not depend on it.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from anymal.config.schema import OptimConfig
from anymal.model.lora import is_lora
from anymal.model.trainable import trainable


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW over what is trainable, in the groups that ``optim.groups`` makes of it."""
    first, second = optim.betas
    return torch.optim.AdamW(parameter_groups(trainable(model), optim), betas=(first, second))


def parameter_groups(parameters: Mapping[str, nn.Parameter], optim: OptimConfig) -> list[dict[str, Any]]:
    """torch's parameter groups, each in the order of `parameters`; a group in which nothing learns is left out.

    Args:
        parameters: What learns, by its name in the model.
        optim: The settings.

    Returns:
        Groups with ``lr`` (the peak, which ``peak`` keeps), ``weight_decay`` and ``called``: the most specific name in
        ``optim.groups`` for these parameters, or empty.
    """
    groups: dict[str, dict[str, Any]] = {}
    for path, parameter in parameters.items():
        names = [name for name in _names(path) if name in optim.groups]
        called = names[0] if names else ""
        if called not in groups:
            peak, decay = _setting(optim, names, "lr"), _setting(optim, names, "weight_decay")
            groups[called] = {"params": [], "lr": peak, "weight_decay": decay, "peak": peak, "called": called}
        groups[called]["params"].append(parameter)
    return list(groups.values())


def _names(path: str) -> list[str]:
    """What a parameter of the model is called in ``train`` and ``optim.groups``, the most specific name first."""
    part, modality = path.split(".")[:2]
    if part == "llm":
        return ["lora" if is_lora(path) else "llm"]
    part = "encoders" if part == "trained_encoders" else part
    return [f"{part}.{modality}", part]


def _setting(optim: OptimConfig, names: list[str], key: Literal["lr", "weight_decay"]) -> float:
    """The value of the first of these groups that sets it, or that of ``optim`` itself."""
    values = [getattr(optim.groups[name], key) for name in names]
    return next((value for value in values if value is not None), getattr(optim, key))


def learning_rate(step: int, optim: OptimConfig, peak: float | None = None) -> float:
    """The rate of the step that follows `step` finished ones: linear warm-up, then what ``optim.schedule`` says.

    A pure function of the step, so that there is no scheduler whose state could be lost. It is that of transformers'
    ``get_scheduler``, except that warm-up is a step ahead (its first rate is not zero, and trains something), and that
    a share rounded to no steps is one step.

    Args:
        step: Optimizer steps done.
        optim: The settings.
        peak: The highest rate; ``optim.lr`` by default.
    """
    peak = optim.lr if peak is None else peak
    warmup = max(1, round(optim.warmup * optim.steps)) if optim.warmup_steps is None else optim.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, optim.steps - warmup)
    match optim.schedule:
        case "cosine":
            share = 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            share = 1 - progress
        case "constant":
            share = 1.0
    return peak * (optim.min_lr_rate + (1 - optim.min_lr_rate) * share)


def set_learning_rate(groups: Iterable[dict[str, Any]], step: int, optim: OptimConfig) -> dict[str, float]:
    """Set every group's rate of the step that follows `step` finished ones.

    Args:
        groups: ``engine.optimizer.param_groups``.
        step: Optimizer steps done.
        optim: The settings.

    Returns:
        The figures of that step: ``lr`` where anything learns at ``optim.lr``, and ``lr/NAME`` of each other group.
    """
    rates = {}
    for group in groups:
        group["lr"] = learning_rate(step, optim, group["peak"])
        rates["lr" if group["peak"] == optim.lr else f"lr/{group['called']}"] = group["lr"]
    return rates
