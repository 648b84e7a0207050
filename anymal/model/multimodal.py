"""Encode, project, splice, run the LLM; and say what of it is trainable.

    batch.media ──frozen encoders──▶ features ──projectors──▶ embeddings ─┐
    batch.ids ─────────────the LLM's own embedding table─────────────────▶ spliced row ──LLM──▶ loss at answer tokens

Projectors that have bridges are also looked at from between the LLM's layers (`anymal.model.cross_attention`).

Frozen encoders are not registered as submodules: the engine sees only what gradients pass through, and under ZeRO-3
nothing is gathered for an encoder that only some ranks run. One that learns is registered, and runs in `forward`, on
every rank in every step.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anymal.config.schema import encoder_learns
from anymal.errors import UserError
from anymal.modality import Adapter, Encoder
from anymal.model import attention
from anymal.model.cross_attention import Bridges, Sight, looks
from anymal.model.llm import base_model, compute_dtype, set_frozen_mode
from anymal.model.loss import chunked_loss, find_head, plain_loss, sums_per_group
from anymal.sample import Batch, PartlyEncoded


class AnyMAL(nn.Module):
    """An LLM, and for each modality an encoder and a projector; frozen until `select_trainable` says otherwise.

    Args:
        llm: A causal LM of transformers, on its device (with or without LoRA).
        adapters: By modality name, in the order in which every rank runs them.
        train: As for `select_trainable`: an encoder that is to learn stays in float32 and is registered.
        low_precision: Whether the arithmetic on a GPU is bfloat16; by default, where the LLM's weights are.
    """

    def __init__(
        self,
        llm: nn.Module,
        adapters: dict[str, Adapter],
        train: Sequence[str] = (),
        *,
        low_precision: bool | None = None,
    ):
        super().__init__()
        self.llm = llm
        self._head = find_head(llm)
        # Read once: under ZeRO-3 every look at a weight gathers it, and ranks must gather the same in the same order.
        table = llm.get_input_embeddings().weight
        self.device = table.device
        self._low_precision = table.is_cuda and (
            table.dtype == torch.bfloat16 if low_precision is None else low_precision
        )
        self.projectors = nn.ModuleDict({name: adapter.projector for name, adapter in adapters.items()})
        self.projectors.to(self.device)
        self.bridges = Bridges(llm, self.projectors)
        self.encoders = {name: adapter.encoder for name, adapter in adapters.items()}  # a plain dict registers nothing
        self.trained_encoders = nn.ModuleDict()
        for name, encoder in self.encoders.items():
            if encoder_learns(name, train):
                self.trained_encoders[name] = encoder.to(self.device)
            else:
                place_encoder(encoder, self.device)

    def autocast(self) -> torch.autocast:
        """The precision of the arithmetic: bfloat16 on a GPU, unless the LLM was asked for at 32 bits."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._low_precision)

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """The named modules of which the model consists, frozen encoders included."""
        yield "llm", self.llm
        for name, encoder in self.encoders.items():
            yield f"encoders.{name}", encoder
        for name, projector in self.projectors.items():
            yield f"projectors.{name}", projector

    @torch.no_grad()
    def encode(self, media: dict[str, Tensor | PartlyEncoded]) -> dict[str, Tensor]:
        """Decoded media [N, ...] of each modality → features [N, tokens, width]. No gradient passes.

        For answering, this is all; in training, `forward` itself runs the encoders that learn.
        """
        features = {}
        for name, held in media.items():
            if not isinstance(held, PartlyEncoded):
                features[name] = run_encoder(self.encoders[name], held, self.device)
                continue
            made = [] if held.raw is None else [run_encoder(self.encoders[name], held.raw, self.device)]
            known = held.features.to(self.device, compute_dtype(self.device))
            features[name] = torch.cat([*made, known])[held.order.to(self.device)]
        return features

    def _with_learnt(self, batch: Batch, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """`features` and those of the encoders that learn: of a zero medium, where the batch has none."""
        learnt = {}
        for name, encoder in self.trained_encoders.items():
            media = batch.media.get(name)
            learnt[name] = encoder(torch.zeros(1, *encoder.shape, device=self.device) if media is None else media)
        return features | learnt

    def embed(self, batch: Batch, features: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Embed the ids and put each medium's embeddings exactly where its placeholder stands.

        Every projector runs, in the same order on every rank: one whose modality is absent gets a zero input (or what
        a learning encoder makes of one), and its output takes part with weight zero. Otherwise ranks that see different
        modalities would wait for one another forever in the gradient reduction.

        Returns:
            [1, T, D] embeddings, and a scalar zero that depends on every projector that the batch has no medium for.

        Raises:
            ValueError: Embeddings and placeholder positions differ in number. Nothing is spliced.
        """
        row = self.llm.get_input_embeddings()(batch.ids)
        absent = row.new_zeros((), dtype=torch.float32)
        for name, projector in self.projectors.items():
            if hasattr(projector, "skip") and name not in batch.skips:
                absent = absent + projector.skip.sum().float() * 0.0
            if name not in batch.media_positions:
                encoder, nothing = self.encoders[name], features.get(name)
                if nothing is None:
                    nothing = torch.zeros(1, encoder.tokens, encoder.width, device=self.device)
                absent = absent + projector(nothing).sum().float() * 0.0
                continue
            embeddings = projector(features[name]).to(row.dtype)
            positions, counts = batch.media_positions[name], batch.counts[name]
            if embeddings.shape[:2].numel() != len(positions) or len(counts) != len(embeddings):
                raise ValueError(
                    f"{name}: {len(embeddings)} media of {embeddings.shape[1]} embeddings for {len(counts)} "
                    f"placeholder runs of {len(positions)} positions in all; samples {', '.join(batch.keys)}"
                )
            row = row.index_copy(1, positions, embeddings.flatten(0, 1)[None])
            if name in batch.skips:
                places = batch.skips[name]
                row = row.index_copy(1, places, projector.skip.to(row.dtype).expand(1, len(places), -1))
        if absent.requires_grad and not row.requires_grad:
            # Nothing in this row learns, but on another rank something may: under ZeRO-3 both must go back through the
            # LLM, whose weights are gathered for it.
            row = row + absent.to(row.dtype)
        return row, absent

    def sights(self, batch: Batch, features: dict[str, Tensor]) -> dict[str, Sight]:
        """What the row's tokens see of each modality that has bridges into the LLM.

        As in `embed`, all of them take part on every rank: nobody sees a modality that is absent.
        """
        found = {}
        for name, projector in self.bridges.projectors.items():
            encoder = self.encoders[name]
            nothing = torch.zeros(1, encoder.tokens, encoder.width, device=self.device)
            starts = batch.media_starts.get(name, [])
            row = looks(batch.lengths, starts, last_only=projector.last_only)
            found[name] = Sight(latents=projector.context(features.get(name, nothing)), looks=[row])
        return found

    def _read(self, reader: nn.Module, row: Tensor, batch: Batch, features: dict[str, Tensor], **more: Any) -> Any:
        more |= attention.arguments(self.llm, batch.lengths)
        with self.bridges.open(self.sights(batch, features)):
            return reader(inputs_embeds=row, position_ids=batch.positions, use_cache=False, **more)

    def logits(self, batch: Batch, features: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """[A, V] logits that predict the answer tokens, and the zero of `embed`."""
        row, absent = self.embed(batch, features)
        return self._read(self.llm, row, batch, features, logits_to_keep=batch.answer_positions).logits[0], absent

    def hidden(self, batch: Batch, features: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """[A, D] what the head makes these logits of, and the zero of `embed`."""
        row, absent = self.embed(batch, features)
        decoder = base_model(self.llm).get_decoder()
        return self._read(decoder, row, batch, features).last_hidden_state[0, batch.answer_positions], absent

    def forward(self, batch: Batch, features: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The sum of the answer tokens' losses, and [G, 2] their sums and counts per group of `batch.groups`.

        Args:
            batch: On the model's device.
            features: Those of the frozen encoders for its media.
        """
        with self.autocast():
            features = self._with_learnt(batch, features)
            if self._head is not None and self._head.frozen():
                hidden, absent = self.hidden(batch, features)
                total, losses = chunked_loss(self._head, hidden, batch.targets)
            else:
                logits, absent = self.logits(batch, features)
                total, losses = plain_loss(logits, batch.targets)
        return total + absent, sums_per_group(losses, batch.answer_groups, len(batch.groups))

    def train(self, mode: bool = True) -> "AnyMAL":
        """Training mode for what is trained; what is frozen stays in eval mode, and so does all BatchNorm.

        A micro-batch holds a few media, on each rank others: their statistics would be poor, would differ from rank to
        rank, and no gradient would bring them together. BatchNorm's weights learn all the same.
        """
        super().train(mode)
        for module in self.trained_encoders.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        if any(p.requires_grad and "lora_" not in name for name, p in self.llm.named_parameters()):
            return self
        set_frozen_mode(self.llm, recompute=mode)
        for name, module in self.llm.named_modules():
            if "lora_" in name:
                module.train(mode)
        return self


def place_encoder(encoder: Encoder, device: torch.device) -> None:
    """Freeze an encoder and put it on its device, in the precision of the arithmetic there."""
    encoder.requires_grad_(False).eval().to(device, compute_dtype(device))


@torch.no_grad()
def run_encoder(encoder: Encoder, media: Tensor, device: torch.device) -> Tensor:
    """Decoded media [N, ...] → features [N, tokens, width], on the device that the encoder was placed on."""
    media = media.to(device)
    dtype = next((p.dtype for p in encoder.parameters() if p.is_floating_point()), compute_dtype(device))
    return encoder(media.to(dtype) if media.is_floating_point() else media)


def select_trainable(model: AnyMAL, train: Sequence[str]) -> None:
    """Freeze everything but what `train` names. The only such place.

    ``projectors`` and ``encoders`` are those of all modalities, ``projectors.NAME`` and ``encoders.NAME`` one's;
    ``lora`` is the LLM's LoRA, ``llm`` all of the LLM itself, embedding table and head included. Of an encoder those
    parameters learn that its features depend on: not a last layer or pooling that they pass by.

    Raises:
        UserError: A name fits nothing in the model, or the LLM is to learn beneath a LoRA.
    """
    model.requires_grad_(False)
    for encoder in model.encoders.values():
        encoder.requires_grad_(False)
    known = [
        part if name is None else f"{part}.{name}"
        for part in ("projectors", "encoders")
        for name in [None, *model.encoders]
    ]
    known += ["lora", "llm"]
    for name in train:
        if name not in known:
            raise UserError(f"train lists {name!r}; this model has {', '.join(known)}")
        chosen = list(_chosen(model, name))
        if not chosen:
            raise UserError(f"train lists {name!r}, but the model has no such parameters")
        for parameter in chosen:
            parameter.requires_grad_(True)
    model.train()


def _chosen(model: AnyMAL, name: str) -> Iterator[nn.Parameter]:
    """The parameters that a name in `train` stands for."""
    part, _, modality = name.partition(".")
    if part == "encoders":
        for encoder in [model.trained_encoders[modality]] if modality else model.trained_encoders.values():
            yield from _used(encoder, model.device)
        return
    if part == "llm" and any("lora_" in path for path, _ in model.llm.named_parameters()):
        raise UserError("train lists 'llm', but the LLM has a LoRA: train one or the other, or start without the LoRA")
    for path, parameter in model.named_parameters():
        if path.startswith(f"{name}.") or (name == "lora" and "lora_" in path):
            yield parameter


def _used(encoder: Encoder, device: torch.device) -> list[nn.Parameter]:
    """The parameters that an encoder's features depend on, found by a zero medium.

    Others would never get a gradient: neither ZeRO nor AdamW without it can save a state for such.
    """
    parameters = list(encoder.requires_grad_(True).parameters())
    features = encoder(torch.zeros(1, *encoder.shape, device=device))
    found = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
    encoder.requires_grad_(False)
    return [p for p, gradient in zip(parameters, found, strict=True) if gradient is not None]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@dataclass(frozen=True)
class Row:
    """A line of the table of what the model consists of."""

    module: str
    parameters: int
    dtype: str
    bits: int
    trainable: bool


def table(model: AnyMAL) -> list[Row]:
    """Module, parameters, dtype, bits, trainable: one row for each kind of parameter in each part."""
    rows: dict[tuple, int] = {}
    for name, part in model.parts():
        for path, parameter in part.named_parameters():
            module = f"{name}.lora" if "lora_" in path else name
            bits = 8 if parameter.dtype == torch.int8 else parameter.element_size() * 8
            numel = getattr(parameter, "ds_numel", parameter.numel())
            state = getattr(parameter, "quant_state", None)
            if state is not None:  # bitsandbytes packs two 4-bit weights into a byte
                bits, numel = 4, torch.Size(state.shape).numel()
            key = (module, str(parameter.dtype).removeprefix("torch."), bits, parameter.requires_grad)
            rows[key] = rows.get(key, 0) + numel
    return [Row(module, count, dtype, bits, learns) for (module, dtype, bits, learns), count in rows.items()]


def format_table(rows: Sequence[Row]) -> str:
    """The table as aligned text."""
    lines = [f"{'module':<22} {'parameters':>14} {'dtype':>9} {'bits':>4}  trainable"]
    for row in rows:
        mark = "yes" if row.trainable else "-"
        lines.append(f"{row.module:<22} {row.parameters:>14,} {row.dtype:>9} {row.bits:>4}  {mark}")
    return "\n".join(lines)


def fingerprint(modules: Any) -> str:
    """SHA-256 over the bytes of every parameter and buffer, in order: equal before and after means unchanged."""
    digest = hashlib.sha256()
    for name, tensor in sorted(modules.state_dict(keep_vars=True).items()):
        digest.update(name.encode())
        if isinstance(tensor, Tensor):
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
