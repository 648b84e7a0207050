"""The estimator against reality: predicted and really allocated memory of training steps, side by side.

    make demo && .venv/bin/python benchmarks/estimate_vs_real.py

The demo's LLM, encoders and projectors, through the real engine and prefetcher: optimizer steps of each configuration,
the peak of what torch's allocator handed out (on a CPU by its profiler, on a GPU torch.cuda.max_memory_allocated), and
what `anymal.estimation.peak.predict` says of tensors from the recipe alone. On a CPU, 4 and 8 bits compute in float32.
Takes 10 to 20 minutes on two cores: the profiler notes every allocation.
"""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from anymal.adapters import REGISTRY
from anymal.checkpoints.build import build
from anymal.config.command_line import run_program
from anymal.config.schema import Config
from anymal.config.settings import load
from anymal.data.packing import Item, Row
from anymal.data_prep.demo.assets import cache_folder
from anymal.estimation.fake_step import FakeStep, Workload
from anymal.estimation.peak import predict
from anymal.model.llm import device, on_gpu
from anymal.model.multimodal import AnyMAL
from anymal.model.trainable import select_trainable
from anymal.training.engine import Engine, make_engine, start_processes
from anymal.training.prefetch import Prefetcher

RECIPES = Path(__file__).parent.parent / "launch" / "recipes"
CONFIGURATIONS = {
    "4 bits, 8 x 64": ("pretrain", 64, 8, ["model.llm.bits=4"]),
    "4 bits, 4 x 256": ("pretrain", 256, 4, ["model.llm.bits=4"]),
    "4 bits, 8 x 128, recomputed": ("pretrain", 128, 8, ["model.llm.bits=4", "model.llm.checkpointing=full"]),
    "4 bits, 8 x 128, selective": ("pretrain", 128, 8, ["model.llm.bits=4", "model.llm.checkpointing=selective"]),
    "8 bits, 8 x 64": ("pretrain", 64, 8, ["model.llm.bits=8"]),
    "32 bits, 8 x 64": ("pretrain", 64, 8, ["model.llm.bits=32"]),
    "32 bits, 2 x 512, recomputed": ("pretrain", 512, 2, ["model.llm.bits=32", "model.llm.checkpointing=full"]),
    "LoRA, 4 bits, 8 x 64": ("finetune", 64, 8, ["model.llm.bits=4"]),
    "LoRA, 8 bits, 4 x 128, recomputed": ("finetune", 128, 4, ["model.llm.bits=8", "model.llm.checkpointing=full"]),
}
"""By name: recipe, tokens of a sample, samples in a row, overrides."""
GOAL = 0.10
STEPS = 2


def measured(config: Config, row: Row) -> int:
    """Peak bytes of training steps of the real model on a real row, weights included."""
    built = build(config, device(), REGISTRY)
    select_trainable(built.model, config.train)
    gc.collect()
    if not on_gpu():
        return _on_cpu(built.model, config, row)
    _train(make_engine(built.model, config), row)
    return torch.cuda.max_memory_allocated()


def _on_cpu(model: AnyMAL, config: Config, row: Row) -> int:
    from torch.profiler import ProfilerActivity, profile

    waiting = sum(
        medium.nbytes for item in row.items for medium in item.tokens.media if isinstance(medium, torch.Tensor)
    )
    before = _alive() - waiting  # the estimate has it apart
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _train(make_engine(model, config), row)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return before + most


def _alive() -> int:
    """Bytes of all tensors that Python knows; shared memory counts once."""
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and type(thing).__name__ != "FakeTensor" and thing.device.type == "cpu":
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(found.values())


def _train(engine: Engine, row: Row) -> None:
    """Optimizer steps of one micro-batch in the order of `anymal.training.loop`."""
    prefetcher = Prefetcher(engine.module)
    prefetcher.start(row)
    for _ in range(STEPS):
        batch, features = prefetcher.take()
        total, _ = engine(batch, features)
        del features
        engine.backward(total / len(batch.targets), scale_wrt_gas=False)
        del total
        prefetcher.start(row)
        engine.step()


def one(name: str) -> None:
    """Print predicted and measured bytes of one configuration: a process of its own, so that nothing is left over."""
    start_processes()
    stage, tokens, samples, overrides = CONFIGURATIONS[name]
    fresh = ["model.checkpoint=null"] if stage == "finetune" else []
    config = load(
        Config, RECIPES / f"demo-{stage}.yaml", [*overrides, *fresh, "data.workers=0", f"data.batch_size={samples}"]
    )
    work = Workload(tokens=tokens, answers=tokens // 4)
    fake_step = FakeStep(config, REGISTRY, gpu=on_gpu())
    predicted = predict(fake_step, work, samples, world=1)
    tokens = fake_step.samples(work, samples, real=True)
    row = Row(items=[Item(position=n, dataset="", tokens=sample) for n, sample in enumerate(tokens)])
    del fake_step, tokens
    print(json.dumps({"predicted": predicted.tensors, "measured": measured(config, row), "parts": predicted.by_part}))


def main() -> None:
    """Run every configuration and print the table and one line of figures."""
    if len(sys.argv) > 1:
        return one(sys.argv[1])
    if not (cache_folder() / "data" / "imu-encoder").is_dir():
        sys.exit("the demo's models are not there; run make demo first")
    errors = []
    print(f"{'configuration':<36} {'predicted':>10} {'measured':>10} {'error':>7}   (MB)")
    for name in CONFIGURATIONS:
        done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, env=os.environ)
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        found = json.loads(done.stdout.strip().splitlines()[-1])
        errors.append(found["predicted"] / found["measured"] - 1)
        print(
            f"{name:<36} {found['predicted'] / 1e6:>10.1f} {found['measured'] / 1e6:>10.1f} {errors[-1]:>+7.1%}",
            flush=True,
        )
    worst = max(map(abs, errors))
    print(
        f"device={'gpu' if on_gpu() else 'cpu'} configurations={len(errors)} worst_error={worst:.1%} "
        f"goal={'met' if worst <= GOAL else 'missed'}"
    )


if __name__ == "__main__":
    run_program(main)
