"""The LLM without its weights: every module at its precision, from config.json alone."""

import copy
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from anymal.config.schema import LLMConfig
from anymal.errors import UserError, nearest
from anymal.model import attention
from anymal.model.activation_checkpointing import set_checkpointing
from anymal.model.llm import set_frozen_mode
from anymal.model.quantization import kept

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from anymal.model.llm import CausalLM

BLOCK, BLOCK_OF_SCALES = 64, 256  # of bitsandbytes' nf4, and of its double quantisation


def config_of(architecture: Mapping[str, Any], setting: str) -> "PreTrainedConfig":
    """A causal LM's transformers config from its model_type and sizes; nothing is read.

    Args:
        architecture: By the names of a config.json; what is left out has transformers' default.
        setting: What it is called in messages.

    Raises:
        UserError: There is no such model_type, one of the names is unknown to it (the nearest is named), or a value
            does not fit.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = architecture.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise UserError(f"{setting}.model_type is {kind!r}; it is that of a config.json, such as llama or qwen3")
    known = AutoConfig.for_model(kind).to_dict()
    for name in architecture:
        if name not in known:
            hint = nearest(name, known, otherwise="")
            raise UserError(f"{setting}: {kind} has no {name}{hint and f'; {hint}'}")
    try:
        return AutoConfig.for_model(**architecture)
    except Exception as error:  # transformers' checks have errors of their own
        raise UserError(f"{setting}: {' '.join(str(error).split())}") from error


def with_layers(config: "PreTrainedConfig", layers: int) -> "PreTrainedConfig":
    """A copy of the LLM's config with only so many decoder layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return config


def make_llm(settings: LLMConfig, config: "PreTrainedConfig", fake: FakeTensorMode, dtype: torch.dtype) -> "CausalLM":
    """The causal LM of `config` on fake tensors, frozen, quantised and in the mode that `load_llm` leaves.

    Args:
        settings: Precision, attention and checkpointing.
        config: As `read_config` gives it.
        fake: The mode that its tensors belong to.
        dtype: What is computed in, and what is not quantised is held in.
    """
    from transformers import AutoModelForCausalLM

    dtype = {16: torch.bfloat16, 32: torch.float32}.get(settings.bits, dtype)
    known = settings.attention in ("packed", "sdpa", "eager")
    name = settings.attention if known else "sdpa"  # others save as much as sdpa
    with fake:
        llm = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention.at_loading(name), trust_remote_code=False
        )
    attention.choose(llm, name)
    if settings.bits in (4, 8):
        quantise_shapes(llm, settings.bits, dtype, fake)
    llm.requires_grad_(False)
    set_checkpointing(llm, settings.checkpointing)
    set_frozen_mode(llm, recompute=True)
    return llm


def quantise_shapes(llm: "CausalLM", bits: int, dtype: torch.dtype, fake: FakeTensorMode) -> None:
    """Put bitsandbytes' layers where transformers puts them when it loads an LLM at 4 or 8 bits, on fake tensors."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    exempt = kept(llm)
    for name, module in list(llm.named_modules()):
        if should_convert_module(name, exempt) and (type(module) is nn.Linear or isinstance(module, Conv1D)):
            make = _linear4bit if bits == 4 else _linear8bit
            llm.set_submodule(name, make(_as_linear(module), dtype, fake))
    for attribute in (f"is_loaded_in_{bits}bit", "is_quantized"):  # what PEFT and transformers ask a quantised model
        setattr(llm, attribute, True)


def _as_linear(layer: Any) -> nn.Linear:
    """A layer as a linear one; that of GPT-2 (Conv1D) has its weight the other way round, until it is quantised."""
    if isinstance(layer, nn.Linear):
        return layer
    linear = nn.Linear(*layer.weight.shape, bias=False, device="meta")
    linear.weight, linear.bias = nn.Parameter(layer.weight.T, requires_grad=False), layer.bias
    return linear


def _linear4bit(linear: nn.Linear, dtype: torch.dtype, fake: FakeTensorMode) -> nn.Module:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit

    quantised = Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, device="meta")
    scales = math.ceil(linear.weight.numel() / BLOCK)
    with fake:
        state = QuantState(
            absmax=torch.empty(scales, dtype=torch.uint8),
            shape=linear.weight.shape,
            code=torch.empty(16),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=torch.empty(()),
            state2=QuantState(
                absmax=torch.empty(math.ceil(scales / BLOCK_OF_SCALES)),
                code=torch.empty(256),
                blocksize=BLOCK_OF_SCALES,
                dtype=torch.float32,
            ),
        )
        packed = torch.empty(math.ceil(linear.weight.numel() / 2), 1, dtype=torch.uint8)
    weight: Any = nn.Parameter(packed, requires_grad=False)  # bitsandbytes keeps the quantisation in its attributes
    weight.quant_state, weight.quant_type, weight.compress_statistics = state, "nf4", True
    quantised.weight = weight
    quantised.bias, quantised.quant_state, quantised.compute_type_is_set = linear.bias, state, True
    return quantised


def _linear8bit(linear: nn.Linear, dtype: torch.dtype, fake: FakeTensorMode) -> nn.Module:
    from bitsandbytes.nn import Linear8bitLt

    quantised = Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, device="meta")
    with fake:
        weight: Any = nn.Parameter(torch.empty(linear.weight.shape, dtype=torch.int8), requires_grad=False)
        quantised.state.CB, quantised.state.SCB = weight.data, torch.empty(linear.out_features)
    weight.CB = weight.SCB = None
    quantised.weight, quantised.bias = weight, linear.bias
    return quantised


def stored_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, quantisation's scales and tables included; shared ones count once."""
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    for layer in module.modules():
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        scales = getattr(getattr(layer, "state", None), "SCB", None)
        if isinstance(scales, Tensor):
            tensors.append(scales)
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
