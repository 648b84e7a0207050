"""Stage 1, ours against the plain Hugging Face way: real tokens per second, and peak memory.

    make demo && .venv/bin/python benchmarks/stage1_vs_hf.py
    .venv/bin/python benchmarks/stage1_vs_hf.py data.batch_size=16

Both train the same fresh projectors by torch's AdamW, on the same decoded samples in batches of the same size, through
the same frozen 4-bit LLM and the same encoders, no layer checkpointed: the demo's captions and conversations in the
proportions of its stage 2, without LoRA. Overrides of that recipe may follow.

- ours: `Stream` → `pack` → `AnyMAL` (one row, nothing padded, the head at answer positions, the loss in chunks), with
  features as `launch/encode.py` writes them by default (bfloat16, read back before the clock starts, as workers do).
- raw: the same, but the encoders run in every step.
- plain: as `LlavaForConditionalGeneration` does it: samples padded to the longest, features put in place by
  `masked_scatter`, the LLM called with `inputs_embeds`, `attention_mask` and `labels`: logits [B, T, V], its own loss.

They alternate batch by batch; which of them begins alternates from round to round. A step is collating, encoding,
forward and backward pass and the optimizer; reading and decoding, which would be the same, are not timed. Real tokens
are those of the samples, media included. `speedup` is the median of the ratios plain / ours of a batch's two times,
`raw_speedup` that of plain / raw: what is left in the first pass over data, which has no features yet. Before the first
step, losses of raw and plain must be equal to 1e-5 and gradients to 1e-3 (on a GPU, in bfloat16, to 1e-2 and 1e-1).

Peak memory is the most that torch's allocator held at once during a step beyond what it held before: weights, encoders
and optimizer state are not in it. On a CPU the profiler's allocations are summed up, on a GPU `max_memory_allocated`
less `memory_allocated`. Measured on the batch whose padded size is the largest.

TRL's SFTTrainer cannot do this job. It is transformers' Trainer, which refuses a quantised LLM that has no PEFT adapter
even if it holds a trainable projector ("You cannot perform fine-tuning on purely quantized models", tried with
transformers 5.23); and TRL 1.16 takes media through a processor of transformers only, which audio, IMU and encoders of
one's own do not have.
"""

from anymal.adapters import REGISTRY

import anymal  # noqa: F401  # isort: skip  (first: it prepares the process for torch)
import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import profile

from allocated import peak_bytes
from anymal.checkpoints.build import Built, build
from anymal.config.command_line import run_program
from anymal.config.schema import Config
from anymal.config.settings import load
from anymal.data.feature_codec import dump
from anymal.data.feature_codec import load as load_features
from anymal.data.packing import pack
from anymal.data.quarantine import Quarantine
from anymal.data.stream import Stream
from anymal.data_prep.demo.assets import cache_folder
from anymal.model.llm import device, on_gpu
from anymal.model.multimodal import AnyMAL
from anymal.model.trainable import select_trainable
from anymal.sample import IGNORED, Features, Tokens

RECIPE = Path(__file__).parent.parent / "launch" / "recipes" / "demo-finetune.yaml"
BATCHES, ROUNDS = 3, 3
GOAL_SPEED, GOAL_MEMORY = 3.0, 0.5
TOLERANCES = (1e-2, 1e-1) if on_gpu() else (1e-5, 1e-3)  # of loss and gradient, relative


