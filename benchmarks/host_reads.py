"""Watches a run for whatever would make the host wait for a GPU, between a step's forward pass and its optimizer.

On a GPU kernels run behind the host, which queues them. What needs a number of a tensor's content waits until all that
was queued is done, and then the GPU has nothing to do. On a CPU the same operations are called, and are seen here.
"""

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anymal.environment import swapped
from anymal.training import loop
from anymal.training.prefetch import Feed

WAITS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "allclose", "masked_select", "unique"}
WAITS |= {"_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount", "histc", "nonzero_numpy"}
"""Operations of torch that read a tensor on the host, or whose result's shape depends on content."""
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
"""Those that do so where they are given a mask of booleans."""


class HostReads(TorchDispatchMode):
    """Counts the waiting operations inside, by name and place."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        self.seen[name] += 1
        masks = name in INDEXED and any(
            isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8) for leaf in tree_leaves(args[1])
        )
        repeats = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in WAITS or masks or repeats:
            self.found[f"{name} in {_place()}"] += 1
        return func(*args, **(kwargs or {}))


def _place() -> str:
    """The innermost line of Python outside of torch's own dispatch."""
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and "host_reads" not in f.filename]
    return f"{frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno} ({frames[-1].line})"


@contextmanager
def watched() -> Iterator[HostReads]:
    """Inside, training loops are watched from a micro-batch's forward pass to where the optimizer's step begins."""
    mode, inside = HostReads(), ExitStack()
    take, step = Feed.take, loop.step

    def begin(feed: Feed) -> Any:
        encoded = take(feed)
        inside.enter_context(mode)
        return encoded

    def end(engine: Any) -> bool:
        inside.close()
        return step(engine)

    with swapped(Feed, "take", begin), swapped(loop, "step", end), inside:
        yield mode
