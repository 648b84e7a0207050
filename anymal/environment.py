"""What must be settled before the heavy libraries are imported.

torchaudio's wheel on PyPI is built for CUDA 13. Beside a build of torch for a CPU, or another CUDA, its compiled
extension cannot be loaded, so ``import torchaudio`` fails, and with it every import of a model from transformers. All
that we use of it (resampling, mel and Kaldi filter banks) is pure torch. There are two ways around, and both cost
``forced_align`` and ``rnnt_loss`` alone, which raise torchaudio's own error:

- `make_torchaudio_importable`: whoever imports ``anymal`` gets a stand-in for the extension, in this process only.
- ``python anymal/environment.py`` removes the extension's file from the environment, once, which torchaudio allows for:
  other programs there work then, too. ``make install`` does that in its own ``.venv``.

On a GPU: how torch takes its memory (`let_segments_grow`), and whose attention (`put_cudnn_attention_last`).

`swapped` stands in for a function of another library for a while.
"""

import importlib.metadata
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def installed_version(distribution: str) -> str:
    """The version of a distribution; empty where there is none, or half of one. Imports nothing of it."""
    try:
        return importlib.metadata.version(distribution) or ""
    except Exception:  # of an installation that was interrupted, it depends on Python's version which
        return ""


def versions_differ() -> bool:
    """Whether torch says what it is built for (``+cpu``, ``+cu126``) and torchaudio is not built for that.

    Wheels of PyPI say nothing: both are for the same CUDA. Neither is imported.
    """
    torch_version, torchaudio_version = installed_version("torch"), installed_version("torchaudio")
    built_for, other = (version.partition("+")[2] for version in (torch_version, torchaudio_version))
    return bool(built_for) and torchaudio_version != "" and other != built_for


def make_torchaudio_importable() -> bool:
    """Stand in for torchaudio's compiled extension where it cannot be loaded; return whether that was needed.

    Costs microseconds: neither library is imported here.
    """
    if not versions_differ() or "torchaudio" in sys.modules:  # imported already, so it works as it is
        return False
    extension = types.ModuleType("torchaudio._extension")
    vars(extension).update(_IS_TORCHAUDIO_EXT_AVAILABLE=False, fail_if_no_align=lambda function: function)
    sys.modules.setdefault("torchaudio._extension", extension)
    return True


def remove_extension() -> list[Path]:
    """Remove torchaudio's compiled extension from this environment where it cannot be loaded; return what was removed.

    torchaudio looks whether the file is there, and without it does without (its ``_extension/utils.py`` says why).
    ``pip install --force-reinstall torchaudio`` brings it back.
    """
    if not versions_differ():
        return []
    folder = Path(str(importlib.metadata.distribution("torchaudio").locate_file("torchaudio/lib")))
    files = sorted(folder.glob("_torchaudio*.so"))
    for file in files:
        file.unlink()
    return files


def make_threads_yield() -> None:
    """Let OpenMP's threads sleep while they wait for one another, unless the environment says otherwise.

    By default they spin. As soon as anything else wants a core (loader workers do), each of a step's thousands of
    barriers then waits out a scheduler's time slice: a training step on two cores, one of them busy, took 5 to 20 s
    spinning and 0.9 s sleeping (docs/log.md). OpenMP reads this once, when torch is first imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""The variables that torch reads its allocator's settings from. The last is its present name for all devices, which
torch 2.9 and later know; of several that are set, torch 2.13 takes the first."""


def let_segments_grow() -> None:
    """Let what torch has taken of a GPU's memory grow in place, unless the environment says something of its allocator.

    Packed rows and media make tensors of ever new sizes. In segments of fixed size they leave gaps that no later tensor
    fits into, until memory runs out although there is enough. torch reads this once, when it first allocates.
    """
    if not any(name in os.environ for name in ALLOCATOR_SETTINGS):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def put_cudnn_attention_last() -> None:
    """Let torch's attention (SDPA) pass cuDNN by on a GPU, unless the environment says otherwise.

    On an H100 torch takes cuDNN's kernels first, and cuDNN plans anew at each new shape: rows of ragged
    lengths and growing answers are new shapes all the time. With this variable the order is torch's own: flash,
    memory-efficient, plain, and cuDNN only where none of these can. 0 puts cuDNN first again. Read once, at the first
    attention in the process (ATen/native/transformers/cuda/sdp_utils.cpp).
    """
    os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")


@contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, the attribute `name` of a module, class or object is `value`; afterwards it is what it was before."""
    own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:  # its class has it
            delattr(owner, name)


if __name__ == "__main__":
    for removed in remove_extension():
        print(f"removed {removed}: it is for CUDA 13, and beside this build of torch nothing could import torchaudio")
