"""The whole pipeline on real data, on a machine without a GPU: `make demo`.

    anymal demo
    anymal demo seed=1

Runs the programs that a real run uses, one after another, each as you would start it by hand (the commands are
printed): download, convert, prepare, train the IMU encoder, stage 1, stage 2, evaluate, report. What is done already is
not done again. Downloads, models and data go to ANYMAL_CACHE (~/.cache/anymal/demo by default), results to runs/demo.

All that was chosen was chosen by the validation splits; the evaluation reports the test splits, a sample of each that
`seed` draws. Another seed holds other things out (`anymal.data_prep.demo.data`); its data and results have folders of
their own.
"""


def start() -> None:
    """Run the program, for the command line."""
    from anymal.config.command_line import run_program
    from anymal.data_prep.demo.run import main

    run_program(lambda: main(__doc__))


if __name__ == "__main__":
    start()
