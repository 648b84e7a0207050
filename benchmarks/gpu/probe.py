"""The machine: what it is, how fast it computes and copies, which attention torch has there. Imports torch alone."""

import importlib.util
import inspect
import os
import platform
import shutil
import subprocess
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu.measure import NEEDS, Clock, Scale, difference, matmul_peak, timed


def run(scale: Scale, clock: Clock) -> dict[str, Any]:
    """The stage's figures."""
    figures: dict[str, Any] = about(scale)
    clock.within(figures, "product", 20, lambda: _product(scale))
    clock.within(figures, "copies", 20, lambda: _copies(scale))
    clock.within(figures, "attention", 20, lambda: _attention(scale))
    return figures


def about(scale: Scale) -> dict[str, Any]:
    """What there is."""
    packages = sorted({name for names in NEEDS.values() for name in names})
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cpus": os.cpu_count(),
        "packages": {name: importlib.util.find_spec(name) is not None for name in packages},
        "allocator": {name: value for name, value in os.environ.items() if name.endswith("ALLOC_CONF")},
    }
    if scale.rehearsed:
        return found
    properties = torch.cuda.get_device_properties(0)
    found |= {"device": properties.name, "memory_gb": properties.total_memory / 1e9, "driver": _driver()}
    found |= {"capability": float(f"{properties.major}.{properties.minor}"), "sms": properties.multi_processor_count}
    return found | {"cudnn": torch.backends.cudnn.version(), "bf16": torch.cuda.is_bf16_supported()}


def _driver() -> str:
    """The driver's version as nvidia-smi says it: at least 580 for CUDA 13."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def _product(scale: Scale) -> dict[str, float]:
    """The peak, and whether a product is right, against float64 on the CPU."""
    a = torch.randn(64, 1024, device=scale.device, dtype=scale.dtype)
    b = torch.randn(1024, 64, device=scale.device, dtype=scale.dtype)
    return {
        "matmul_tflops": matmul_peak(scale) / 1e12,
        "matmul_error": difference((a @ b).cpu(), a.cpu().double() @ b.cpu().double()),
    }


def _copies(scale: Scale) -> dict[str, float]:
    """10^9 bytes a second: within the device's memory (read and written), and to it from the host."""
    source = torch.empty(scale.copied, dtype=torch.uint8, device=scale.device)
    target = torch.empty_like(source)
    found = {"memory_gb_per_s": 2 * scale.copied / timed(lambda: target.copy_(source), scale.device) / 1e9}
    for name, pinned in (("unpinned", False), ("pinned", True)):
        if pinned and scale.rehearsed:
            continue
        host = torch.zeros(scale.copied, dtype=torch.uint8, pin_memory=pinned)
        seconds = timed(lambda host=host: target.copy_(host, non_blocking=True), scale.device, 5)
        found[f"from_host_{name}_gb_per_s"] = scale.copied / seconds / 1e9
    return found


def _attention(scale: Scale) -> dict[str, Any]:
    """Which of torch's kernels take a causal row of heads of 128, and whether it has one for packed rows."""
    query = torch.randn(1, 8, 256, 128, device=scale.device, dtype=scale.dtype)
    taken = []
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
        try:
            with sdpa_kernel(getattr(SDPBackend, name)):
                F.scaled_dot_product_attention(query, query, query, is_causal=True)
            taken.append(name)
        except RuntimeError:
            pass
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return {"sdpa": taken, "varlen": None}
    return {"sdpa": taken, "varlen": sorted(inspect.signature(varlen_attn).parameters)}
