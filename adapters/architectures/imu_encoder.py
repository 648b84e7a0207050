"""The small IMU encoder of our own: convolutions over six channels, loaded through transformers' Auto classes.

No pretrained IMU encoder is published in a form that users can load; ``anymal pretrain-imu-encoder`` trains this one
and writes a local folder (config.json, model.safetensors). Importing this module registers the type ``anymal_imu``.

    window [N, 6, S] ──3 strided convolutions──▶ ──residual blocks──▶ features [N, ceil(S / 8), width]

Channels: accelerometer x, y, z in m/s², then gyroscope x, y, z in rad/s. Windows are 5 s by default, as in IMU2CLIP
(arXiv 2210.14395). Each channel is standardised with the mean and deviation of the training data, which stand in the
config: decoding applies them in fp32, since gravity would cost the motion its precision in bf16.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

CHANNELS = 6


class IMUEncoderConfig(PreTrainedConfig):
    """What the encoder takes, and its size.

    Args:
        rate: Samples per second (Hz).
        seconds: Length of a window.
        hidden_size: Width of the features.
        blocks: Residual blocks after the strided convolutions.
        mean, std: Per channel, of the training data, in m/s² and rad/s.
        labels: What it was trained to tell apart; for the record.
    """

    model_type = "anymal_imu"

    def __init__(
        self,
        rate: float = 50.0,
        seconds: float = 5.0,
        hidden_size: int = 128,
        blocks: int = 2,
        mean: Sequence[float] = (0.0,) * CHANNELS,
        std: Sequence[float] = (9.81, 9.81, 9.81, 1.0, 1.0, 1.0),
        labels: Sequence[str] = (),
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.rate, self.seconds, self.hidden_size, self.blocks = rate, seconds, hidden_size, blocks
        self.mean, self.std, self.labels = list(mean), list(std), list(labels)

    @property
    def samples(self) -> int:
        """S, the samples of a window."""
        return round(self.rate * self.seconds)


class _Convolution(nn.Module):
    """Convolution, GroupNorm, GELU; added to its input where the shape stays."""

    def __init__(self, before: int, after: int, kernel: int, stride: int):
        super().__init__()
        self.conv = nn.Conv1d(before, after, kernel, stride=stride, padding=kernel // 2)
        self.norm = nn.GroupNorm(8, after)
        self.residual = before == after and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.norm(self.conv(x)))
        return x + y if self.residual else y


class IMUEncoderModel(PreTrainedModel):
    """windows [N, 6, S], standardised → last_hidden_state [N, ceil(S / 8), hidden_size]."""

    config_class = IMUEncoderConfig
    main_input_name = "windows"

    def __init__(self, config: IMUEncoderConfig):
        super().__init__(config)
        width = config.hidden_size
        self.layers = nn.Sequential(
            _Convolution(CHANNELS, width // 2, 9, 2),
            _Convolution(width // 2, width, 5, 2),
            _Convolution(width, width, 5, 2),
            *(_Convolution(width, width, 3, 1) for _ in range(config.blocks)),
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """transformers would draw weights of deviation 0.02; PyTorch's own initialisation suits convolutions."""

    def forward(self, windows: Tensor, **_: object) -> BaseModelOutput:
        """The features over time, as its only output."""
        return BaseModelOutput(last_hidden_state=self.layers(windows).transpose(1, 2))


AutoConfig.register(IMUEncoderConfig.model_type, IMUEncoderConfig)
AutoModel.register(IMUEncoderConfig, IMUEncoderModel)
