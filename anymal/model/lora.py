"""LoRA's family, by PEFT: what ``model.lora`` asks of it, what does not go together, and what PEFT leaves to us.

`anymal.model.llm.add_lora` and `load_lora` wrap the LLM. The base stays as it is, to the bit: a checkpoint holds the
LoRA alone, and whoever reads it loads the base anew, at any precision. Hence no initialisation that moves weights from
the base into the update (PiSSA, OLoRA).
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only

from anymal.config.schema import LoraConfig
from anymal.errors import UserError, nearest

if TYPE_CHECKING:
    from peft import LoraConfig as PeftLoraConfig


def is_lora(name: str) -> bool:
    """Whether a parameter or module of the LLM, by its name, belongs to its LoRA.

    That is the update's matrices, DoRA's magnitudes (``lora_magnitude_vector``) and the copies of
    ``model.lora.modules_to_save``.
    """
    return "lora_" in name or ".modules_to_save." in name


def peft_config(config: LoraConfig) -> "PeftLoraConfig":
    """PEFT's settings for ours."""
    from peft import LoraConfig as PeftLoraConfig

    alpha: Any = config.alpha  # PEFT's annotation says int, but any number will do
    return PeftLoraConfig(
        r=config.rank,
        lora_alpha=alpha,
        lora_dropout=config.dropout,
        target_modules=config.targets[0] if config.targets == ["all-linear"] else config.targets,
        exclude_modules=config.exclude or None,
        use_rslora=config.rslora,
        use_dora=config.dora,
        init_lora_weights="gaussian" if config.init == "gaussian" else True,
        modules_to_save=config.modules_to_save or None,
        task_type="CAUSAL_LM",
    )


def require_fit(llm: nn.Module, config: LoraConfig) -> None:
    """Raises `UserError` where a fresh LoRA does not go with the LLM's precision, or names modules that it lacks."""
    if config.init == "loftq" and not getattr(llm, "is_loaded_in_4bit", False):
        raise UserError(
            "model.lora.init=loftq makes up for what model.llm.bits=4 takes from the weights: set model.llm.bits=4, or "
            "model.lora.init=default"
        )
    modules = dict(llm.named_modules())
    for name in config.modules_to_save:  # PEFT would pass over one that is not there
        found = [module for path, module in modules.items() if path == name or path.endswith(f".{name}")]
        if not found:
            known = {path.rpartition(".")[2] for path, module in modules.items() if [*module.parameters()]}
            hint = nearest(name, sorted(one for one in known if one and not one.isdigit()))
            raise UserError(f"model.lora.modules_to_save: the LLM has no {name!r}; {hint}")
        if any(not parameter.is_floating_point() for module in found for parameter in module.parameters()):
            raise UserError(
                f"model.lora.modules_to_save lists {name}, whose weights model.llm.bits quantises, and quantised "
                "weights cannot learn: take it out, or set model.llm.bits to 16 or 32"
            )


def require_same_kind(saved: Any, folder: Path, config: LoraConfig) -> None:
    """Raises `UserError` for a saved LoRA that is not what the recipe says: it would be trained on as another.

    Args:
        saved: PEFT's settings of it.
        folder: Where it lies.
        config: The recipe's settings.
    """
    from peft import LoraConfig as PeftLoraConfig

    if not isinstance(saved, PeftLoraConfig):
        raise UserError(f"{folder} holds no LoRA, but PEFT's {saved.peft_type}")
    if (saved.r, saved.lora_alpha) != (config.rank, config.alpha):
        raise UserError(
            f"{folder} has rank {saved.r} and alpha {saved.lora_alpha:g}, the recipe says "
            f"model.lora.rank={config.rank} and model.lora.alpha={config.alpha:g}; set them alike"
        )
    there = [saved.use_rslora, saved.use_dora, sorted(saved.modules_to_save or [])]
    here = [config.rslora, config.dora, sorted(config.modules_to_save)]
    for name, was, now in zip(("rslora", "dora", "modules_to_save"), there, here, strict=True):
        if was != now:
            raise UserError(
                f"{folder} was trained with model.lora.{name}={json.dumps(was)}, the recipe says {json.dumps(now)}; "
                "set them alike"
            )


