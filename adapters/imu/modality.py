"""IMU: a window of accelerometer and gyroscope (``.imu.npy``) → standardised channels → features of an IMU encoder.

A member holds a float array [samples, 6]: accelerometer x, y, z in m/s² (gravity included), then gyroscope x, y, z in
rad/s; or in g and in degrees per second, as the options say. An encoder in a folder is of our own, and its config
states the rate and the length that it takes (see `anymal.adapters.architectures.imu_encoder`); in a file it is one of
the published networks, whose rate is known (`anymal.adapters.imu.published`).

    S samples of a window   tokens features of a window   width channels of a feature
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from anymal.adapters.pretrained import is_savable, load_config, load_network, save_network
from anymal.adapters.signals import hold_last, noted, resample
from anymal.errors import BadSample, UserError
from anymal.modality import Encoder, Modality
from anymal.model.hub import license_of
from anymal.sample import Noted

FILES = (".pth", ".pt", ".safetensors")
"""Endings of encoders that are files."""
Acceleration, Rotation = Literal["m/s2", "g"], Literal["rad/s", "deg/s"]
ACCELERATION: dict[Acceleration, float] = {"m/s2": 1.0, "g": 9.80665}
"""Units of the accelerometer, in m/s²."""
ROTATION: dict[Rotation, float] = {"rad/s": 1.0, "deg/s": math.pi / 180}
"""Units of the gyroscope, in rad/s."""
WANTED = "wanted is a float array [samples, 6]: accelerometer in m/s², gyroscope in rad/s"
MAX_ACCELERATION = 1000.0
"""m/s²: a hundred times gravity. Sensors reach 16 or 32."""
MAX_ROTATION = 100.0
"""rad/s: sensors reach 35. More than this is degrees per second taken for radians."""
ONE_G = (0.8, 1.3)
"""A recording whose median length lies between these, all in one direction, is in g, not in m/s². In m/s² gravity alone
would be 9.8; and if gravity had been taken out, the mean over seconds would be near zero, since motion goes to and
fro."""
MAX_MEDIAN = 50.0
"""m/s²: nobody bears five times gravity for half of a recording. It is in m/s² and taken for g, or in mg."""


@dataclass(kw_only=True)
class IMUOptions:
    """How IMU recordings are decoded."""

    rate: float = 0.0
    """Samples per second (Hz) of the recordings. Must be given: a .npy file does not hold it. Recordings are resampled
    to the encoder's rate."""
    acceleration: Acceleration = "m/s2"
    """Unit of the recordings' accelerometer. Gravity is part of it: at rest it reads 9.81 m/s2, or 1 g."""
    rotation: Rotation = "rad/s"
    """Unit of the recordings' gyroscope."""
    max_seconds: float = 600.0
    """A longer recording is a bad sample."""
    trunk: str = ""
    """Whose network an encoder that is a file holds, imagebind, onellm or imu2clip; empty reads it off the file."""
    trunk_rate: float = 0.0
    """Samples per second (Hz) that an encoder that is a file was trained at. 0 takes the published rate: 400 for
    imagebind (2000 samples are 5 s), 200 for the others."""

    def __post_init__(self):
        if min(self.rate, self.trunk_rate) < 0:
            raise UserError(f"rate is {self.rate:g} and trunk_rate {self.trunk_rate:g}; they are samples per second")

    @property
    def scale(self) -> tuple[float, float]:
        """By what the accelerometer's and the gyroscope's numbers are multiplied, to be in m/s² and rad/s."""
        return ACCELERATION[self.acceleration], ROTATION[self.rotation]


@dataclass(frozen=True, kw_only=True)
class IMUDecoder:
    """bytes → [6, S] float32, standardised per channel.

    A recording longer than the encoder's window is cropped to its middle. One that is shorter, but at least half as
    long, is padded with its last value. Both get a note. A shorter one is a bad sample.
    """

    rate: float
    """Of the recordings, in Hz."""
    encoder_rate: float
    """Of the window, in Hz."""
    samples: int
    """S, at `encoder_rate`."""
    max_seconds: float
    """As in `IMUOptions`."""
    mean: tuple[float, ...]
    """Of each channel."""
    std: tuple[float, ...]
    """Of each channel."""
    scale: tuple[float, float] = (1.0, 1.0)
    """As `IMUOptions.scale`."""

    def __call__(self, data: bytes) -> Tensor | Noted:
        """Raises `BadSample`."""
        most = round(self.max_seconds * self.rate)
        recording = torch.from_numpy(read_recording(data, max_samples=most, scale=self.scale))
        window = self.samples / self.encoder_rate
        seconds = len(recording) / self.rate
        if seconds < window / 2:
            raise BadSample(
                f"{len(recording)} samples, {seconds:.3g} s at {self.rate:g} Hz; wanted is a window of {window:g} s, "
                "or at least half of it"
            )
        channels = hold_last(resample(recording.T.contiguous(), self.rate, self.encoder_rate), self.samples)
        standard = (channels - torch.tensor(self.mean)[:, None]) / torch.tensor(self.std)[:, None]
        shorter = f"filled up to {window:g} s with the last value"
        return noted(standard, seconds=seconds, clip=window, shorter=shorter)


