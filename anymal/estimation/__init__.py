"""What a run will take, before anything is downloaded: memory, FLOPs, time, cost.

    Config ──fake_llm, fake_step──▶ a step on tensors without data ──memory──▶ bytes alive at each moment ──predict──▶
    tables

1. `fake_step` makes a recipe's model without weights and runs a training step on it. Read it first.
2. `fake_llm`: the LLM of that, from its config alone.
3. `memory` tracks what the step keeps alive.
4. `predict` is the program: the peak, the largest micro-batch, time and money.
"""
