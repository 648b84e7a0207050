"""Stage 2: projectors and LoRA learn from interleaved multimodal conversations.

    deepspeed launch/finetune.py launch/recipes/mmit-lora.yaml data.shards=...
    python launch/finetune.py launch/recipes/demo-finetune.yaml                      # one process, a CPU will do

A recipe states the run, or several stages of one (docs/stages.md; stage=NAME runs one alone); settings after it,
written a.b=value, override it. Started again, a run goes on from its latest checkpoint.
"""

if __name__ == "__main__":
    from anymal.signals import leave_on_signals

    leave_on_signals()  # before the imports that take seconds
    from anymal.checkpoints.build import run_program
    from anymal.training.run import main

    run_program(lambda: main(__doc__, defaults=["train=[projectors,lora]"]))
