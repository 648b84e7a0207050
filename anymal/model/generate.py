"""Answer interleaved prompts, and score given answers: the LLM reads the spliced row and goes on from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anymal.data.packing import pack
from anymal.model.cross_attention import Sight, left_padded
from anymal.model.multimodal import AnyMAL
from anymal.sample import Tokens


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """A prompt as the LLM reads it."""

    row: Tensor
    """[1, T, D] embeddings."""
    sights: dict[str, Sight]
    """What its tokens see of each modality that has bridges into the LLM."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """A free answer."""

    text: str
    """Without special tokens and outer spaces."""
    cut: bool
    """Whether it had no end before ``max_new_tokens``."""


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
        return Embedded(row=model.embed(batch, features)[0], sights=model.sights(batch, features))


def _left_padded(prompts: Sequence[Embedded]) -> tuple[Tensor, Tensor, dict[str, Sight]]:
    """Rows [B, longest, D], their mask [B, longest], and sights; on the left, so that all answers begin together."""
    given = [prompt.row for prompt in prompts]
    longest = max(row.shape[1] for row in given)
    rows = given[0].new_zeros(len(given), longest, given[0].shape[2])
    mask = torch.zeros(len(given), longest, dtype=torch.int64, device=rows.device)
    for i, row in enumerate(given):
        rows[i, longest - row.shape[1] :] = row[0]
        mask[i, longest - row.shape[1] :] = 1
    names = prompts[0].sights
    return rows, mask, {name: left_padded([prompt.sights[name] for prompt in prompts], longest) for name in names}


@torch.no_grad()
def generate(
    model: AnyMAL,
    tokenizer: Any,
    prompts: Sequence[Embedded],
    *,
    max_new_tokens: int,
    streamer: Any = None,
    **sampling,
) -> list[Said]:
    """Continue several prompts, greedily unless `sampling` (transformers' generation settings) says otherwise.

    Args:
        model: The model.
        tokenizer: The LLM's.
        prompts: From `embed_prompt`; they may differ in T.
        max_new_tokens: The longest answer.
        streamer: A streamer of transformers, for one prompt alone: its ``put`` gets every token id as it comes. What it
            raises ends the generation.
        sampling: Passed on to transformers' ``generate``.

    Returns:
        The answer to each.
    """
    model.eval()
    rows, mask, sights = _left_padded(prompts)
    with model.autocast(), model.bridges.open(sights):
        ids = model.llm.generate(
            inputs_embeds=rows,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **{"do_sample": False, **sampling},
        )
    ends = model.llm.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    return [
        Said(text=text.strip(), cut=ends.isdisjoint(answer))
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
    rows, mask, sights = _left_padded(prompts)
    device, counts = rows.device, [len(several) for several in answers]
    every = [answer for several in answers for answer in several]
    owners = [i for i, count in enumerate(counts) for _ in range(count)]  # the prompt of each answer
    owner = torch.tensor(owners, device=device)
    ids = torch.zeros(len(every), max(map(len, every)), dtype=torch.int64, device=device)
    real = torch.zeros_like(ids)
    for i, answer in enumerate(every):
        ids[i, : len(answer)] = torch.tensor(answer, device=device)
        real[i, : len(answer)] = 1
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    following = places[owner, -1:] + 1 + torch.arange(ids.shape[1] - 1, device=device)
    with model.autocast():
        with model.bridges.open(sights):
            read = model.llm(
                inputs_embeds=rows,
                attention_mask=mask,
                position_ids=places,
                past_key_values=DynamicCache(),
                use_cache=True,
                logits_to_keep=1,
            )
        logits = read.logits[owner]
        if ids.shape[1] > 1:
            cache = read.past_key_values
            cache.batch_select_indices(owner)
            with model.bridges.open({name: sight.after(owners) for name, sight in sights.items()}):
                more = model.llm(
                    input_ids=ids[:, :-1],
                    attention_mask=torch.cat([mask[owner], real[:, :-1]], dim=1),
                    position_ids=following,
                    past_key_values=cache,
                    use_cache=True,
                )
            logits = torch.cat([logits, more.logits], dim=1)
    found = logits.float().log_softmax(dim=-1).gather(2, ids[..., None])[..., 0]
    return list((found * real).sum(dim=1).split(counts))