# ----------------------------------------------------------------------------------------------- modules_to_save


def copies_in_float32(wrapped: nn.Module) -> bool:
    """Make the copies of ``modules_to_save`` float32, as all that learns; PEFT does so with the update alone.

    They still answer in the precision of what they were copied from, so the layers around them work as before.

    Returns:
        Whether there are any that were not float32.
    """
    rounded = False
    for path, module in wrapped.named_modules():
        if not path.endswith(".modules_to_save.default"):
            continue
        dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
        if dtype != torch.float32:
            rounded = True
            module.to(torch.float32)
            module.register_forward_pre_hook(_inputs_in_float32, with_kwargs=True)
            module.register_forward_hook(partial(_output_in, dtype))
    return rounded


def _inputs_in_float32(_: nn.Module, inputs: tuple, keywords: dict) -> tuple[tuple, dict]:
    return _cast(inputs, torch.float32), _cast(keywords, torch.float32)


def _output_in(dtype: torch.dtype, _: nn.Module, __: tuple, output: Any) -> Any:
    return _cast(output, dtype)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, values)


# --------------------------------------------------------------------------------------------------------- LoftQ


@torch.no_grad()
def begin_at_quantisation_error(wrapped: nn.Module, llm: str) -> None:
    """LoftQ's start (arXiv 2310.08659) for a base that is quantised already and stays so.

    The update of each layer becomes the best approximation, of its rank, of the layer's own weights minus the quantised
    ones: scaling · B · A ≈ W - dequantised(W). (PEFT's ``replace_lora_weights_loftq`` leaves out the scaling.)

    Args:
        wrapped: The LLM at 4 bits in a fresh LoRA.
        llm: Its folder or hub name, where the whole weights are read, a layer at a time.

    Raises:
        UserError: They are not found there.
    """
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora import Linear4bit

    if isinstance(next(wrapped.parameters()), FakeTensor):  # an estimate: only shapes count
        return
    read = _whole_weights(llm)
    for path, layer in wrapped.named_modules():
        if not isinstance(layer, Linear4bit):
            continue
        base: Any = layer.base_layer
        quantised = dequantize_4bit(base.weight.data, base.weight.quant_state).float()
        whole = read(f"{path.removeprefix('base_model.model.')}.weight").to(quantised.device, torch.float32)
        rank, scaling = layer.r["default"], layer.scaling["default"]
        most = min(rank + 8, *whole.shape)  # a few more than wanted make the wanted ones exact
        u, s, v = torch.svd_lowrank(whole - quantised, q=most, niter=8)
        root = (s[:rank] / scaling).sqrt()
        update: Any = layer
        a, b = update.lora_A["default"].weight, update.lora_B["default"].weight
        a.zero_()[: len(root)] = root[:, None] * v[:, :rank].T
        b.zero_()[:, : len(root)] = u[:, :rank] * root
        if layer.lora_magnitude_vector:  # DoRA's are the lengths of the rows of what it begins with
            magnitude: Any = layer.lora_magnitude_vector["default"]
            magnitude.update_layer(base_layer=base, lora_A=a, lora_B=b, scaling=scaling)
            magnitude.to(torch.float32)


def _whole_weights(llm: str) -> Callable[[str], Tensor]:
    """Reads a tensor of an LLM's safetensors, given its name.

    Raises:
        UserError: There are none, or not by that name.
    """
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

    def find(file: str) -> str | None:
        return cached_file(llm, file, _raise_exceptions_for_missing_entries=False)

    index = find(SAFE_WEIGHTS_INDEX_NAME)
    file_of = json.loads(Path(index).read_text())["weight_map"] if index else {}

    def read(name: str) -> Tensor:
        path = find(file_of.get(name, SAFE_WEIGHTS_NAME))
        if path is not None:
            with safe_open(path, "pt") as file:
                if name in file.keys():  # noqa: SIM118  it is no dict
                    return file.get_tensor(name)
        raise UserError(
            f"model.lora.init=loftq reads the whole weights of {llm}, and finds no {name} there in .safetensors; set "
            "model.lora.init=default"
        )

    return read
