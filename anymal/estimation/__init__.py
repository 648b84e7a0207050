"""What a run will take, before anything is downloaded: memory, FLOPs, time, cost.

    Config ──fake_llm, fake_step──▶ a step on fake tensors ──memory──▶ bytes alive, by phase ──peak, predict──▶ tables

1. `fake_step` makes a recipe's model without weights and runs a training step on it. Read it first.
2. `fake_llm`: the LLM of that, from its config alone.
3. `memory` tracks what the step keeps alive.
4. `peak`: what of that stands side by side; the largest micro-batch.
5. `predict` is the program: tables of memory, time and money.
"""
