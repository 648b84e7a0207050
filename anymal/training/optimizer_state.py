"""The trained state in a form that is free of the number of ranks and of the ZeRO stage: out of the engine, and back.

    portable_parameters  projectors, LoRA and what else learns, whole
    full_moments         AdamW's moments, whole                          ──▶ checkpoint ──▶ restore_moments
    NAME.master          float32 weights that the model's saved form rounds          ──▶ restore_masters

DeepSpeed's own files are cut by the number of ranks, so a run could not go on with another.
"""

from collections.abc import Callable, Container
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from anymal.checkpoints.networks import MASTER
from anymal.model.lora import is_lora
from anymal.model.trainable import trainable
from anymal.training.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state per parameter, by torch's names


def portable_parameters(engine: Engine) -> dict[str, Tensor]:
    """Projectors, LoRA and what else learns by name, whole and in float32 on the CPU.

    Every rank must call it, and rank 0 gets them: an LLM that learns would fill the memory once for each process.
    """
    from deepspeed.runtime.zero import GatheredParameters

    parameters = {}
    for name, parameter in engine.module.named_parameters():
        if name.startswith(("projectors.", "trained_encoders.")) or is_lora(name) or parameter.requires_grad:
            with GatheredParameters([parameter], enabled=engine.zero_optimization_stage() == 3):
                if engine.global_rank == 0:
                    parameters[name] = parameter.detach().float().cpu().clone()
    return parameters


def full_moments(engine: Engine) -> dict[str, Tensor]:
    """AdamW's moments as ``NAME.exp_avg`` and ``NAME.exp_avg_sq``, whole, on the CPU.

    Every rank must call it, and rank 0 gets them.

    Raises:
        RuntimeError: DeepSpeed has none of a parameter.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    sharded = engine.zero_optimization()
    if engine.zero_optimization_stage() in (1, 2):
        _link_moments(engine)
    moments = {}
    for name, parameter in trainable(engine.module).items():
        for key in MOMENTS:
            whole = safe_get_full_optimizer_state(parameter, key) if sharded else engine.optimizer.state[parameter][key]
            if whole is None:
                raise RuntimeError(
                    f"DeepSpeed has no {key} of {name}: a checkpoint without it could not be gone on from"
                )
            if engine.global_rank == 0:
                moments[f"{name}.{key}"] = whole.detach().float().cpu().clone()
    return moments


def _from_rank_0(read: Callable[[], Tensor], shape: torch.Size, device: torch.device) -> Tensor:
    """A float32 tensor that rank 0 alone reads, on every rank's device; all must call it."""
    whole = torch.empty(shape, device=device)  # NCCL takes no tensors of the host
    if torch.distributed.get_rank() == 0:
        whole.copy_(read())
    torch.distributed.broadcast(whole, src=0)
    return whole


@torch.no_grad()
def restore_masters(model: nn.Module, saved: Container[str], read: Callable[[str], Tensor]) -> None:
    """Put back the float32 weights of which the model has a rounded form. Before ZeRO-3 shards it; on every rank.

    Args:
        model: Loaded from the checkpoint.
        saved: The names in the optimizer's file.
        read: Gives a tensor of that file by its name; called on rank 0.
    """
    for name, parameter in model.named_parameters():
        if f"{name}.{MASTER}" in saved:
            parameter.copy_(_from_rank_0(partial(read, f"{name}.{MASTER}"), parameter.shape, parameter.device))


def restore_moments(engine: Engine, read: Callable[[str], Tensor], step: int) -> None:
    """Put back what `full_moments` returned after `step` optimizer steps, for whatever world size and ZeRO stage.

    One tensor at a time: rank 0 reads it, every rank takes the slice that it owns, and the rest is forgotten. So no
    rank needs more memory than the largest parameter takes, as the forward pass of ZeRO-3 does, too. On every rank.

    Args:
        engine: As it was made, without a step.
        read: Gives a tensor that `full_moments` returned by its name; called on rank 0.
        step: Optimizer steps done.
    """
    _fresh_moments(engine, step)
    for name, parameter in trainable(engine.module).items():
        for key in MOMENTS:
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO 3's: it is empty itself while it is sharded
            _set_moment(engine, parameter, key, _from_rank_0(partial(read, f"{name}.{key}"), shape, engine.device))


def _fresh_moments(engine: Engine, step: int) -> None:
    """Make the optimizer's state, all zeros, which its first step would do."""
    stage = engine.zero_optimization_stage()
    inner = engine.optimizer.optimizer if stage else engine.optimizer
    if stage == 3:  # its groups are empty but for the moment of a step
        pieces = engine.optimizer.fp32_partitioned_groups_flat
    else:  # under stages 1 and 2 this rank's flat partition, under 0 the parameters themselves
        pieces = [piece for group in inner.param_groups for piece in group["params"]]
    for piece in pieces:
        inner.state[piece] = {key: torch.zeros_like(piece) for key in MOMENTS} | {"step": torch.tensor(float(step))}
    if stage in (1, 2):
        _link_moments(engine)


def _link_moments(engine: Engine) -> None:
    """Let stages 1 and 2 find each parameter's piece of the flat state.

    DeepSpeed does so once, after its first step for the first group: the others have no state yet, and would not be
    found later either.
    """
    engine.optimizer._hp_optimizer_states_linked = False
    engine.optimizer._lazy_init_hp_params_optimizer_state()


def _set_moment(engine: Engine, parameter: nn.Parameter, key: str, whole: Tensor) -> None:
    """Take this rank's slice of a moment, given all of it."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    stage = engine.zero_optimization_stage()
    if stage == 0:
        engine.optimizer.state[parameter][key].copy_(whole)
    elif stage == 3:  # DeepSpeed's own way to set all of it fails where the size is no multiple of the ranks
        sharded: Any = parameter  # DeepSpeed has put attributes on it
        size = sharded.ds_tensor.numel()
        rank = torch.distributed.get_rank(sharded.ds_process_group)
        own = whole.flatten()[rank * size : (rank + 1) * size]
        safe_set_local_optimizer_state(parameter, torch.nn.functional.pad(own, (0, size - own.numel())), key)
    else:
        safe_set_full_optimizer_state(parameter, whole, key)
