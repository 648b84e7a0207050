"""A GPU's first hour: what it is, what our kernels, steps and programs do there; the estimate beside every figure.

    python benchmarks/gpu_check.py probe                    # needs torch alone
    python benchmarks/gpu_check.py attention nf4 engine     # 8 minutes a stage at most, 25 a command
    python benchmarks/gpu_check.py 70b 8b programs
    python benchmarks/gpu_check.py all --rehearse           # tiny shapes on the CPU; what happens without a GPU

Random weights, no network. Each stage ends in one line `stage=… device=… figures… goal=met|missed`; all that was
measured goes to benchmarks/results/. What a stage has no time for is noted as skipped, and a stage whose packages are
missing says which, `goal=skipped`.

On a machine without a network carry the wheels of what is missing, for its Python; packages without a wheel are built:

    wheel="pip wheel -c constraints.txt --no-deps -w wheels"
    $wheel omegaconf pyyaml                                                    # attention
    $wheel bitsandbytes webdataset braceexpand                                 # nf4, 8b, 70b
    $wheel peft accelerate pillow pydantic pydantic-core annotated-types \\
        typing-inspection einops hjson msgpack py-cpuinfo psutil               # engine, programs, with the next
    DS_BUILD_OPS=0 $wheel deepspeed
    pip install --no-deps --no-index wheels/*.whl                              # there

From a bare checkout it runs with torch 2.11 and transformers 5.17, too; an installed AnyMAL wants what pyproject.toml
says.

Of bitsandbytes' wheel the libraries of the card's CUDA and of the CPU are enough (libbitsandbytes_cuda130.so and
_cpu.so, 4 MB of more than 100): delete the others with `zip -d`.
"""

import argparse
import gc
import json
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

import anymal  # noqa: F401  (settles torch's allocator and attention; imports nothing heavy)

# isort: split
import torch

from gpu.measure import GPU, REHEARSAL, Clock, Scale, judge, line, missing

RESULTS = Path(__file__).parent / "results"
STAGES = {
    "probe": "gpu.probe:run",
    "attention": "gpu.kernels:run_attention",
    "nf4": "gpu.kernels:run_nf4",
    "engine": "gpu.engine:run",
    "70b": "gpu.steps:run_70b",
    "8b": "gpu.steps:run_8b",
    "programs": "gpu.programs:run",
}
A_STAGE, IN_ALL, GRACE = 450, 1470, 30
"""Seconds that a stage and all of them plan with, and that the former may take on top."""


@contextmanager
def ended_after(seconds: float) -> Iterator[None]:
    """Inside, a `TimeoutError` comes after so many seconds: a stage that hangs must not take the others' time."""

    def end(*_: Any) -> None:
        raise TimeoutError(f"it took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measured(stage: str, scale: Scale, seconds: float) -> tuple[dict[str, Any], str]:
    """What a stage measures, and its goal: ``met``, ``missed`` (also where it fails), ``not_measured``, ``skipped``."""
    if absent := missing(stage):
        return {"skipped": [f"not installed: {', '.join(absent)}"]}, "skipped"
    module, _, name = STAGES[stage].partition(":")
    try:
        run: Callable[[Scale, Clock], dict[str, Any]] = getattr(import_module(module), name)
        with ended_after(seconds + GRACE):
            figures = run(scale, Clock(seconds))
    except ModuleNotFoundError as error:
        return {"skipped": [f"not installed: {error.name}"]}, "skipped"
    except Exception:  # one stage must not cost the others their time on the machine
        return {"failures": {"stage": traceback.format_exc()}}, "missed"
    return figures, judge(figures, scale.goals[stage])


def report(stage: str, scale: Scale, seconds: float, results: Path) -> str:
    """Run a stage, write what it measured, and return its line."""
    figures, goal = measured(stage, scale, seconds)
    device = "cpu-rehearsal" if scale.rehearsed else torch.cuda.get_device_name().replace(" ", "-")
    if scale.rehearsed and goal != "skipped" and not figures.get("failures"):
        goal = "not_measured"
    results.mkdir(exist_ok=True)
    about = {"stage": stage, "device": device, "torch": torch.__version__, "goal": goal, **figures}
    (results / f"gpu_check-{stage}-{device}.json").write_text(json.dumps(about, indent=1, default=str))
    for failure in figures.get("failures", {}).values():
        print(failure, file=sys.stderr)
    return line(stage, device, figures, scale.goals[stage], goal)


def main() -> int:
    """Run the stages that were asked for; 0 if none missed its goals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=[*STAGES, "all"])
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU, even where there is a GPU")
    given = parser.parse_args()
    scale = GPU if torch.cuda.is_available() and not given.rehearse else REHEARSAL
    if scale.rehearsed:
        print("A rehearsal of tiny shapes on a CPU: nothing is measured on a GPU.", file=sys.stderr)
    whole, said = Clock(IN_ALL), []
    for stage in STAGES if "all" in given.stages else given.stages:
        said.append(report(stage, scale, min(A_STAGE, whole.left()), RESULTS))
        print(said[-1], flush=True)
        gc.collect()
        if not scale.rehearsed:
            torch.cuda.empty_cache()
    return int(any(text.endswith("goal=missed") for text in said))


if __name__ == "__main__":
    sys.exit(main())
