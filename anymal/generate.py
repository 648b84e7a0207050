"""Answer interleaved prompts, and score given answers: the LLM reads the spliced row and goes on from it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anymal.model import AnyMAL
from anymal.packing import pack
from anymal.sample import Tokens


@torch.no_grad()
def embed_prompt(model: AnyMAL, question: Tokens, features: dict[str, Tensor] | None = None) -> Tensor:
    """One prompt as the LLM reads it.

    Args:
        model: The model.
        question: From `anymal.prompt.Prompt.question`.
        features: Encoded media by modality, if they are at hand; otherwise the encoders run.

    Returns:
        [1, T, D] embeddings.
    """
    batch = pack([question]).to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type != "cpu"):
        return model.embed(batch, model.encode(batch.media) if features is None else features)[0]


@torch.no_grad()
def generate(model: AnyMAL, tokenizer: Any, prompts: Sequence[Tensor], *, max_new_tokens: int, **sampling) -> list[str]:
    """Continue several prompts, greedily unless `sampling` (transformers' generation settings) says otherwise.

    Args:
        model: The model.
        tokenizer: The LLM's.
        prompts: [1, T, D] each, from `embed_prompt`; they may differ in T.
        max_new_tokens: The longest answer.
        sampling: Passed on to transformers' ``generate``.

    Returns:
        The answers as text, without special tokens.
    """
    model.eval()
    longest = max(prompt.shape[1] for prompt in prompts)
    width = prompts[0].shape[2]
    rows = prompts[0].new_zeros(len(prompts), longest, width)
    mask = torch.zeros(len(prompts), longest, dtype=torch.int64, device=rows.device)
    for i, prompt in enumerate(prompts):  # on the left, so that every answer begins at the same place
        rows[i, longest - prompt.shape[1] :] = prompt[0]
        mask[i, longest - prompt.shape[1] :] = 1
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=rows.device.type != "cpu"):
        ids = model.llm.generate(
            inputs_embeds=rows,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **{"do_sample": False, **sampling},
        )
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


@torch.no_grad()
def log_likelihoods(model: AnyMAL, prompt: Tensor, answers: Sequence[Sequence[int]]) -> Tensor:
    """How likely each of several answers is after one prompt. The prompt is read once; the answers share its cache.

    Args:
        model: The model.
        prompt: [1, T, D] from `embed_prompt`.
        answers: Token ids of each answer, end token included.

    Returns:
        [answers] float32, natural logarithm of each whole answer's probability.
    """
    from transformers import DynamicCache

    model.eval()
    device, count, longest = prompt.device, len(answers), max(map(len, answers))
    ids = torch.zeros(count, longest, dtype=torch.int64, device=device)
    real = torch.zeros(count, longest, dtype=torch.int64, device=device)
    for i, answer in enumerate(answers):
        ids[i, : len(answer)] = torch.tensor(answer, device=device)
        real[i, : len(answer)] = 1
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
        read = model.llm(inputs_embeds=prompt, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)
        logits = read.logits.expand(count, 1, -1)
        if longest > 1:
            cache = read.past_key_values
            cache.batch_repeat_interleave(count)
            mask = torch.cat([real.new_ones(count, prompt.shape[1]), real[:, :-1]], dim=1)
            following = model.llm(input_ids=ids[:, :-1], attention_mask=mask, past_key_values=cache, use_cache=True)
            logits = torch.cat([logits, following.logits], dim=1)
    found = logits.float().log_softmax(dim=-1).gather(2, ids[..., None])[..., 0]
    return (found * real).sum(dim=1)
