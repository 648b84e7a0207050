"""What a machine without a GPU needs before the heavy libraries are imported.

torchaudio's wheel on PyPI is built for CUDA. Beside a CPU build of torch its compiled extension cannot be loaded, so
``import torchaudio`` fails, and with it ``import transformers``. Everything that we use of it (resampling, mel and
Kaldi filter banks) is pure torch, so the extension alone is replaced, in this process only; no installed file changes.
"""

import importlib.metadata
import os
import sys
import types


def make_torchaudio_importable() -> bool:
    """Stand in for torchaudio's compiled extension where it cannot be loaded; return whether that was needed.

    It is needed exactly when torch is a CPU build (its version ends in ``+cpu``) and torchaudio is not. Only
    ``forced_align`` and ``rnnt_loss`` are lost; they raise torchaudio's own error. Costs microseconds: neither
    library is imported here.
    """
    try:
        torch_version = importlib.metadata.version("torch")
        torchaudio_version = importlib.metadata.version("torchaudio")
    except importlib.metadata.PackageNotFoundError:
        return False
    if not torch_version.endswith("+cpu") or torchaudio_version.endswith("+cpu"):
        return False
    if "torchaudio" in sys.modules:  # imported already, so it works as it is
        return False
    extension = types.ModuleType("torchaudio._extension")
    extension._IS_TORCHAUDIO_EXT_AVAILABLE = False
    extension.fail_if_no_align = lambda function: function
    sys.modules.setdefault("torchaudio._extension", extension)
    return True


def make_threads_yield() -> None:
    """Let OpenMP's threads sleep while they wait for one another, unless the environment says otherwise.

    By default they spin. As soon as anything else wants a core (loader workers do), each of a step's thousands of
    barriers then waits out a scheduler's time slice: a training step on two cores, one of them busy, took 5 to 20 s
    spinning and 0.9 s sleeping (docs/log.md). OpenMP reads this once, when torch is first imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
