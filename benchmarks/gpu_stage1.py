"""Stage 1 on one GPU at AnyMAL's real sizes: largest batch, tokens/s, memory, utilisation; our estimate beside each.

    python benchmarks/gpu_stage1.py --model 8b                 # each within ten minutes on an H100
    python benchmarks/gpu_stage1.py --model 70b --checkpointing full
    python benchmarks/gpu_stage1.py --dry                      # tiny shapes on the CPU; what happens without a GPU

Llama-3.1-8B and -70B with random weights, made and quantised to nf4 matrix by matrix on the card; CLIP ViT-L/14-336,
random weights too; a resampler of 6 layers and 64 tokens, trained by AdamW. AnyMAL's own model and batches, without
engine and stream. Needs no network. Results go to benchmarks/results/.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from torch import nn

from anymal.adapters import MODALITIES, REGISTRY
from anymal.adapters.image.modality import ImageDecoder, ImageEncoder
from anymal.checkpoints.build import build_projector
from anymal.config.schema import Config
from anymal.config.settings import load
from anymal.estimation.fake_step import FakeStep, Workload
from anymal.estimation.peak import largest_batch, predict
from anymal.modality import Adapter, parts
from anymal.model import attention
from anymal.model.activation_checkpointing import set_checkpointing
from anymal.model.flops import StepFlops, llm_flops
from anymal.model.llm import compute_dtype, set_frozen_mode
from anymal.model.multimodal import AnyMAL
from anymal.model.registry import Fit
from anymal.model.trainable import select_trainable, trainable

RESULTS = Path(__file__).parent / "results"
CARD = 80e9
RESERVE = 1.5e9  # of it, for cuBLAS' workspaces and fragments
ANSWERS = 0.25  # share of a sample's tokens
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500000.0}
LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
LLAMA |= {"rope_parameters": ROPE | {"original_max_position_embeddings": 8192}}
LLMS = {
    "8b": LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
TINY_LLM = {"vocab_size": 512, "num_key_value_heads": 2, "hidden_size": 128, "intermediate_size": 256}
TINY_LLM |= {"num_hidden_layers": 2, "num_attention_heads": 4}
CLIP = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
CLIP |= {"image_size": 336, "patch_size": 14}
TINY_CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY_CLIP |= {"image_size": 32, "patch_size": 8}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What differs between a GPU and the dry run."""

    device: torch.device
    card: float
    """Bytes."""
    samples: tuple[int, ...]
    """Tokens of a sample for which the largest batch is sought."""
    rows: tuple[int, ...]
    """Tokens of packed rows."""
    matrix: int
    """Size of the matrices whose product is the peak."""
    projector: tuple[str, ...]
    """Overrides."""

    @property
    def dry(self) -> bool:
        """Whether there is no GPU."""
        return self.device.type == "cpu"


GPU = Scale(
    device=torch.device("cuda"),
    card=CARD,
    samples=(160, 512),
    rows=(4096, 8192, 1024),
    matrix=8192,
    projector=("layers=6", "tokens=64"),
)
DRY = Scale(
    device=torch.device("cpu"),
    card=6e6,
    samples=(16, 24),
    rows=(64, 128),
    matrix=256,
    projector=("layers=2", "tokens=4"),
)


def measured_peak(scale: Scale) -> float:
    """FLOP/s of a matrix product in the precision that is trained in."""
    a = torch.randn(scale.matrix, scale.matrix, device=scale.device, dtype=compute_dtype(scale.device))
    for _ in range(3):
        a @ a
    seconds = timed(lambda: [a @ a for _ in range(20)], scale)
    return 20 * 2 * scale.matrix**3 / seconds


def timed(run: Callable[[], Any], scale: Scale) -> float:
    """Seconds, the device's work included."""
    wait = (lambda: None) if scale.dry else torch.cuda.synchronize
    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began


def settings(name: str, folder: Path, scale: Scale) -> Config:
    """The recipe, with config folders as a user's model folders have them."""
    from transformers import CLIPVisionConfig, LlamaConfig

    LlamaConfig(**(TINY_LLM if scale.dry else LLMS[name])).save_pretrained(folder / "llm")
    vision = CLIPVisionConfig(**(TINY_CLIP if scale.dry else CLIP))
    vision.save_pretrained(folder / "clip")
    size = vision.image_size
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": size}}
    processor |= {"crop_size": {"height": size, "width": size}}
    (folder / "clip" / "preprocessor_config.json").write_text(json.dumps(processor))
    image = "model.modalities.image"
    given = [f"model.llm.name={folder / 'llm'}", f"{image}.encoder={folder / 'clip'}", "engine.zero=0"]
    given += [f"{image}.projector.kind=resampler", *(f"{image}.projector.{text}" for text in scale.projector)]
    return load(Config, None, given)


