"""Stage 2: projectors and LoRA learn from conversations with media.

    anymal finetune demo-finetune      # one process, a CPU will do
    deepspeed launch/finetune.py mmit-lora data.shards=...
    deepspeed --module anymal.launch.finetune mmit-lora ...      # without a checkout

A recipe states the run, or several stages of one (docs/stages.md; stage=NAME runs one alone). It is a file, or the name
of one that comes with AnyMAL; settings after it, written a.b=value, override it. Started again, a run goes on from its
latest checkpoint.
"""


def start() -> None:
    """Run the program, for the command line."""
    from anymal.signals import leave_on_signals

    leave_on_signals()  # before the imports that take seconds
    from anymal.config.command_line import run_program
    from anymal.launch.registry import registry
    from anymal.training.run import main

    run_program(lambda: main(__doc__, registry(), ["train=[projectors,lora]"]))


if __name__ == "__main__":
    start()
