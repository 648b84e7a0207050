"""The IMU networks that others published, read from the files that users have of them. Behind `modality`.

A file is a state_dict under its authors' names: ImageBind's ``imagebind_huge.pth``, OneLLM's ``consolidated.*.pth``, an
``*_src_encoder.pt`` that IMU2CLIP's training writes; each also as ``.safetensors``. All sizes are read off its tensors.

    windows [N, 6, S] ──stem──▶ patches [N, P, W] ──blocks──▶ last_hidden_state [N, tokens, width]

    trunk      window (S, rate, seconds)   features (tokens x width) of the published weights
    imagebind  2000   400 Hz   5 s         250 x 512: patches before the last block
    onellm      400   200 Hz   2 s         391 x 1024: patches after CLIP's last block and its final norm
    imu2clip   1000   200 Hz   5 s         1 x 512: the GRU's last state

Sources: ImageBind (arXiv 2305.05665, section 3 for the window), OneLLM (arXiv 2312.03700), IMU2CLIP (arXiv 2210.14395),
and the names, activations and epsilons of their public code. All three saw Ego4D's m/s² and rad/s as they are.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import QuickGELUActivation
from transformers.modeling_outputs import BaseModelOutput

from anymal.adapters.state_dicts import StateDict, listed, read_state_dict
from anymal.errors import UserError, nearest
from anymal.model.fake_tensors import new_tensors

CHANNELS = 6
HEAD = 64
"""Channels of an attention head, which no shape tells: CLIP's rule, and ImageBind's 512 / 8."""


class Attention(nn.Module):
    """Multi-head self-attention; with `bias_kv`, to one learned key and value more (`torch.nn.MultiheadAttention`)."""

    def __init__(self, width: int, *, bias_kv: bool):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.bias_kv = bias_kv
        if bias_kv:
            self.bias_k, self.bias_v = (nn.Parameter(torch.empty(1, 1, width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, W] → [N, T, W]."""
        queries, keys, values = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        if self.bias_kv:
            keys = torch.cat([keys, self.bias_k.expand(len(x), -1, -1)], dim=1)
            values = torch.cat([values, self.bias_v.expand(len(x), -1, -1)], dim=1)
        queries, keys, values = (x.unflatten(-1, (-1, HEAD)).transpose(1, 2) for x in (queries, keys, values))
        return self.out_proj(F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and MLP, each after its norm and added to its input."""

    def __init__(self, width: int, hidden: int, *, epsilon: float, activation: nn.Module, bias_kv: bool):
        super().__init__()
        self.norm_1, self.norm_2 = (nn.LayerNorm(width, eps=epsilon) for _ in range(2))
        self.attn = Attention(width, bias_kv=bias_kv)
        self.fc1, self.activation, self.fc2 = nn.Linear(width, hidden), activation, nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, W] → [N, T, W]."""
        x = x + self.attn(self.norm_1(x))
        return x + self.fc2(self.activation(self.fc1(self.norm_2(x))))


class ImageBindTrunk(nn.Module):
    """Patches of 8 samples through all blocks but the last.

    In the last block only the class token's output reached ImageBind's loss, so that its outputs at the patches were
    never trained: as with CLIP's vision tower (`anymal.adapters.image.modality`), what goes into it is used. The head
    is not.
    """

    rate, license = 400.0, "CC-BY-NC-4.0"  # 5 s are 2000 samples
    parts = ("modality_preprocessors.imu.", "modality_trunks.imu.")
    names: Mapping[str, str] = {
        "stem.": "modality_preprocessors.imu.imu_stem.proj.",
        "patch_norm.": "modality_preprocessors.imu.imu_stem.norm_layer.",
        "start": "modality_preprocessors.imu.cls_token",
        "positions": "modality_preprocessors.imu.pos_embed",
        "blocks.": "modality_trunks.imu.blocks.",
        ".fc1.": ".mlp.fc1.",
        ".fc2.": ".mlp.fc2.",
    }

    def __init__(self, weights: StateDict):
        super().__init__()
        width, inputs = weights.shape("stem.weight", None, None)
        _, positions, _ = weights.shape("positions", 1, None, width)
        blocks = max(weights.blocks() - 1, 0)
        hidden, _ = weights.shape("blocks.0.fc1.weight", None, width)
        _check_heads(weights, width)
        if inputs % CHANNELS:
            raise UserError(
                f"{weights.path}: {weights.key('stem.weight')} takes {inputs} values, no multiple of {CHANNELS}"
            )
        self.unused = (f"modality_trunks.imu.blocks.{blocks}.",)
        self.kernel = inputs // CHANNELS
        self.samples = self.kernel * (positions - 1)
        self.stem = nn.Linear(inputs, width, bias=False)
        self.patch_norm = nn.LayerNorm(width)
        self.start = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, positions, width))
        self.blocks = nn.Sequential(
            *(Block(width, hidden, epsilon=1e-6, activation=nn.GELU(), bias_kv=True) for _ in range(blocks))
        )

    def forward(self, windows: Tensor) -> BaseModelOutput:
        """[N, 6, S] → [N, P, W] with P = S / kernel; raises `UserError` at another S."""
        _check_window(windows, self.samples)
        patches = windows.unfold(-1, self.kernel, self.kernel).transpose(1, 2).flatten(2)  # [N, P, 6 · kernel]
        x = self.patch_norm(self.stem(patches))
        x = torch.cat([self.start.expand(len(x), -1, -1), x], dim=1) + self.positions
        return BaseModelOutput(last_hidden_state=self.blocks(x)[:, 1:])


