"""The language model: loading at 4, 8, 16 or 32 bits, freezing, LoRA.

Weights are quantised by bitsandbytes while transformers loads them (`anymal.model.quantization`). Mixed precision:
arithmetic is in bfloat16 on a GPU (autocast, in `anymal.model.multimodal.AnyMAL.autocast`; what older ones do is in
`anymal.model.precision`) and in float32 on a CPU; the code is the same. What is trained is float32 on both.
"""

import hashlib
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from anymal.config.schema import LLMConfig, LoraConfig
from anymal.data.packing import row_offsets
from anymal.errors import UserError
from anymal.model import attention, lora, norms, precision
from anymal.model.activation_checkpointing import set_checkpointing
from anymal.model.hub import unavailable
from anymal.model.quantization import quantization_config, require_quantisable, require_quantised

if TYPE_CHECKING:
    from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    class CausalLM(PreTrainedModel, GenerationMixin):
        """A causal LM of transformers, for type checkers alone."""


# On a CPU, 8-bit layers warn at every call that they cast; it is known and harmless.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def on_gpu() -> bool:
    """Whether this process computes on a GPU: there is one, and DS_ACCELERATOR is not cpu."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def compute_dtype(device: torch.device) -> torch.dtype:
    """What frozen encoders compute in there (`anymal.model.precision`): float32 on a CPU, bfloat16 on a GPU."""
    return precision.encoder_dtype(precision.hardware(device))


def base_model(llm: Any) -> "CausalLM":
    """The causal LM of transformers: `llm` itself, or what its LoRA is wrapped around."""
    return llm.get_base_model() if hasattr(llm, "get_base_model") else llm


def token_embedding(llm: nn.Module) -> nn.Embedding:
    """The table of token embeddings, with or without LoRA: [B, T] ids → [B, T, D]."""
    embedding: Any = base_model(llm).get_input_embeddings()  # transformers promises no more than a module
    return embedding


def embedding_std(llm: nn.Module) -> float:
    """Standard deviation of the elements of token embeddings as they are looked up: Gemma's table scales them by √D."""
    table = token_embedding(llm)
    return table.weight.float().std().item() * float(getattr(table, "embed_scale", 1.0))


def output_layer(llm: nn.Module) -> nn.Linear:
    """The layer that makes logits of hidden states, with or without LoRA: [B, T, D] → [B, T, V]."""
    layer: Any = base_model(llm).get_output_embeddings()  # transformers promises no more than a module
    return layer


def require_llm(name: str) -> None:
    """Raises `UserError` at once where an LLM is neither a folder nor to be had from the hub, with what to do."""
    if reason := unavailable(name):
        raise UserError(
            f"model.llm.name: {reason}; for an LLM in a folder, one that was moved too, give model.llm.name=FOLDER"
        )


@contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """Inside, transformers shows its progress bars on a terminal alone."""
    from transformers.utils import logging

    hidden = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if hidden:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hidden:
            logging.enable_progress_bar()


