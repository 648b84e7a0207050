"""Tiny random-weight encoders of real architectures in their real format, and media that fit each modality.

`ENCODERS` and `MEDIA` have an entry for each modality: a new modality adds one to each, and is tested like the rest.
"""

import io
import json
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch

import anymal  # noqa: F401  before anything imports transformers or torchaudio
import tiny_imu_trunks
from anymal.sample import with_note

SIZE = 32
PATCH = {"height": 4, "width": 4}
PIXELS = {"size": {"height": SIZE, "width": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
VIT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": SIZE}


def _save(folder: Path, model, processor: dict) -> str:
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nTiny random weights for tests.\n")
    return str(folder)


def clip(folder: Path, seed: int = 0) -> str:
    """A whole CLIP, text tower included: only its vision tower is of use. 64 patches, 16 wide."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config=text | {"vocab_size": 64}, vision_config=VIT | {"patch_size": 4}, projection_dim=8)
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": SIZE}}
    return _save(folder, CLIPModel(config), processor | {"crop_size": PIXELS["crop_size"]})


def clip_vision(folder: Path) -> str:
    """CLIP's vision tower alone."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": SIZE}}
    model = CLIPVisionModel(CLIPVisionConfig(**VIT, patch_size=4))
    return _save(folder, model, processor | {"crop_size": PIXELS["crop_size"]})


def siglip(folder: Path) -> str:
    """A SigLIP (or SigLIP 2 of fixed resolution) vision tower: no class token. 16 patches."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    processor = {"image_processor_type": "SiglipImageProcessor", "size": PIXELS["size"]}
    return _save(folder, SiglipVisionModel(SiglipVisionConfig(**VIT, patch_size=8)), processor)


def siglip2(folder: Path) -> str:
    """A SigLIP 2 of flexible resolution (NaFlex): its processor cuts the patches."""
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    sizes = {key: value for key, value in VIT.items() if key != "image_size"}
    model = Siglip2VisionModel(Siglip2VisionConfig(**sizes, patch_size=4, num_patches=16))
    return _save(
        folder, model, {"image_processor_type": "Siglip2ImageProcessor", "patch_size": 4, "max_num_patches": 16}
    )


def dinov2(folder: Path) -> str:
    """DINOv2: a class token and 16 patches."""
    from transformers import Dinov2Config, Dinov2Model

    sizes = {key: value for key, value in VIT.items() if key != "intermediate_size"}
    processor = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": SIZE}}
    model = Dinov2Model(Dinov2Config(**sizes, patch_size=8))
    return _save(folder, model, processor | {"crop_size": PIXELS["crop_size"]})


def efficientnet_lite(folder: Path) -> str:
    """EfficientNet-Lite0 at 64 x 64: a feature map of 2 x 2."""
    from anymal.adapters.architectures.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel

    size = {"height": 64, "width": 64}
    torch.manual_seed(0)
    model = EfficientNetLiteModel(EfficientNetLiteConfig(image_size=64))
    for parameter in model.parameters():  # without trained normalisation, small weights would let the signal die away
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter)
    return _save(folder, model, {"image_processor_type": "ViTImageProcessor", "size": size})


def convnext(folder: Path) -> str:
    """A ConvNeXt of four stages, 4 to 32 channels wide: maps of 8, 4, 2 and 1 rows for 32 pixels."""
    from transformers import ConvNextConfig, ConvNextModel

    torch.manual_seed(0)
    config = ConvNextConfig(hidden_sizes=[4, 8, 16, 32], depths=[1, 1, 2, 1], layer_scale_init_value=0.5)
    processor = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": SIZE}}
    model = ConvNextModel(config)
    for parameter in model.parameters():  # as below
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter)
    return _save(folder, model, processor)


def sam(folder: Path) -> str:
    """SAM's image encoder: a map of 8 x 8, 12 wide."""
    from transformers import SamVisionConfig, SamVisionModel

    config = SamVisionConfig(
        hidden_size=16,
        output_channels=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=4,
        window_size=3,
        global_attn_indexes=[1],
        mlp_dim=32,
    )
    torch.manual_seed(0)
    return _save(
        folder, SamVisionModel(config), {"image_processor_type": "SamImageProcessor", "size": {"longest_edge": SIZE}}
    )


def pix2struct(folder: Path) -> str:
    """A whole Pix2Struct, of which the vision model is of use: at most 30 patches of 4 x 4, so 5 x 5 of a square."""
    from transformers import Pix2StructConfig, Pix2StructForConditionalGeneration

    torch.manual_seed(0)
    vision = {"hidden_size": 16, "d_ff": 32, "d_kv": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"patch_embed_hidden_size": 48, "seq_len": 32, "initializer_range": 0.5}
    text = {"hidden_size": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
    config = Pix2StructConfig(vision_config=vision, text_config=text)
    processor = {"image_processor_type": "Pix2StructImageProcessor", "max_patches": 30}
    return _save(folder, Pix2StructForConditionalGeneration(config), processor | {"patch_size": PATCH})


def blip2(folder: Path) -> str:
    """A whole BLIP-2, of which vision model and Q-Former are of use: 6 queries, 16 wide."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"model_type": "opt", "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config=VIT | {"patch_size": 8},
        qformer_config=sizes | {"encoder_hidden_size": 16, "vocab_size": 64},
        text_config=text | {"vocab_size": 64, "word_embed_proj_dim": 16},
        num_query_tokens=6,
    )
    model = Blip2ForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens)
    return _save(folder, model, {"image_processor_type": "BlipImageProcessor", "size": PIXELS["size"]})


def mixture(folder: Path) -> dict:
    """Four encoders joined channel by channel, as Eagle does: 8 x 8 features, 112 wide."""
    parts = [
        {"name": clip(folder / "clip"), "size": 40},
        {"name": convnext(folder / "convnext"), "size": 64},
        {"name": sam(folder / "sam"), "unshuffle": 2},
        pix2struct(folder / "pix2struct"),
    ]
    return {"channels": parts, "grid": 8, "keep_global": True}


def appended(folder: Path) -> dict:
    """A map and a Q-Former's queries one after another, as SPHINX does: 16 + 6 features."""
    return {"append": [siglip(folder / "siglip"), blip2(folder / "blip2")], "fit": "squash"}


def videomae(folder: Path) -> str:
    """VideoMAE: 4 frames in tubes of 2, 16 patches each: 32 features."""
    from transformers import VideoMAEConfig, VideoMAEModel

    model = VideoMAEModel(VideoMAEConfig(**VIT, patch_size=8, num_frames=4, tubelet_size=2))
    processor = {"image_processor_type": "VideoMAEImageProcessor", "size": {"shortest_edge": SIZE}}
    return _save(folder, model, processor | {"crop_size": PIXELS["crop_size"]})


def whisper(folder: Path, seconds: int = 1) -> str:
    """Whisper for short clips: 50 features a second."""
    from transformers import WhisperConfig, WhisperModel

    config = WhisperConfig(
        num_mel_bins=8,
        d_model=16,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        vocab_size=64,
        max_source_positions=50 * seconds,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
    )
    extractor = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 8, "chunk_length": seconds}
    return _save(folder, WhisperModel(config), extractor)


def ast(folder: Path) -> str:
    """AST: half a second, patches of 4 x 4 over 16 mel bins and 50 frames."""
    from transformers import ASTConfig, ASTModel

    sizes = {key: value for key, value in VIT.items() if key != "image_size"}
    config = ASTConfig(**sizes, patch_size=4, frequency_stride=4, time_stride=4, max_length=50, num_mel_bins=16)
    extractor = {"feature_extractor_type": "ASTFeatureExtractor", "max_length": 50, "num_mel_bins": 16}
    return _save(folder, ASTModel(config), extractor)


def clap(folder: Path, fusion: bool = False) -> str:
    """A whole CLAP with a tiny audio tower of two stages."""
    from transformers import ClapConfig, ClapModel

    audio = {
        "spec_size": 64,
        "num_mel_bins": 16,
        "patch_size": 4,
        "patch_stride": [4, 4],
        "window_size": 4,
        "patch_embeds_hidden_size": 8,
        "hidden_size": 16,
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
        "num_hidden_layers": 2,
        "enable_fusion": fusion,
    }
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ClapConfig(text_config=text | {"vocab_size": 64}, audio_config=audio, projection_dim=8)
    extractor = {
        "feature_extractor_type": "ClapFeatureExtractor",
        "feature_size": 16,
        "sampling_rate": 16000,
        "max_length_s": 1,
        "hop_length": 160,
        "truncation": "fusion" if fusion else "rand_trunc",
    }
    return _save(folder, ClapModel(config), extractor)


def imu(folder: Path) -> str:
    """Our IMU encoder for one second at 50 Hz: 7 features."""
    from anymal.adapters.architectures.imu_encoder import IMUEncoderConfig, IMUEncoderModel

    IMUEncoderModel(IMUEncoderConfig(rate=50.0, seconds=1.0, hidden_size=16, blocks=1)).save_pretrained(folder)
    return str(folder)


def trunk(folder: Path, kind: str) -> str:
    """A published IMU network: a file, not a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tiny_imu_trunks.STATE_DICTS[kind](), folder / f"{kind}.pth")
    return str(folder / f"{kind}.pth")


ENCODERS: dict[str, dict[str, Callable[[Path], str | dict]]] = {
    "image": {
        "clip": clip,
        "clip_vision": clip_vision,
        "siglip": siglip,
        "siglip2": siglip2,
        "dinov2": dinov2,
        "efficientnet_lite": efficientnet_lite,
        "mixture": mixture,
        "appended": appended,
    },
    "video": {
        "clip": clip,
        "efficientnet_lite": efficientnet_lite,
        "videomae": videomae,
        "mixture": lambda folder: {"channels": [clip(folder / "clip"), dinov2(folder / "dinov2")]},
    },
    "audio": {
        "whisper": whisper,
        "ast": ast,
        "clap": clap,
        "clap_fusion": lambda folder: clap(folder, fusion=True),
    },
    "imu": {"imu": imu} | {kind: partial(trunk, kind=kind) for kind in tiny_imu_trunks.STATE_DICTS},
}
"""Makers of encoders of each modality: folder → what a recipe's ``encoder`` is."""

OPTIONS: dict[str, dict] = {"imu": {"rate": 50.0}}
"""Options without which a modality cannot be loaded."""


def picture(mode: str = "RGB", size: tuple[int, int] = (48, 40), kind: str = "PNG", **kwargs) -> bytes:
    """A picture with something in it."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels, "RGBA").convert(mode).save(stream, kind, **kwargs)
    return stream.getvalue()


def processed(folder: str, *pictures) -> torch.Tensor:
    """What the image processor in a folder makes of pictures, as transformers has it: ``pixel_values``, float32."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return torch.as_tensor(processor(images=list(pictures), return_tensors="pt")["pixel_values"]).float()


def opened(data: bytes):
    """The picture that `picture` encoded."""
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises width x height pixels and holds none."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 10) + b"IDAT" + bytes(14)


def sound(seconds: float = 1.0, rate: int = 16000, channels: int = 1, kind: str = "WAV", subtype: str | None = None):
    """A chord, encoded."""
    import soundfile

    time = np.arange(int(seconds * rate)) / rate
    wave = 0.3 * np.sin(2 * np.pi * 440 * time) + 0.2 * np.sin(2 * np.pi * 660 * time)
    stream = io.BytesIO()
    soundfile.write(stream, np.stack([wave] * channels, 1).astype("float32"), rate, format=kind, subtype=subtype)
    return stream.getvalue()


def shade(index: int) -> int:
    """The grey of frame `index` of `clip_bytes`."""
    return 16 + 8 * (index % 26)


def clip_bytes(
    frames: int = 20, size: tuple[int, int] = (64, 48), kind: str = "mp4", codec: str = "libx264", **options: str
) -> bytes:
    """A clip whose frames can be told apart: each is of one grey, `shade(index)`."""
    stream = io.BytesIO()
    with av.open(stream, "w", format=kind) as file:
        video = file.add_stream(codec, rate=10, options=options)
        video.width, video.height, video.pix_fmt = *size, "yuv420p"
        for index in range(frames):
            grey = np.full((size[1], size[0], 3), shade(index), np.uint8)
            file.mux(video.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        file.mux(video.encode())
    return stream.getvalue()


def npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    """The bytes of a .npy."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=allow_pickle)
    return stream.getvalue()


def motion(samples: int = 50) -> np.ndarray:
    """A plausible recording [samples, 6]: gravity, and a swing."""
    time = np.arange(samples)[:, None] / 50
    wave = np.sin(2 * np.pi * np.array([[1.0, 1.5, 2.0, 0.5, 1.0, 2.0]]) * time)
    return (wave + np.array([[0, 0, 9.81, 0, 0, 0]])).astype("float32")


def decoded(decode, data: bytes) -> torch.Tensor:
    """What an encoder takes of a medium, without the note on what was cropped or filled up."""
    return with_note(decode(data))[0]


MEDIA: dict[str, Callable[[], bytes]] = {
    "image": picture,
    "video": clip_bytes,
    "audio": sound,
    "imu": lambda: npy(motion(250)),  # IMU2CLIP takes 5 s and no less
}
"""One good medium of each modality."""


def hostile(name: str) -> dict[str, bytes]:
    """What no modality may take: each must be a `BadSample`."""
    good = MEDIA[name]()
    return {
        "empty": b"",
        "text": b"This is not what its name says.\n" * 20,
        "zeros": bytes(1000),
        "cut in half": good[: len(good) // 2],
        "head only": good[:40],
        "pickle": npy(np.array([{"a": 1}], dtype=object), allow_pickle=True),
        "playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        "zip": b"PK\x03\x04" + bytes(200),
    }
