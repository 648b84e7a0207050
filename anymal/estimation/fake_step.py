"""A recipe's training step on tensors without data: what its model holds, and what a step keeps alive.

Decoder layers are alike, so a shallow LLM of two depths is run, and each part of each phase's peak is drawn out
linearly to the real depth. Everything else (widths, encoders, projectors, loss, the batch) is as in the run itself.
"""

from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from anymal.checkpoints import networks
from anymal.checkpoints.build import build_adapters
from anymal.config.schema import Checkpointing, Config
from anymal.data.budget import degrade
from anymal.data.packing import pack
from anymal.errors import UserError
from anymal.estimation.fake_llm import make_llm, stored_bytes, with_layers
from anymal.estimation.memory import Footprint, as_on
from anymal.modality import Adapter
from anymal.model.fake_tensors import shapes_only
from anymal.model.flops import Cost
from anymal.model.llm import add_lora, base_model, read_config
from anymal.model.multimodal import AnyMAL, select_trainable, trainable
from anymal.model.registry import Registry
from anymal.sample import IGNORED, Batch, Tokens

DEPTHS = (2, 4)
PHASES = ("encode", "language model", "projectors backward")


@dataclass(kw_only=True)
class Workload:
    """The samples of a micro-batch."""

    tokens: int
    """Tokens of a sample, media included; more where its media and answers alone take more."""
    answers: int
    """Those that are answered."""
    media: list[str] = field(default_factory=list)
    """Modalities of the media in a sample; empty takes one of the model's for each sample, in turn."""


@dataclass(kw_only=True)
class Held:
    """What a process holds between steps, in bytes, and how many numbers are trained."""

    body: int
    embeddings_and_head: int
    encoders: int
    frozen_projectors: int
    trained: int
    lora: int
    """How many of `trained` are LoRA's."""
    largest_layer: int
    """Bytes of a decoder layer: what ZeRO-3 gathers at once."""