@bars_on_terminals_only()
def load_llm(
    config: LLMConfig, device: torch.device, *, learns: bool = False, trains: bool = False
) -> "tuple[CausalLM, PreTrainedTokenizerBase]":
    """Load a causal LM of transformers, frozen and in eval mode, and its tokenizer.

    Args:
        config: Which, and how.
        device: Where to.
        learns: Whether it is to be trained itself. Its weights are then float32 whatever `config.bits` says, since
            steps of the size of a learning rate are lost in bfloat16; the arithmetic is that of `config.bits`.
        trains: Whether anything is to be trained beside it: gradients then pass through it.

    Raises:
        UserError: There is no such model, it is not a causal LM, it is to learn in 4 or 8 bits, much of it cannot be
            quantised, or the device cannot compute what is asked.
    """
    if learns and config.bits not in (16, 32):
        raise UserError(
            f"train lists llm, but model.llm.bits is {config.bits}, and quantised weights cannot learn: set "
            "model.llm.bits to 16 or 32, or train lora instead"
        )
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    require_llm(config.name)
    on = precision.hardware(device)
    dtype = precision.llm_dtype(on, config.bits, trains=trains or learns)
    try:
        llm_config = AutoConfig.from_pretrained(config.name, trust_remote_code=False)
        require_quantisable(config, llm_config, dtype)
        if dtype == torch.float16:
            precision.require_no_overflow(on, llm_config.model_type)
        dtype = torch.float32 if learns else dtype
        tokenizer: Any = AutoTokenizer.from_pretrained(config.name, trust_remote_code=False)
        llm = AutoModelForCausalLM.from_pretrained(
            config.name,
            dtype=dtype,
            quantization_config=quantization_config(config, dtype),
            attn_implementation=attention.at_loading(config.attention),
            device_map={"": device},
            trust_remote_code=False,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = f"transformers cannot load it as a causal LM: {error}"
        if "scaled_dot_product_attention" in str(error):  # gpt-oss, whose heads have an attention sink
            reason = "its attention is not one that SDPA knows; set model.llm.attention=eager"
        raise UserError(f"model.llm.name={config.name}: {reason}") from error
    require_quantised(llm, config, dtype)
    attention.choose(llm, config.attention)
    if device.type == "cuda":
        norms.fuse(llm)
    llm.requires_grad_(False)
    set_checkpointing(llm, config.checkpointing)
    set_frozen_mode(llm, recompute=True)
    llm.weights_digest = _digest(llm)
    return llm, tokenizer


def _digest(llm: "CausalLM") -> str:
    """Tells LLMs apart, and is the same for one LLM at every precision and wherever it lies.

    SHA-256 over what is never quantised (norms, biases, every so many rows of the embedding table), in bfloat16.
    """
    digest = hashlib.sha256()
    table = token_embedding(llm).weight
    rows = table[:: max(1, len(table) // 256)]
    for name, tensor in [("table", rows), *((n, p) for n, p in llm.named_parameters() if p.ndim == 1)]:
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.detach().to(torch.bfloat16).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def set_frozen_mode(llm: nn.Module, *, recompute: bool) -> None:
    """Put a frozen LLM in eval mode, except for two kinds of modules to which the training flag means something else.

    Quantised layers always keep it set. On a CPU an 8-bit layer in eval mode takes another kernel, off by about 2%;
    a 4-bit layer in eval mode repacks its weights for good at the first input without gradient (on CPUs with
    AVX512-BF16), after which no gradient passes through it any more.

    Args:
        llm: The LLM, with or without LoRA.
        recompute: Whether decoder layers recompute in the backward pass what `set_checkpointing` chose. The flag is
            set on the layers alone, not on the dropouts inside them.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from transformers.modeling_layers import GradientCheckpointingLayer

    llm.eval()
    for module in llm.modules():
        if isinstance(module, Linear4bit | Linear8bitLt):
            module.training = True
        elif isinstance(module, GradientCheckpointingLayer):
            module.training = recompute


def isolates_packed_samples(llm: nn.Module) -> bool:
    """Whether a sample in a packed row is to the LLM what it is alone.

    For most architectures transformers finds the samples by their positions. Recurrent and state-space layers ignore
    positions (Mamba, Qwen3-Next), and so do some attention layers (OPT, Bloom, Falcon). Tried on rows of random tokens:
    a sample's logits must not change with the sample before it, and must be those that it has alone. Leaves the LLM in
    eval mode.
    """
    set_frozen_mode(llm, recompute=False)  # no dropout of a LoRA
    table = token_embedding(llm)
    device, border = table.weight.device, 5
    ids = torch.randint(table.num_embeddings, (3, border), generator=torch.Generator().manual_seed(0))

    def read(*samples: int) -> Tensor:
        positions = torch.arange(border, device=device).repeat(len(samples))[None]
        row = table(ids[list(samples)].to(device)).flatten(0, 1)[None]
        lengths = [border] * len(samples)
        offsets = row_offsets(lengths).to(device)
        packed = attention.arguments(base_model(llm), lengths, offsets) if len(samples) > 1 else {}
        return llm(inputs_embeds=row, position_ids=positions, use_cache=False, **packed).logits[0, -border:].float()

    with torch.no_grad():
        after_one, after_other, alone, another = read(0, 1), read(2, 1), read(1), read(2)
    # Exact for rows of one shape; rows of two shapes differ by rounding, in bfloat16 by some percent.
    usual = (another - alone).abs().max()
    leaks = (after_one - after_other).abs().max() > 1e-3 * usual
    return not leaks and bool((after_one - alone).abs().max() < 0.2 * usual)


def add_lora(llm: "CausalLM", config: LoraConfig) -> nn.Module:
    """Wrap the LLM in PEFT's LoRA, trainable and in float32; the base stays as it is.

    Raises:
        UserError: No layer has one of the names in `config`, or the LLM's precision does not go with it.
    """
    from peft import get_peft_model

    lora.require_fit(llm, config)
    try:
        wrapped = get_peft_model(llm, lora.peft_config(config))
    except (ValueError, TypeError) as error:
        raise UserError(f"model.lora.targets={config.targets}: {error}") from error
    lora.copies_in_float32(wrapped)
    if config.init == "loftq":
        lora.begin_at_quantisation_error(wrapped, str(llm.name_or_path))
    return wrapped


def load_lora(llm: "CausalLM", folder: Path, config: LoraConfig) -> nn.Module:
    """Wrap the LLM in a LoRA saved in PEFT's own layout.

    Raises:
        UserError: It is damaged, fits another LLM, or is of another kind, rank or alpha than the recipe says.
    """
    from peft import PeftModel

    device = str(token_embedding(llm).weight.device)
    try:
        wrapped = PeftModel.from_pretrained(llm, str(folder), is_trainable=True, torch_device=device)
        if lora.copies_in_float32(wrapped):  # they were rounded as they were loaded
            wrapped.load_adapter(str(folder), "default", is_trainable=True, torch_device=device)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be loaded into this LLM: {error}") from error
    lora.require_same_kind(wrapped.peft_config["default"], folder, config)
    return wrapped


def device() -> torch.device:
    """The GPU, if there is one."""
    return torch.device("cuda" if on_gpu() else "cpu")


@bars_on_terminals_only()
def read_config(name: str) -> "PreTrainedConfig":
    """The LLM's transformers config, from a folder or hub name.

    Raises:
        UserError: There is none.
    """
    require_llm(name)
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"model.llm.name={name}: no config of a causal LM is to be had: {error}") from error
