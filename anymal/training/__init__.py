"""One program for both stages: a stage is a list of what is trainable.

    Config ──run──▶ model, stream, engine ──loop──▶ [ micro-batches × gradient accumulation → optimizer step ] ──▶
    checkpoint

1. `run`: from settings to the last checkpoint. Read it first, then `loop`. `restore`: all that a run stands on, made or
   restored by one function. `optimizer_state`: out of the engine and back, whatever the number of ranks.
2. `loop`: micro-batches, gradient accumulation, the loss divided by the answer tokens of all data-parallel ranks.
3. `prefetch`: the next micro-batch moves and is encoded while the LLM is busy. `engine`: DeepSpeed and ZeRO.
4. `recovery`: a loss or gradient that is not finite: which sample it was, and on without it.
5. `signals`: what asks a run to stop. `resume`: what may change between two starts.
6. `meter` measures, `tracking` tells: JSON Lines, W&B, one progress bar.
"""
