"""Sizes, time, goals and the line that a stage ends in. Imports torch alone, so that the probe needs nothing else."""

import importlib.util
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Goals = Mapping[str, tuple[str, float]]
"""By figure: ``"<="`` or ``">="``, and the number."""
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500000.0}
LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
LLAMA |= {"rope_parameters": ROPE | {"original_max_position_embeddings": 8192}}
LLMS = {
    "8b": LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
CLIP = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
CLIP |= {"image_size": 336, "patch_size": 14}
TINY_LLM = {"vocab_size": 512, "num_key_value_heads": 2, "hidden_size": 128, "intermediate_size": 256}
TINY_LLM |= {"num_hidden_layers": 2, "num_attention_heads": 4}
TINY_CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY_CLIP |= {"image_size": 32, "patch_size": 8}
NEEDS = {
    "probe": [],
    "attention": ["omegaconf", "transformers"],
    "nf4": ["bitsandbytes"],
    "engine": ["omegaconf", "transformers", "deepspeed", "webdataset", "tokenizers"],
    "8b": ["omegaconf", "transformers", "bitsandbytes", "webdataset"],
    "70b": ["omegaconf", "transformers", "bitsandbytes", "webdataset"],
    "programs": ["omegaconf", "transformers", "deepspeed", "webdataset", "tokenizers", "peft", "PIL"],
}
"""By stage, the packages that it cannot do without."""
GOALS: dict[str, Goals] = {
    "probe": {"matmul_error": ("<=", 0.01), "capability": (">=", 8.0)},
    "attention": {
        "error": ("<=", 0.02),
        "loop_over_packed": (">=", 1.0),
        "norm_error": ("<=", 0.02),
        "norm_module_over_fused": (">=", 1.0),
    },
    "nf4": {"error": ("<=", 0.15), "share_of_bf16_at_most_tokens": (">=", 0.8)},
    "engine": {
        "host_reads": ("<=", 0),
        "wait_share": ("<=", 0.02),
        "resume_difference_deterministic": ("<=", 0.0),
    },
    "8b": {
        "cached_tokens_per_s": (">=", 15_000),
        "inline_tokens_per_s": (">=", 13_000),
        "estimate_error": ("<=", 0.03),
        "wait_share": ("<=", 0.02),
    },
    "70b": {
        "fits": (">=", 1),
        "hardware_share": (">=", 0.7),
        "estimate_error": ("<=", 0.03),
        "wait_share": ("<=", 0.02),
    },
    "programs": {"failed": ("<=", 0), "resumed": (">=", 1)},
}
"""By stage, on one H100 of 80 GB. `estimate_error` is the larger of those of tensors and of what is reserved."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What differs between a GPU and a rehearsal on a CPU."""

    device: torch.device
    matrix: int
    """Size of the matrices whose product is the peak."""
    copied: int
    """Bytes of copies."""
    llms: Mapping[str, Mapping[str, Any]]
    """By name, the sizes of a Llama."""
    clip: Mapping[str, Any]
    """The sizes of a CLIP's vision model."""
    projector: tuple[str, ...]
    """Overrides of a resampler."""
    media_tokens: int
    """Of a medium; `projector` says so, too."""
    median: int
    """Tokens of a sample, of which half have fewer."""
    rows: tuple[int, ...]
    """Tokens of packed rows; of the first the goals speak."""
    whole: tuple[int, int]
    """Samples, and their mean tokens, of the row that must fit at 70B."""
    tokens: tuple[int, ...]
    """Of products with nf4 weights."""
    products: tuple[tuple[int, int], ...]
    """Inputs and outputs of these."""
    steps: int = 4
    """Optimizer steps that are timed, after one that is not."""
    goals: Mapping[str, Goals] = field(default_factory=lambda: GOALS)

    @property
    def rehearsed(self) -> bool:
        """Whether there is no GPU, so that nothing is measured."""
        return self.device.type == "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return torch.float32 if self.rehearsed else torch.bfloat16


GPU = Scale(
    device=torch.device("cuda"),
    matrix=8192,
    copied=2**30,
    llms=LLMS,
    clip=CLIP,
    projector=("layers=6", "tokens=64"),
    media_tokens=64,
    median=128,
    rows=(8192, 4096, 2048),
    whole=(64, 160),
    tokens=(256, 512, 1024, 2048, 4096, 8192),
    products=((4096, 14336), (14336, 4096), (8192, 28672)),
)
REHEARSAL = Scale(
    device=torch.device("cpu"),
    matrix=256,
    copied=2**20,
    llms={"8b": TINY_LLM, "70b": TINY_LLM},
    clip=TINY_CLIP,
    projector=("layers=2", "tokens=4"),
    media_tokens=4,
    median=16,
    rows=(128, 64),
    whole=(4, 16),
    tokens=(64, 128),
    products=((128, 256),),
    steps=2,
)


class Clock:
    """What is left of a stage's time.

    Args:
        seconds: In all.
    """

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def within(self, figures: dict[str, Any], name: str, seconds: float, run: Callable[[], dict[str, Any]]) -> None:
        """Add what `run` measures to `figures`; or that it was skipped, where it would not be done in time; or, under
        ``failures``, how it failed, which must not cost the others their time on the machine.

        Args:
            figures: Those of the stage.
            name: Of this part.
            seconds: That it takes, by a generous guess.
            run: Measures it.
        """
        if self.left() < seconds:
            figures.setdefault("skipped", []).append(f"{name}: no time left")
            return
        began = time.monotonic()
        try:
            figures |= run()
        except ModuleNotFoundError:
            raise
        except Exception:
            figures.setdefault("failures", {})[name] = traceback.format_exc()
        figures[f"seconds_of_{name}"] = round(time.monotonic() - began, 1)


def missing(stage: str) -> list[str]:
    """The packages that a stage needs and that are not there."""
    return [name for name in NEEDS[stage] if importlib.util.find_spec(name) is None]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], Any], device: torch.device, times: int = 10) -> float:
    """Seconds of one `run`, the device's work included: the mean of several after two that do not count."""
    for _ in range(2):
        run()
    synchronize(device)
    began = time.perf_counter()
    for _ in range(times):
        run()
    synchronize(device)
    return (time.perf_counter() - began) / times


