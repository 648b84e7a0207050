"""Networks without weights: inside `shapes_only` they are made from their configs on torch's fake tensors.

`anymal.estimation` needs shapes only, so no weights are read. Code that loads or makes a network asks here whether
weights are wanted.
"""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar

from torch._subclasses.fake_tensor import FakeTensorMode

_SHAPES_ONLY: ContextVar[AbstractContextManager | None] = ContextVar("shapes_only", default=None)


@contextlib.contextmanager
def shapes_only(fake: AbstractContextManager) -> Iterator[None]:
    """Inside, encoders and projectors are made from their configs on `fake` tensors; no weights are read.

    Args:
        fake: A ``FakeTensorMode`` that allows other inputs.
    """
    token = _SHAPES_ONLY.set(fake)
    try:
        yield
    finally:
        _SHAPES_ONLY.reset(token)


def new_tensors() -> AbstractContextManager:
    """What weights are to be made in: fake tensors inside `shapes_only`, else ordinary ones."""
    return _SHAPES_ONLY.get() or contextlib.nullcontext()


def without_weights() -> bool:
    """Whether this is inside `shapes_only`: no weights are to be read."""
    return _SHAPES_ONLY.get() is not None


def on_shapes() -> AbstractContextManager:
    """Inside, networks run on shapes alone, whatever their weights are: nothing is computed."""
    return _SHAPES_ONLY.get() or FakeTensorMode(allow_non_fake_inputs=True)
