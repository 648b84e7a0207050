"""The gradient at the projectors through a quantised LLM, against the same LLM dequantised to float32.

    make demo && .venv/bin/python benchmarks/quantised_gradients.py

Takes the demo's LLM, encoders and real training pairs, and fresh projectors. Both sides hold the same weights: the
quantised ones, once in 4 or 8 bits, once dequantised. Prints the relative error |g - g32| / |g32| over all projector
parameters, and whether the bytes of the frozen parts were still the same afterwards.
"""

import sys
from pathlib import Path

import torch
from torch import nn

from anymal.adapters import REGISTRY
from anymal.checkpoints.build import build
from anymal.config.command_line import run_program
from anymal.config.schema import Config
from anymal.config.settings import load
from anymal.data.quarantine import Quarantine
from anymal.data.stream import Stream
from anymal.data_prep.demo.assets import cache_folder
from anymal.model.multimodal import AnyMAL
from anymal.model.trainable import fingerprint, select_trainable, trainable
from anymal.sample import Batch

RECIPE = Path(__file__).parent.parent / "launch" / "recipes" / "demo-pretrain.yaml"
GOAL = 1e-4


def dequantised(module: nn.Module) -> torch.Tensor:
    """The float32 weights that a quantised linear layer stands for: [out, in]."""
    from bitsandbytes.functional import dequantize_4bit

    if module.weight.dtype == torch.uint8:
        return dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    scale = module.state.SCB if module.weight.SCB is None else module.weight.SCB  # it moves at the first forward pass
    return module.weight.data.float() * scale[:, None] / 127


def gradients(model: AnyMAL, batch: Batch) -> torch.Tensor:
    """All projector gradients of one batch, end to end."""
    select_trainable(model, ["projectors"])
    model.zero_grad()
    model(batch, model.encode(batch.media))[0].backward()
    return torch.cat([p.grad.flatten() for p in trainable(model).values()])


def compare(bits: int) -> tuple[float, bool]:
    """Relative gradient error at `bits`, and whether LLM and encoders kept their bytes."""
    device = torch.device("cpu")
    config = load(Config, RECIPE, [f"model.llm.bits={bits}", "data.workers=0"])
    quantised = build(config, device, REGISTRY)
    quarantine = Quarantine(None, max_in_a_row=0, max_share=0)
    parts = {"suffixes": REGISTRY.suffixes(), "prepare": quantised.prepare, "quarantine": quarantine}
    batch = next(iter(Stream(config.data, **parts, seed=0))).collate()
    frozen = [quantised.model.llm, *quantised.model.encoders.values()]
    before = [fingerprint(module) for module in frozen]
    through = gradients(quantised.model, batch)
    same = before == [fingerprint(module) for module in frozen]
    plain = build(load(Config, RECIPE, ["model.llm.bits=32", "data.workers=0"]), device, REGISTRY)
    for name, module in quantised.model.llm.named_modules():
        if isinstance(module, nn.Linear) and module.weight.dtype in (torch.uint8, torch.int8):
            plain.model.llm.get_submodule(name).weight.data = dequantised(module)
    reference = gradients(plain.model, batch)
    return float((through - reference).norm() / reference.norm()), same


def main() -> None:
    """Measure both precisions and print one line of figures."""
    if not (cache_folder() / "data" / "imu-encoder").is_dir():
        sys.exit("the demo's models are not there; run make demo first")
    four, same_four = compare(4)
    eight, same_eight = compare(8)
    met = max(four, eight) < GOAL and same_four and same_eight
    print(
        f"error_4bit={four:.2e} error_8bit={eight:.2e} frozen_unchanged={same_four and same_eight} "
        f"goal={'met' if met else 'missed'}"
    )


if __name__ == "__main__":
    run_program(main)
