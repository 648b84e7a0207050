"""Answer interleaved prompts, and score given answers: the LLM reads the spliced row and goes on from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from anymal.data.packing import pack
from anymal.model.cross_attention import VisibleMedia, left_padded
from anymal.model.llm import base_model
from anymal.model.multimodal import AnyMAL
from anymal.sample import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """A prompt as the LLM reads it."""

    row: Tensor
    """[1, T, D] embeddings."""
    visible: dict[str, VisibleMedia]
    """What its tokens see of each modality that speaks to the LLM by cross-attention."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A free answer."""

    text: str
    """Without special tokens and outer spaces."""
    cut: bool
    """Whether it had no end before ``max_new_tokens``."""


class Streamer(Protocol):
    """Takes token ids as they come, as transformers' own streamers do."""

    def put(self, value: Tensor, /) -> None:
        """Some more of them; what it raises ends the generation."""

    def end(self) -> None:
        """There will be no more."""


@torch.no_grad()
def embed_prompt(model: AnyMAL, question: Tokens) -> Embedded:
    """One prompt as the LLM reads it.

    Args:
        model: The model.
        question: From `anymal.data.prompt.Prompt.question`; its media may be `anymal.sample.Features`.
    """
    batch = pack([question]).to(model.device)
    features = model.encode(batch.media)  # outside of autocast, as in training
    with model.autocast():
        return Embedded(row=model.embed(batch, features)[0], visible=model.visible_media(batch, features))


def _left_padded(prompts: Sequence[Embedded]) -> tuple[Tensor, Tensor, dict[str, VisibleMedia]]:
    """Rows [B, longest, D], their attention mask [B, longest], and what media they see.

    Padding is on the left, so that all answers begin together.
    """
    unpadded = [prompt.row for prompt in prompts]
    longest = max(row.shape[1] for row in unpadded)
    rows = unpadded[0].new_zeros(len(unpadded), longest, unpadded[0].shape[2])
    mask = torch.zeros(len(unpadded), longest, dtype=torch.int64, device=rows.device)
    for i, row in enumerate(unpadded):
        rows[i, longest - row.shape[1] :] = row[0]
        mask[i, longest - row.shape[1] :] = 1
    names = prompts[0].visible
    return rows, mask, {name: left_padded([prompt.visible[name] for prompt in prompts], longest) for name in names}


@torch.no_grad()
def generate(
    model: AnyMAL,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Embedded],
    *,
    max_new_tokens: int,
    streamer: Streamer | None = None,
    **sampling: Any,
) -> list[Answer]:
    """Continue several prompts, greedily unless `sampling` (transformers' generation settings) says otherwise.

    Args:
        model: The model.
        tokenizer: The LLM's.
        prompts: From `embed_prompt`; they may differ in T.
        max_new_tokens: The longest answer.
        streamer: For one prompt alone: gets every token id as it comes.
        sampling: Passed on to transformers' ``generate``.

    Returns:
        The answer to each.
    """
    model.eval()
    rows, mask, visible = _left_padded(prompts)
    llm: Any = base_model(model.llm)  # the type of `generate` depends on its settings
    with model.autocast(), model.cross_attention.over(visible):
        ids = llm.generate(  # embeddings go in, so the prompts' own ids do not come back
            inputs_embeds=rows,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **{"do_sample": False, **sampling},
        )
    ends = llm.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    return [
        Answer(text=text.strip(), cut=ends.isdisjoint(answer))
        for text, answer in zip(tokenizer.batch_decode(ids, skip_special_tokens=True), ids.tolist(), strict=True)
    ]


@torch.no_grad()
def log_likelihoods(
    model: AnyMAL, prompts: Sequence[Embedded], answers: Sequence[Sequence[Sequence[int]]]
) -> list[Tensor]:
    """How likely each of several answers is after each of several prompts.

    Every prompt is read once; its answers go on from copies of its cache.

    Args:
        model: The model.
        prompts: From `embed_prompt`; they may differ in T.
        answers: For each prompt, the token ids of its answers, end token included.

    Returns:
        For each prompt, [answers] float32: the natural logarithm of each whole answer's probability.
    """
    from transformers import DynamicCache

    model.eval()
    rows, mask, visible = _left_padded(prompts)
    device, counts = rows.device, [len(several) for several in answers]
    every = [answer for several in answers for answer in several]
    owners = [i for i, count in enumerate(counts) for _ in range(count)]  # the prompt of each answer
    owner = torch.tensor(owners, device=device)
    ids = torch.zeros(len(every), max(map(len, every)), dtype=torch.int64, device=device)
    real = torch.zeros_like(ids)
    for i, answer in enumerate(every):
        ids[i, : len(answer)] = torch.tensor(answer, device=device)
        real[i, : len(answer)] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    following = positions[owner, -1:] + 1 + torch.arange(ids.shape[1] - 1, device=device)
    with model.autocast():
        with model.cross_attention.over(visible):
            read = model.llm(
                inputs_embeds=rows,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=DynamicCache(),
                use_cache=True,
                logits_to_keep=1,
            )
        logits = read.logits[owner]
        if ids.shape[1] > 1:
            cache = read.past_key_values
            cache.batch_select_indices(owner)
            with model.cross_attention.over({name: media.continued(owners) for name, media in visible.items()}):
                more = model.llm(
                    input_ids=ids[:, :-1],
                    attention_mask=torch.cat([mask[owner], real[:, :-1]], dim=1),
                    position_ids=following,
                    past_key_values=cache,
                    use_cache=True,
                )
            logits = torch.cat([logits, more.logits], dim=1)
    per_token = logits.float().log_softmax(dim=-1).gather(2, ids[..., None])[..., 0]
    return list((per_token * real).sum(dim=1).split(counts))
