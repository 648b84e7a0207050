"""The other way for media to speak to the LLM: between its layers, by cross-attention. Beside the splice, in the model.

    features ──projector.context──▶ latents [M, R, C] ─┐ (`VisibleMedia`: and which tokens see which of them)
    hidden states [B, T, D] of the LLM ────────────────┴─block──▶ hidden states [B, T, D] ──the next decoder layer──▶

M media (or views of one) of one modality in all rows   R latents of each   C their width   S tokens that see any

Nothing of the LLM is rewritten: a forward pre-hook of a decoder layer calls the cross-attention block that a projector
has for it. The hooks do nothing outside of `CrossAttention.over`, so whoever else runs the LLM finds it as it was. What
a block needs is handed to it as arguments; what activation checkpointing computes again in the backward pass is
therefore the same.

A projector calls its blocks ``bridges``: the name stands in checkpoints.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from anymal.errors import UserError
from anymal.modality import Projector
from anymal.model.activation_checkpointing import LAYERS_FUNCTION
from anymal.model.llm import base_model


class MediaSpan(NamedTuple):
    """Neighbouring tokens that see the same media: those from `first` up to, not including, `last`.

    Where the two are equal the tokens see none.
    """

    tokens: int
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class VisibleMedia:
    """What the tokens of B rows see of one modality's media."""

    latents: Tensor
    """[M, R, C], in the order of the rows and of the positions in them."""
    spans: Sequence[Sequence[MediaSpan]]
    """For each row, spans over all of its tokens, from the first to the last."""

    def spans_of(self, rows: int, tokens: int) -> list[MediaSpan]:
        """The spans of `rows` × `tokens` hidden states, end to end.

        If `tokens` is the length of the rows, these are the rows themselves; else they are tokens generated after them,
        which see what the last one saw. There may be several copies of each row, side by side: beams, or several
        answers.
        """
        spans: list[MediaSpan] = []
        for row in self.spans:
            known = sum(span.tokens for span in row) == tokens
            for _ in range(rows // len(self.spans)):
                spans += row if known else [row[-1]._replace(tokens=tokens)]
        return spans

    def continued(self, owners: Sequence[int]) -> "VisibleMedia":
        """What new tokens see when rows are continued: `owners` has, for each new row, the row that it continues."""
        spans = [[self.spans[owner][-1]._replace(tokens=1)] for owner in owners]
        return VisibleMedia(latents=self.latents, spans=spans)


def media_spans(lengths: Sequence[int], starts: Sequence[tuple[int, int]], *, last_only: bool) -> list[MediaSpan]:
    """What each token of a packed row sees of one modality: media of its own sample that do not stand after it.

    A token sees a contiguous range of media, and so do its neighbours up to the next medium. Hence there is no
    attention mask.

    Args:
        lengths: Tokens of each sample; T in all.
        starts: For each medium or view, the position (in T) of its first token, and the number of the first view of the
            same medium (its own, if it is the only one); `anymal.sample.Batch.media_starts`.
        last_only: Whether only the last medium is seen (in all of its views so far), not those before it too.
    """
    begins = [0, *accumulate(lengths)]
    positions = [position for position, _ in starts]
    changes = [(begin, 0, 0) for begin in begins]  # from here on nothing is seen
    for number, (position, medium) in enumerate(starts):
        begin = begins[bisect_right(begins, position) - 1]
        changes.append((position, medium if last_only else bisect_left(positions, begin), number + 1))
    pairs = pairwise(sorted(changes))
    spans = [MediaSpan(end - position, first, last) for (position, first, last), (end, *_) in pairs]
    return [span for span in spans if span.tokens]


def left_padded(several: Sequence[VisibleMedia], longest: int) -> VisibleMedia:
    """The visible media of several rows as those of one batch, each row padded on the left to so many tokens."""
    spans, before = [], 0
    for visible in several:
        (row,) = visible.spans
        moved = [MediaSpan(tokens, first + before, last + before) for tokens, first, last in row]
        missing = longest - sum(span.tokens for span in row)
        spans.append([MediaSpan(missing, 0, 0), *moved] if missing else moved)
        before += len(visible.latents)
    return VisibleMedia(latents=torch.cat([visible.latents for visible in several]), spans=spans)


class CrossAttention:
    """The hooks through which the LLM's layers see media.

    Args:
        llm: A causal LM of transformers, with or without LoRA.
        projectors: By modality. Those that have cross-attention blocks (see `anymal.modality.Projector`) get hooks.

    Raises:
        UserError: A projector has blocks, but the LLM's decoder layers are not found.
    """

    def __init__(self, llm: nn.Module, projectors: Mapping[str, Projector]):
        self.projectors = {name: projector for name, projector in projectors.items() if hasattr(projector, "bridges")}
        """Those that have cross-attention blocks."""
        self._visible: Mapping[str, VisibleMedia] = {}
        for name, projector in self.projectors.items():
            layers = _decoder_layers(llm, name)
            for number, block in projector.bridges.items():
                layers[int(number)].register_forward_pre_hook(partial(self._before, name, block), with_kwargs=True)

    @contextmanager
    def over(self, visible: Mapping[str, VisibleMedia]) -> Iterator[None]:
        """Inside, the LLM's layers see what `visible` says, by modality."""
        self._visible = visible
        try:
            yield
        finally:
            self._visible = {}

    def _before(
        self, name: str, block: nn.Module, layer: nn.Module, arguments: tuple, named: dict
    ) -> tuple[tuple, dict] | None:
        """The hook: the layer's arguments with other hidden states."""
        if name not in self._visible:
            return None
        call: Callable = block
        # transformers checkpoints a layer's forward function, which hooks are outside of.
        if getattr(layer, "gradient_checkpointing", False) and layer.training:
            call = partial(getattr(layer, LAYERS_FUNCTION), block)
        if arguments:
            return (cross_attend(call, arguments[0], self._visible[name]), *arguments[1:]), named
        return arguments, named | {"hidden_states": cross_attend(call, named["hidden_states"], self._visible[name])}


def _decoder_layers(llm: nn.Module, name: str) -> nn.ModuleList:
    base = base_model(llm)
    layers = getattr(base.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UserError(
            f"model.modalities.{name}.projector speaks to the LLM between its layers, but those of "
            f"{type(base).__name__} are not where they are looked for (get_decoder().layers); choose another "
            "projector.kind, or another LLM"
        )
    return layers


def cross_attend(
    block: Callable[[Tensor, Tensor, list[MediaSpan]], Tensor], hidden: Tensor, visible: VisibleMedia
) -> Tensor:
    """[B, T, D] → [B, T, D]: the tokens that see any medium go through the block, all others stay as they are.

    Args:
        block: As in `anymal.modality.Projector.bridges`.
        hidden: The hidden states of B rows.
        visible: What their tokens see.
    """
    spans = visible.spans_of(*hidden.shape[:2])
    seeing = [span for span in spans if span.first < span.last]
    if not seeing:
        if not torch.is_grad_enabled():
            return hidden
        # The block takes part all the same, where it always does: other ranks run it, and would wait for this one.
        return hidden + block(hidden[0, :1].detach(), visible.latents, [MediaSpan(1, 0, 1)]).sum() * 0.0
    # split and cat, not indexing: the numbers are known here, so no GPU is waited for
    pieces = hidden.flatten(0, 1).split([span.tokens for span in spans])
    sees = [span.first < span.last for span in spans]
    new = block(torch.cat([piece for piece, does in zip(pieces, sees, strict=True) if does]), visible.latents, seeing)
    changed = iter(new.split([span.tokens for span in seeing]))
    joined = torch.cat([next(changed) if does else piece for piece, does in zip(pieces, sees, strict=True)])
    return joined.view_as(hidden)
