"""Which parameters learn. All others are frozen, here and nowhere else; and the table of what the model consists of."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anymal.config.schema import trainable_names
from anymal.errors import UserError
from anymal.modality import Encoder, zero_media
from anymal.model.flops import numel
from anymal.model.lora import is_lora
from anymal.model.multimodal import AnyMAL


def select_trainable(model: AnyMAL, train: Sequence[str]) -> None:
    """Freeze everything but what `train` names. The only such place.

    ``projectors`` and ``encoders`` name those of all modalities, ``projectors.NAME`` and ``encoders.NAME`` that of one;
    ``lora`` is the LLM's LoRA, ``llm`` all of the LLM itself, embedding table and head included. Of an encoder, only
    parameters that its features depend on are trained: not a last layer or a pooler that is not used.

    Raises:
        UserError: A name fits nothing in the model, or the LLM is to learn beneath a LoRA.
    """
    model.requires_grad_(False)
    for encoder in model.encoders.values():
        encoder.requires_grad_(False)
    known = trainable_names(model.encoders)
    for name in train:
        if name not in known:
            raise UserError(f"train lists {name!r}; this model has {', '.join(known)}")
        chosen = list(_chosen(model, name))
        if not chosen:
            raise UserError(f"train lists {name!r}, but the model has no such parameters")
        for parameter in chosen:
            parameter.requires_grad_(True)
    model.train()


def _chosen(model: AnyMAL, name: str) -> Iterator[nn.Parameter]:
    """The parameters that a name in `train` stands for."""
    group, _, modality = name.partition(".")
    if group == "encoders":
        for trained in model.trained_encoders:
            if modality in ("", trained):
                yield from _used(model.encoders[trained], model.device)
        return
    if group == "llm" and any(is_lora(path) for path, _ in model.llm.named_parameters()):
        raise UserError("train lists 'llm', but the LLM has a LoRA: train one or the other, or start without the LoRA")
    for path, parameter in model.named_parameters():
        if path.startswith(f"{name}.") or (name == "lora" and is_lora(path)):
            yield parameter


def _used(encoder: Encoder, device: torch.device) -> list[nn.Parameter]:
    """The parameters that an encoder's features depend on, found by a zero medium.

    Others would never get a gradient: neither ZeRO nor AdamW without it can save a state for such.
    """
    parameters = list(encoder.requires_grad_(True).parameters())
    features = encoder(zero_media(encoder, 1, device))
    gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
    encoder.requires_grad_(False)
    return [p for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@dataclass(frozen=True)
class Row:
    """A line of the table of what the model consists of."""

    module: str
    parameters: int
    dtype: str
    bits: int
    trainable: bool


def table(model: AnyMAL) -> list[Row]:
    """Module, parameters, dtype, bits, trainable: one row for each kind of parameter in each network."""
    rows: dict[tuple, int] = {}
    for name, network in model.networks():
        for path, parameter in network.named_parameters():
            module = f"{name}.lora" if is_lora(path) else name
            bits = 8 if parameter.dtype == torch.int8 else parameter.element_size() * 8
            if getattr(parameter, "quant_state", None) is not None:  # bitsandbytes packs two 4-bit weights into a byte
                bits = 4
            key = (module, str(parameter.dtype).removeprefix("torch."), bits, parameter.requires_grad)
            rows[key] = rows.get(key, 0) + numel(parameter)
    return [Row(module, count, dtype, bits, learns) for (module, dtype, bits, learns), count in rows.items()]


def format_table(rows: Sequence[Row]) -> str:
    """The table as aligned text."""
    lines = [f"{'module':<22} {'parameters':>14} {'dtype':>9} {'bits':>4}  trainable"]
    for row in rows:
        mark = "yes" if row.trainable else "-"
        lines.append(f"{row.module:<22} {row.parameters:>14,} {row.dtype:>9} {row.bits:>4}  {mark}")
    return "\n".join(lines)


def fingerprint(modules: nn.Module) -> str:
    """SHA-256 over the bytes of every parameter and buffer, in order: equal before and after means unchanged."""
    digest = hashlib.sha256()
    for name, tensor in sorted(modules.state_dict(keep_vars=True).items()):
        digest.update(name.encode())
        if isinstance(tensor, Tensor):
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