def random_llm(folder: Path, device: torch.device) -> nn.Module:
    """A causal LM of random weights in nf4: made matrix by matrix on the device, never whole at 16 bits."""
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
    return llm


def random_model(config: Config, scale: Scale) -> AnyMAL:
    """AnyMAL around it."""
    from transformers import AutoImageProcessor, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    image = config.model.modalities["image"]
    network = CLIPVisionModel(CLIPVisionConfig.from_pretrained(image.encoder)).eval()
    processor = AutoImageProcessor.from_pretrained(image.encoder, backend="pil")
    encoder = ImageEncoder(network, ImageDecoder(processor=processor, max_pixels=10**6), 0, "random weights")
    llm = random_llm(Path(config.model.llm.name), scale.device)
    projector = build_projector(
        REGISTRY, image.projector, Fit(parts=parts(encoder), llm_width=llm.config.hidden_size, scale=0.02)
    )
    model = AnyMAL(llm, {"image": Adapter(MODALITIES["image"], encoder, projector)})
    select_trainable(model, ["projectors"])
    return model


class Bench:
    """One LLM on the card."""

    def __init__(self, name: str, scale: Scale, folder: Path, deadline: float):
        self.name, self.scale, self.deadline = name, scale, deadline
        self.config = settings(name, folder, scale)
        self.peak = measured_peak(scale)
        began = time.perf_counter()
        self.model = random_model(self.config, scale)
        self.seconds_to_build = time.perf_counter() - began
        self.optimizer = torch.optim.AdamW(trainable(self.model).values(), lr=1e-4)
        self.step_flops = StepFlops(self.model, llm_flops(self.model.llm))
        self.rows: list[dict[str, Any]] = []

    def run(self, modes: list[str]) -> None:
        """Measure every mode of checkpointing; what no time is left for is noted as such."""
        for mode in modes:
            fake_step = self._set_checkpointing(mode)
            for tokens in self.scale.samples:
                self._in_time(
                    mode, f"largest batch of {tokens}", lambda t=tokens, r=fake_step, m=mode: self._largest(r, t, m)
                )
            for row in self.scale.rows:
                samples = row // self.scale.samples[0]
                what = f"row of {row}"
                self._in_time(
                    mode,
                    what,
                    lambda s=samples, r=fake_step, m=mode, w=what: self._measure(r, self.scale.samples[0], s, m, w),
                )

    def _in_time(self, mode: str, what: str, run: Callable[[], dict[str, Any]]) -> None:
        if time.perf_counter() > self.deadline:
            found = {"checkpointing": mode, "what": what, "skipped": "no time left"}
        else:
            found = run()
        self.rows.append(found)
        print(json.dumps({"model": self.name, **found}), flush=True)

    def _set_checkpointing(self, mode: str) -> FakeStep:
        set_checkpointing(self.model.llm, mode)
        self.model.train()
        llm = replace(self.config.model.llm, checkpointing=mode)
        config = replace(self.config, model=replace(self.config.model, llm=llm))
        self.step_flops.llm = replace(self.step_flops.llm, recomputed=float(mode == "full"))
        return FakeStep(config, REGISTRY, gpu=not self.scale.dry)

    def _largest(self, fake_step: FakeStep, tokens: int, mode: str) -> dict[str, Any]:
        """From the estimate down until it fits, or up until it does not."""
        what = f"largest batch of {tokens}"
        work = self._work(tokens)
        estimate = largest_batch(fake_step, work, self.scale.card - RESERVE * (not self.scale.dry), world=1)
        samples, fits = max(estimate, 1), {}
        while samples > 0 and not self._fits(fake_step, work, samples, fits):
            samples = min(int(samples * 0.95), samples - 1)
        for _ in range(3):
            more = max(int(samples * 1.04), samples + 1)
            if samples == 0 or fits.get(more) is False or not self._fits(fake_step, work, more, fits):
                break
            samples = more
        if samples == 0:
            return {"checkpointing": mode, "what": what, "samples": 0, "estimated_samples": estimate}
        return self._measure(fake_step, tokens, samples, mode, what) | {"estimated_samples": estimate}

    def _fits(self, fake_step: FakeStep, work: Workload, samples: int, known: dict[int, bool]) -> bool:
        try:
            self._step(fake_step.batch(work, samples, real=True))
            known[samples] = not self.scale.dry or predict(fake_step, work, samples, world=1).total <= self.scale.card
        except torch.OutOfMemoryError:
            known[samples] = False
        self._clear()
        return known[samples]

    def _work(self, tokens: int) -> Workload:
        return Workload(tokens=tokens, answers=int(tokens * ANSWERS))

    def _step(self, batch: Any) -> None:
        batch = batch.to(self.scale.device)
        total, _ = self.model(batch, self.model.encode(batch.media))
        (total / len(batch.targets)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if not self.scale.dry:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _measure(self, fake_step: FakeStep, tokens: int, samples: int, mode: str, what: str) -> dict[str, Any]:
        """Speed and memory of one kind of micro-batch, the estimate beside them."""
        work = self._work(tokens)
        estimated = predict(fake_step, work, samples, world=1).total
        batch = fake_step.batch(work, samples, real=True)
        self._clear()
        found = {"checkpointing": mode, "what": what, "samples": samples, "tokens": batch.ids.numel()}
        try:
            self._step(batch)
            steps = 3
            seconds = timed(lambda: [self._step(batch) for _ in range(steps)], self.scale) / steps
        except torch.OutOfMemoryError:
            self._clear()
            return found | {"out_of_memory": True, "estimated_gb": estimated / 1e9}
        needed, recomputed = (float(flops) for flops in self.step_flops.count(batch))
        memory = None if self.scale.dry else torch.cuda.max_memory_allocated() / 1e9
        return found | {
            "tokens_per_s": batch.ids.numel() / seconds,
            "model_tflops": needed / seconds / 1e12,
            "utilisation": needed / seconds / self.peak,
            "utilisation_with_recomputed": (needed + recomputed) / seconds / self.peak,
            "memory_gb": memory,
            "estimated_gb": estimated / 1e9,
            "estimate_error": None if memory is None else estimated / 1e9 / memory - 1,
        }


def judge(name: str, rows: list[dict[str, Any]]) -> tuple[str, bool]:
    """The figures that the goals are about, and whether they are met: the strict reading, nothing recomputed counts."""
    done = [row for row in rows if "tokens_per_s" in row]
    if name == "8b":
        best = max((row["tokens_per_s"] for row in done if row["what"].startswith("row")), default=0)
        return f"8b_packed_tokens_per_s={best:.0f}", best >= 15_000
    batch = max((row["samples"] for row in done if row["what"] == "largest batch of 160"), default=0)
    best = max((row["utilisation"] for row in done), default=0)
    both = max((row["utilisation_with_recomputed"] for row in done), default=0)
    text = f"70b_batch_of_160={batch} 70b_utilisation={best:.1%} 70b_utilisation_with_recomputed={both:.1%}"
    return text, batch >= 64 and best >= 0.5


def main() -> None:
    """Run the parts that were asked for, write the results, print one line of figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(LLMS), action="append", help="8b, 70b; by default both")
    parser.add_argument("--checkpointing", action="append", help="none, selective, full; by default all, full first")
    parser.add_argument("--minutes", type=float, default=9, help="after so many minutes a model's rest is skipped")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU")
    arguments = parser.parse_args()
    scale = GPU if torch.cuda.is_available() and not arguments.dry else DRY
    device = "none (dry run on the CPU)" if scale.dry else torch.cuda.get_device_name()
    if not scale.dry:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CARD / whole))
    figures, met = [], []
    for name in arguments.model or list(LLMS):
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(name, scale, Path(folder), time.perf_counter() + 60 * arguments.minutes)
            bench.run(arguments.checkpointing or ["full", "none", "selective"])
            results = Path(folder) if scale.dry else RESULTS
            results.mkdir(exist_ok=True)
            path = results / f"gpu_stage1-{name}-{device.replace(' ', '-')}.json"
            about = {"device": device, "model": name, "peak_tflops": bench.peak / 1e12, "card_gb": scale.card / 1e9}
            about |= {"seconds_to_build": bench.seconds_to_build, "torch": torch.__version__, "rows": bench.rows}
            path.write_text(json.dumps(about, indent=1))
        text, reached = judge(name, bench.rows)
        figures.append(f"{name}_peak_tflops={bench.peak / 1e12:.3g} {text}")
        met.append(reached)
        del bench
        gc.collect()
    if scale.dry:
        print("This was a dry run of tiny shapes on a CPU: nothing was measured on a GPU.")
        print("device=cpu dry=true measured_on_gpu=false goal=not_measured")
        return
    print(f"device={device.replace(' ', '-')} {' '.join(figures)} goal={'met' if all(met) else 'missed'}")


if __name__ == "__main__":
    sys.exit(main())
