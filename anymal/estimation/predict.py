"""The program behind `anymal estimate`: memory by part, the largest micro-batch, time and money, from shapes alone."""

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

from anymal.checkpoints.process import process_as_found
from anymal.config.command_line import parse_args
from anymal.config.schema import Checkpointing
from anymal.config.stages import Recipe, load_untrained
from anymal.errors import UserError
from anymal.estimation.fake_llm import config_of
from anymal.estimation.fake_step import FakeStep, Workload
from anymal.estimation.peak import Prediction, largest_batch, media_on_host, predict
from anymal.model.llm import read_config
from anymal.model.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

GB, TERA = 1e9, 1e12


@dataclass(frozen=True, kw_only=True)
class EstimateConfig(Recipe):
    """A run, and what is to be known about it."""

    gpu: bool = True
    """Whether it is to run on a GPU (bfloat16, its kernels) or on a CPU."""
    gpu_gb: float = 80.0
    """Memory of the card, in 10^9 bytes."""
    reserve_gb: float = 3.0
    """Of it, what is not for tensors: the CUDA context with its kernels, NCCL's buffers, gaps between tensors."""
    world: int = 1
    """Processes, one a GPU, over which ZeRO divides."""
    sample_tokens: int = 160
    """Tokens of a sample, media included; more where its media and answer alone take more."""
    answer_tokens: int = 40
    """Those of them that are answers."""
    media: list[str] = field(default_factory=list)
    """Modalities of the media in each sample, such as [image,image]; by default one of the recipe's, in turn."""
    tflops: float = 0.0
    """TFLOP/s of one GPU, what checkpointing recomputes included: hoped for, or measured (of a run's throughput.json,
    (model_tflop + recomputed_tflop) / seconds, over its GPUs)."""
    read_mb_per_s: float = 500.0
    """What is read from storage, in 10^6 bytes a second: says whether cached features (`anymal encode`) pay."""
    price_per_hour: float = 0.0
    """Of one GPU, in any currency."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """The LLM's model_type and sizes by the names of its config.json, in place of that file: {model_type: llama,
    vocab_size: 128256, hidden_size: 8192, intermediate_size: 28672, num_hidden_layers: 80, num_attention_heads: 64,
    num_key_value_heads: 8} is Llama 3.1 70B."""

    def __post_init__(self):
        super().__post_init__()
        self.require_modalities("media", self.media)
        for name in ("gpu_gb", "world", "sample_tokens", "answer_tokens", "read_mb_per_s"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.sample_tokens < self.answer_tokens:
            raise UserError(f"sample_tokens is {self.sample_tokens}, but answer_tokens {self.answer_tokens}")


def _cache(fake_step: FakeStep, work: Workload, samples: int, config: EstimateConfig) -> list[str]:
    """The table of what one medium's features cost to make, and to read once they were written by ``anymal encode``."""
    rate = config.tflops or config.run.peak_tflops
    if not rate or not fake_step.adapters:
        return []
    needed, _ = fake_step.flops(work, samples)
    saved = needed["encoders"] / needed.total()
    token = (needed.total() - needed["encoders"]) / (samples * fake_step.mean_tokens(work))
    lines = [f"Encoding one medium at {rate:g} TFLOP/s; reading its features (bf16) at {config.read_mb_per_s:g} MB/s"]
    lines += [f"  {'':<34} {'as tokens':>9} {'encode, ms':>11} {'read, ms':>9} {'kB':>9}"]
    pays = []
    for kind, adapter in fake_step.adapters.items():
        size = 2 * adapter.encoder.tokens * adapter.encoder.width
        read = size / config.read_mb_per_s / 1e3
        flops = fake_step.step_flops.encoder_flops(kind)
        encode = flops / rate / 1e9
        lines.append(f"  {kind:<34} {flops / token:>9,.1f} {encode:>11.3f} {read:>9.3f} {size / 1e3:>9,.0f}")
        pays += [kind] if read < encode else []
    verdict = f"caching pays for {', '.join(pays)}" if pays else "caching does not pay: reading takes longer"
    lines.append(f"  Without encoders a step needs {saved:.0%} fewer FLOPs; {verdict}.")
    return [*lines, "  The tokens are what data.encoder_cost takes.", ""]


@process_as_found()
def main(usage: str, registry: Registry) -> None:
    """Read the command line, estimate and print, stage by stage."""
    stages = parse_args(EstimateConfig, usage, more_help=registry.describe(), read=load_untrained)
    rooms = {}
    for config in stages:
        if config.stage:
            print(f"\nStage {config.stage}: {', '.join(config.train)} learn\n")
        rooms[config.stage] = estimate(config, registry)
        print(_fits(rooms[config.stage]))
    if len(stages) > 1:
        tightest = min(rooms, key=lambda name: rooms[name])
        print(f"\nAll {len(stages)} stages, of which {tightest} takes most\n{_fits(rooms[tightest])}")


def _fits(room: float) -> str:
    return f"fits: {'yes' if room >= 0 else 'no'}, by {abs(room) / GB:.3g} GB"


