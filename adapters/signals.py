"""What audio and IMU have in common: resampling and cutting of one-dimensional signals. Runs in loader workers."""

from fractions import Fraction

import torch.nn.functional as F
from torch import Tensor

from anymal.sample import Noted

SLACK = 0.01
"""By how much of a clip a signal may be longer or shorter without a note: rounding, and what codecs put around it."""


def resample(signal: Tensor, old: float, new: float) -> Tensor:
    """Resample along the last axis with torchaudio's windowed sinc filter.

    Only the ratio of the rates matters. It is taken as a fraction of small numbers (exact for all usual rates, within
    one part in a million otherwise), because torchaudio's filter bank has a row for each unit of the numerator and
    would take gigabytes for a file that claims 44101 Hz.

    Args:
        signal: [..., samples] float32.
        old, new: Rates in Hz.

    Returns:
        [..., ceil(samples · new / old)].
    """
    ratio = Fraction(new / old).limit_denominator(1000)
    if ratio == 1:
        return signal
    from torchaudio.functional import resample as sinc

    mean = signal.mean(-1, keepdim=True)  # the filter sees zeros beyond the ends: without its mean there is no step
    return sinc(signal - mean, ratio.denominator, ratio.numerator) + mean


def crop_centre(signal: Tensor, samples: int) -> Tensor:
    """[..., T] → the middle `samples` of it, or all of it if it is shorter."""
    start = max(signal.shape[-1] - samples, 0) // 2
    return signal[..., start : start + samples]


def hold_last(signal: Tensor, samples: int) -> Tensor:
    """[C, T] → [C, samples]: cropped to the middle, or its last value held to the end."""
    signal = crop_centre(signal, samples)
    return F.pad(signal, (0, samples - signal.shape[-1]), mode="replicate")


def noted(decoded: Tensor, *, seconds: float, clip: float, shorter: str = "") -> Tensor | Noted:
    """A decoded signal, with a note if it lasted longer than the clip that was kept of it.

    Args:
        decoded: What its encoder takes.
        seconds: How long the signal was.
        clip: How long the clip is, in seconds.
        shorter: The note on a shorter signal; empty if being short is no loss.
    """
    if seconds > clip * (1 + SLACK):
        return Noted(tensor=decoded, note=f"cropped to the middle {clip:g} s")
    if shorter and seconds < clip * (1 - SLACK):
        return Noted(tensor=decoded, note=shorter)
    return decoded