class Rehearsal:
    """The model of a recipe without weights.

    Args:
        config: The recipe.
        registry: What it may name.
        gpu: Whether it is to train on a GPU: bfloat16, autocast and other kernels.
        llm_config: The LLM's transformers config; by default that of ``model.llm.name`` is read.

    Raises:
        UserError: A config is not there, or settings do not fit.
    """

    def __init__(self, config: Config, registry: Registry, *, gpu: bool, llm_config: Any = None):
        self.config, self.registry, self.gpu = config, registry, gpu
        self._llm_config = llm_config or read_config(config.model.llm.name)
        self.layers = self._llm_config.get_text_config().num_hidden_layers
        kinds = getattr(self._llm_config.get_text_config(), "layer_types", None) or ["alike"]
        self._depths = DEPTHS if self.layers > DEPTHS[1] and len(set(kinds)) == 1 else (self.layers,)
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        with shapes_only(self._fake):
            self.adapters: dict[str, Adapter] = build_adapters(
                registry,
                config.model.modalities,
                self._llm_config.get_text_config().hidden_size,
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
        with as_on(self._fake, gpu=self.gpu):
            if "lora" in self.config.train:
                llm = add_lora(llm, self.config.model.lora)
            model = AnyMAL(llm, self.adapters, self.config.train)
            for name in self.adapters.keys() - model.trained_encoders.keys():
                model.encoders[name].to(dtype)  # as on a GPU, where the tensors are not
            model._low_precision = self.gpu and self.config.model.llm.bits != 32
            select_trainable(model, self.config.train)
        return model

    def _deep(self, shallow: Mapping[int, float]) -> float:
        """A figure at the real depth from the same at the depths that were run."""
        if len(self._depths) == 1:
            return shallow[self.layers]
        low, high = self._depths
        return shallow[low] + (shallow[high] - shallow[low]) * (self.layers - low) / (high - low)

    def held(self) -> Held:
        """What is there before a step begins."""

        def over(measure: Any) -> int:
            return round(self._deep({depth: measure(model) for depth, model in self._models.items()}))

        model = self._models[self._depths[-1]]
        base = base_model(model.llm)
        outside = stored_bytes(torch.nn.ModuleList([base.get_input_embeddings(), base.get_output_embeddings()]))
        lora = over(lambda m: sum(p.numel() for n, p in m.llm.named_parameters() if "lora_" in n))
        trained = over(lambda m: sum(p.numel() for p in trainable(m).values()))
        whole = over(lambda m: stored_bytes(m.llm))
        body = whole - outside - 4 * lora
        learns, llm_learns = set(map(id, trainable(model).values())), networks.llm_learns(self.config.train)
        return Held(
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
        names, found = list(self.adapters), []
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
            found.append((max(work.tokens, work.answers + sum(taken)), kinds))
        return found

    def mean_tokens(self, work: Workload) -> int:
        """Tokens of a sample, on average over the modalities that take turns."""
        lengths = [length for length, _ in self.rows(work, max(1, len(self.adapters)))]
        return round(sum(lengths) / len(lengths))

    def batch(self, work: Workload, samples: int, *, real: bool = False) -> Batch:
        """A micro-batch of `samples` samples as the stream would pack it: noise if it is `real`, else shapes only."""
        packed = []
        for i, (length, kinds) in enumerate(self.rows(work, samples)):
            sizes = [self.adapters[kind].tokens for kind in kinds]
            runs = [(kind, sum(sizes[:n]), sizes[n]) for n, kind in enumerate(kinds)]
            shapes = [self.adapters[kind].encoder.shape for kind in kinds]
            media = [torch.randn(shape) if real else torch.zeros(()).expand(shape) for shape in shapes]
            labels = [IGNORED] * (length - work.answers) + [0] * work.answers
            packed.append(Tokens(key=str(i), ids=[0] * length, labels=labels, runs=runs, media=media))
        with nullcontext() if real else self._fake:
            return pack(packed)

    def flops(self, work: Workload, samples: int) -> tuple[Counter[str], float]:
        """FLOPs of a micro-batch by part, and those recomputed on top."""
        rows = self.rows(work, samples)
        tokens, squares = sum(length for length, _ in rows), sum(length**2 for length, _ in rows)
        cost, parts = self.cost, Counter()
        llm = cost.llm
        parts[f"LLM body ({llm.per_weight}N)"] = llm.per_weight * llm.body * tokens
        parts["its attention"] = 6 * llm.attention * squares
        parts["head at answers"] = llm.per_weight * llm.head * work.answers * samples
        parts["LoRA"] = 6 * llm.lora * tokens
        for kind in (kind for _, kinds in rows for kind in kinds):
            media = cost.media_flops(kind, self.adapters[kind].encoder.shape)
            parts["encoders"] += media - cost.projector[kind]
            parts["projectors"] += cost.projector[kind]
        for length, kinds in rows:
            for kind in cost.bridges.keys() & set(kinds):
                before = sum(self.adapters[other].tokens for other in kinds[: kinds.index(kind)])
                parts["cross-attention"] += cost.bridges[kind] * (length - before)
        return parts, llm.recomputed_flops(tokens, squares)

    def with_checkpointing(self, mode: Checkpointing) -> "Rehearsal":
        """The same with another ``model.llm.checkpointing``."""
        llm = replace(self.config.model.llm, checkpointing=mode)
        config = replace(self.config, model=replace(self.config.model, llm=llm))
        return Rehearsal(config, self.registry, gpu=self.gpu, llm_config=self._llm_config)

    def peaks(self, work: Workload, samples: int) -> dict[str, Counter[str]]:
        """What a step keeps alive beyond what is held, by phase and by label, in bytes.

        Raises:
            UserError: A network cannot be run on shapes alone.
        """
        key = (work.tokens, work.answers, *work.media, samples)
        if key in self._peaks:
            return self._peaks[key]
        batch = self.batch(work, samples)
        try:
            runs = {depth: _step(model, batch, self) for depth, model in self._models.items()}
        except DataDependentOutputException as error:
            raise UserError(
                "a network of this recipe looks at numbers to know its shapes (SigLIP 2 of flexible resolution does), "
                "so no step can be run without weights; estimate with another encoder in its place"
            ) from error
        found = {}
        for phase in PHASES:
            labels = set().union(*(run[phase] for run in runs.values()))
            found[phase] = Counter(
                {label: round(self._deep({d: run[phase][label] for d, run in runs.items()})) for label in labels}
            )
        self._peaks[key] = found
        return found

    @cached_property
    def cost(self) -> Cost:
        """FLOPs, with the LLM at its real depth."""
        costs = {depth: Cost(model, self.config.model.llm.checkpointing) for depth, model in self._models.items()}
        cost = costs[self._depths[-1]]
        deep = {
            name: round(self._deep({depth: getattr(c.llm, name) for depth, c in costs.items()}))
            for name in ("body", "embeddings", "head", "lora", "attention")
        }
        cost.llm = replace(cost.llm, **deep)
        return cost


def _step(model: AnyMAL, batch: Batch, rehearsal: Rehearsal) -> dict[str, Counter[str]]:
    """Encode, forward, backward; gradients of what learns are taken away as ZeRO does, into a buffer counted apart."""
    footprint = Footprint()
    base = base_model(model.llm)
    watched = {"LLM layers": [base.get_decoder()], "head and loss": [base.get_output_embeddings()]}
    watched |= {"projectors": list(model.projectors.values()), "encoders": list(model.encoders.values())}
    hooks = []
    if rehearsal.config.engine.zero:
        for parameter in trainable(model).values():
            hooks.append(parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)))

    def left_llm(*_: Any) -> None:
        footprint.phase = "projectors backward"

    def embed(*arguments: Any) -> Any:
        row, absent = type(model).embed(model, *arguments)
        if row.requires_grad:
            row.register_hook(left_llm)
        return row, absent

    packed = len(batch.keys) > 1
    with as_on(rehearsal._fake, gpu=rehearsal.gpu, packed=packed), footprint:
        for label, modules in watched.items():
            for module in modules:
                footprint.watch(module, label)
        model.embed = embed
        try:
            footprint.phase = "encode"
            moved = batch.to("cpu")
            features = model.encode(moved.media)
            footprint.phase = "language model"
            total, _ = model(moved, features)
            total.backward()
        finally:
            del model.embed
            for hook in hooks:
                hook.remove()
            model.zero_grad(set_to_none=True)
    media = Counter({"batch": sum(tensor.numel() * tensor.element_size() for tensor in batch.media.values())})
    return {phase: footprint.peaks.get(phase, Counter()) + media for phase in PHASES}