class OneLLMTrunk(nn.Module):
    """OneLLM's IMU tokenizer (a convolution and positions) and the frozen CLIP ViT that all its modalities share.

    That is what OneLLM calls its encoder. The experts, router, query tokens and projection behind it turn features
    into embeddings of its own LLM: here a projector takes their place. Without CLIP's blocks the tokens would be one
    linear map of ten samples, so a file that lacks them is refused; OneLLM's training writes them.
    """

    rate, license = 200.0, "LLAMA 2 Community License"  # all that OneLLM's README states for code and weights
    parts = ("conv1.imu.", "positional_embedding.imu", "clip.visual.")
    unused = ("clip.visual.conv1.", "clip.visual.positional_embedding", "clip.visual.proj")  # the tokenizer of images
    names: Mapping[str, str] = {
        "stem.": "conv1.imu.",
        "start": "clip.visual.class_embedding",
        "positions": "positional_embedding.imu",
        "norm_before.": "clip.visual.ln_pre.",
        "norm_after.": "clip.visual.ln_post.",
        "blocks.": "clip.visual.transformer.resblocks.",
        ".norm_1.": ".ln_1.",
        ".norm_2.": ".ln_2.",
        ".fc1.": ".mlp.c_fc.",
        ".fc2.": ".mlp.c_proj.",
    }

    def __init__(self, weights: StateDict):
        super().__init__()
        width, _, kernel = weights.shape("stem.weight", None, CHANNELS, None)
        positions, _ = weights.shape("positions", None, width)
        hidden, _ = weights.shape("blocks.0.fc1.weight", None, width)
        _check_heads(weights, width)
        self.samples = positions - 1 + kernel - 1
        self.stem = nn.Conv1d(CHANNELS, width, kernel, bias=False)
        self.start = nn.Parameter(torch.empty(width))
        self.positions = nn.Parameter(torch.empty(positions, width))
        self.norm_before, self.norm_after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = nn.Sequential(
            *(
                Block(width, hidden, epsilon=1e-5, activation=QuickGELUActivation(), bias_kv=False)
                for _ in range(weights.blocks())
            )
        )

    def forward(self, windows: Tensor) -> BaseModelOutput:
        """[N, 6, S] → [N, P, W] with P = S - kernel + 1; raises `UserError` at another S."""
        _check_window(windows, self.samples)
        x = self.stem(windows).transpose(1, 2)
        x = torch.cat([self.start.expand(len(x), 1, -1), x], dim=1) + self.positions
        return BaseModelOutput(last_hidden_state=self.norm_after(self.blocks(self.norm_before(x)))[:, 1:])


