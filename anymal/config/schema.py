"""Every setting of a run and its default: one home per setting, typed, documented under the field.

`anymal.config.settings` reads them from recipes and the command line. Once resolved they are frozen: who needs others
makes new ones by ``dataclasses.replace``. A setting that gets another name has an entry in `anymal.config.renamed`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from anymal.errors import UserError, alternatives, nearest

Checkpointing = Literal["none", "selective", "full"]
Schedule = Literal["cosine", "linear", "constant"]
LORA_INIT = ("default", "gaussian", "loftq")
_MOVES_BASE = "it changes the LLM's own weights, which a checkpoint does not hold: loaded again, the LoRA would not fit"
_WANTS_DATA = "it is computed from the LLM's activations or gradients on data, which are not there when a run begins"
LORA_INIT_REFUSED = {
    **dict.fromkeys(("pissa", "olora"), _MOVES_BASE),
    **dict.fromkeys(("corda", "eva", "lora_ga"), _WANTS_DATA),
}
"""What PEFT offers as ``init_lora_weights`` and ``model.lora.init`` does not, with the reason."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """How an encoder's features become embeddings of the LLM."""

    kind: str = "mlp"
    """A kind of projector, such as linear, mlp, resampler or cross_attention (--help lists all)."""
    tokens: int = 32
    """K, the tokens that one medium takes in the LLM. AnyMAL: 64 for images, 32 for the others. 0: as many as the kind
    makes of the encoder's features by itself. With cross_attention: the latents that the LLM's layers look at."""
    layers: int = 2
    """Layers of an mlp, pixel_shuffle or qformer; blocks of a resampler (AnyMAL: 6 for images, 4 for video), or of an
    abstractor on either side of its pooling."""
    width: int = 0
    """Inner width. 0 takes the LLM's for an mlp or pixel_shuffle, the encoder's for the others."""
    heads: int = 8
    """Attention heads of a resampler or qformer."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of this kind alone (listed by --help under its name)."""

    def __post_init__(self):
        _require(min(self.layers, self.heads) > 0, "a projector needs at least one layer and one head")
        _require(self.tokens >= 0, f"projector.tokens is {self.tokens}; it cannot be negative")


@dataclass(frozen=True, kw_only=True)
class ModalityConfig:
    """One modality of the model."""

    encoder: Any = MISSING
    """Hub name or local folder of the frozen encoder, or a composition of several."""
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    """What is trained between the encoder and the LLM."""
    options: dict[str, Any] = field(default_factory=dict)
    """Decoding settings of this modality (listed by --help under its name)."""
    encoder_batch_size: int = 64
    """Most pictures, frames, sounds or windows that the frozen encoder takes at once, which bounds its memory whatever
    the micro-batch holds. A clip counts as its frames. 0: all at once, as always in training where it learns."""

    def __post_init__(self):
        size = self.encoder_batch_size
        _require(size >= 0, f"encoder_batch_size is {size}; it is at least 1, or 0 for all at once")


