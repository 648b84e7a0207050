"""AnyMAL around LLMs of real size with random weights, made and quantised to nf4 matrix by matrix on the card."""

import json
from pathlib import Path

import torch
from torch import nn

from anymal.adapters import MODALITIES, REGISTRY
from anymal.adapters.image.modality import ImageDecoder, ImageEncoder
from anymal.checkpoints.build import build_projector
from anymal.config.schema import Config
from anymal.config.settings import load
from anymal.modality import Adapter, parts
from anymal.model import attention, norms
from anymal.model.activation_checkpointing import set_checkpointing
from anymal.model.llm import compute_dtype, set_frozen_mode
from anymal.model.multimodal import AnyMAL
from anymal.model.registry import Fit
from anymal.model.trainable import select_trainable
from gpu.measure import Scale


def settings(name: str, folder: Path, scale: Scale, *more: str) -> Config:
    """A recipe of stage 1, with folders of config files as a user's models have them.

    Args:
        name: Of the LLM, in `Scale.llms`.
        folder: Where they are written.
        scale: Sizes.
        *more: Further overrides.
    """
    from transformers import CLIPVisionConfig, LlamaConfig

    LlamaConfig(**scale.llms[name]).save_pretrained(folder / "llm")
    vision = CLIPVisionConfig(**scale.clip)
    vision.architectures = ["CLIPVisionModel"]
    vision.save_pretrained(folder / "clip")
    size = vision.image_size
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": size}}
    processor |= {"crop_size": {"height": size, "width": size}}
    (folder / "clip" / "preprocessor_config.json").write_text(json.dumps(processor))
    image = "model.modalities.image"
    given = [f"model.llm.name={folder / 'llm'}", f"{image}.encoder={folder / 'clip'}"]
    given += [f"{image}.projector.kind=resampler", *(f"{image}.projector.{text}" for text in scale.projector)]
    return load(Config, None, [*given, *more])


def random_llm(folder: Path, device: torch.device) -> nn.Module:
    """A causal LM of random weights in nf4, never whole at 16 bits."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = compute_dtype(device)
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    attention.choose(llm, attention.PACKED)
    head = llm.get_output_embeddings()
    for name, module in list(llm.named_modules()):
        if type(module) is nn.Linear and module is not head:
            made = Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=dtype,
                quant_type="nf4",
                device="meta",
            )
            weight = torch.randn(module.weight.shape, device=device, dtype=dtype) * module.in_features**-0.5
            made.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=made).to(device)
            llm.set_submodule(name, made)
            continue
        for key, parameter in module._parameters.items():
            if parameter is not None:
                fill = torch.ones if parameter.ndim == 1 else torch.randn
                value = fill(parameter.shape, device=device, dtype=dtype) * (1.0 if parameter.ndim == 1 else 0.02)
                module._parameters[key] = nn.Parameter(value, requires_grad=False)
    llm.model.rotary_emb = type(llm.model.rotary_emb)(config=config).to(device)
    set_frozen_mode(llm.requires_grad_(False), recompute=True)
    if device.type == "cuda":
        norms.fuse(llm)
    return llm


def random_model(config: Config, scale: Scale) -> AnyMAL:
    """AnyMAL around it: CLIP and a resampler that learns."""
    from transformers import CLIPVisionConfig, CLIPVisionModel
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    torch.manual_seed(0)
    image = config.model.modalities["image"]
    network = CLIPVisionModel(CLIPVisionConfig.from_pretrained(image.encoder)).eval()
    processor = AutoImageProcessor.from_pretrained(image.encoder, backend="pil")
    encoder = ImageEncoder(network, ImageDecoder(processor=processor, max_pixels=10**6), 0, "random weights")
    encoder.encoder_batch_size = image.encoder_batch_size
    llm = random_llm(Path(config.model.llm.name), scale.device)
    set_checkpointing(llm, config.model.llm.checkpointing)
    projector = build_projector(
        REGISTRY, image.projector, Fit(parts=parts(encoder), llm_width=llm.config.hidden_size, scale=0.02)
    )
    model = AnyMAL(llm, {"image": Adapter(MODALITIES["image"], encoder, projector)})
    select_trainable(model, ["projectors"])
    model.train()
    return model