class Plain(nn.Module):
    """The plain way: padded batches, logits at every position, the LLM's own loss."""

    def __init__(self, model: AnyMAL, pad: int):
        super().__init__()
        self.llm, self.encode, self.autocast, self.pad = model.llm, model.encode, model.autocast, pad
        self.projectors = copy.deepcopy(model.projectors)

    def forward(self, samples: list[Tokens]) -> Tensor:
        """The mean loss of a batch's answer tokens."""
        longest, device = max(len(sample.ids) for sample in samples), self.llm.device
        ids = torch.full((len(samples), longest), self.pad)
        labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
        where: dict[str, Tensor] = {}
        media: dict[str, list[Tensor]] = {}
        for i, sample in enumerate(samples):
            length = len(sample.ids)
            ids[i, :length], labels[i, :length] = torch.tensor(sample.ids), torch.tensor(sample.labels)
            mask[i, :length] = 1
            for (name, first, count), medium in zip(sample.runs, sample.media, strict=True):
                where.setdefault(name, torch.zeros_like(ids, dtype=torch.bool))[i, first : first + count] = True
                media.setdefault(name, []).append(medium)
        features = self.encode({name: torch.stack(items) for name, items in media.items()})
        with self.autocast():
            row = self.llm.get_input_embeddings()(ids.to(device))
            for name, found in features.items():
                embeddings = self.projectors[name](found).to(row.dtype)
                row = row.masked_scatter(where[name][..., None].to(device), embeddings)
            attended, labels = mask.to(device), labels.to(device)
            return self.llm(inputs_embeds=row, attention_mask=attended, labels=labels, use_cache=False).loss


def read(built: Built, config: Config) -> list[list[Tokens]]:
    """The first batches of the stream, decoded and not yet collated."""
    quarantine = Quarantine(None, max_in_a_row=0, max_share=0)
    parts = {"suffixes": REGISTRY.suffixes(), "prepare": built.prepare, "quarantine": quarantine}
    rows = islice(Stream(config.data, **parts, seed=0), BATCHES)
    return [[item.tokens for item in row.items] for row in rows]


def encoded(model: AnyMAL, samples: list[Tokens]) -> list[Tokens]:
    """The same samples with features as a run reads them where `launch/encode.py` wrote them."""

    def features(modality: str, medium: Tensor) -> Features:
        encoder = model.encoders[modality]
        found = model.encode({modality: medium[None]})[modality][0]
        return Features(tensor=load_features(dump(found, "bf16"), encoder.tokens, encoder.width))

    return [
        replace(sample, media=[features(run[0], medium) for run, medium in zip(sample.runs, sample.media, strict=True)])
        for sample in samples
    ]


def steps(model: AnyMAL, plain: Plain, config: Config) -> dict[str, Callable[[list[Tokens]], float]]:
    """A training step of the two programs, by name: samples → loss. "ours" takes samples with media or features."""

    learners = {
        way: torch.optim.AdamW(way.projectors.parameters(), lr=config.optim.lr, betas=tuple(config.optim.betas))
        for way in (model, plain)
    }

    def ours(samples: list[Tokens]) -> float:
        batch = pack(samples).to(model.device)
        loss = model(batch, model.encode(batch.media))[0] / len(batch.targets)
        return _learn(loss, learners[model])

    def theirs(samples: list[Tokens]) -> float:
        return _learn(plain(samples), learners[plain])

    return {"ours": ours, "plain": theirs}


def _learn(loss: Tensor, learner: torch.optim.Optimizer) -> float:
    loss.backward()
    learner.step()
    learner.zero_grad()
    return loss.item()  # waits for a GPU


def differences(model: AnyMAL, plain: Plain, samples: list[Tokens]) -> tuple[float, float]:
    """How far apart the two ways' losses and gradients are, relative to the plain way's."""
    batch = pack(samples).to(model.device)
    losses = [model(batch, model.encode(batch.media))[0] / len(batch.targets), plain(samples)]
    gradients = []
    for way, loss in zip((model, plain), losses, strict=True):
        loss.backward()
        present = [p.grad for name in batch.media for p in way.projectors[name].parameters()]
        gradients.append(torch.cat([gradient.flatten() for gradient in present]))
        way.projectors.zero_grad()
    (ours, theirs), (g, h) = losses, gradients
    return abs(ours - theirs).item() / theirs.item(), float((g - h).norm() / h.norm())


