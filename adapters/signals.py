"""What audio and IMU have in common: resampling and cutting of one-dimensional signals. Runs in loader workers."""

import math
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from anymal.sample import Noted

SLACK = 0.01
"""By how much of a clip a signal may be longer or shorter without a note: rounding, and what codecs put around it."""
_LONG = 1 << 22  # samples that are resampled at once: the filter takes several times their memory
_TAPS = 1 << 21  # of a filter bank, at 8 bytes, of which torchaudio makes several


def resample(signal: Tensor, old: float, new: float) -> Tensor:
    """Resample along the last axis with torchaudio's windowed sinc filter.

    Only the ratio of the rates matters. It is taken as a fraction of small numbers (exact for all usual rates, within
    one part in two thousand otherwise), because torchaudio's filter bank has a row for each unit of the numerator, as
    long as the denominator, and would take gigabytes for a file that claims 44101 Hz, or 1013.

    Args:
        signal: [..., samples] float32.
        old, new: Rates in Hz.

    Returns:
        [..., ceil(samples · new / old)].
    """
    ratio = Fraction(new / old).limit_denominator(1000)
    if ratio.numerator * ratio.denominator > _TAPS:
        ratio = 1 / Fraction(old / new).limit_denominator(math.isqrt(int(_TAPS * new / old)))
    if ratio == 1:
        return signal
    mean = signal.mean(-1, keepdim=True)  # the filter sees zeros beyond the ends: without its mean there is no step
    if signal.shape[-1] <= _LONG:
        return _sinc(signal - mean, ratio) + mean
    # piece by piece, each with more of the signal on either side than the filter sees
    step, margin = _LONG // ratio.denominator * ratio.denominator, 8 * ratio.denominator
    pieces = []
    for start in range(0, signal.shape[-1], step):
        first = max(start - margin, 0)
        piece = _sinc(signal[..., first : start + step + margin] - mean, ratio) + mean
        begin = (start - first) // ratio.denominator * ratio.numerator
        pieces.append(piece[..., begin : begin + step // ratio.denominator * ratio.numerator])
    return torch.cat(pieces, -1)


def _sinc(signal: Tensor, ratio: Fraction) -> Tensor:
    from torchaudio.functional import resample as sinc

    return sinc(signal, ratio.denominator, ratio.numerator)


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
