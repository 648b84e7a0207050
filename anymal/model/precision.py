"""What is computed in, by what a device can do and what is asked of it. It is decided here alone.

    CPU                       float32, where bfloat16 is many times slower
    GPU from Ampere on        bfloat16: compute capability 8.0 and later (A100, H100, RTX 30 and later), all of ROCm's
    older GPU (T4, V100)      float16 to answer, evaluate and encode; training is refused, except at 32 bits

float16 ends at 65,504, and what is smaller than 6e-8 is zero in it: gradients want their loss scaled, which nobody does
here, and some LLMs overflow in it. At 32 bits the LLM's arithmetic is float32 everywhere.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch

from anymal.errors import UserError

BFLOAT16_SINCE = (8, 0)
"""Compute capability of the first GPUs (Ampere) that multiply matrices in bfloat16."""
INT8_SINCE = (7, 5)
"""Of the first (Turing) on which bitsandbytes multiplies in 8 bits."""
OVERFLOW = ("gemma",)
"""Architectures (parts of their ``model_type``) that are known to overflow in float16."""
_REMEDY = (
    "take a card from Ampere on (compute capability 8.0, such as an A100, an H100 or an RTX 30), or set "
    "model.llm.bits=32, which computes in float32"
)


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What is computed on."""

    kind: str
    """torch's type of the device: cpu, cuda, …"""
    capability: tuple[int, int] | None = None
    """NVIDIA's compute capability; None for what is not NVIDIA's."""
    name: str = ""
    """The card's name, for messages."""


@cache
def hardware(device: torch.device) -> Hardware:
    """What a device is. Each layer's attention asks."""
    if device.type != "cuda":
        return Hardware(kind=device.type)
    capability = None if torch.version.hip else torch.cuda.get_device_capability(device)
    return Hardware(kind="cuda", capability=capability, name=torch.cuda.get_device_name(device))


def low_dtype(on: Hardware) -> torch.dtype:
    """What mixed precision (autocast) multiplies in: bfloat16, or float16 on a GPU that does not have it."""
    return torch.float16 if _before(on, BFLOAT16_SINCE) else torch.bfloat16


def encoder_dtype(on: Hardware) -> torch.dtype:
    """What frozen encoders compute in: float32 on a CPU, else `low_dtype`."""
    return torch.float32 if on.kind == "cpu" else low_dtype(on)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which every operation computes in the dtype that it is given. Not all devices know autocast."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def llm_dtype(on: Hardware, bits: int, *, trains: bool) -> torch.dtype:
    """What the LLM computes in, and what it holds that is not quantised.

    Args:
        on: Where.
        bits: ``model.llm.bits``.
        trains: Whether anything is trained: gradients then pass through the LLM.

    Raises:
        UserError: That device cannot do it.
    """
    dtype = torch.float32 if bits == 32 else low_dtype(on) if bits == 16 else encoder_dtype(on)
    if dtype == torch.float16 and trains:
        raise UserError(f"{_card(on)} has no bfloat16, and float16 loses the gradients of training: {_REMEDY}")
    if bits == 8 and _before(on, INT8_SINCE):
        raise UserError(f"model.llm.bits is 8, but {_card(on)} cannot multiply in 8 bits; set it to 4 or 32")
    return dtype


def require_no_overflow(on: Hardware, architecture: str) -> None:
    """Refuse an LLM, by its ``model_type``, that is known to overflow in float16, where that is computed in.

    Raises:
        UserError: It does.
    """
    if any(part in architecture for part in OVERFLOW):
        raise UserError(f"{_card(on)} has no bfloat16, and {architecture} overflows in float16: {_REMEDY}")


def limits(on: Hardware) -> str:
    """What such a device cannot do, as a sentence; empty if it can do all."""
    if not _before(on, BFLOAT16_SINCE):
        return ""
    less = "" if not _before(on, INT8_SINCE) else ", and not with model.llm.bits=8"
    return f"it has no bfloat16: it answers in float16{less}, and trains with model.llm.bits=32 alone"


def _card(on: Hardware) -> str:
    return f"{on.name} (compute capability {'.'.join(map(str, on.capability or ()))})"


def _before(on: Hardware, first: tuple[int, int]) -> bool:
    return on.capability is not None and on.capability < first
