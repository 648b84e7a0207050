"""Attention over a packed row: each sample by itself, so that no work is done across borders.

    lengths, offsets of a row ──anymal.model.multimodal──▶ every attention layer of transformers ──▶ packed_attention

An attention mask over a row of T tokens costs T² products, most of them masked: for rows of many short samples more
than the rest of the layer. Here it is the sum of t² over the samples. There is no mask to keep, and no way for samples
to see one another. On a GPU flash attention takes the row in one call (`anymal.model.varlen`); elsewhere samples of one
length that stand side by side (`anymal.data.packing.Packer` sorts them) go through torch's SDPA together.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anymal.errors import UserError
from anymal.model import precision, varlen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKED = "packed"
"""Its name among transformers' attention implementations."""

_BEYOND_SDPA = ("softcap", "s_aux", "sinks")
"""What some architectures hand to their attention, and none of these kernels computes: capped scores, and sinks."""
_IN_THE_MASK = ("position_bias", "indices", "block_indices")
"""What changes scores by way of the attention mask, which a packed row does without."""


def choose(llm: "PreTrainedModel", name: str) -> None:
    """Give the LLM the attention implementation that ``model.llm.attention`` names.

    For "packed" it keeps SDPA where an architecture does not pass the samples' lengths on to its attention layers, or
    attends in chunks or windows that only its mask knows.
    """
    if name != PACKED:
        return
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, sdpa_mask)  # for rows that are not packed: generation
    config = llm.config.get_text_config()
    windows = getattr(config, "use_sliding_window", False) and not any(
        hasattr(module, "sliding_window") for module in llm.modules()
    )  # of which the mask alone knows
    if llm._supports_attention_backend and not hasattr(config, "attention_chunk_size") and not windows:
        llm.set_attn_implementation(PACKED)


def at_loading(name: str) -> str:
    """The implementation of transformers' own that an LLM is loaded with before `choose`."""
    return "sdpa" if name == PACKED else name


def arguments(llm: "PreTrainedModel", lengths: Sequence[int], offsets: Tensor) -> dict[str, Any]:
    """What the LLM's ``forward`` is given beside embeddings and positions, so that its samples are kept apart.

    Args:
        llm: A causal LM.
        lengths: Tokens of each sample of the row.
        offsets: Where they begin and end (`anymal.data.packing.row_offsets`), on the LLM's device.
    """
    if llm.config._attn_implementation != PACKED:
        return {}
    # transformers hands a mask of four dimensions on as it is, instead of making one; nobody reads this one.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    return {"sample_lengths": tuple(lengths), "sample_offsets": offsets, "attention_mask": mask}


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sample_lengths: Sequence[int] | None = None,
    sample_offsets: Tensor | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """One layer's causal attention, as transformers calls it.

    Args:
        module: The layer.
        query: [1, H, T, d].
        key: [1, H or fewer, T, d].
        value: As `key`.
        attention_mask: Not read where there are `sample_lengths`; else as SDPA takes it.
        sample_lengths: Tokens of each sample; T in all. None: not a packed row.
        sample_offsets: [B + 1] int32, where they begin and end.
        sliding_window: How many tokens back a token sees, itself included, if that is limited.
        **more: What else SDPA takes: scaling, dropout, is_causal.

    Returns:
        [1, T, H, d], and no weights.

    Raises:
        UserError: The architecture asks for what is not computed here, or does not say where samples end.
        ValueError: The lengths are not the row's.
    """
    _refuse_left_out(module, more, packed=sample_lengths is not None)
    if sample_lengths is None or sample_offsets is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if attention_mask is not None and attention_mask.shape == (1, 1, 1, 1) and query.shape[2] > 1:
            raise UserError(
                f"{type(module).__name__} is not told where the samples of a packed row end; set "
                "model.llm.attention=sdpa (or eager)"
            )
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    if sum(sample_lengths) != query.shape[2]:
        raise ValueError(f"samples of {sum(sample_lengths)} tokens in a row of {query.shape[2]}")
    causal = more.get("is_causal")
    chosen = varlen.kernel(
        capability=precision.hardware(query.device).capability,
        dtype=varlen.arithmetic(query),
        widths=[x.shape[-1] for x in (query, key, value)],
        dropout=more.get("dropout") or 0.0,
        causal=getattr(module, "is_causal", True) if causal is None else causal,
        parameters=varlen.parameters(),
        flash_attn=varlen.flash_attn() is not None,
    )
    if chosen == "loop":
        return _loop(module, query, key, value, sample_lengths, sliding_window, more), None
    where = {"offsets": sample_offsets, "longest": max(sample_lengths), "sliding_window": sliding_window}
    return varlen.run(chosen, query, key, value, scale=more.get("scaling"), **where)[None], None


def _refuse_left_out(module: nn.Module, more: dict[str, Any], *, packed: bool) -> None:
    """Raises `UserError` where an architecture attends with what SDPA drops, most of it without a word."""
    for name in (*_BEYOND_SDPA, *(_IN_THE_MASK if packed else ())):
        if more.get(name) is not None:
            raise UserError(
                f"{type(module).__name__} attends with {name}, which model.llm.attention=packed (or sdpa) leaves out; "
                "set model.llm.attention=eager"
            )


def _loop(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    sliding_window: int | None,
    more: dict[str, Any],
) -> Tensor:
    """[1, T, H, d] by SDPA, a call for each run of samples of one length."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    runs = [(length, len(list(alike))) for length, alike in groupby(lengths)]
    sizes = [length * count for length, count in runs]
    # split: its backward pass is one concatenation, where each slice's would fill a whole row with zeros
    queries, keys, values = (x[0].split(sizes, dim=1) for x in (query, key, value))
    outputs = []
    for run, (length, count) in enumerate(runs):
        q, k, v = (x[run].unflatten(1, (count, length)).transpose(0, 1) for x in (queries, keys, values))
        mask = None
        if sliding_window is not None and length > sliding_window:
            back = torch.arange(length, device=query.device)[:, None] - torch.arange(length, device=query.device)
            mask = ((back >= 0) & (back < sliding_window))[None, None]
        outputs.append(sdpa_attention_forward(module, q, k, v, mask, **more)[0].flatten(0, 1))
    return torch.cat(outputs)[None]