@dataclass(frozen=True, kw_only=True)
class LLMConfig:
    """The frozen language model."""

    name: str = MISSING
    """Hub name or local folder of any causal LM of transformers."""
    bits: int = 4
    """4 (nf4, double quantisation), 8, 16 (bfloat16) or 32 (float32)."""
    int8_threshold: float = 6.0
    """At 8 bits on a GPU: columns of a layer's input that hold a value of at least this are multiplied in 16 bits, the
    rest in 8 (LLM.int8()). To find them every layer waits for the host; 0 never waits, and multiplies all in 8 bits,
    which LLMs with outliers do not bear (docs/memory.md). On a CPU weights alone are in 8 bits: it plays no part."""
    allow_unquantized: bool = False
    """At 4 or 8 bits: take an LLM although bitsandbytes cannot quantise more than 1% of its weights (the experts of a
    mixture), which then stay in 16 or 32 bits. Otherwise it is refused."""
    attention: str = "packed"
    """packed (each sample of a row by itself; where the LLM's architecture does not let it, sdpa), or one of
    transformers' implementations: eager, sdpa, flash_attention_2, flex_attention."""
    checkpointing: Checkpointing = "none"
    """Activation (gradient) checkpointing, what the backward pass recomputes: none, selective (elementwise results) or
    full (each decoder layer)."""
    license: str = ""
    """The LLM's licence, for the model card; empty reads it from the model's own card if there is one."""

    def __post_init__(self):
        _require(self.bits in (4, 8, 16, 32), f"model.llm.bits is {self.bits}; it can be 4, 8, 16 or 32")
        _require(
            self.int8_threshold >= 0, f"model.llm.int8_threshold is {self.int8_threshold}; it can be 0 (none) or more"
        )


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adaptation of the LLM (trained when `train` lists lora). AnyMAL: rank 64, alpha 16, all layers."""

    rank: int = 64
    """Rank of the update."""
    alpha: float = 16
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the update's input."""
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Names of the linear layers that get an update, or [all-linear]."""
    exclude: list[str] = field(default_factory=list)
    """Names of layers among the targets that get none."""
    rslora: bool = False
    """Scale the update by alpha / √rank (PEFT's use_rslora), so that high ranks learn as fast as low ones."""
    dora: bool = False
    """Learn the length of each row of the updated weights as well (PEFT's use_dora). It takes more time and memory; not
    with engine.zero 3."""
    init: str = "default"
    """How the update begins: default (A random, B zero), gaussian (A from a normal distribution, B zero), or loftq (the
    best approximation of what 4 bits take from the weights; model.llm.bits 4)."""
    modules_to_save: list[str] = field(default_factory=list)
    """Names of modules of the LLM of which a copy is trained beside the update and saved with it, all of their weights,
    in float32: [embed_tokens, lm_head]. Not modules that are quantised."""

    def __post_init__(self):
        _require(self.rank > 0, f"model.lora.rank is {self.rank}; it must be at least 1")
        _require(0 <= self.dropout < 1, f"model.lora.dropout is {self.dropout}; it is a share below 1")
        kind = self.init.split("_niter_")[0]
        if reason := LORA_INIT_REFUSED.get(kind):
            raise UserError(f"model.lora.init={self.init}: {reason}; set it to {alternatives(LORA_INIT)}")
        _require(self.init in LORA_INIT, f"model.lora.init is {self.init!r}; it can be {alternatives(LORA_INIT)}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """LLM, modalities, and what to start from."""

    llm: LLMConfig = field(default_factory=LLMConfig)
    """The frozen language model."""
    modalities: dict[str, ModalityConfig] = field(default_factory=dict)
    """One entry for each modality, by its name; their options, listed below, say which there are."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adaptation of the LLM."""
    checkpoint: Any = None
    """A checkpoint folder that the run starts from: its projectors, its LoRA, and encoders and LLM if it trained them;
    nothing else of it is used. Of modalities that were trained apart with the same LLM, several: by modality, such as
    {image: runs/a, imu: runs/b}, or a list."""

    def __post_init__(self):
        start = self.checkpoint
        fits = isinstance(start, str | None)
        if isinstance(start, dict):  # null: that modality starts fresh
            fits = all(isinstance(folder, str | None) for folder in start.values())
        elif isinstance(start, list):
            fits = all(isinstance(folder, str) for folder in start)
        _require(fits, f"model.checkpoint is {start!r}; it can be a folder, a list of folders, or one by modality")
        _require(
            not (self.lora.dora and self.llm.bits == 8),
            "model.lora.dora does not go with model.llm.bits=8: PEFT cannot read back weights at 8 bits without harm; "
            "set model.llm.bits to 4, 16 or 32",
        )


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """One of several datasets."""

    shards: Any = MISSING
    """As data.shards."""
    ratio: float = 1.0
    """Its share of the samples, relative to the other datasets' ratios."""
    epochs: float = 0.0
    """In place of ratio: its share of the samples is this times its size. Of two datasets with epochs 1 and 2, the
    second is read twice while the first is read once. All datasets have it, or none."""
    instructions: list[str] = field(default_factory=list)
    """In place of prompt.instruction for this dataset's media-caption pairs: one of these, drawn for each sample anew
    in every epoch. Empty leaves prompt.instruction."""

    def __post_init__(self):
        _require(self.epochs >= 0, f"a dataset's epochs is {self.epochs}; it cannot be negative")
        _require(not self.epochs or self.ratio == 1.0, "a dataset takes a ratio or epochs, not both")
        _require(all(text.strip() for text in self.instructions), "a dataset's instructions: one of them is empty")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and how."""

    shards: Any = None
    """Tars of the only dataset: a path, a brace pattern (a/{000..015}.tar), a folder, an address (https://, s3://, gs://,
    hf://datasets/…) or a pattern of addresses, or a list of these."""
    cache: str = ""
    """Folder for downloaded tars; empty takes $ANYMAL_CACHE/shards, or ~/.cache/anymal/shards."""
    cache_gb: float = 0.0
    """GB (1e9 bytes) that downloaded tars may take; those not used for longest are removed. 0 does not limit it."""
    datasets: dict[str, DatasetConfig] = field(default_factory=dict)
    """Several datasets with ratios, by name, in place of data.shards."""
    batch_size: int = 16
    """Samples in a micro-batch of one process, end to end in one row; it plays no part once row_tokens is set."""
    row_tokens: int = 0
    """Sequence packing: samples of any length are packed into rows of at most this many tokens, a row being the
    micro-batch of one process. 0 packs batch_size samples instead."""
    packing_buffer: int = 16
    """Samples that may be kept for a later row while a fitting one is sought (row_tokens only)."""
    encoder_cost: dict[str, float] = field(default_factory=dict)
    """By modality: how many tokens one medium counts in row_tokens for its encoder's work, beside its own tokens, so
    that rows cost all ranks the same time (`anymal estimate` says how many)."""
    group_by: Literal["none", "modality", "dataset"] = "none"
    """What the samples of a micro-batch have in common. Ratios are kept over the run."""
    shuffle: int = 10_000
    """Samples that are shuffled among one another (shards are shuffled as well); 0 keeps the shards' order."""
    workers: int = 2
    """Processes that read and decode; 0 does it in the training process. The order of samples is the same.
    A sample over which a worker crashes is a bad one; with 0, a decoder that crashes ends the run."""
    timeout: float = 300.0
    """Seconds to wait for a worker; a sample that takes longer even in a process of its own stops the run, by name."""
    max_tokens: int = 2048
    """Longest sample in tokens, media included; a longer one is a bad sample."""
    max_bad_in_a_row: int = 20
    """Stop after more bad samples than this without a good one between; 0 tolerates none."""
    max_bad_share: float = 0.1
    """Stop when more than this share of the samples is bad; 0 tolerates none."""
    features: Literal["auto", "never", "float32", "bf16", "int8"] = "auto"
    """Whether features that `anymal encode` wrote are read in place of media: auto (where there are any, the most
    exact), float32, bf16 or int8 (only such), never. `anymal encode` writes this precision; with auto, bf16."""

    def __post_init__(self):
        _require(self.batch_size > 0, f"data.batch_size is {self.batch_size}; it must be at least 1")
        least = min(self.workers, self.shuffle, self.packing_buffer, self.row_tokens)
        _require(least >= 0, "data.workers, shuffle, packing_buffer and row_tokens cannot be negative")
        _require(
            not self.row_tokens or self.row_tokens >= self.max_tokens,
            f"data.row_tokens is {self.row_tokens}, but a sample may have data.max_tokens = {self.max_tokens}",
        )
        _require(min(self.encoder_cost.values(), default=0) >= 0, "data.encoder_cost cannot be negative")
        _require(self.cache_gb >= 0, f"data.cache_gb is {self.cache_gb}; it cannot be negative")
        _require(self.timeout > 0, f"data.timeout is {self.timeout}; it is a number of seconds")
        _require(0 <= self.max_bad_share <= 1, f"data.max_bad_share is {self.max_bad_share}; it is a share from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """How a sample becomes text for the LLM."""

    template: Literal["chat", "plain"] = "chat"
    """chat (the tokenizer's chat template) or plain (media and texts one after another, a line break after a user's
    words, then the answer)."""
    system: str = ""
    """System message put before conversations that have none (chat only); empty leaves the template's own."""
    instruction: str = ""
    """For media-caption pairs: what the user says after the medium, e.g. "Describe it."; may be empty."""


@dataclass(frozen=True, kw_only=True)
class OptimGroup:
    """What AdamW does otherwise with some of the parameters that learn."""

    lr: float | None = None
    """Peak learning rate of these parameters; null takes optim.lr."""
    weight_decay: float | None = None
    """Decoupled weight decay of these parameters; null takes optim.weight_decay."""

    def __post_init__(self):
        _require(
            min(self.lr or 0, self.weight_decay or 0) >= 0,
            f"optim.groups: a group has lr {self.lr} and weight_decay {self.weight_decay}; they cannot be negative",
        )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW; the learning rate rises linearly to its peak, then follows a schedule."""

    lr: float = 2e-4
    """Peak learning rate (AnyMAL: 2e-4 for images, 1e-4 for the others, 1e-5 for instruction tuning)."""
    weight_decay: float = 0.0
    """Decoupled weight decay, of all that learns alike: biases and norms are not left out."""
    groups: dict[str, OptimGroup] = field(default_factory=dict)
    """Learning rate and weight decay of some parameters, by a name that train may list: projectors, projectors.NAME,
    encoders, encoders.NAME, lora, llm. Each takes a value from the most specific name that sets it. Every rate follows
    the same schedule. On the command line: optim.groups.lora.lr=2e-4, 'optim.groups={projectors.NAME: {lr: 1e-3}}'."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Adam's decay rates of the first and second moment."""
    schedule: Schedule = "cosine"
    """What the learning rate does after warm-up: half a cosine or a line down to the end, or nothing."""
    warmup: float = 0.03
    """Share of the steps over which the learning rate rises."""
    warmup_steps: int | None = None
    """In place of warmup: the number of these steps."""
    min_lr_rate: float = 0.0
    """Where a cosine or linear schedule ends, as a share of the peak, not a rate: 0.1 of 2e-4 ends at 2e-5."""
    steps: int = 1000
    """Optimizer steps of the run."""
    gradient_accumulation: int = 1
    """Gradient accumulation: micro-batches per optimizer step and process."""
    clip: float = 1.0
    """Gradient clipping: the largest norm; 0 does not clip."""

    def __post_init__(self):
        least = min(self.steps, self.gradient_accumulation)
        _require(least > 0, "optim.steps and optim.gradient_accumulation must be at least 1")
        least = min(self.lr, self.weight_decay, self.clip)
        _require(least >= 0, "optim.lr, optim.weight_decay and optim.clip cannot be negative")
        _require(0 <= self.warmup <= 1, f"optim.warmup is {self.warmup}; it is a share from 0 to 1")
        decays = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _require(decays, f"optim.betas is {self.betas}; it takes two numbers from 0 to below 1")
        _require(0 <= self.min_lr_rate <= 1, f"optim.min_lr_rate is {self.min_lr_rate}; it is a share from 0 to 1")
        _require(
            not self.min_lr_rate or self.schedule != "constant",
            f"optim.min_lr_rate is {self.min_lr_rate}, but optim.schedule=constant does not fall; set it to 0",
        )
        if self.warmup_steps is not None:
            _require(
                self.warmup in (0, OptimConfig.warmup),
                f"optim.warmup is {self.warmup} and optim.warmup_steps {self.warmup_steps}; to count steps, set "
                "optim.warmup=0; for a share, optim.warmup_steps=null",
            )
            _require(
                0 <= self.warmup_steps <= self.steps,
                f"optim.warmup_steps is {self.warmup_steps}; it is a number from 0 to optim.steps = {self.steps}",
            )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """DeepSpeed."""

    zero: int = 1
    """ZeRO stage: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters are sharded over processes."""
    deepspeed: str | None = None
    """A DeepSpeed JSON file whose settings are added to the derived ones; one that contradicts ours is an error."""

    def __post_init__(self):
        _require(self.zero in (0, 1, 2, 3), f"engine.zero is {self.zero}; it can be 0, 1, 2 or 3")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run lives and how it is followed."""

    dir: str = "runs/default"
    """Folder of checkpoints, metrics.jsonl, quarantine.jsonl and the resolved recipe."""
    seed: int = 0
    """All randomness derives from it."""
    deterministic: bool = False
    """On a GPU: only kernels that give the same bits each time, so that a run goes on to the bit as if it had never
    stopped (slower; by how much is not yet measured). On a CPU it does that anyway."""
    resume: str = "auto"
    """auto (go on from the folder's latest checkpoint, if any), never (refuse a folder in use), or a checkpoint."""
    save_every: int = 100
    """Steps between checkpoints; the last step always saves one."""
    keep: int = 3
    """Newest checkpoints that are kept."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl and W&B."""
    peak_tflops: float = 0.0
    """What one GPU does at best (10^12 FLOP/s; an H100 989 in dense bfloat16), for ``utilisation``; 0 if not known."""
    wandb: Literal["online", "offline", "disabled"] = "disabled"
    """Whether figures go to W&B, now or by its own ``wandb sync`` later."""
    project: str = "anymal"
    """W&B project."""
    group: str = ""
    """W&B group that the run is listed in; for a recipe of several stages, its run.dir if left empty."""
    data_license: str = ""
    """Licences of the data, for the model card."""
    samples: int = 4
    """Samples whose answers are generated and logged with every checkpoint; 0 for none."""
    samples_from: Any = None
    """Shards that they are taken from, as data.shards; by default the training data."""

    def __post_init__(self):
        least = min(self.save_every, self.keep, self.log_every)
        _require(least > 0, "run.save_every, run.keep and run.log_every must be at least 1")
        _require(self.peak_tflops >= 0, f"run.peak_tflops is {self.peak_tflops}; it cannot be negative")
        _require(self.samples >= 0, f"run.samples is {self.samples}; it cannot be negative")


def trainable_names(modalities: Iterable[str]) -> list[str]:
    """What `train` may list, and ``optim.groups`` may name, for a model of these modalities."""
    names = list(modalities)
    of_modalities = [[group, *(f"{group}.{name}" for name in names)] for group in ("projectors", "encoders")]
    return [*of_modalities[0], *of_modalities[1], "lora", "llm"]


def encoder_learns(modality: str, train: Sequence[str]) -> bool:
    """Whether `train`, as in a recipe, names the encoder of a modality."""
    return "encoders" in train or f"encoders.{modality}" in train


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """LLM, modalities, and what to start from."""
    train: list[str] = field(default_factory=lambda: ["projectors"])
    """What is trainable: projectors, encoders (all), projectors.NAME, encoders.NAME (one modality's), lora, or llm
    (all of the LLM, embeddings and head included; model.llm.bits 16 or 32). Everything else is frozen."""
    data: DataConfig = field(default_factory=DataConfig)
    """What is read, and how."""
    prompt: PromptConfig = field(default_factory=PromptConfig)
    """How a sample becomes text for the LLM."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and schedule."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """DeepSpeed."""
    run: RunConfig = field(default_factory=RunConfig)
    """Where the run lives and how it is followed."""

    def __post_init__(self):
        self.require_modalities("data.encoder_cost", self.data.encoder_cost)
        if isinstance(self.model.checkpoint, dict):
            self.require_modalities("model.checkpoint", self.model.checkpoint)
        known = trainable_names(self.model.modalities)
        for name in self.optim.groups:
            _require(name in known, f"optim.groups has no {name!r}; {nearest(name, known)}")
        _require(
            not (self.model.lora.dora and self.engine.zero == 3),
            "model.lora.dora does not go with engine.zero=3: it needs the whole of a layer's frozen weights, of which "
            "ZeRO 3 leaves each process a part; set engine.zero to 2 or less",
        )

    def require_modalities(self, setting: str, names: Iterable[str]) -> None:
        """Refuse a setting that speaks of a modality that the model does not have, and name the nearest."""
        for name in names:
            if name not in self.model.modalities:
                hint = nearest(name, self.model.modalities, "it has")
                raise UserError(f"{setting}: the model has no modality {name!r}; {hint}")