def estimate(config: EstimateConfig, registry: Registry) -> float:
    """Estimate and print; `room_left`."""
    work = Workload(tokens=config.sample_tokens, answers=config.answer_tokens, media=config.media)
    fake_step = FakeStep(config, registry, gpu=config.gpu, llm_config=llm_config_of(config))
    samples = max(1, config.data.row_tokens // fake_step.mean_tokens(work))
    if not config.data.row_tokens:
        samples = config.data.batch_size
    for table in (_memory, _host_memory, _checkpointing, arithmetic, _cache):
        _say("running steps on shapes alone ...")
        lines = table(fake_step, work, samples, config)
        _say("")
        print("\n".join(lines), flush=True)
    return room_left(config, predict(fake_step, work, samples, world=config.world))


def _say(text: str) -> None:
    """One line on a terminal that the next one replaces."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def room_left(config: EstimateConfig, predicted: Prediction) -> float:
    """What is left on the card at a step's peak, beside what is kept free, in bytes; negative where it does not fit."""
    return (config.gpu_gb - config.reserve_gb) * GB - predicted.total


def llm_config_of(config: EstimateConfig) -> "PreTrainedConfig":
    """The LLM's transformers config: by `architecture`, else read by its name."""
    if config.architecture:
        return config_of(config.architecture, "architecture")
    try:
        return read_config(config.model.llm.name)
    except UserError as error:
        raise UserError(f"{error}; or say by architecture what it is (see --help)") from error


def _memory(fake_step: FakeStep, work: Workload, samples: int, config: EstimateConfig) -> list[str]:
    """The table of a micro-batch's memory by part."""
    predicted = predict(fake_step, work, samples, world=config.world)
    each = fake_step.mean_tokens(work)
    lines = [f"Memory at the peak of a step: {samples} samples of {each} tokens in a row, GB (10^9 bytes)"]
    lines += [f"  {name:<34} {size / GB:>9.3f}" for name, size in predicted.by_part.items() if size]
    return [*lines, f"  {'in all':<34} {predicted.total / GB:>9.3f}", ""]


def _host_memory(fake_step: FakeStep, work: Workload, samples: int, config: EstimateConfig) -> list[str]:
    """The table of what decoded media take of a process's host memory while they wait."""
    waiting = media_on_host(fake_step, work, samples, config)
    if not waiting:
        return []
    lines = [
        "Host memory of decoded media, a process (one a GPU), GB; workers' own memory and the LLM's file come on top"
    ]
    lines += [f"  {name:<34} {size / GB:>9.3f}" for name, size in waiting.items() if size]
    return [*lines, f"  {'in all':<34} {waiting.total() / GB:>9.3f}", ""]


def _checkpointing(fake_step: FakeStep, work: Workload, samples: int, config: EstimateConfig) -> list[str]:
    """The table of what each mode of checkpointing takes, and what fits on the card with it."""
    room = (config.gpu_gb - config.reserve_gb) * GB
    chosen = config.model.llm.checkpointing
    lines = [f"Largest micro-batch on {config.gpu_gb:g} GB, of which {config.reserve_gb:g} GB are kept free"]
    lines += [f"  {'model.llm.checkpointing':<34} {'GB now':>9} {'samples':>9} {'tokens':>9}"]
    for mode in get_args(Checkpointing):
        tried = fake_step.with_checkpointing(mode)
        now = predict(tried, work, samples, world=config.world).total
        most = largest_batch(tried, work, room, world=config.world)
        name = f"{mode} (the recipe's)" if mode == chosen else mode
        lines.append(f"  {name:<34} {now / GB:>9.3f} {most:>9,} {most * fake_step.mean_tokens(work):>9,}")
    return [*lines, ""]


def arithmetic(fake_step: FakeStep, work: Workload, samples: int, config: EstimateConfig) -> list[str]:
    """The table of FLOPs, and what they take in time and money."""
    needed, recomputed = fake_step.flops(work, samples)
    tokens = samples * fake_step.mean_tokens(work)
    per_step = samples * config.optim.gradient_accumulation * config.world
    lines = [f"Arithmetic: GFLOP a token, TFLOP an optimizer step of {per_step} samples on {config.world} GPU(s)"]
    micro = config.optim.gradient_accumulation * config.world
    by_part = {**needed, "what is needed": needed.total(), "recomputed on top": recomputed}
    lines += [f"  {name:<34} {n / tokens / 1e9:>9.3f} {n * micro / TERA:>12,.1f}" for name, n in by_part.items() if n]
    total = needed.total() * config.optim.gradient_accumulation / TERA  # of one GPU
    with_both = (needed.total() + recomputed) * config.optim.gradient_accumulation / TERA
    rows = []
    if config.run.peak_tflops:
        rows.append((f"floor, at {config.run.peak_tflops:g} TFLOP/s", total / config.run.peak_tflops))
        rows += [("  and with what is recomputed", with_both / config.run.peak_tflops)] * bool(recomputed)
    if config.tflops:
        also = ", with recomputing" if recomputed else ""
        rows.append((f"at {config.tflops:g} TFLOP/s{also}", with_both / config.tflops))
    if not rows:
        return [*lines, "", "Set run.peak_tflops (an H100: 989) for the floor, tflops for time and cost."]
    lines += ["", f"  {'':<34} {'s a step':>9} {'tokens/s':>12} {'hours a run':>12} {'cost':>12}"]
    for name, seconds in rows:
        hours = seconds * config.optim.steps / 3600
        cost = f"{hours * config.world * config.price_per_hour:>12,.2f}" if config.price_per_hour else f"{'-':>12}"
        rate = tokens * micro / seconds
        lines.append(f"  {name:<34} {seconds:>9.3f} {rate:>12,.0f} {hours:>12,.1f} {cost}")
    return [*lines, ""]
