"""A CTranslate2 ``model.bin`` of Whisper → a folder that transformers' ``from_pretrained`` loads as `WhisperModel`.

    python data_prep/demo/ctranslate2_whisper.py model=model.bin folder=models/whisper-tiny.en license=mit

Whisper's encoder always takes clips of one length. Its table of positions is cut to `seconds` here, so that a short
clip does not cost what 30 seconds cost; the feature extractor saved beside it pads or cuts clips to that length.
The layout of the file is written down at `read_arrays`.
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from omegaconf import MISSING

from anymal.config.command_line import parse_args, run_program
from anymal.errors import UserError
from anymal.files import is_done, whole_folder

_DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)
_POSITIONS_PER_SECOND = 50
_TOP_NAMES = {"layer_norm": "layer_norm", "embeddings": "embed_tokens", "conv1": "conv1", "conv2": "conv2"}
_LAYER_NAMES = {
    "self_attention/layer_norm": ["self_attn_layer_norm"],
    "self_attention/linear_0": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attention/linear_1": ["self_attn.out_proj"],
    "attention/layer_norm": ["encoder_attn_layer_norm"],
    "attention/linear_0": ["encoder_attn.q_proj"],
    "attention/linear_1": ["encoder_attn.k_proj", "encoder_attn.v_proj"],
    "attention/linear_2": ["encoder_attn.out_proj"],
    "ffn/layer_norm": ["final_layer_norm"],
    "ffn/linear_0": ["fc1"],
    "ffn/linear_1": ["fc2"],
}
_KINDS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}


@dataclass(kw_only=True)
class Settings:
    """Settings of this step."""

    model: str = MISSING
    """The model.bin: any size of Whisper, in float32 or float16."""
    folder: str = MISSING
    """The folder to write."""
    seconds: int = 30
    """Length of the clips that the encoder shall take, 1 to 30."""
    source: str = ""
    """Where the file comes from, for the model card; empty takes its name."""
    license: str = "unknown"
    """Its licence, for the model card."""


def read_arrays(data: bytes) -> tuple[str, dict[str, np.ndarray]]:
    """Read the arrays of a ``model.bin`` of version 6: (name of the model's specification, name → array).

    Layout, little-endian: version u32, specification, revision u32, count u32; then for each array its name, rank u8,
    dimensions u32 each, type u8 (0 f32, 1 i8, 2 i16, 3 i32, 4 f16), size in bytes u32, data. A name is its length u16,
    including the zero byte that ends it, and the characters. What follows (names for the same array) is not needed.

    Raises:
        UserError: Another version, an unknown type, or data that ends too early.
    """
    at = 0

    def take(layout: str) -> tuple:
        nonlocal at
        values = struct.unpack_from("<" + layout, data, at)
        at += struct.calcsize("<" + layout)
        return values

    def name() -> str:
        return take(f"{take('H')[0]}s")[0].rstrip(b"\0").decode()

    try:
        version = take("I")[0]
        if version != 6:
            raise UserError(f"the CTranslate2 file has version {version}; version 6 is understood")
        specification, _revision, count = name(), *take("II")
        arrays = {}
        for _ in range(count):
            key, rank = name(), take("B")[0]
            shape, kind, size = take(f"{rank}I"), *take("BI")
            arrays[key] = np.frombuffer(take(f"{size}s")[0], _DTYPES[kind]).reshape(shape)
    except (struct.error, IndexError, ValueError) as error:
        raise UserError(f"the CTranslate2 file is damaged at byte {at}: {error}") from error
    return specification, arrays


def convert(data: bytes, folder: Path, card: str, *, seconds: int = 30) -> None:
    """Write `folder` from the bytes of a ``model.bin``: weights, configuration, feature extractor, and `card`.

    Raises:
        UserError: Not Whisper, an array without a place, or `seconds` outside 1 to 30.
    """
    from safetensors.numpy import save_file

    specification, arrays = read_arrays(data)
    if specification != "WhisperSpec":
        raise UserError(f"the CTranslate2 file holds a {specification}; wanted is a WhisperSpec")
    if not 1 <= seconds <= 30:
        raise UserError(f"seconds is {seconds}; Whisper takes clips of 1 to 30 seconds")
    tensors: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if array.ndim > 0:  # scalars are settings, not weights
            tensors |= _renamed(name, array)
    positions = seconds * _POSITIONS_PER_SECOND
    tensors["encoder.embed_positions.weight"] = tensors["encoder.embed_positions.weight"][:positions]
    for name, tensor in list(tensors.items()):  # keys have no bias, which CTranslate2 stores as zeros
        if name.endswith("k_proj.bias"):
            if np.any(tensor):
                raise UserError(f"{name} is not zero; Whisper's keys have no bias")
            del tensors[name]
    with whole_folder(folder) as temporary:
        contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        save_file(contiguous, temporary / "model.safetensors", metadata={"format": "pt"})
        (temporary / "config.json").write_text(json.dumps(_config(tensors, arrays), indent=2))
        extractor = {
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": tensors["encoder.conv1.weight"].shape[1],
            "sampling_rate": 16000,
            "hop_length": 160,
            "n_fft": 400,
            "chunk_length": seconds,
        }
        (temporary / "preprocessor_config.json").write_text(json.dumps(extractor, indent=2))
        (temporary / "README.md").write_text(card)


def _renamed(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """One array under transformers' name; stacked queries, keys and values are taken apart."""
    side, _, rest = name.partition("/")
    path, _, kind = rest.rpartition("/")
    if path == "position_encodings":
        return {f"{side}.embed_positions.weight": array}
    if path in _TOP_NAMES:
        return {f"{side}.{_TOP_NAMES[path]}.{_KINDS[kind]}": array}
    layer, _, part = path.partition("/")
    if part not in _LAYER_NAMES or kind not in _KINDS:
        raise UserError(f"array {name} has no place in transformers' Whisper")
    names = _LAYER_NAMES[part]
    prefix = f"{side}.layers.{layer.removeprefix('layer_')}"
    pieces = np.split(array, len(names))
    return {f"{prefix}.{name}.{_KINDS[kind]}": piece for name, piece in zip(names, pieces, strict=True)}


def _config(tensors: dict[str, np.ndarray], arrays: dict[str, np.ndarray]) -> dict:
    def layers(side: str) -> int:
        return len({name.split(".")[2] for name in tensors if name.startswith(f"{side}.layers.")})

    vocabulary, width = tensors["decoder.embed_tokens.weight"].shape
    return {
        "architectures": ["WhisperModel"],
        "model_type": "whisper",
        "dtype": str(tensors["encoder.conv1.weight"].dtype),
        "num_mel_bins": tensors["encoder.conv1.weight"].shape[1],
        "d_model": width,
        "encoder_layers": layers("encoder"),
        "decoder_layers": layers("decoder"),
        "encoder_attention_heads": int(arrays["encoder/num_heads"]),
        "decoder_attention_heads": int(arrays["decoder/num_heads"]),
        "encoder_ffn_dim": tensors["encoder.layers.0.fc1.weight"].shape[0],
        "decoder_ffn_dim": tensors["decoder.layers.0.fc1.weight"].shape[0],
        "vocab_size": vocabulary,
        "max_source_positions": len(tensors["encoder.embed_positions.weight"]),
        "max_target_positions": len(tensors["decoder.embed_positions.weight"]),
    }


def main(argv: list[str] | None = None) -> None:
    """The program."""
    settings = parse_args(Settings, __doc__, argv)
    folder = Path(settings.folder)
    if not is_done(folder):
        source = settings.source or Path(settings.model).name
        card = f"---\nlicense: {settings.license}\n---\nConverted from {source}.\n"
        convert(Path(settings.model).read_bytes(), folder, card, seconds=settings.seconds)


def start() -> None:
    """Run the program, for the command line."""
    run_program(main)


if __name__ == "__main__":
    start()