class IMU2CLIPTrunk(nn.Module):
    """IMU2CLIP's ``MW2StackRNNPooling``: three convolutions with max-pooling, then a GRU.

    The GRU walks over the channels and takes the pooled times of one as its input, so the length of a window is fixed.
    """

    rate, license = 200.0, "CC-BY-NC-4.0"
    samples = 1000  # 5 s; the shapes allow for 978 to 1004
    parts, unused = ("net.",), ()
    names: Mapping[str, str] = {
        "window_norm.": "net.0.",
        "convolutions.0.": "net.1.net.0.",
        "convolutions.1.": "net.2.net.0.",
        "convolutions.2.": "net.3.net.0.",
        "channel_norm.": "net.4.",
        "gru.": "net.5.",
    }

    def __init__(self, weights: StateDict):
        super().__init__()
        before, times, convolutions = CHANNELS, self.samples, []
        for i in range(3):
            after, _, kernel = weights.shape(f"convolutions.{i}.weight", None, before, None)
            convolutions.append(nn.Conv1d(before, after, kernel, dilation=2, bias=False))
            before, times = after, (times - 2 * (kernel - 1)) // 3
        weights.shape("gru.weight_ih_l0", None, times)
        _, width = weights.shape("gru.weight_hh_l0", None, None)
        if before % 4:
            raise UserError(
                f"{weights.path}: {weights.key('convolutions.2.weight')} has {before} channels, no multiple of 4"
            )
        self.window_norm, self.channel_norm = nn.GroupNorm(2, CHANNELS), nn.GroupNorm(4, before)
        self.convolutions = nn.ModuleList(convolutions)
        self.gru = nn.GRU(times, width, batch_first=True)

    def forward(self, windows: Tensor) -> BaseModelOutput:
        """[N, 6, S] → [N, 1, W]; raises `UserError` at another S."""
        _check_window(windows, self.samples)
        x = self.window_norm(windows)
        for convolution in self.convolutions:
            x = F.max_pool1d(convolution(x), 3)
        _, state = self.gru(self.channel_norm(x))
        return BaseModelOutput(last_hidden_state=state.transpose(0, 1))


Trunk = ImageBindTrunk | OneLLMTrunk | IMU2CLIPTrunk
TRUNKS: dict[str, type[Trunk]] = {
    "imagebind": ImageBindTrunk,
    "onellm": OneLLMTrunk,
    "imu2clip": IMU2CLIPTrunk,
}
"""What ``options.trunk`` can be."""
SIGNATURES = {
    "imagebind": "modality_preprocessors.imu.imu_stem.proj.weight",
    "onellm": "conv1.imu.weight",
    "imu2clip": "net.5.weight_ih_l0",
}
"""The tensor by whose published name a file is recognised."""


def load_trunk(path: str, kind: str = "") -> Trunk:
    """A published IMU network from its file, in fp32 on the CPU, in eval mode, without gradients.

    Args:
        path: Of a state_dict.
        kind: A name in `TRUNKS`; empty recognises it by the file's names.

    Returns:
        A module that has ``samples`` (S), ``rate`` (Hz) and ``license``. Inside
        `anymal.model.fake_tensors.shapes_only` it is made of fake tensors, and no weight is read.

    Raises:
        UserError: There is no such file, it is no state_dict, or not one of this network. Names file and tensor.
    """
    if kind and kind not in TRUNKS:
        hint = nearest(kind, TRUNKS, "it can be empty, or one of")
        raise UserError(f"model.modalities.imu.options.trunk is {kind!r}; {hint}")
    tensors = read_state_dict(path)
    kinds = {name: key for name, end in SIGNATURES.items() for key in tensors if key.endswith(end)}
    if not kinds or (kind and kind not in kinds):
        missing = f"tensor {SIGNATURES[kind]} of {kind}" if kind else f"IMU network of {listed(TRUNKS)}"
        contents = listed(kinds) if kinds else f"{listed(list(tensors)[:3])}, …"
        raise UserError(f"{path} holds no {missing}; it holds {contents}")
    kind = kind or next(iter(kinds))
    trunk = TRUNKS[kind]
    weights = StateDict(
        path=path, tensors=tensors, prefix=kinds[kind].removesuffix(SIGNATURES[kind]), names=trunk.names
    )
    with new_tensors():
        network = trunk(weights)
        weights.load(network, trunk.parts, network.unused)
    return network.eval().requires_grad_(False)


def _check_heads(weights: StateDict, width: int) -> None:
    if width % HEAD:
        raise UserError(f"{weights.path}: {weights.key('stem.weight')} gives {width} channels, no multiple of {HEAD}")


def _check_window(windows: Tensor, samples: int) -> None:
    if windows.shape[1:] != (CHANNELS, samples):
        raise UserError(
            f"windows of {list(windows.shape[1:])} for an IMU network that takes [{CHANNELS}, {samples}] and no other"
        )
