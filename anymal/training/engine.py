"""DeepSpeed: data parallel processes, its JSON derived from our config, and one optimizer step.

The engine gets only what gradients pass through: projectors, LLM, and encoders that learn. Parameters that learn are
float32; on a GPU the arithmetic is bfloat16 through autocast, so DeepSpeed itself runs in float32 and its
half-precision modes stay off.
"""

import gc
import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import _lru_cache_wrapper
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from anymal.config.schema import Config
from anymal.errors import UserError
from anymal.model.llm import on_gpu
from anymal.model.multimodal import AnyMAL
from anymal.model.trainable import trainable
from anymal.sample import Batch
from anymal.training import ranks
from anymal.training.optimizer import make_optimizer

BUCKET = 500_000_000
"""Most numbers in ZeRO's buffer for gradients: DeepSpeed's own default."""


class Engine(Protocol):
    """What is used of ``deepspeed.DeepSpeedEngine``, whose own annotations do not say what it holds."""

    module: AnyMAL
    """The model. Under ZeRO 3 its parameters are empty but for the moment of a layer."""
    optimizer: Any
    """AdamW, or one of DeepSpeed's classes around it for each ZeRO stage."""
    device: torch.device
    global_rank: int
    world_size: int

    def __call__(self, batch: Batch, features: dict[str, Tensor]) -> tuple[Tensor, Tensor]: ...
    def backward(self, loss: Tensor, *, scale_wrt_gas: bool) -> Any: ...
    def step(self) -> None: ...
    def was_step_applied(self) -> bool: ...
    def is_gradient_accumulation_boundary(self) -> bool: ...
    def get_global_grad_norm(self) -> float | None: ...
    def zero_optimization(self) -> bool: ...
    def zero_optimization_stage(self) -> int: ...
    def destroy(self) -> None: ...


class Process(NamedTuple):
    """One rank of a run."""

    rank: int
    """Its number."""
    world: int
    """How many there are."""
    device: torch.device
    """Where it computes."""


def start_processes() -> Process:
    """Join the process group that the launcher described, or make one of a single process.

    Raises:
        UserError: Several Slurm tasks were started without a launcher; each would be a run of its own.
    """
    gpu = on_gpu()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if gpu else "cpu")
    if "RANK" not in os.environ:
        if int(os.environ.get("SLURM_NTASKS", 1)) > 1:
            raise UserError("several Slurm tasks, but no RANK: start one task a node, and in it deepspeed or torchrun")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        single = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in single.items()})
    import deepspeed

    if not gpu:  # it would be compiled at every start, for half a minute; gloo does the same
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    joins = not torch.distributed.is_initialized()
    deepspeed.init_distributed(dist_backend="nccl" if gpu else "gloo", auto_mpi_discovery=False, verbose=False)
    if joins:
        ranks.make_host_group()
    return Process(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device)


@contextmanager
def processes() -> Iterator[Process]:
    """`start_processes`; afterwards a group of a single process is ended, and its environment variables are removed.

    Otherwise programs that this process starts later would take themselves for ranks of it. A launcher's group is kept
    for the next stage or run: its address is in use, and a rank that leaves may wait for others that are gone.
    """
    alone = "RANK" not in os.environ and not torch.distributed.is_initialized()
    before = dict(os.environ)
    try:
        yield start_processes()
    finally:
        if alone:
            if torch.distributed.is_initialized():
                import deepspeed

                deepspeed.comm.destroy_process_group()
                ranks.forget_host_group()
            for name in ("DS_ACCELERATOR", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
                os.environ.pop(name, None)
                os.environ.update({name: before[name]} if name in before else {})


def deepspeed_config(config: Config) -> dict[str, Any]:
    """DeepSpeed's settings, derived from ours.

    Raises:
        UserError: ``engine.deepspeed`` is no JSON file, or it sets one of ours to another value.
    """
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.data.batch_size,
        "gradient_accumulation_steps": config.optim.gradient_accumulation,
        "gradient_clipping": config.optim.clip,
        "zero_optimization": {"stage": config.engine.zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": False},  # autocast does it; else DeepSpeed would cast what learns
        "fp16": {"enabled": False},
        "steps_per_print": 10**9,  # progress is ours to show
        "timers": {"throughput": {"enabled": False}},  # they wait for the GPU twice a micro-batch
    }
    if config.engine.deepspeed is None:
        return derived
    path = Path(config.engine.deepspeed)
    try:
        extra = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"engine.deepspeed={path}: not a readable JSON file: {error}") from error
    for name in ("optimizer", "scheduler", "train_batch_size"):
        if name in extra:
            raise UserError(f"{path}: {name} is the recipe's to set (optim.*, data.batch_size); remove it here")
    return _merged(derived, extra, str(path))


