"""A recipe's training step on tensors without data: what its model takes, and what a step keeps alive.

Decoder layers are alike, so a shallow LLM of two depths is run, and each part of each phase's peak is extrapolated
linearly to the real depth. Everything else (widths, encoders, projectors, loss, the batch) is as in the run itself.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from anymal.checkpoints import networks
from anymal.checkpoints.build import build_adapters
from anymal.config.schema import Checkpointing, Config, encoder_learns
from anymal.data.packing import pack
from anymal.data.view_budget import degrade
from anymal.environment import swapped
from anymal.errors import UserError
from anymal.estimation.fake_llm import make_llm, stored_bytes, with_layers
from anymal.estimation.memory import MemoryTracker, computing_on
from anymal.modality import Adapter, media_dtype
from anymal.model import multimodal, norms
from anymal.model.fake_tensors import shapes_only
from anymal.model.flops import StepFlops, llm_flops
from anymal.model.llm import add_lora, base_model, output_layer, read_config, token_embedding
from anymal.model.lora import is_lora
from anymal.model.multimodal import AnyMAL
from anymal.model.quantization import require_quantisable
from anymal.model.registry import Registry
from anymal.model.trainable import select_trainable, trainable
from anymal.sample import IGNORED, Batch, Features, PartlyEncoded, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DEPTHS = (2, 4)
ENCODE, FEATURES = "encode", "features"
LLM = ("language model", "projectors backward")
PHASES = (ENCODE, FEATURES, *LLM)


@dataclass(kw_only=True)
class Workload:
    """The samples of a micro-batch."""

    tokens: int
    """Tokens of a sample, media included; more where its media and answers alone take more."""
    answers: int
    """Those that are answered."""
    media: list[str] = field(default_factory=list)
    """Modalities of the media in a sample; empty takes one of the model's for each sample, in turn."""
    cached: bool = False
    """Whether their features are read in place of them (`anymal encode`)."""


@dataclass(kw_only=True)
class ResidentMemory:
    """What a process keeps in memory between steps, in bytes, and how many numbers are trained."""

    body: int
    embeddings_and_head: int
    encoders: int
    frozen_projectors: int
    trained: int
    lora: int
    """How many of `trained` are LoRA's."""
    largest_layer: int
    """Bytes of a decoder layer: what ZeRO-3 gathers at once."""


