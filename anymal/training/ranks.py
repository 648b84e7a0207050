"""What data parallel ranks tell one another beside gradients: numbers and plain JSON, from host to host.

They go over a gloo group of their own. Over NCCL, the group of the gradients, each of them would be a copy to the GPU
and back, for which the host waits until the GPU has done all that it was given.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from anymal.errors import UserError

T = TypeVar("T")
_hosts: Any = None  # a process group; None is the default one


def make_host_group() -> None:
    """Make the group, once the default one is there. On every rank.

    gloo talks over the interface that the host's name stands for, unless it is told of one. Who told NCCL means it as
    well.

    Raises:
        UserError: The hosts do not find one another over it.
    """
    global _hosts
    told = os.environ.get("NCCL_SOCKET_IFNAME", "")
    if told and not set("^=,") & set(told):  # one name, not a rule
        os.environ.setdefault("GLOO_SOCKET_IFNAME", told)
    try:
        _hosts = dist.new_group(backend="gloo")
    except RuntimeError as error:
        raise UserError(
            f"the ranks' hosts do not reach one another by gloo ({error}); set GLOO_SOCKET_IFNAME to the network "
            "interface that they share, such as eth0 (ip -brief address lists them)"
        ) from error


def forget_host_group() -> None:
    """To be called when all groups were ended."""
    global _hosts
    _hosts = None


def sum_over_ranks(values: Sequence[int]) -> list[int]:
    """The sum over all processes of each of several whole numbers."""
    sums = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(sums, group=_hosts)
    return sums.tolist()


def gather(value: Any) -> list[Any]:
    """Every rank's plain-JSON value, on every rank; of a process without a group, its own."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_hosts)
    return values


def wait_for_all() -> None:
    """Return once all ranks have come here."""
    dist.barrier(group=_hosts)


def on_rank_0(decide: Callable[[], T]) -> T:
    """What `decide` returns on rank 0, on every rank; if it raises there, the others end without a word."""
    decided: list[Any] = [None]
    try:
        if dist.get_rank() == 0:
            decided = [(decide(),)]
    finally:
        dist.broadcast_object_list(decided, group=_hosts)
    if decided[0] is None:
        raise SystemExit(2)
    return decided[0][0]