def _merged(ours: dict[str, Any], extra: dict[str, Any], where: str) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(ours.get(key), dict):
            merged[key] = _merged(ours[key], value, f"{where}: {key}")
        elif key in ours and ours[key] != value:
            raise UserError(f"{where}: {key} is {value}, but the recipe says {ours[key]}; set it in the recipe")
        else:
            merged[key] = value
    return merged


def make_engine(model: AnyMAL, config: Config) -> Engine:
    """Wrap the model in a DeepSpeed engine with AdamW over what is trainable (`anymal.training.optimizer`)."""
    import deepspeed

    optimizer = make_optimizer(model, config.optim)
    settings = deepspeed_config(config)
    # ZeRO's buffer for gradients would be 2 GB, however little is trained.
    learns = sum(parameter.numel() for parameter in trainable(model).values())
    settings["zero_optimization"].setdefault("reduce_bucket_size", min(BUCKET, learns))
    engine: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    return engine


@contextmanager
def engine_of(model: AnyMAL, config: Config) -> Iterator[Engine]:
    """`make_engine`'s engine; afterwards its memory is freed, and torch has its own ``linear`` back.

    Under ZeRO-3 DeepSpeed replaces ``linear`` by a function that keeps the input of every layer, frozen ones too, and
    does not put it back: later stages of the process would take more memory. It also keeps the modules that it ran in a
    list and a cache of its own, and with them the model and the optimizer.
    """
    with ExitStack() as at_end:
        at_end.callback(_forget_modules)
        at_end.callback(setattr, torch.nn.functional, "linear", torch.nn.functional.linear)
        engine = make_engine(model, config)
        at_end.callback(engine.destroy)
        yield engine


def _forget_modules() -> None:
    """Empty DeepSpeed's list of modules, and its cache, which is hidden in a closure."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    FWD_MODULE_STACK.clear()
    for cached in gc.get_objects():
        if type(cached) is _lru_cache_wrapper and str(cached.__module__).startswith("deepspeed."):
            cached.cache_clear()


def scale_of(total: Tensor, answers: int, world: int) -> Tensor:
    """The factor on a micro-batch's summed loss before its backward pass; the host does not wait for the GPU.

    DeepSpeed averages gradients over ranks. So the factor is the world size over the step's answer tokens on all ranks:
    gradients are then those of the mean over answer tokens. If the loss is not finite the factor is NaN, and so are all
    gradients: an infinite loss can have finite gradients, and `step` must notice it on every rank.
    """
    return (1 + 0 * total.detach()) * (world / answers)


def step(engine: Engine) -> bool:
    """DeepSpeed's step after a micro-batch. At a step's last one gradients are applied, if they are all finite.

    Returns:
        Whether they were applied, the same on all ranks. If not, nothing has changed and the gradients are gone.
    """
    if engine.zero_optimization() or not engine.is_gradient_accumulation_boundary():
        engine.step()  # ZeRO drops gradients whose norm over all ranks is not finite
        return engine.was_step_applied()
    gradients = [parameter.grad for parameter in trainable(engine.module).values() if parameter.grad is not None]
    finite = bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients)))  # they are summed over ranks already
    # DeepSpeed counts micro-batches in its step, so it must be taken. Its clipping fails where there is no gradient, so
    # they go after that: AdamW then finds none, and leaves weights and moments alone.
    drop = None if finite else engine.optimizer.register_step_pre_hook(lambda optimizer, *_: optimizer.zero_grad())
    engine.step()
    if drop is not None:
        drop.remove()
    return finite
