"""The LLM at 4 or 8 bits: how it is asked for, and whether that is what it became.

bitsandbytes quantises linear layers. What an architecture keeps otherwise stays as it is, without a word: the experts
of a mixture, which transformers 5 keeps as one tensor of three dimensions a layer (bitsandbytes' issue 1849), are most
of such an LLM. So what is quantised is counted, and refused if it is not what was asked for.
"""

import logging
import re
from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from anymal.config.schema import LLMConfig
from anymal.errors import UserError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel


SMALL = 0.01
"""Share of the weights that may stay as they are: routers of experts, kernels of short convolutions."""
_NAMED = 3  # kinds of weights that a message names
_log = logging.getLogger(__name__)


def quantization_config(settings: LLMConfig, dtype: torch.dtype) -> "BitsAndBytesConfig | None":
    """What transformers is told to quantise by; None at 16 and 32 bits.

    Args:
        settings: Precision.
        dtype: What 4-bit layers compute in.
    """
    from transformers import BitsAndBytesConfig

    if settings.bits == 4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if settings.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=settings.int8_threshold)
    return None


def kept(llm: "PreTrainedModel") -> list[str]:
    """Modules that transformers keeps as they are by design, as its quantisers name them: the head, and few others."""
    from transformers.quantizers.base import HfQuantizer

    return HfQuantizer.get_modules_to_not_convert(llm, None, list(llm._keep_in_fp32_modules or []))


def unquantised(llm: "PreTrainedModel", bits: int) -> tuple[Counter[str], int]:
    """The weights that were to be quantised and are not: their names → how many numbers; and of how many in all.

    Not asked for are embeddings, the head and what else is `kept`, biases, and what has but one dimension.

    Args:
        llm: As it was loaded, or without data.
        bits: 4 or 8.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from transformers.quantizers.quantizers_utils import should_convert_module

    exempt, left, total = kept(llm), Counter[str](), 0
    for path, module in llm.named_modules():
        if isinstance(module, Linear4bit if bits == 4 else Linear8bitLt):
            total += module.in_features * module.out_features
        elif not isinstance(module, nn.Embedding) and should_convert_module(path, exempt):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim > 1 and not name.endswith("bias"):
                    left[f"{path}.{name}"] = parameter.numel()
    return left, total + left.total()


def require_quantised(llm: "PreTrainedModel", settings: LLMConfig, dtype: torch.dtype) -> None:
    """Refuse an LLM of which more than a small share stays as it is, unless that is allowed: then it is said.

    Args:
        llm: As it was loaded, or without data.
        settings: Its name, its bits, and whether they may be had in part.
        dtype: Of what is not quantised.

    Raises:
        UserError: Says how much, how large it is, and what it is called.
    """
    if settings.bits not in (4, 8):
        return
    left, total = unquantised(llm, settings.bits)
    if left.total() <= SMALL * total:
        return
    kinds = Counter[str]()
    for name, size in left.items():
        kinds[re.sub(r"\.\d+\.", ".*.", name)] += size
    names = ", ".join(f"{name} ({size / total:.0%})" for name, size in kinds.most_common(_NAMED))
    more = f" and {len(kinds) - _NAMED} more" if len(kinds) > _NAMED else ""
    found = (
        f"model.llm.name={settings.name}: bitsandbytes cannot hold {left.total() / total:.0%} of its weights in "
        f"{settings.bits} bits: {names}{more}; they take {left.total() * dtype.itemsize / 1e9:.3g} GB in "
        f"{str(dtype).removeprefix('torch.')}"
    )
    if not settings.allow_unquantized:
        raise UserError(
            f"{found}. If there is room for that, set model.llm.allow_unquantized=true; else take an LLM without a "
            "mixture of experts"
        )
    _say(f"{found}, as model.llm.allow_unquantized lets them")


def require_quantisable(settings: LLMConfig, llm_config: "PreTrainedConfig", dtype: torch.dtype) -> None:
    """As `require_quantised`, by an LLM's config alone: before weights are read that may not fit.

    Args:
        settings: Its name, its bits, and whether they may be had in part.
        llm_config: transformers' config of it.
        dtype: Of what is not quantised.

    Raises:
        UserError: As there; or its weights are quantised on disk already, otherwise than is asked.
    """
    from transformers import AutoModelForCausalLM
    from transformers.quantizers import AutoHfQuantizer

    config = quantization_config(settings, dtype)
    if on_disk := getattr(llm_config, "quantization_config", None):
        _require_same_on_disk(on_disk, settings)
        return
    if config is None:
        return
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(llm_config, trust_remote_code=False)
    AutoHfQuantizer.from_config(config, pre_quantized=False).preprocess_model(llm, device_map=None)
    require_quantised(llm, settings, dtype)


def _require_same_on_disk(on_disk: Mapping[str, Any], settings: LLMConfig) -> None:
    """transformers takes weights as they are quantised on disk, whatever it is asked for."""
    found, method = f"model.llm.name={settings.name}: its weights are quantised on disk", on_disk.get("quant_method")
    if method == "bitsandbytes":
        bits = 4 if on_disk.get("load_in_4bit") else 8
        if settings.bits != bits:
            raise UserError(f"{found} in {bits} bits; set model.llm.bits={bits}, or take that LLM in 16 bits")
    elif settings.bits in (4, 8):
        raise UserError(f"{found}, by {method}; for model.llm.bits={settings.bits} take that LLM in 16 bits")


@cache
def _say(message: str) -> None:
    """Once in a process, since an LLM is looked at before it is loaded, and afterwards."""
    _log.warning(message)