def read_recording(data: bytes, max_samples: int, scale: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
    """Read the bytes of a ``.npy``: a finite float array [samples, 6] of plausible size, as float32 in m/s² and rad/s.

    The header is judged before the array is made: one that promises more than the bytes hold would fill the memory.
    A pickled array is refused, not opened.

    Raises:
        BadSample: Anything else; the message says what it is and what is wanted.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(stream)
    except Exception as error:  # ValueError, SyntaxError, UnicodeDecodeError, …: NumPy's parser has no error of its own
        raise BadSample(f"{len(data)} bytes that begin with {data[:12]!r} are not a .npy; {WANTED}: {error}") from error
    if dtype.kind != "f" or len(shape) != 2 or shape[1] != 6:
        hint = "; transpose it" if len(shape) == 2 and shape[0] == 6 else ""
        raise BadSample(f"an array {list(shape)} of {dtype}; {WANTED}{hint}")
    if not 0 < shape[0] <= max_samples:
        raise BadSample(f"an array of {shape[0]} samples; wanted are 1 to {max_samples} (max_seconds at that rate)")
    if shape[0] * 6 * dtype.itemsize != len(data) - stream.tell():
        raise BadSample(f"an array {list(shape)} of {dtype} cannot be {len(data) - stream.tell()} bytes: it is cut off")
    recording = np.load(io.BytesIO(data), allow_pickle=False).astype(np.float32)
    if not np.isfinite(recording).all():
        raise BadSample(f"{int((~np.isfinite(recording)).sum())} of {recording.size} values are NaN or infinite")
    with np.errstate(over="ignore"):  # what becomes infinite is refused like all that is too large
        recording *= np.repeat(np.array(scale, np.float32), 3)
    _check_units(recording, in_g=scale[0] != 1)
    return recording


def _check_units(recording: np.ndarray, *, in_g: bool) -> None:
    """Refuse a recording [samples, 6] in m/s² and rad/s whose numbers can only come of other units.

    Args:
        recording: What is judged.
        in_g: Whether the options say that its acceleration was in g.
    """
    acceleration, rotation = np.abs(recording[:, :3]).max(), np.abs(recording[:, 3:]).max()
    if acceleration > MAX_ACCELERATION or rotation > MAX_ROTATION:
        raise BadSample(
            f"the accelerometer reaches {acceleration:.4g} m/s² and the gyroscope {rotation:.4g} rad/s; at most "
            f"{MAX_ACCELERATION:g} and {MAX_ROTATION:g} can be: are the units others, such as degrees per second? (imu "
            "options acceleration and rotation)"
        )
    median = np.median(np.linalg.norm(recording[:, :3], axis=1))
    one_way = np.linalg.norm(recording[:, :3].mean(axis=0))
    if not in_g and ONE_G[0] <= median <= ONE_G[1] and one_way > ONE_G[0] / 2:
        raise BadSample(
            f"the accelerometer reads {median:.2f} in one direction: that is gravity in g, where 9.81 m/s² is wanted; "
            "set the imu option acceleration=g"
        )
    if median > MAX_MEDIAN:
        raise BadSample(
            f"the accelerometer's median is {median:.4g} m/s², more than five times gravity: is it in m/s² or in mg, "
            "and not as the imu option acceleration says?"
        )


class IMUEncoder(Encoder):
    """The frozen IMU network with its decoding."""

    def __init__(self, network: nn.Module, decode: IMUDecoder, license: str):
        super().__init__()
        self.network, self.decode, self.license = network, decode, license
        self.eval()
        with torch.no_grad():
            _, self.tokens, self.width = self(torch.zeros(1, 6, decode.samples)).shape
        self.shape = (6, decode.samples)

    def forward(self, windows: Tensor) -> Tensor:
        """[N, 6, S] → [N, tokens, width]."""
        return self.network(windows).last_hidden_state

    @property
    def savable(self) -> bool:
        """Whether it came from a folder, not from a file of somebody else's format."""
        return is_savable(self.network)

    def save_pretrained(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write a folder that the loader of this modality reads; `weights` are a whole state dict of this encoder."""
        save_network(self.network, None, folder, weights, self.license)


def load_imu_encoder(name: str, options: IMUOptions) -> IMUEncoder:
    """An IMU encoder, frozen, in fp32 on the CPU: ours from a local folder or hub name, others' from a local file.

    Raises:
        UserError: It cannot be loaded, is another kind of network, or the recordings' rate is not given.
    """
    if str(name).endswith(FILES):
        from anymal.adapters.imu.published import load_trunk

        trunk = load_trunk(name, options.trunk)
        decode = _decoder(options, options.trunk_rate or trunk.rate, trunk.samples, mean=[0.0] * 6, std=[1.0] * 6)
        return IMUEncoder(trunk, decode, trunk.license)
    config = load_config(name)
    if config.model_type != "anymal_imu":
        raise UserError(
            f"{name!r} holds a {config.model_type}, not an IMU encoder; anymal pretrain-imu-encoder makes one"
        )
    if options.trunk or options.trunk_rate:
        raise UserError(f"model.modalities.imu.options.trunk and trunk_rate are for files, but {name!r} is none")
    decode = _decoder(options, config.rate, config.samples, mean=config.mean, std=config.std)
    return IMUEncoder(load_network(name), decode, license_of(name))


def _decoder(
    options: IMUOptions, rate: float, samples: int, *, mean: Sequence[float], std: Sequence[float]
) -> IMUDecoder:
    if options.rate <= 0:
        raise UserError(
            "model.modalities.imu.options.rate must state the recordings' samples per second: .npy files do not hold it"
            f" (this encoder takes {rate:g} Hz; others are resampled)"
        )
    return IMUDecoder(
        rate=options.rate,
        encoder_rate=rate,
        samples=samples,
        max_seconds=options.max_seconds,
        mean=tuple(mean),
        std=tuple(std),
        scale=options.scale,
    )


MODALITY = Modality(name="imu", suffixes=("imu.npy",), options=IMUOptions, load=load_imu_encoder)
