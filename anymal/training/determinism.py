"""The same bits each time, on a GPU too: what ``run.deterministic`` sets, and sets back.

On a GPU some kernels add up in whatever order their threads come. Of a training step it is the backward pass of flash
attention, dense or of packed rows (``varlen_attn``), which sums the gradient of the queries so; and a convolution, of
which cuDNN may choose another kind. Both have a form with a fixed order, slower, that torch takes on demand.
docs/checkpoints.md says what is left.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from anymal.errors import UserError

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
FIXED = (":4096:8", ":16:8")
"""Workspaces of a fixed size, with which cuBLAS gives the same bits each time; torch itself takes the first on H100."""


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, if it is `wanted`, torch runs only what gives the same bits each time; afterwards all is as before.

    torch reads cuBLAS' workspace once in a process, at the first matrix product on a GPU: enter before that.

    Raises:
        UserError: The environment sets a workspace with which cuBLAS cannot do it.
    """
    if not wanted:
        yield
        return
    if os.environ.get(CUBLAS, FIXED[0]) not in FIXED:
        raise UserError(f"run.deterministic needs {CUBLAS} to be {' or '.join(FIXED)}, not {os.environ[CUBLAS]}")
    modes = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    with ExitStack() as at_end:
        if CUBLAS not in os.environ:
            os.environ[CUBLAS] = FIXED[0]
            at_end.callback(os.environ.pop, CUBLAS, None)
        for owner, name, value in (
            (torch.backends.cudnn, "benchmark", False),  # it may choose otherwise each time
            (torch.backends.cudnn, "deterministic", True),
            # Else torch fills every empty tensor, for programs that read what they never wrote: time for nothing.
            (torch.utils.deterministic, "fill_uninitialized_memory", False),
        ):
            at_end.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        at_end.callback(torch.use_deterministic_algorithms, modes[0], warn_only=modes[1])
        torch.use_deterministic_algorithms(True)
        yield
