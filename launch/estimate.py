"""What a recipe will need and cost: memory, largest micro-batch, time, money.

    anymal estimate anymal-image-8b data.shards=x tflops=400 price_per_hour=2.5
    anymal estimate demo-finetune model.checkpoint=x gpu=false sample_tokens=64

It says so before anything is downloaded: reads the config.json of LLM and encoders (and the encoders'
preprocessor_config.json), from a folder or the hub, and no weights: the model is built, and a step run, on tensors that
have a shape but no content. Nothing of the LLM is read where `architecture` says what it is: it may be gated. The last
line says whether the run fits. How: docs/cost.md.
"""


def start() -> None:
    """Run the program, for the command line."""
    from anymal.config.command_line import run_program
    from anymal.estimation.predict import main
    from anymal.launch.registry import registry

    run_program(lambda: main(__doc__, registry()))


if __name__ == "__main__":
    start()
