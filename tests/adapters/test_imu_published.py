"""Published IMU networks: features as their descriptions say, written anew; others' files are refused."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import tiny_encoders as tiny
from anymal.adapters.imu.modality import IMUOptions, load_imu_encoder
from anymal.adapters.imu.published import TRUNKS, load_trunk
from anymal.errors import BadSample, UserError
from anymal.model.fake_tensors import shapes_only
from tiny_imu_trunks import STATE_DICTS, imagebind, imu2clip, onellm

SAMPLES = {"imagebind": 160, "onellm": 40, "imu2clip": 1000}


def saved(folder: Path, state: dict[str, Tensor], suffix: str = ".pth") -> str:
    path = folder / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    return str(path)


def windows(kind: str, count: int = 2) -> Tensor:
    """Gravity and noise."""
    noise = torch.randn(count, 6, SAMPLES[kind], generator=torch.Generator().manual_seed(7))
    return noise + torch.tensor([0, 0, 9.81, 0, 0, 0])[:, None]


# ------------------------------------------------------------- the three networks, written from their descriptions


def imagebind_features(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Torch's own attention with a learned key and value, block by block; what enters the last one, patches only."""
    own = {name.split(".imu.", 1)[1]: tensor for name, tensor in state.items() if ".imu." in name}
    width = own["cls_token"].shape[-1]

    def norm(x, name, eps=1e-6):
        return F.layer_norm(x, (width,), own[f"{name}.weight"], own[f"{name}.bias"], eps)

    rows = []
    for start in range(0, x.shape[-1], 8):  # channel by channel, eight samples of each
        patch = torch.cat([x[:, channel, start : start + 8] for channel in range(6)], dim=1)
        rows.append(norm(patch @ own["imu_stem.proj.weight"].T, "imu_stem.norm_layer", 1e-5))
    x = torch.cat([own["cls_token"].repeat(len(x), 1, 1), torch.stack(rows, 1)], 1) + own["pos_embed"]
    for i in range(2):
        attention = nn.MultiheadAttention(width, width // 64, add_bias_kv=True, batch_first=True)
        attention.load_state_dict({n.split(".attn.")[1]: t for n, t in own.items() if f"blocks.{i}.attn." in n})
        y = norm(x, f"blocks.{i}.norm_1")
        x = x + attention(y, y, y)[0]
        y = F.linear(norm(x, f"blocks.{i}.norm_2"), own[f"blocks.{i}.mlp.fc1.weight"], own[f"blocks.{i}.mlp.fc1.bias"])
        x = x + F.linear(F.gelu(y), own[f"blocks.{i}.mlp.fc2.weight"], own[f"blocks.{i}.mlp.fc2.bias"])
    return x[:, 1:]


def onellm_features(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The tokenizer, then the layers of transformers' CLIP."""
    from transformers import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer

    state = {name.removeprefix("llma."): tensor.float() for name, tensor in state.items()}
    clip = {name.removeprefix("clip.visual."): tensor for name, tensor in state.items()}
    width = len(clip["class_embedding"])
    kernel = state["conv1.imu.weight"]
    steps = [torch.einsum("nct,wct->nw", x[:, :, t : t + 10], kernel) for t in range(x.shape[-1] - 9)]
    x = torch.stack([clip["class_embedding"].expand(len(x), -1), *steps], 1) + state["positional_embedding.imu"]
    x = F.layer_norm(x, (width,), clip["ln_pre.weight"], clip["ln_pre.bias"])
    config = CLIPVisionConfig(hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64)
    config._attn_implementation = "eager"
    for i in range(2):
        layer, block = CLIPEncoderLayer(config), f"transformer.resblocks.{i}"
        theirs = {}
        for end in ("weight", "bias"):
            parts = clip[f"{block}.attn.in_proj_{end}"].chunk(3)
            theirs |= {f"self_attn.{p}_proj.{end}": part for p, part in zip("qkv", parts, strict=True)}
            theirs[f"self_attn.out_proj.{end}"] = clip[f"{block}.attn.out_proj.{end}"]
            theirs |= {f"layer_norm{n}.{end}": clip[f"{block}.ln_{n}.{end}"] for n in (1, 2)}
            theirs |= {f"mlp.fc1.{end}": clip[f"{block}.mlp.c_fc.{end}"]}
            theirs |= {f"mlp.fc2.{end}": clip[f"{block}.mlp.c_proj.{end}"]}
        layer.load_state_dict(theirs)
        given = layer(x, attention_mask=None)
        x = given[0] if isinstance(given, tuple) else given
    return F.layer_norm(x, (width,), clip["ln_post.weight"], clip["ln_post.bias"])[:, 1:]


def imu2clip_features(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Every step by hand: the three triples of axes normalised, taps two samples apart, the best of three, a GRU."""

    def normalised(x, groups, name):
        parts = [
            (p - p.mean((1, 2), True)) / (p.var((1, 2), False, keepdim=True) + 1e-5).sqrt() for p in x.chunk(groups, 1)
        ]
        return torch.cat(parts, 1) * state[f"{name}.weight"][:, None] + state[f"{name}.bias"][:, None]

    x = normalised(x, 2, "net.0")
    for i in (1, 2, 3):
        kernel = state[f"net.{i}.net.0.weight"]
        taps, length = kernel.shape[2], x.shape[-1] - 2 * (kernel.shape[2] - 1)
        x = sum(torch.einsum("nct,oc->not", x[..., 2 * k : 2 * k + length], kernel[..., k]) for k in range(taps))
        x = torch.stack([x[..., k : k + length // 3 * 3 : 3] for k in range(3)]).amax(0)
    x = normalised(x, 4, "net.4")
    h = torch.zeros(len(x), state["net.5.weight_hh_l0"].shape[1])
    for channel in range(x.shape[1]):  # a GRU's steps are the channels here
        given = x[:, channel] @ state["net.5.weight_ih_l0"].T + state["net.5.bias_ih_l0"]
        kept = h @ state["net.5.weight_hh_l0"].T + state["net.5.bias_hh_l0"]
        (r1, z1, n1), (r2, z2, n2) = given.chunk(3, 1), kept.chunk(3, 1)
        z = (z1 + z2).sigmoid()
        h = (1 - z) * (n1 + (r1 + r2).sigmoid() * n2).tanh() + z * h
    return h[:, None]


REFERENCES = {"imagebind": imagebind_features, "onellm": onellm_features, "imu2clip": imu2clip_features}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("kind", TRUNKS)
def test_features_are_those_of_the_description(kind, suffix, tmp_path):
    state = STATE_DICTS[kind]()
    network = load_trunk(saved(tmp_path, state, suffix))
    assert isinstance(network, TRUNKS[kind]), "told by its names"
    with torch.no_grad():
        expected = REFERENCES[kind](state, windows(kind))
        given = network(windows(kind)).last_hidden_state
    assert given.shape == expected.shape
    assert torch.allclose(given, expected, atol=1e-5), (given - expected).abs().max()
    assert expected.std() > 0.1, "the comparison is of something"


# ------------------------------------------------------------------------------------- sizes, windows and decoding


@pytest.mark.parametrize(
    ("state", "window", "rate", "features"),
    [
        (lambda: imagebind(width=512, patches=250, blocks=6), (6, 2000), 400, (250, 512)),
        (lambda: imagebind(width=64, patches=7, blocks=2, kernel=5), (6, 35), 400, (7, 64)),
        (lambda: onellm(width=64, patches=391, blocks=1), (6, 400), 200, (391, 64)),
        (lambda: onellm(width=192, patches=5, blocks=1, kernel=3), (6, 7), 200, (5, 192)),
        (lambda: imu2clip(width=512), (6, 1000), 200, (1, 512)),
    ],
)
def test_sizes_are_read_off_the_shapes(state, window, rate, features, tmp_path):
    encoder = load_imu_encoder(saved(tmp_path, state()), IMUOptions(rate=100))
    assert (encoder.shape, encoder.decode.encoder_rate) == (window, rate)
    assert (encoder.tokens, encoder.width) == features


def test_recordings_are_resampled_and_cropped_and_not_standardised(tmp_path):
    path = saved(tmp_path, imu2clip())
    decode = load_imu_encoder(path, IMUOptions(rate=200)).decode
    recording = tiny.motion(1400)
    middle = tiny.decoded(decode, tiny.npy(recording))
    assert np.array_equal(middle.T.numpy(), recording[200:1200]), "the middle, as it is"
    slow = load_imu_encoder(path, IMUOptions(rate=50)).decode(tiny.npy(recording[:250]))
    assert slow.shape == (6, 1000)
    with pytest.raises(BadSample, match=r"2.4 s at 50 Hz; wanted is a window of 5 s, or at least half"):
        load_imu_encoder(path, IMUOptions(rate=50)).decode(tiny.npy(recording[:120]))
    fast = load_imu_encoder(path, IMUOptions(rate=1000, trunk_rate=1000)).decode
    assert torch.equal(tiny.decoded(fast, tiny.npy(recording)), middle), "one trained at another rate"
    assert middle.mean(1)[2] > 9


@pytest.mark.parametrize("kind", TRUNKS)
def test_windows_of_another_length_are_refused(kind, tmp_path):
    network = load_trunk(saved(tmp_path, STATE_DICTS[kind]()))
    for samples in (SAMPLES[kind] - 1, SAMPLES[kind] + 8, 2 * SAMPLES[kind]):
        with pytest.raises(
            UserError, match=rf"\[6, {samples}\] for an IMU .* takes \[6, {SAMPLES[kind]}\] and no other"
        ):
            network(torch.zeros(1, 6, samples))


def test_the_licence_is_known(tmp_path):
    found = {kind: load_trunk(saved(tmp_path, make())).license for kind, make in STATE_DICTS.items()}
    assert found == {"imagebind": "CC-BY-NC-4.0", "onellm": "LLAMA 2 Community License", "imu2clip": "CC-BY-NC-4.0"}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", TRUNKS)
def test_shapes_alone_need_no_weights(kind, suffix, tmp_path):
    path = saved(tmp_path, STATE_DICTS[kind](), suffix)
    whole = load_imu_encoder(path, IMUOptions(rate=50))
    with shapes_only(FakeTensorMode(allow_non_fake_inputs=True)):
        encoder = load_imu_encoder(path, IMUOptions(rate=50))
    assert all(isinstance(weight, FakeTensor) for weight in encoder.parameters())
    assert (encoder.tokens, encoder.width, encoder.shape) == (whole.tokens, whole.width, whole.shape)
    assert sum(w.numel() for w in encoder.parameters()) == sum(w.numel() for w in whole.parameters())


# --------------------------------------------------------------------------------------------------- other files


BLOCK = "modality_trunks.imu.blocks"
CLIP = "llma.clip.visual"


@pytest.mark.parametrize(
    ("kind", "without", "more", "message"),
    [
        ("imagebind", f"{BLOCK}.0.attn.bias_k", {}, f"lacks the tensor {BLOCK}.0.attn.bias_k"),
        ("imagebind", f"{BLOCK}.1.", {}, f"lacks {BLOCK}.1, but has block 2"),
        ("imagebind", "", {f"{BLOCK}.0.layer_scale_gamma1": (1, 1, 128)}, f"holds {BLOCK}.0.layer_scale_gamma1, which"),
        (
            "imagebind",
            "",
            {f"{BLOCK}.1.norm_1.weight": (64,)},
            r"norm_1.weight has the shape \[64\]; wanted is \[128\]",
        ),
        (
            "imagebind",
            "",
            {"modality_preprocessors.imu.cls_token": (1, 2, 128)},
            r"cls_token has the shape \[1, 2, 128\]",
        ),
        ("onellm", f"{CLIP}.transformer", {}, f"lacks the tensor {CLIP}.transformer.resblocks.0.mlp.c_fc.weight"),
        ("onellm", f"{CLIP}.ln_post.bias", {}, f"lacks the tensor {CLIP}.ln_post.bias"),
        ("onellm", "", {"llma.conv1.imu.weight": (128, 7, 10)}, r"\[128, 7, 10\]; wanted is \[any, 6, any\]"),
        ("onellm", "", {"llma.conv1.imu.bias": (128,)}, "holds llma.conv1.imu.bias, which this network does not have"),
        ("imu2clip", "net.3", {}, "lacks the tensor net.3.net.0.weight"),
        ("imu2clip", "", {"net.5.weight_ih_l1": (72, 24)}, "holds net.5.weight_ih_l1, which"),
        ("imu2clip", "", {"net.1.net.0.weight": (32, 6, 40)}, r"net.5.weight_ih_l0 has the .* wanted is \[any, 30\]"),
        ("imu2clip", "net.5", {}, "holds no IMU network of imagebind, onellm, imu2clip; it holds net.0.weight, "),
    ],
)
def test_what_does_not_fit_is_named(kind, without, more, message, tmp_path):
    state = STATE_DICTS[kind]()
    state = {key: tensor for key, tensor in state.items() if not (without and key.startswith(without))}
    path = saved(tmp_path, state | {key: torch.zeros(shape) for key, shape in more.items()})
    with pytest.raises(UserError, match=message) as caught:
        load_trunk(path)
    assert path in str(caught.value)


def test_weights_are_of_floating_point(tmp_path):
    path = saved(tmp_path, imu2clip() | {"net.0.bias": torch.zeros(6, dtype=torch.int64)})
    with pytest.raises(UserError, match=r"net.0.bias is of torch.int64"):
        load_trunk(path)


def test_the_kind_can_be_said(tmp_path):
    path = saved(tmp_path, imagebind() | onellm())
    for kind in ("imagebind", "onellm"):
        assert isinstance(load_trunk(path, kind), TRUNKS[kind])
    with pytest.raises(UserError, match=r"no tensor net.5.weight_ih_l0 of imu2clip; it holds imagebind, onellm"):
        load_trunk(path, "imu2clip")
    with pytest.raises(UserError, match=r"trunk is 'imagebnd'; did you mean imagebind\?"):
        load_trunk(path, "imagebnd")
    with pytest.raises(UserError, match="trunk and trunk_rate are for files"):
        load_imu_encoder(tiny.imu(tmp_path / "ours"), IMUOptions(rate=50, trunk="imagebind"))


class Trap:
    """Pickled, it is a call that leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_objects_are_refused_and_not_run(tmp_path):
    sprung = tmp_path / "sprung"
    torch.save(imu2clip() | {"net.6.weight": Trap(sprung)}, tmp_path / "trap.pth")
    with pytest.raises(
        UserError, match=r"trap.pth holds more than tensors, and objects are not unpickled; wanted is a"
    ):
        load_trunk(str(tmp_path / "trap.pth"))
    assert not sprung.exists()


def test_files_that_are_no_state_dict_are_refused(tmp_path):
    def refused(name: str, match: str):
        with pytest.raises(UserError, match=match) as caught:
            load_trunk(str(tmp_path / name))
        assert name in str(caught.value) and "\n" not in str(caught.value)

    refused("none.pth", "there is no such file")
    whole = Path(saved(tmp_path, imu2clip())).read_bytes()
    for name in ("a.pth", "a.pt", "a.safetensors"):
        for data in (b"", b"text" * 100, whole[: len(whole) // 2]):
            (tmp_path / name).write_bytes(data)
            refused(name, "cannot be read|holds more than tensors")
    torch.save({"model": imu2clip(), "epoch": 3}, tmp_path / "run.pth")
    refused("run.pth", "holds a dict of model, epoch; wanted is a state_dict")
    torch.save([1, 2], tmp_path / "list.pth")
    refused("list.pth", "holds a list; wanted is")
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    refused("other.safetensors", "holds no IMU network of imagebind, onellm, imu2clip; it holds x, …")
    assert math.isfinite(load_trunk(saved(tmp_path, imu2clip()))(windows("imu2clip")).last_hidden_state.sum().item())
