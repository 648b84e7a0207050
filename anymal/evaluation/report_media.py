"""What `anymal report` draws: one medium as HTML by its file's ending, and curves; all of it inside the page.

Media and plots become data URIs, so that the page is one file that needs no network. Plots are transparent with
mid-grey axes: they read the same on a light and a dark page.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

GREY = "#8b8f98"
COLOURS = ("#4c8be0", "#e08a2e", "#3ba272", "#b06ab3", "#cf5c5c", "#7f8c3d")
LARGEST_MEDIUM = 8_000_000
"""Bytes; a page with larger ones inside does not open on every machine."""

_IMAGES = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png", ".webp": "webp", ".gif": "gif"}
_VIDEOS = {".mp4": "mp4", ".webm": "webm"}
_SOUNDS = {".flac": "flac", ".wav": "wav", ".mp3": "mpeg", ".ogg": "ogg"}


def medium_html(path: Path) -> str:
    """HTML that shows the medium in `path`; a sentence in its place where that is not possible.

    The ending decides: a picture, a video with a strip of four of its frames (for browsers without its codec), a
    sound with its waveform and spectrogram, or a window of signals (``.npy``, [T, channels] or [channels, T]).
    """
    suffix = path.suffix.lower()
    if not path.is_file():
        return _sentence(f"The medium is not there: {path.name}")
    if path.stat().st_size > LARGEST_MEDIUM:
        return _sentence(f"{path.name} is too large for the page ({path.stat().st_size / 1e6:.0f} MB)")
    try:
        if suffix in _IMAGES:
            return f'<img src="{_data_uri(path.read_bytes(), f"image/{_IMAGES[suffix]}")}" alt="{escape(path.name)}">'
        if suffix in _VIDEOS:
            source = _data_uri(path.read_bytes(), f"video/{_VIDEOS[suffix]}")
            return f'<video src="{source}" controls loop muted playsinline></video>{_film_strip(path)}'
        if suffix in _SOUNDS:
            source = _data_uri(path.read_bytes(), f"audio/{_SOUNDS[suffix]}")
            return f'{_sound_plot(path)}<audio src="{source}" controls></audio>'
        if suffix == ".npy":
            return _signal_plot(path)
    except (OSError, ValueError, RuntimeError) as error:  # each decoder's own errors are one of these
        return _sentence(f"{path.name} cannot be shown: {error}")
    return _sentence(f"{path.name} is of a kind that the page cannot show")


def loss_plot(lines: Sequence[Mapping[str, float]]) -> str:
    """The curves of ``loss/GROUP`` (``loss`` where there are none) over the steps, as an image.

    The faint line is what was logged, the strong one its running mean (over a tenth of the curve).
    """
    names = sorted({name for line in lines for name in line if name.startswith("loss/")}) or ["loss"]
    figure = Figure(figsize=(7.2, 2.9), dpi=150, layout="constrained")
    axes = _quiet_axes(figure.add_subplot())
    for i, name in enumerate(names):
        points = [(line["step"], line[name]) for line in lines if _finite(line.get(name))]
        if not points:
            continue
        steps, losses = np.array(points, dtype=float).T
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=1)
        axes.plot(steps, _running_mean(losses), color=colour, linewidth=2, label=name.removeprefix("loss/"))
    axes.set_xlabel("step", color=GREY, fontsize=8)
    axes.set_ylabel("loss (nats per answer token)", color=GREY, fontsize=8)
    axes.set_ylim(bottom=0)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(
            frameon=False, labelcolor=GREY, fontsize=8, ncols=len(names), loc="lower right", bbox_to_anchor=(1, 1)
        )
    return _image(figure, "loss curves")


def _running_mean(values: np.ndarray) -> np.ndarray:
    width = max(1, len(values) // 10)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _film_strip(path: Path, frames: int = 4, height: int = 90) -> str:
    import av
    from PIL import Image

    with av.open(str(path)) as container:
        pictures = [frame.to_image() for _, frame in zip(range(600), container.decode(video=0), strict=False)]
    if not pictures:
        return _sentence("no frames")
    chosen = [pictures[round(i * (len(pictures) - 1) / (frames - 1))] for i in range(frames)]
    width = max(1, round(height * chosen[0].width / chosen[0].height))
    strip = Image.new("RGB", (frames * width, height))
    for i, picture in enumerate(chosen):
        strip.paste(picture.resize((width, height)), (i * width, 0))
    buffer = io.BytesIO()
    strip.save(buffer, "JPEG", quality=85)
    return f'<img class="strip" src="{_data_uri(buffer.getvalue(), "image/jpeg")}" alt="four frames">'


def _sound_plot(path: Path) -> str:
    import soundfile

    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    mono = samples.mean(axis=1)
    if len(mono) < 2:
        return _sentence("an empty sound")
    seconds = len(mono) / rate
    figure = Figure(figsize=(2.7, 1.6), dpi=200, layout="constrained")
    wave, spectrum = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.6])
    bins = np.array_split(mono, min(500, len(mono)))  # the outline; drawing every sample would take seconds
    times = (np.arange(len(bins)) + 0.5) * seconds / len(bins)
    wave.fill_between(times, [b.min() for b in bins], [b.max() for b in bins], color=COLOURS[0], linewidth=0)
    wave.set_axis_off()
    window = min(512, len(mono))
    power, _, _, image = spectrum.specgram(
        mono, NFFT=window, noverlap=window // 2, Fs=rate, cmap="magma", scale="linear"
    )
    loudest = max(power.max(), 1e-12)
    image.set_data(10 * np.log10(np.maximum(power[::-1], loudest * 1e-8) / loudest))
    image.set_clim(-80, 0)  # decibels below the loudest
    spectrum.set_xlim(0, seconds)
    _quiet_axes(spectrum).grid(visible=False)
    spectrum.set_yticks([0, rate / 2], ["0", f"{rate / 2000:.0f} kHz"])
    spectrum.set_xlabel("seconds", color=GREY, fontsize=7)
    return _image(figure, "waveform and spectrogram")


def _signal_plot(path: Path) -> str:
    signals = np.load(path, allow_pickle=False)
    if signals.ndim != 2 or not np.issubdtype(signals.dtype, np.number):
        return _sentence(f"{path.name} holds {signals.dtype} of shape {signals.shape}, not channels over time")
    if signals.shape[0] < signals.shape[1]:
        signals = signals.T
    six = signals.shape[1] == 6  # accelerometer x y z, then gyroscope x y z
    panels = [(signals[:, :3], "m/s²"), (signals[:, 3:], "rad/s")] if six else [(signals, "")]
    figure = Figure(figsize=(2.7, 0.8 * len(panels) + 0.3), dpi=200, layout="constrained")
    for i, (part, unit) in enumerate(panels):
        axes = _quiet_axes(figure.add_subplot(len(panels), 1, i + 1))
        for channel in range(part.shape[1]):
            label = "xyz"[channel] if six else None
            axes.plot(part[:, channel], color=COLOURS[channel % len(COLOURS)], linewidth=0.9, label=label)
        axes.set_ylabel(unit, color=GREY, fontsize=7)
        axes.set_xlim(0, len(part) - 1)
        if i < len(panels) - 1:
            axes.set_xticklabels([])
        else:
            axes.set_xlabel("reading", color=GREY, fontsize=7)
        if six and i == 0:
            axes.legend(
                frameon=False, labelcolor=GREY, fontsize=7, ncols=3, loc="lower right", bbox_to_anchor=(1, 0.95)
            )
    return _image(figure, "signals over time")


def _quiet_axes(axes: Axes) -> Axes:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
    axes.tick_params(colors=GREY, labelsize=7)
    axes.grid(axis="y", color=GREY, alpha=0.2, linewidth=0.6)
    return axes


def _image(figure: Figure, alt: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=True)
    return f'<img class="plot" src="{_data_uri(buffer.getvalue(), "image/png")}" alt="{alt}">'


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _sentence(text: str) -> str:
    return f'<p class="missing">{escape(text)}</p>'


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
