"""Features of frozen encoders as bytes: what a feature tar (anymal.data.feature_cache) holds in place of a medium.

    encoder ──[tokens, width]──▶ dump ──safetensors──▶ load ──▶ Features ──packing──▶ Batch

A member ``0.jpg`` of a sample becomes ``0.jpg.safetensors``; one that does not decode keeps its place, with the reason.
Nothing is unpickled. `identity` says which features they are: it changes with whatever they depend on.
"""

import functools
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from anymal.errors import BadSample

VERSION = 2  # of the format and of all decoding: a change of either must leave older features unused
PRECISIONS = ("float32", "bf16", "int8")
"""The most exact first."""
ENDING = "safetensors"
LARGEST = 1e9  # of a feature, or of what is decoded: beyond any encoder's; sums of its squares are still finite
_LONGEST_REASON = 2000  # bytes
_OVERHEAD = 1 << 16  # bytes beside the tensors: safetensors' header
_DTYPES = {torch.float32, torch.bfloat16, torch.int8}
_PASSING = (  # no features depend on these, but for the last bits on the size of a batch
    *("training", "license", "name_or_path", "transformers_version"),
    *("as_bytes", "media_dtype", "inputs_per_medium", "encoder_batch_size"),
)


class Stored(bytes):
    """The bytes of a medium's features, in the place of the medium's own."""


def dump(features: Tensor, precision: str) -> bytes:
    """Features as the bytes of a safetensors file.

    Args:
        features: [tokens, width], finite.
        precision: One of `PRECISIONS`. int8 is symmetric, with one float32 scale a row, the row's largest absolute
            value over 127: no value is off by more than half a scale.
    """
    features = features.detach().float().cpu().contiguous()
    if precision == "float32":
        return to_bytes({"features": features})
    if precision == "bf16":
        return to_bytes({"features": features.bfloat16()})
    scale = features.abs().amax(dim=1) / 127
    steps = features / torch.where(scale > 0, scale, 1)[:, None]
    return to_bytes({"features": steps.round().clamp(-127, 127).to(torch.int8), "scale": scale})


def dump_bad(reason: str) -> bytes:
    """What is stored in place of the features of a bad medium: the reason, as the bytes of a safetensors file."""
    text = reason.encode(errors="surrogateescape")[:_LONGEST_REASON]
    return to_bytes({"bad": torch.frombuffer(bytearray(text or b"?"), dtype=torch.uint8)})


def load(data: bytes, tokens: int, width: int) -> Tensor:
    """The bytes that `dump` made → [tokens, width] bfloat16, or float32 if they hold float32 or int8.

    Raises:
        BadSample: The bytes are those of `dump_bad`, whose reason it gives; or no such features; or not finite, or
            larger than `LARGEST`.
    """
    if len(data) > (most := 4 * tokens * (width + 1) + _OVERHEAD):
        raise BadSample(f"cached features of {len(data)} bytes; [{tokens}, {width}] takes at most {most}")
    tensors = _tensors(data)
    if "features" not in tensors:
        raise BadSample(f"cached features hold the tensors {sorted(tensors)}; wanted is 'features'")
    features, scale = tensors["features"], tensors.get("scale")
    if features.dtype not in _DTYPES or tuple(features.shape) != (tokens, width):
        raise BadSample(
            f"cached features are {list(features.shape)} of {features.dtype}; this encoder's are [{tokens}, {width}] "
            "of float32, bfloat16 or int8"
        )
    if features.dtype == torch.int8:
        if scale is None or scale.dtype != torch.float32 or tuple(scale.shape) != (tokens,):
            actual = "none" if scale is None else f"{list(scale.shape)} of {scale.dtype}"
            raise BadSample(f"the scale of cached features is {actual}; wanted is [{tokens}] of float32")
        features = features * scale[:, None]
    check(features, "cached features")
    return features


