"""What a run will take, before anything is downloaded: memory, FLOPs, time, cost.

    Config ──fake_llm, fake_step──▶ a step on tensors without data ──memory──▶ bytes alive at each moment ──predict──▶
    tables

`fake_llm` makes the LLM from its config, `fake_step` runs a recipe's training step on it, `memory` counts what is kept
alive, and `predict` is the program: the peak, the largest micro-batch, time and money. Read `fake_step` first.
"""
