"""Encode, project, splice, run the LLM: from a `Batch` to a loss, and from a prompt to an answer.

    media ──encoder──▶ features ──projector──▶ embeddings ─┐
    token ids ──────the LLM's embedding table─────────────▶ splice ──▶ LLM ──▶ loss at answer tokens

1. `multimodal`: that figure. Mixed precision (autocast) is set there. Read it first.
2. `trainable`: which parameters learn; all others are frozen there.
3. `llm`: loading at 4, 8, 16 or 32 bits, the table of token embeddings. `quantization`: what bitsandbytes makes of it,
   and what not. `precision`: what is computed in, by what a device can do. `lora`: what of PEFT's LoRA and its kin.
4. `attention`: each packed sample by itself, without an attention mask; on a GPU by `varlen`, flash attention.
   `cross_attention`: media between the LLM's layers. `norms`: RMSNorm in one kernel on a GPU.
5. `activation_checkpointing`: what the backward pass keeps, and what it computes again.
6. `loss`: cross-entropy, chunk by chunk; its gradient is computed in the forward pass.
7. `generate`: answers, and how likely a given one is. `flops`: the arithmetic of a step.

`registry` is what the core is handed: modalities and projectors by name. `fake_tensors` makes networks without weights.
`hub` says why a model cannot be downloaded, and its licence.

    B samples in a micro-batch   T tokens of a row   A answer tokens   N media   K tokens of a medium   D LLM's width
"""