class FakeStep:
    """A recipe's training step without weights or data.

    Args:
        config: The recipe.
        registry: What it may name.
        gpu: Whether it is to train on a GPU: bfloat16, autocast and other kernels.
        llm_config: The LLM's transformers config; by default that of ``model.llm.name`` is read.

    Raises:
        UserError: A config is not there, or settings do not fit.
    """

    def __init__(self, config: Config, registry: Registry, *, gpu: bool, llm_config: "PreTrainedConfig | None" = None):
        self.config, self.registry, self.gpu = config, registry, gpu
        self._llm_config = llm_config or read_config(config.model.llm.name)
        require_quantisable(config.model.llm, self._llm_config, torch.bfloat16 if gpu else torch.float32)
        text = self._llm_config.get_text_config()
        self.layers: int = text.num_hidden_layers
        kinds = getattr(text, "layer_types", None) or ["alike"]
        self._depths = DEPTHS if self.layers > DEPTHS[1] and len(set(kinds)) == 1 else (self.layers,)
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        with shapes_only(self._fake):
            self.adapters: dict[str, Adapter] = build_adapters(
                registry,
                config.model.modalities,
                text.hidden_size,
                llm_layers=self.layers,
            )
        if any(hasattr(adapter.projector, "bridges") for adapter in self.adapters.values()):
            self._depths = (self.layers,)  # layers with a block before them are not like the others
        self._peaks: dict[tuple, dict[str, Counter[str]]] = {}
        self._models = {depth: self._model(depth) for depth in self._depths}

    def _model(self, depth: int) -> AnyMAL:
        dtype = torch.bfloat16 if self.gpu else torch.float32
        settings, learns = self.config.model.llm, networks.llm_learns(self.config.train)
        settings = replace(settings, bits=32) if learns else settings  # as load_llm has it
        llm = make_llm(settings, with_layers(self._llm_config, depth), self._fake, dtype)
        if self.gpu:
            norms.fuse(llm)
        with computing_on(self._fake, gpu=self.gpu):
            if "lora" in self.config.train:
                llm = add_lora(llm, self.config.model.lora)
            model = AnyMAL(llm, self.adapters, self.config.train)
            for name in self.adapters.keys() - model.trained_encoders.keys():
                model.encoders[name].to(dtype)  # as on a GPU, where the tensors are not
            model._low_precision = self.gpu and self.config.model.llm.bits != 32
            select_trainable(model, self.config.train)
        return model

    def _extrapolated(self, shallow: Mapping[int, float]) -> float:
        """A figure at the real depth from the same at the depths that were run."""
        if len(self._depths) == 1:
            return shallow[self.layers]
        low, high = self._depths
        return shallow[low] + (shallow[high] - shallow[low]) * (self.layers - low) / (high - low)

    def resident_memory(self) -> ResidentMemory:
        """What is there before a step begins."""

        def at_depth(measure: Callable[[AnyMAL], int]) -> int:
            return round(self._extrapolated({depth: measure(model) for depth, model in self._models.items()}))

        model = self._models[self._depths[-1]]
        ends: list[nn.Module] = [token_embedding(model.llm), output_layer(model.llm)]
        # Of those that are trained beside the LoRA, what they were copied from: the copies are among its parameters.
        outside = stored_bytes(nn.ModuleList([getattr(module, "original_module", module) for module in ends]))
        lora = at_depth(lambda m: sum(p.numel() for n, p in m.llm.named_parameters() if is_lora(n)))
        trained = at_depth(lambda m: sum(p.numel() for p in trainable(m).values()))
        whole = at_depth(lambda m: stored_bytes(m.llm))
        body = whole - outside - 4 * lora
        learns, llm_learns = set(map(id, trainable(model).values())), networks.llm_learns(self.config.train)
        return ResidentMemory(
            body=0 if llm_learns else body,  # then it is among what is trained
            embeddings_and_head=0 if llm_learns else outside,
            encoders=sum(
                stored_bytes(encoder) - sum(p.numel() * 4 for p in encoder.parameters() if id(p) in learns)
                for encoder in model.encoders.values()
            ),
            frozen_projectors=sum(p.numel() * 4 for p in model.projectors.parameters() if id(p) not in learns),
            trained=trained,
            lora=lora,
            largest_layer=body // self.layers,
        )

    def rows(self, work: Workload, samples: int) -> list[tuple[int, list[str]]]:
        """Length, and modality of each view of its media, of each sample of a micro-batch.

        Media in views take as many as ``data.max_tokens`` lets them beside the answer.
        """
        names, rows = list(self.adapters), []
        for i in range(samples):
            media = work.media or [names[i % len(names)]] if names else []
            sizes = [self.adapters[kind].tokens for kind in media]
            choices = [
                [size * n for n in range(self.adapters[kind].views, 0, -1)]
                for kind, size in zip(media, sizes, strict=True)
            ]
            taken = degrade(choices, self.config.data.max_tokens - work.answers)
            views = [tokens // size for tokens, size in zip(taken, sizes, strict=True)]
            kinds = [kind for kind, count in zip(media, views, strict=True) for _ in range(count)]
            rows.append((max(work.tokens, work.answers + sum(taken)), kinds))
        return rows

    def mean_tokens(self, work: Workload) -> int:
        """Tokens of a sample, on average over the modalities that take turns."""
        lengths = [length for length, _ in self.rows(work, max(1, len(self.adapters)))]
        return round(sum(lengths) / len(lengths))

    def samples(self, work: Workload, samples: int, *, real: bool = False) -> list[Tokens]:
        """A micro-batch's samples as workers give them: their media are noise if it is `real`, else shapes only."""
        packed = []
        for i, (length, kinds) in enumerate(self.rows(work, samples)):
            sizes = [self.adapters[kind].tokens for kind in kinds]
            runs = [(kind, sum(sizes[:n]), sizes[n]) for n, kind in enumerate(kinds)]
            media = [self._medium(kind, real=real, cached=work.cached) for kind in kinds]
            labels = [IGNORED] * (length - work.answers) + [0] * work.answers
            packed.append(Tokens(key=str(i), ids=[0] * length, labels=labels, runs=runs, media=media))
        return packed

    def batch(self, work: Workload, samples: int, *, real: bool = False) -> Batch:
        """These samples, packed."""
        tokens = self.samples(work, samples, real=real)
        with nullcontext() if real else self._fake:
            return pack(tokens)

    def _medium(self, kind: str, *, real: bool, cached: bool) -> Tensor | Features:
        """A medium as it travels, or its features: noise if it is `real`, else its shape and dtype."""
        encoder = self.adapters[kind].encoder
        shape, dtype = encoder.shape, media_dtype(encoder)
        if cached:
            shape, dtype = (encoder.tokens, encoder.width), torch.bfloat16
        elif self.gpu and dtype.is_floating_point and not encoder_learns(kind, self.config.train):
            dtype = torch.bfloat16  # see `anymal.data.prepare.Prepare.dtypes`
        medium = torch.zeros((), dtype=dtype).expand(shape)
        if real:
            medium = torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.randint(256, shape, dtype=dtype)
        return Features(tensor=medium) if cached else medium

    def media_sizes(self, work: Workload, samples: int) -> Counter[str]:
        """By modality, bytes of a micro-batch's decoded media as they travel, or of the features in their place."""
        sizes: Counter[str] = Counter()
        for kind in (kind for _, kinds in self.rows(work, samples) for kind in kinds):
            medium = self._medium(kind, real=False, cached=work.cached)
            tensor = medium.tensor if isinstance(medium, Features) else medium
            sizes[kind] += tensor.numel() * tensor.element_size()
        return sizes

    def flops(self, work: Workload, samples: int) -> tuple[Counter[str], float]:
        """FLOPs of a micro-batch by part, and those recomputed on top."""
        rows = self.rows(work, samples)
        tokens, squares = sum(length for length, _ in rows), sum(length**2 for length, _ in rows)
        counter, llm, needed = self.step_flops, self.step_flops.llm, Counter()
        needed[f"LLM body ({llm.per_weight}N)"] = llm.per_weight * llm.body * tokens
        needed["its attention"] = 6 * llm.attention * squares
        needed["head at answers"] = llm.per_head_weight * llm.head * work.answers * samples
        needed["LoRA"] = 6 * llm.lora * tokens
        for kind in (kind for _, kinds in rows for kind in kinds):
            needed["encoders"] += counter.encoder_flops(kind)
            needed["projectors"] += counter.projector[kind]
        for length, kinds in rows:
            for kind in counter.cross_attention.keys() & set(kinds):
                before = sum(self.adapters[other].tokens for other in kinds[: kinds.index(kind)])
                needed["cross-attention"] += counter.cross_attention[kind] * (length - before)
        return needed, llm.recomputed_flops(tokens, squares)

    def with_checkpointing(self, mode: Checkpointing) -> "FakeStep":
        """The same with another ``model.llm.checkpointing``."""
        llm = replace(self.config.model.llm, checkpointing=mode)
        config = replace(self.config, model=replace(self.config.model, llm=llm))
        return FakeStep(config, self.registry, gpu=self.gpu, llm_config=self._llm_config)

    def peaks(self, work: Workload, samples: int) -> dict[str, Counter[str]]:
        """What a step keeps alive beyond what is resident, by phase and by label, in bytes.

        The phase `ENCODE` has media and encoders. What it leaves, the features, is in the phases of the `LLM`, too, and
        alone in `FEATURES`.

        Raises:
            UserError: A network cannot be run on shapes alone.
        """
        key = (work.tokens, work.answers, work.cached, *work.media, samples)
        if key in self._peaks:
            return self._peaks[key]
        batch = self.batch(work, samples)
        try:
            runs = {depth: self._run(model, batch) for depth, model in self._models.items()}
        except DataDependentOutputException as error:
            raise UserError(
                "a network of this recipe looks at numbers to know its shapes (SigLIP 2 of flexible resolution does), "
                "so no step can be run without weights; estimate with another encoder in its place"
            ) from error
        peaks = {}
        for phase in PHASES:
            labels = sorted(set().union(*(run[phase] for run in runs.values())))  # the same table in every process
            peaks[phase] = Counter(
                {
                    label: round(self._extrapolated({depth: run[phase][label] for depth, run in runs.items()}))
                    for label in labels
                }
            )
        self._peaks[key] = peaks
        return peaks

    @cached_property
    def step_flops(self) -> StepFlops:
        """FLOPs, with the LLM at its real depth."""
        checkpointing = self.config.model.llm.checkpointing
        counts = {depth: llm_flops(model.llm, checkpointing) for depth, model in self._models.items()}

        def at_depth(name: str) -> int:
            return round(self._extrapolated({depth: getattr(count, name) for depth, count in counts.items()}))

        deepest = self._depths[-1]
        llm = replace(
            counts[deepest],
            body=at_depth("body"),
            embeddings=at_depth("embeddings"),
            head=at_depth("head"),
            lora=at_depth("lora"),
            attention=at_depth("attention"),
        )
        return StepFlops(self._models[deepest], llm)

    def _run(self, model: AnyMAL, batch: Batch) -> dict[str, Counter[str]]:
        """Encode, forward, backward. What is alive at each phase's peak, by label, in bytes.

        Gradients are freed as they are made, as under ZeRO, which moves them to a buffer that is counted apart.
        """
        tracker = MemoryTracker()
        watched: dict[str, list[nn.Module]] = {
            "LLM layers": [base_model(model.llm).get_decoder()],
            "head and loss": [output_layer(model.llm)],
            "projectors": [*model.projectors.values()],
            "encoders": [*model.encoders.values()],
        }
        hooks = []
        if self.config.engine.zero:
            for parameter in trainable(model).values():
                hooks.append(parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)))

        def left_llm(_: Tensor) -> None:
            tracker.phase = "projectors backward"

        def embed(batch: Batch, features: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            row, absent = type(model).embed(model, batch, features)
            if row.requires_grad:
                row.register_hook(left_llm)
            return row, absent

        packed = len(batch.keys) > 1
        with ExitStack() as stack:
            stack.enter_context(computing_on(self._fake, gpu=self.gpu, packed=packed))
            if self.gpu:  # the tensors seem to be on a CPU
                stack.enter_context(swapped(multimodal, "compute_dtype", lambda _: torch.bfloat16))
            for context in (tracker, swapped(model, "embed", embed)):
                stack.enter_context(context)
            for label, modules in watched.items():
                for module in modules:
                    tracker.watch(module, label)
            try:
                tracker.phase = ENCODE
                moved, learn = batch.to("cpu"), model.trained_encoders
                features = model.encode({name: media for name, media in moved.media.items() if name not in learn})
                tracker.relabel(features.values(), FEATURES)
                kept = sum(tensor.untyped_storage().nbytes() for tensor in features.values())  # of views, the whole
                tracker.peaks[FEATURES] = Counter({FEATURES: kept})
                tracker.phase = "language model"
                moved.media = {name: media for name, media in moved.media.items() if name in learn}
                total, _ = model(moved, features)
                del features  # as in training: the backward pass frees them as it goes
                total.backward()
            finally:
                for hook in hooks:
                    hook.remove()
                model.zero_grad(set_to_none=True)
        media = {phase: media_bytes(moved.media) for phase in LLM} | {ENCODE: media_bytes(batch.media), FEATURES: 0}
        return {phase: tracker.peaks.get(phase, Counter()) + Counter({"media": media[phase]}) for phase in PHASES}


def media_bytes(media: Mapping[str, Tensor | PartlyEncoded]) -> int:
    """Bytes of a micro-batch's media, or of the features that stand for them."""
    several = (
        tensor
        for value in media.values()
        for tensor in ((value.raw, value.features) if isinstance(value, PartlyEncoded) else (value,))
    )
    return sum(tensor.numel() * tensor.element_size() for tensor in several if tensor is not None)
