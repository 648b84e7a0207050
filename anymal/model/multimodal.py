"""Encode, project, splice, run the LLM: from a micro-batch to its loss.

    batch.media ──frozen encoders──▶ features ──projectors──▶ embeddings ─┐
    batch.ids ─────────────the LLM's own token embedding─────────────────▶ spliced row ──LLM──▶ loss at answer tokens

What some projectors make is also seen from between the LLM's layers (`anymal.model.cross_attention`). Which parameters
learn is said in `anymal.model.trainable`.

Frozen encoders are not registered as submodules: the engine sees only what gradients pass through, and under ZeRO-3
nothing is gathered for an encoder that only some ranks run. One that learns is registered, and runs in `forward`, on
every rank in every step.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anymal.config.schema import encoder_learns
from anymal.modality import Adapter, Encoder, in_chunks, zero_media
from anymal.model import attention, precision
from anymal.model.cross_attention import CrossAttention, VisibleMedia, media_spans
from anymal.model.llm import base_model, compute_dtype, set_frozen_mode, token_embedding
from anymal.model.lora import is_lora
from anymal.model.loss import chunked_loss, find_head, plain_loss, sums_per_group
from anymal.sample import Batch, PartlyEncoded


class AnyMAL(nn.Module):
    """An LLM, and for each modality an encoder and a projector.

    All are frozen until `anymal.model.trainable.select_trainable` says otherwise.

    Args:
        llm: A causal LM of transformers, on its device (with or without LoRA).
        adapters: By modality name, in the order in which every rank runs them.
        train: As for `select_trainable`. An encoder that is to learn stays in float32 and is registered.
        low_precision: Whether the arithmetic on a GPU is bfloat16 (`anymal.model.precision`); by default, where the
            LLM's weights are.
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
        # Read once: under ZeRO-3 reading a weight gathers it, and ranks must gather the same in the same order.
        table = token_embedding(llm).weight
        self.device = table.device
        self._low_dtype = precision.low_dtype(precision.hardware(self.device))
        self._low_precision = table.is_cuda and (
            table.dtype == self._low_dtype if low_precision is None else low_precision
        )
        projectors = {name: adapter.projector for name, adapter in adapters.items()}
        self.projectors = nn.ModuleDict(projectors)
        self.projectors.to(self.device)
        self.cross_attention = CrossAttention(llm, projectors)
        self.adapters = adapters  # a plain dict registers nothing
        self.encoders = {name: adapter.encoder for name, adapter in adapters.items()}
        self.trained_encoders = nn.ModuleDict()
        for name, encoder in self.encoders.items():
            if encoder_learns(name, train):
                self.trained_encoders[name] = encoder.to(self.device)
            else:
                freeze_encoder(encoder, self.device)

    def autocast(self) -> torch.autocast:
        """Mixed precision on a GPU: bfloat16 (float16 before Ampere), unless the LLM was asked for at 32 bits."""
        return torch.autocast(self.device.type, self._low_dtype, enabled=self._low_precision)

    def networks(self) -> Iterator[tuple[str, nn.Module]]:
        """LLM, encoders and projectors by name, the frozen ones included."""
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
        for name, several in media.items():
            if not isinstance(several, PartlyEncoded):
                features[name] = run_encoder(self.encoders[name], several, self.device)
                continue
            encoded = [] if several.raw is None else [run_encoder(self.encoders[name], several.raw, self.device)]
            known = several.features.to(self.device, compute_dtype(self.device))
            features[name] = torch.cat([*encoded, known])[several.order.to(self.device)]
        return features

    def _with_learnt(self, batch: Batch, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """`features` and those of the encoders that learn: of a zero medium, where the batch has none."""
        learnt = {}
        for name in self.trained_encoders:
            encoder, media = self.encoders[name], batch.media.get(name)
            learnt[name] = encoder(zero_media(encoder, 1, self.device) if media is None else media)
        return features | learnt

    def embed(self, batch: Batch, features: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The splice: token embeddings, and each medium's embeddings exactly where its placeholder stands.

        Every projector runs, in the same order on every rank: one whose modality is absent gets a zero input (or what
        a learning encoder makes of one), and its output takes part with weight zero. Otherwise ranks that see different
        modalities would wait for one another forever in the gradient reduction.

        Returns:
            [1, T, D] embeddings, and a scalar zero that depends on every projector that the batch has no medium for.

        Raises:
            ValueError: Embeddings and placeholder positions differ in number. Nothing is spliced.
        """
        row = token_embedding(self.llm)(batch.ids)
        absent = row.new_zeros((), dtype=torch.float32)
        for name, adapter in self.adapters.items():
            encoder, projector = adapter.encoder, adapter.projector
            if hasattr(projector, "skip") and name not in batch.skips:
                absent = absent + projector.skip.sum().float() * 0.0
            if name not in batch.media_positions:
                nothing = features.get(name)
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
                skipped = batch.skips[name]
                row = row.index_copy(1, skipped, projector.skip.to(row.dtype).expand(1, len(skipped), -1))
        if absent.requires_grad and not row.requires_grad:
            # Nothing in this row learns, but on another rank something may: under ZeRO-3 both must go back through the
            # LLM, whose weights are gathered for it.
            row = row + absent.to(row.dtype)
        return row, absent

    def visible_media(self, batch: Batch, features: dict[str, Tensor]) -> dict[str, VisibleMedia]:
        """What the row's tokens see of each modality that speaks to the LLM by cross-attention.

        As in `embed`, all of them take part on every rank: nobody sees a modality that is absent.
        """
        visible = {}
        for name, projector in self.cross_attention.projectors.items():
            encoder = self.encoders[name]
            nothing = torch.zeros(1, encoder.tokens, encoder.width, device=self.device)
            starts = batch.media_starts.get(name, [])
            row = media_spans(batch.lengths, starts, last_only=projector.last_only)
            visible[name] = VisibleMedia(latents=projector.context(features.get(name, nothing)), spans=[row])
        return visible

    def _read(self, reader: nn.Module, row: Tensor, batch: Batch, features: dict[str, Tensor], **more: Any) -> Any:
        more |= attention.arguments(base_model(self.llm), batch.lengths, batch.offsets)
        with self.cross_attention.over(self.visible_media(batch, features)):
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
        if any(p.requires_grad and not is_lora(name) for name, p in self.llm.named_parameters()):
            return self
        set_frozen_mode(self.llm, recompute=mode)
        for name, module in self.llm.named_modules():
            if is_lora(name):
                module.train(mode)
            elif hasattr(module, "lora_dropout"):  # DoRA asks the flag of the layer that it wraps whether to drop
                module.training = mode
        return self


def freeze_encoder(encoder: Encoder, device: torch.device) -> None:
    """Freeze an encoder and put it on its device, in the precision of the arithmetic there."""
    encoder.requires_grad_(False).eval().to(device, compute_dtype(device))


@torch.no_grad()
def run_encoder(encoder: Encoder, media: Tensor, device: torch.device) -> Tensor:
    """Decoded media [N, ...] → features [N, tokens, width], on the encoder's device.

    The one way through an encoder that does not learn, in every program: in the dtype of its weights, never under
    autocast, at most ``encoder_batch_size`` inputs of its network at a time. So equal chunks give equal features.
    """
    media = media.to(device)
    dtype = next((p.dtype for p in encoder.parameters() if p.is_floating_point()), compute_dtype(device))

    def encode(chunk: Tensor) -> Tensor:
        return encoder(chunk.to(dtype) if chunk.is_floating_point() else chunk)

    most = getattr(encoder, "encoder_batch_size", 0)
    with precision.without_autocast(device):
        return in_chunks(encode, media, most and max(1, most // getattr(encoder, "inputs_per_medium", 1)))
