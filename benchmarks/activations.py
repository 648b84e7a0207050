"""What autograd keeps per token and decoder layer of the frozen LLM, by checkpointing mode, and what it costs.

    make demo && .venv/bin/python benchmarks/activations.py

Takes the demo's LLM. Bytes: what the allocator holds after the forward pass of 512 tokens beyond what it held before,
divided by tokens and layers (the profiler's count). Time: forward and backward pass of these tokens, the modes in
turn in every round, median of the ratios to `none`. Where the bytes come from is attributed by
`saved_tensors_hooks` to the module that keeps them; storages count once, parameters do not. 16 bits is timed on a
GPU only: bfloat16 is many times slower on CPUs. The goal is the issue's: selective and full change no gradient.
"""

import anymal  # noqa: F401  # isort: skip  (first: it prepares the process for torch)
import statistics
import sys
import time
from collections import Counter

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import profile

from allocated import kept_bytes
from anymal.config.command_line import run_program
from anymal.config.schema import LLMConfig
from anymal.data_prep.demo.assets import cache_folder
from anymal.model.llm import device, load_llm, on_gpu

TOKENS, LAYERS, ROUNDS = 512, 10, 7
MODES = ("none", "selective", "full")


def load(bits: int, mode: str) -> nn.Module:
    """The first layers of the demo's LLM: its decoder."""
    name = str(cache_folder() / "models" / "llm")
    llm, _ = load_llm(LLMConfig(name=name, bits=bits, checkpointing=mode), device())
    decoder = llm.get_decoder()
    decoder.layers = decoder.layers[:LAYERS]
    decoder.config.num_hidden_layers = LAYERS
    return decoder


def embeddings(decoder: nn.Module) -> Tensor:
    """[1, T, D] random ones that want a gradient."""
    table = decoder.embed_tokens.weight
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(1, TOKENS, table.shape[1], generator=generator) * table.float().std().cpu()
    return row.to(table.device, table.dtype).requires_grad_()


def forward(decoder: nn.Module, row: Tensor) -> Tensor:
    """A scalar that depends on everything."""
    return decoder(inputs_embeds=row, use_cache=False).last_hidden_state.float().square().mean()


def measure_bytes(decoder: nn.Module) -> tuple[float, Tensor]:
    """Bytes per token and layer, and the gradient at the embeddings."""
    forward(decoder, embeddings(decoder)).backward()  # what is set up once is not counted
    row = embeddings(decoder)
    if on_gpu():
        before = torch.cuda.memory_allocated()
        value = forward(decoder, row)
        kept = torch.cuda.memory_allocated() - before
    else:
        with profile(profile_memory=True) as watched:
            value = forward(decoder, row)
        kept = kept_bytes(watched)
    value.backward()
    return kept / TOKENS / LAYERS, row.grad


def by_module(decoder: nn.Module) -> Counter[str]:
    """Bytes per token that one layer's modules keep, without checkpointing."""
    names: list[str] = []
    storages: dict[int, tuple[str, Tensor]] = {}
    known = {p.untyped_storage().data_ptr() for p in decoder.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if names and address not in known:
            storages.setdefault(address, (names[-1], tensor))
        return tensor

    for name, module in decoder.layers[0].named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: names.append(name or "residual"))
        module.register_forward_hook(lambda *_: names.pop() and None)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(decoder, embeddings(decoder))
    found: Counter[str] = Counter()
    for name, tensor in storages.values():
        found[name] += tensor.untyped_storage().nbytes() // TOKENS
    return found


def measure_times(decoders: dict[str, nn.Module]) -> dict[str, float]:
    """Median over the rounds of each mode's time relative to `none`."""
    times: dict[str, list[float]] = {mode: [] for mode in decoders}
    for _ in range(ROUNDS):
        for mode, decoder in decoders.items():
            row, start = embeddings(decoder), time.perf_counter()
            forward(decoder, row).backward()
            if on_gpu():
                torch.cuda.synchronize()
            times[mode].append(time.perf_counter() - start)
    return {
        mode: statistics.median(a / b for a, b in zip(found, times["none"], strict=True))
        for mode, found in times.items()
    }


def main() -> None:
    """Measure every precision and mode; print a table and one line of figures."""
    if not (cache_folder() / "models" / "llm").is_dir():
        sys.exit("the demo's models are not there; run make demo first")
    same, figures = True, {}
    for bits in (4, 8, 16, 32):
        decoders = {mode: load(bits, mode) for mode in MODES}
        kept = {mode: measure_bytes(decoder) for mode, decoder in decoders.items()}
        same = same and all(torch.equal(gradient, kept["none"][1]) for _, gradient in kept.values())
        times = measure_times(decoders) if bits != 16 or on_gpu() else {}
        for mode in MODES:
            figures[bits, mode] = kept[mode][0], times.get(mode, float("nan"))
            print(
                f"{bits:>2} bits {mode:<10} {kept[mode][0]:>8.0f} bytes/token/layer  time x{figures[bits, mode][1]:.2f}"
            )
        for name, bytes_ in by_module(decoders["none"]).most_common():
            print(f"    {name:<26} {bytes_:>6} bytes/token")
    print(
        " ".join(f"{mode}_share={figures[4, mode][0] / figures[4, 'none'][0]:.2f}" for mode in MODES[1:]),
        " ".join(f"{mode}_time={figures[4, mode][1]:.2f}" for mode in MODES[1:]),
        f"gradients_equal={same} goal={'met' if same else 'missed'}",
    )


if __name__ == "__main__":
    run_program(main)
