"""Held-out sets → what a checkpoint is worth, each figure beside its controls.

    shards ──run──▶ evaluate: own, blank, shuffled media ──▶ records.jsonl ──scores──▶ evaluation.json ──▶ report

1. `run`: the program: a checkpoint at one or several precisions, one or several sets; what is written where.
2. `evaluate`: samples → records (free answers, log-likelihoods, losses) under three conditions; each medium is encoded
   once. Read it first.
3. `scores`: records → accuracy with its confidence interval, captions, losses, agreement; from the records alone.
   `metrics`: the formulas (CIDEr-D, ROUGE-L, BLEU, POPE's, Wilson's interval).
4. `tables`: an evaluation as tables, and as text for the terminal.
5. `report`: a run as one HTML page that can be mailed (``report.css`` is its style). `report_media`: media and loss
   curves inside it.

docs/evaluation.md says how options are chosen and why. What a checkpoint keeps of its figures at several precisions is
in `anymal.checkpoints.precision`.
"""
