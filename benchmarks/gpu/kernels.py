"""What a decoder layer spends its time on: attention over ragged rows, norms, products with nf4 weights."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpu.measure import Clock, Scale, difference, timed

HEADS = {"8b": (32, 8), "70b": (64, 8)}
WIDTH = 128


def run_attention(scale: Scale, clock: Clock) -> dict[str, Any]:
    """Attention over ragged rows in three ways, and norms in two."""
    figures: dict[str, Any] = {"rows": []}
    rows = scale.rows if not scale.rehearsed else scale.rows[-1:]
    for name in HEADS:
        for row in rows:
            clock.within(figures, f"{name}_row_of_{row}", 30, lambda n=name, r=row: _row(scale, n, r, figures))
    clock.within(figures, "norms", 20, lambda: norms(scale))
    return figures


def _row(scale: Scale, name: str, row: int, figures: dict[str, Any]) -> dict[str, Any]:
    found = attention(scale, lengths_of(scale, row), *HEADS[name])
    figures["rows"].append({"llm": name, "row": row, **found})
    slowest = {key: min(found[key], figures.get(key, found[key])) for key in ("loop_over_packed", "mask_over_packed")}
    return {"error": max(found["error"], figures.get("error", 0.0)), **slowest}


def lengths_of(scale: Scale, row: int) -> list[int]:
    """Tokens of ragged samples that fill a row, the short ones first, as the packer puts them."""
    generator, lengths = torch.Generator().manual_seed(0), []
    while sum(lengths) < row:
        length = round(scale.median * float(torch.exp(0.3 * torch.randn((), generator=generator))))
        lengths.append(min(length, row - sum(lengths)))
    return sorted(lengths)


class Layer(nn.Module):
    """What transformers' attention asks of the layer that it runs for."""

    def __init__(self, groups: int):
        super().__init__()
        self.is_causal, self.num_key_value_groups = True, groups


def attention(scale: Scale, lengths: list[int], heads: int, fewer: int) -> dict[str, Any]:
    """Forward and backward pass over one row: as `anymal.model.attention` does it here, by its loop over lengths, and
    by SDPA with a mask; the largest error of output and gradients against the last in float32."""
    from anymal.data.packing import row_offsets
    from anymal.environment import swapped
    from anymal.model import varlen
    from anymal.model.attention import packed_attention

    layer, tokens, offsets = Layer(heads // fewer), sum(lengths), row_offsets(lengths).to(scale.device)
    shapes = [(1, n, tokens, WIDTH) for n in (heads, fewer, fewer)]
    torch.manual_seed(0)
    given = [torch.randn(shape, device=scale.device, dtype=scale.dtype) for shape in shapes]
    upstream = torch.randn(1, tokens, heads, WIDTH, device=scale.device, dtype=scale.dtype)
    samples = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(scale.device)
    mask = (samples[:, None] == samples)[None, None].tril()

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(layer, q, k, v, None, lengths, offsets)[0]

    def loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with swapped(varlen, "kernel", lambda **_: "loop"):
            return packed(q, k, v)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(heads // fewer, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    wide = _with_gradients(masked, [x.float() for x in given], upstream.float())
    found: dict[str, Any] = {"samples": len(lengths)}
    for name, way in (("packed", packed), ("loop", loop), ("mask", masked)):
        ours = _with_gradients(way, given, upstream)
        found[f"{name}_error"] = max(difference(a, b) for a, b in zip(ours, wide, strict=True))
        found[f"{name}_ms"] = 1e3 * timed(lambda way=way: _with_gradients(way, given, upstream), scale.device, 5)
    for name in ("loop", "mask"):
        found[f"{name}_over_packed"] = found[f"{name}_ms"] / found["packed_ms"]
    return found | {"error": found["packed_error"]}


def _with_gradients(way: Callable[..., Tensor], given: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """The output, and the gradients of what is given."""
    leaves = [x.detach().requires_grad_() for x in given]
    output = way(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


def norms(scale: Scale) -> dict[str, Any]:
    """Llama's RMSNorm: transformers' module, and torch's one function; forward and backward pass."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    width = scale.llms["8b"]["hidden_size"]
    module = LlamaRMSNorm(width, eps=1e-5).to(scale.device, scale.dtype).requires_grad_(False)
    given = [torch.randn(1, scale.rows[0], width, device=scale.device, dtype=scale.dtype)]
    upstream = torch.randn_like(given[0])

    def fused(x: Tensor) -> Tensor:
        return F.rms_norm(x, (width,), module.weight, 1e-5)

    ours = [_with_gradients(way, given, upstream) for way in (fused, module)]
    seconds = [timed(lambda way=way: _with_gradients(way, given, upstream), scale.device) for way in (fused, module)]
    return {
        "norm_error": max(difference(a, b) for a, b in zip(*ours, strict=True)),
        "norm_fused_ms": 1e3 * seconds[0],
        "norm_module_ms": 1e3 * seconds[1],
        "norm_module_over_fused": seconds[1] / seconds[0],
    }


def run_nf4(scale: Scale, clock: Clock) -> dict[str, Any]:
    """Dequantising, and products with frozen nf4 weights beside such with 16 bits."""
    figures: dict[str, Any] = {"products": []}
    for inputs, outputs in scale.products:
        name = f"{inputs}_to_{outputs}"
        clock.within(figures, name, 40, lambda i=inputs, o=outputs: product(scale, i, o, figures))
    return figures


def product(scale: Scale, inputs: int, outputs: int, figures: dict[str, Any]) -> dict[str, Any]:
    """One matrix: what dequantising it takes, and products with ever more tokens, forward and backward."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs, bias=False, device=scale.device, dtype=scale.dtype).requires_grad_(False)
    layer = Linear4bit(inputs, outputs, bias=False, compute_dtype=scale.dtype, quant_type="nf4", device="meta")
    layer.weight = Params4bit(plain.weight.data.clone(), requires_grad=False, quant_type="nf4").to(scale.device)
    layer.train()
    seconds = timed(lambda: dequantize_4bit(layer.weight.data, layer.weight.quant_state), scale.device)
    found: dict[str, Any] = {"inputs": inputs, "outputs": outputs, "by_tokens": {}}
    found["dequantised_gb_per_s"] = plain.weight.nbytes / seconds / 1e9
    errors = []
    for tokens in scale.tokens:
        given = [torch.randn(tokens, inputs, device=scale.device, dtype=scale.dtype)]
        upstream = torch.randn(tokens, outputs, device=scale.device, dtype=scale.dtype)
        four, sixteen = (_with_gradients(way, given, upstream) for way in (layer, plain))
        errors.append(max(_distance(a, b) for a, b in zip(four, sixteen, strict=True)))
        took = [timed(partial(_with_gradients, way, given, upstream), scale.device) for way in (layer, plain)]
        rates = [4 * tokens * inputs * outputs / took_by / 1e12 for took_by in took]
        found["by_tokens"][tokens] = {"nf4_tflops": rates[0], "bf16_tflops": rates[1], "share": rates[0] / rates[1]}
    figures["products"].append(found)
    share = found["by_tokens"][scale.tokens[-1]]["share"]
    return {
        "error": max(*errors, figures.get("error", 0.0)),
        "share_of_bf16_at_most_tokens": min(share, figures.get("share_of_bf16_at_most_tokens", share)),
    }


def _distance(one: Tensor, reference: Tensor) -> float:
    """The norm of a difference, by the norm: of nf4's rounding about a tenth."""
    return float((one.double() - reference.double()).norm() / reference.double().norm())
