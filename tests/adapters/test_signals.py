"""Signals: resampling between any two rates, cropping, filling."""

import pytest
import torch

from anymal.adapters.signals import crop_centre, hold_last, resample


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 44101, 48000])
def test_any_rate_becomes_the_encoders(rate):
    time = torch.arange(rate) / rate
    wave = torch.sin(2 * torch.pi * 440 * time) + 0.5
    expected = torch.sin(2 * torch.pi * 440 * torch.arange(16000) / 16000) + 0.5
    resampled = resample(wave, rate, 16000)
    assert abs(len(resampled) - 16000) <= 1
    inner = slice(200, 15800)
    assert (resampled[inner] - expected[inner]).abs().max() < 0.02


def test_cropping_and_filling():
    signal = torch.arange(10.0)
    assert crop_centre(signal, 4).tolist() == [3, 4, 5, 6]
    assert crop_centre(signal, 20).tolist() == signal.tolist()
    assert hold_last(signal[None], 12)[0, -4:].tolist() == [8, 9, 9, 9]
