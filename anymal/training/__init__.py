"""One program for both stages: a stage is a list of what is trainable.

    Config ──run──▶ model, stream, engine ──loop──▶ [ gradient accumulation → optimizer step ] ──▶ checkpoint

1. `run`: from settings to the last checkpoint. Read it first, then `loop`. `restore`: all that a run stands on, made or
   restored by one function. `resume`: which settings may change between two starts.
2. `engine`: DeepSpeed: data parallel processes, ZeRO, gradient clipping. `optimizer`: AdamW, parameter groups, the
   learning rate schedule. `optimizer_state`: out of the engine and back, whatever the number of ranks. `ranks`: what
   these tell one another.
3. `loop`: micro-batches, gradient accumulation, the loss divided by the answer tokens of all ranks.
4. `prefetch`: a step's samples are read while the step before it runs; the next micro-batch is copied to the GPU and
   encoded while the LLM is busy with this one.
5. `determinism`: the same bits each time on a GPU, where a run wants them (``run.deterministic``).
6. `recovery`: a loss or gradient that is not finite (NaN): which sample it was, and on without it.
7. `meter` measures loss, throughput and memory; `tracking` writes them: JSON Lines, W&B, one progress bar.

Beside this room: `anymal.signals` (what asks a run to stop), `anymal.checkpoints` (what is saved). Mixed precision is
the model's own autocast (`anymal.model.multimodal`), activation checkpointing `anymal.model.activation_checkpointing`.
"""
