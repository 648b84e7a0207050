"""Held-out sets → what a checkpoint is worth, each figure beside its controls.

    shards ──run──▶ evaluate: own, blank and another's medium ──▶ records.jsonl ──scores──▶ evaluation.json ──▶ report

1. `evaluate`: samples → records; each medium is encoded once. Read it first.
2. `scores`: records → accuracy, captions, losses, agreement; computed from the records alone. `metrics`: the formulas.
3. `run`: the program. `tables`, `report`, `report_media`: for the terminal, and one page that can be mailed.
"""
