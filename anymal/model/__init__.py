"""Encode, project, splice, run the LLM: from a `Batch` to a loss, and from a prompt to an answer.

    media ──encoder──▶ features ──projector──▶ embeddings ─┐
    token ids ──────the LLM's embedding table─────────────▶ splice ──▶ LLM ──▶ loss at answer tokens

1. `multimodal`: that figure, and which parameters are trainable. Read it first.
2. `llm`: loading at 4, 8, 16 or 32 bits (mixed precision: arithmetic in bfloat16 on a GPU, float32 on a CPU), LoRA.
3. `attention`: each packed sample by itself, with no attention mask. `cross_attention`: media between the LLM's layers.
4. `activation_checkpointing`: what the backward pass keeps, and what it computes again.
5. `loss`: cross-entropy, chunk by chunk; its gradient is had in the forward pass.
6. `generate`: answers, and how likely a given one is. `flops`: what a step costs.

`registry` is what the core is handed: modalities and projectors by name. `fake_tensors` makes networks without weights;
`hub` says why a model is not to be had.

    B samples in a micro-batch   T tokens of a row   A answer tokens   N media   K tokens of a medium   D LLM's width
"""
