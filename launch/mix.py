"""Mix the weights of two models: θ = beta · a + (1 - beta) · b.

    anymal mix a=runs/real b=runs/synthetic beta=0.5 out=mixed                 # two runs or checkpoints
    anymal mix a=models/real b=models/synthetic beta=0.5 out=models/mixed      # two whole LLMs

SPHINX does so (arXiv 2311.07575). Of two checkpoints, projectors and LoRA are mixed; `out` is one more checkpoint,
without the state of training. Of two LLMs in transformers' format every tensor is, one after another: memory holds one
of each, however large they are. Both need the same encoders, projectors, LLM and shapes; what differs is named.
"""


def start() -> None:
    """Run the program, for the command line."""
    from anymal.checkpoints.mix import main
    from anymal.config.command_line import run_program

    run_program(lambda: main(__doc__))


if __name__ == "__main__":
    start()
