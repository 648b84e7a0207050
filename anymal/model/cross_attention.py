"""The other way for media to speak to the LLM: between its layers, by cross-attention. Beside the splice, in the model.

    features ──projector.context──▶ latents [M, R, C] ─┐ (a Sight: and which tokens see which of them)
    hidden states [B, T, D] of the LLM ────────────────┴─bridge──▶ hidden states [B, T, D] ──the next decoder layer──▶

M media (or views of one) of one modality in all rows   R latents of each   C their width   S tokens that see any

Nothing of the LLM is rewritten: a forward pre-hook of a decoder layer calls the bridge that a projector has for it. The
hooks do nothing but inside `Bridges.open`, so whoever else runs the LLM finds it as it was. What a bridge needs is
handed to it as arguments; what checkpointing computes again in the backward pass is therefore the same.
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
from anymal.model.llm import base_model


class Look(NamedTuple):
    """What some tokens that stand side by side see: the media from `first` up to, not including, `last`."""

    tokens: int
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What the tokens of B rows see of one modality's media."""

    latents: Tensor
    """[M, R, C], in the order of the rows and of the places in them."""
    looks: Sequence[Sequence[Look]]
    """For each row, looks over all of its tokens, from the first to the last."""

    def over(self, rows: int, tokens: int) -> list[Look]:
        """The looks of `rows` × `tokens` hidden states, end to end.

        A pass over as many tokens as the rows have reads them; any other goes on from them, and new tokens see what the
        last one saw. More rows than there are looks for are copies of them, side by side: beams, or several answers.
        """
        found: list[Look] = []
        for looks in self.looks:
            known = sum(look.tokens for look in looks) == tokens
            found += (looks if known else [looks[-1]._replace(tokens=tokens)]) * (rows // len(self.looks))
        return found

    def after(self, owners: Sequence[int]) -> "Sight":
        """For rows that go on from these rows, given the number of the row that each of them goes on from."""
        return Sight(latents=self.latents, looks=[[self.looks[owner][-1]._replace(tokens=1)] for owner in owners])


def looks(lengths: Sequence[int], stands: Sequence[tuple[int, int]], *, last_only: bool) -> list[Look]:
    """What each token of a packed row sees of one modality: media of its own sample that do not stand after it.

    A token sees a contiguous range of media, and so do its neighbours up to the next medium. Hence there is no mask.

    Args:
        lengths: Tokens of each sample; T in all.
        stands: For each medium or view, the position (in T) of its first token, and the number of the first view of the
            same medium (its own, if it is the only one); `anymal.sample.Batch.media_starts`.
        last_only: Whether only the last medium is seen (in all of its views so far), not those before it too.
    """
    begins = [0, *accumulate(lengths)]
    places = [place for place, _ in stands]
    events = [(begin, 0, 0) for begin in begins]  # from here on nothing is seen
    for number, (place, medium) in enumerate(stands):
        begin = begins[bisect_right(begins, place) - 1]
        events.append((place, medium if last_only else bisect_left(places, begin), number + 1))
    found = [Look(end - place, first, last) for (place, first, last), (end, *_) in pairwise(sorted(events))]
    return [look for look in found if look.tokens]


def left_padded(sights: Sequence[Sight], longest: int) -> Sight:
    """The sights of several rows as one, each row padded on the left to so many tokens."""
    found, before = [], 0
    for sight in sights:
        (row,) = sight.looks
        moved = [Look(tokens, first + before, last + before) for tokens, first, last in row]
        missing = longest - sum(look.tokens for look in row)
        found.append([Look(missing, 0, 0), *moved] if missing else moved)
        before += len(sight.latents)
    return Sight(latents=torch.cat([sight.latents for sight in sights]), looks=found)


class Bridges:
    """The hooks through which the LLM's layers see media.

    Args:
        llm: A causal LM of transformers, with or without LoRA.
        projectors: By modality. Those that have bridges (see `anymal.modality.Adapter`) get hooks.

    Raises:
        UserError: A projector has bridges, but the LLM's decoder layers are not found.
    """

    def __init__(self, llm: nn.Module, projectors: Mapping[str, nn.Module]):
        self.projectors = {name: projector for name, projector in projectors.items() if hasattr(projector, "bridges")}
        """Those that have bridges."""
        self._open: Mapping[str, Sight] = {}
        for name, projector in self.projectors.items():
            layers = _decoder_layers(llm, name)
            for number, bridge in projector.bridges.items():
                layers[int(number)].register_forward_pre_hook(partial(self._before, name, bridge), with_kwargs=True)

    @contextmanager
    def open(self, sights: Mapping[str, Sight]) -> Iterator[None]:
        """Inside, the LLM's layers see what `sights` says, by modality."""
        self._open = sights
        try:
            yield
        finally:
            self._open = {}

    def _before(
        self, name: str, bridge: nn.Module, layer: nn.Module, arguments: tuple, named: dict
    ) -> tuple[tuple, dict] | None:
        """The hook: the layer's arguments with other hidden states."""
        if name not in self._open:
            return None
        way: Callable = bridge
        # transformers checkpoints a layer's forward function, which hooks are outside of.
        if getattr(layer, "gradient_checkpointing", False) and layer.training:
            way = partial(layer._gradient_checkpointing_func, bridge)
        if arguments:
            return (_cross(way, arguments[0], self._open[name]), *arguments[1:]), named
        return arguments, named | {"hidden_states": _cross(way, named["hidden_states"], self._open[name])}


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


def _cross(bridge: Callable[[Tensor, Tensor, list[Look]], Tensor], hidden: Tensor, sight: Sight) -> Tensor:
    """[B, T, D] → [B, T, D]: the tokens that see any medium through the bridge, all others as they are."""
    found = sight.over(*hidden.shape[:2])
    seeing = [look for look in found if look.first < look.last]
    if not seeing:
        if not torch.is_grad_enabled():
            return hidden
        # The bridge takes part all the same, where it always does: other ranks run it, and would wait for this one.
        return hidden + bridge(hidden[0, :1].detach(), sight.latents, [Look(1, 0, 1)]).sum() * 0.0
    # split and cat, not indexing: the numbers are known here, so no GPU is waited for
    parts = hidden.flatten(0, 1).split([look.tokens for look in found])
    sees = [look.first < look.last for look in found]
    new = bridge(torch.cat([part for part, does in zip(parts, sees, strict=True) if does]), sight.latents, seeing)
    changed = iter(new.split([look.tokens for look in seeing]))
    return torch.cat([next(changed) if does else part for part, does in zip(parts, sees, strict=True)]).view_as(hidden)