def matmul_peak(scale: Scale) -> float:
    """FLOP/s of a matrix product in the precision that is trained in."""
    a = torch.randn(scale.matrix, scale.matrix, device=scale.device, dtype=scale.dtype)
    b = torch.randn(scale.matrix, scale.matrix, device=scale.device, dtype=scale.dtype)
    return 2 * scale.matrix**3 / timed(lambda: a @ b, scale.device, 20)


def difference(one: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest difference of two tensors' elements, by the largest element."""
    return float((one.double() - reference.double()).abs().max() / reference.double().abs().max())


def judge(figures: Mapping[str, Any], goals: Goals) -> str:
    """``met``; ``missed`` if something failed or a figure misses its goal; ``not_measured`` if one is not there."""
    holds = {"<=": lambda x, y: x <= y, ">=": lambda x, y: x >= y}
    there = {name: goal for name, goal in goals.items() if figures.get(name) is not None}
    if figures.get("failures") or not all(holds[sign](figures[name], number) for name, (sign, number) in there.items()):
        return "missed"
    return "met" if len(there) == len(goals) else "not_measured"


def line(stage: str, device: str, figures: Mapping[str, Any], goals: Goals, goal: str) -> str:
    """The one that a stage ends in: the figures that the goals are about, and whether they are met."""
    shown = [f"{name}={_short(figures[name])}" for name in goals if figures.get(name) is not None]
    if "skipped" in figures:
        shown.append(f"skipped='{'; '.join(figures['skipped'])}'")
    if figures.get("failures"):
        shown.append(f"failed='{', '.join(figures['failures'])}'")
    return " ".join([f"stage={stage}", f"device={device}", *shown, f"goal={goal}"])


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