def peak(step: Callable[[list[Tokens]], float], samples: list[Tokens]) -> int:
    """Bytes that a step takes at most beyond what is allocated before it."""
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(samples)
        return torch.cuda.max_memory_allocated() - before
    with profile(profile_memory=True) as watched:
        step(samples)
    return peak_bytes(watched)


def timed(step: Callable[[list[Tokens]], Any], samples: list[Tokens]) -> float:
    """Seconds of a step."""
    start = time.perf_counter()
    step(samples)
    return time.perf_counter() - start


Way = tuple[Callable[[list[Tokens]], float], list[list[Tokens]]]  # a step, and the batches that it is given


def compare(ways: dict[str, Way]) -> tuple[dict[str, list[float]], dict[str, float]]:
    """The plain way's time over each way's, of every batch and round; and medians of real tokens per second."""
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(ROUNDS):
        for i in range(BATCHES):
            order = list(ways) if turn % 2 else list(ways)[::-1]
            found = {name: timed(ways[name][0], ways[name][1][i]) for name in order}
            for name, seconds in found.items():
                ratios[name].append(found["plain"] / seconds)
                speeds[name].append(sum(len(sample.ids) for sample in ways[name][1][i]) / seconds)
    return ratios, {name: statistics.median(found) for name, found in speeds.items()}


def main() -> None:
    """Compare, and print one line of figures."""
    if not (cache_folder() / "data" / "imu-encoder").is_dir():
        sys.exit("the demo's models are not there; run make demo first")
    fixed = ["train=[projectors]", "model.checkpoint=null", "data.workers=0"]
    config = load(Config, RECIPE, [*fixed, *(sys.argv[1:] or ["data.batch_size=64"])])
    built = build(config, device(), REGISTRY)
    model = built.model
    select_trainable(model, config.train)
    plain, batches = Plain(model, built.tokenizer.pad_token_id or 0), read(built, config)
    apart = differences(model, plain, batches[0])
    if any(found > allowed for found, allowed in zip(apart, TOLERANCES, strict=True)):
        sys.exit(f"the two do not compute the same: loss and gradient differ by {apart[0]:.1e} and {apart[1]:.1e}")
    step = steps(model, plain, config)
    cached = [encoded(model, samples) for samples in batches]
    ways = {"ours": (step["ours"], cached), "raw": (step["ours"], batches), "plain": (step["plain"], batches)}
    sizes = [len(samples) * max(len(sample.ids) for sample in samples) for samples in batches]
    largest = sizes.index(max(sizes))
    peaks = {name: peak(step, given[largest]) for name, (step, given) in ways.items()}  # also a warm-up
    ratios, speeds = compare(ways)
    real = sum(len(sample.ids) for samples in batches for sample in samples)
    answers = sum(label != IGNORED for samples in batches for sample in samples for label in sample.labels)
    speed, memory = statistics.median(ratios["ours"]), peaks["ours"] / peaks["plain"]
    print(
        f"speedup={speed:.2f} slowest_ratio={min(ratios['ours']):.2f} fastest_ratio={max(ratios['ours']):.2f} "
        f"raw_speedup={statistics.median(ratios['raw']):.2f} memory={memory:.2f} "
        f"raw_memory={peaks['raw'] / peaks['plain']:.2f} "
        + " ".join(f"{name}_tokens_per_s={speed:.0f}" for name, speed in speeds.items())
        + " "
        + " ".join(f"{name}_peak_mb={most / 2**20:.0f}" for name, most in peaks.items())
        + f" loss_error={apart[0]:.1e} gradient_error={apart[1]:.1e} "
        f"padding_share={1 - real / sum(sizes):.2f} answer_share={answers / real:.2f} "
        f"goal={'met' if speed >= GOAL_SPEED and memory <= GOAL_MEMORY else 'missed'}"
    )


if __name__ == "__main__":
    run_program(main)