def check(values: Tensor, what: str) -> None:
    """Refuse what no encoder or projector computes with.

    Raises:
        BadSample: `values` are not finite, or larger than `LARGEST`; the message begins with `what`.
    """
    if not values.is_floating_point() or not values.numel():
        return
    least, most = values.aminmax()  # NaN goes through it; 12 times faster than to look at every value
    if not (torch.isfinite(least) and torch.isfinite(most)):
        raise BadSample(f"{what} hold NaN or infinite values")
    if max(-least, most) > LARGEST:
        raise BadSample(f"{what} hold values up to {max(-least, most):.3g}; at most {LARGEST:g} is taken")


def restore(members: dict[str, bytes]) -> dict[str, bytes]:
    """The members of a sample of a feature tar under the names that they have in the original, media as `Stored`.

    Raises:
        BadSample: The original's sample could not be read; with the reason.
    """
    if ENDING in members:
        raise BadSample(f"cached features without a medium's name hold {sorted(_tensors(members[ENDING]))}")
    originals: dict[str, bytes] = {}
    for name, data in members.items():
        original = name.removesuffix(f".{ENDING}")
        originals[original] = data if name == original else Stored(data)
    return originals


def _tensors(data: bytes) -> dict[str, Tensor]:
    try:
        tensors = from_bytes(data)
    except Exception as error:  # of safetensors, or of torch about a dtype or shape that it does not have
        kind = "" if isinstance(error, SafetensorError) else f"{type(error).__name__}: "
        raise BadSample(f"cached features are not in safetensors' format: {kind}{error}") from error
    if "bad" in tensors:
        reason = tensors["bad"].flatten().view(torch.uint8)[:_LONGEST_REASON]
        raise BadSample(bytes(reason.tolist()).decode(errors="surrogateescape"))
    return tensors


# ------------------------------------------------------------------------------------------------------- identity


def identity(encoder: object) -> str:
    """16 hex digits over all that the features of a medium depend on: weights, settings, decoding, `VERSION`.

    It is the same in every process, for a copy of the encoder's folder elsewhere, and whether the encoder is on a GPU
    by now: weights are compared as bfloat16. Costs one pass over the weights.
    """
    plain = json.dumps([VERSION, _plain(encoder)], sort_keys=True)
    return hashlib.sha256((plain + _weights(encoder)).encode()).hexdigest()[:16]


def weights_digest(encoder: object) -> str:
    """16 hex digits over the weights alone, compared as `identity` does."""
    return hashlib.sha256(_weights(encoder).encode()).hexdigest()[:16]


def _weights(encoder: object) -> str:
    """The digest of every tensor by its name."""
    weights = sorted(encoder.state_dict().items()) if isinstance(encoder, nn.Module) else []
    with ThreadPoolExecutor() as pool:  # hashlib lets go of the interpreter
        digests = pool.map(_digest, [tensor for _, tensor in weights])
        return "".join(f"{name} {digest}" for (name, _), digest in zip(weights, digests, strict=True))


def _digest(tensor: Tensor) -> str:
    if tensor.is_floating_point():
        tensor = tensor.to(torch.bfloat16)
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"{list(tensor.shape)} {hashlib.sha256(data.data).hexdigest()}"


def _plain(value: object) -> Any:
    """What an encoder or its decoding consists of, weights left out, as JSON."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, np.ndarray | np.generic):
        return _digest(torch.from_numpy(np.array(value)))
    if isinstance(value, Tensor):
        return _digest(value)
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if key not in _PASSING}
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(_plain(item), sort_keys=True) for item in value)
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    if isinstance(value, functools.partial):
        return [_plain(part) for part in (value.func, value.args, value.keywords)]
    if inspect.isroutine(value) or inspect.isclass(value):
        return f"{value.__module__}.{value.__qualname__}"
    return {"class": type(value).__name__, "parts": _plain(_parts(value))}


def _parts(value: Any) -> dict[str, Any]:
    config = getattr(value, "config", None)
    if isinstance(value, nn.Module) and hasattr(config, "to_dict"):
        return {"config": config}  # transformers: what a network is, its config says
    if hasattr(value, "to_dict"):
        return _public(value.to_dict())
    if isinstance(value, nn.Module):
        return _public(vars(value)) | dict(value.named_children())
    return getattr(value, "__dict__", {})


def _public(named: Mapping[str, Any]) -> dict[str, Any]:
    return {name: item for name, item in named.items() if not name.startswith("_")}
