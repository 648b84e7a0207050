"""What a machine needs before the heavy libraries are imported.

`make_threads_yield` is about CPUs, `put_cudnn_attention_last` about GPUs; the rest is for machines without a GPU.

torchaudio's wheel on PyPI is built for CUDA. Beside a CPU build of torch its compiled extension cannot be loaded, so
``import torchaudio`` fails, and with it every import of a model from transformers. All that we use of it (resampling,
mel and Kaldi filter banks) is pure torch. There are two ways around, and both cost ``forced_align`` and ``rnnt_loss``
alone, which raise torchaudio's own error:

- `make_torchaudio_importable`: whoever imports ``anymal`` gets a stand-in for the extension, in this process only.
- ``python anymal/environment.py`` removes the extension's file from the environment, once, which torchaudio allows for:
  other programs there work then, too. ``make install`` does that in its own ``.venv``.

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
    """Whether torch is a CPU build (its version ends in ``+cpu``) and torchaudio is not. Imports neither."""
    torch_version, torchaudio_version = installed_version("torch"), installed_version("torchaudio")
    return torch_version.endswith("+cpu") and torchaudio_version != "" and not torchaudio_version.endswith("+cpu")


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


def put_cudnn_attention_last() -> None:
    """Let torch's attention (SDPA) pass cuDNN by on a GPU, unless the environment says otherwise.

    On an H100 torch takes cuDNN's kernels first, and cuDNN plans for 23 to 38 ms at each new shape: rows of ragged
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
        print(f"removed {removed}: it is for CUDA, and beside this CPU build of torch nothing could import torchaudio")
