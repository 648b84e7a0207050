"""A run's results as one page that can be mailed, and as a table.

    anymal report runs/demo        # writes runs/demo/report.html

It reads what the other programs left in the run's folder: ``evaluation.json``, and for each stage (a subfolder such
as ``pretrain``) ``metrics.jsonl`` and, where they are there, ``model.json`` (the rows of
`anymal.model.trainable.table`) and ``recipe.yaml``. No modality is named here: how a medium is shown follows from its
file's ending.
"""


def start() -> None:
    """Run the program, for the command line."""
    from anymal.config.command_line import run_program
    from anymal.evaluation.report import main

    run_program(lambda: main(__doc__))


if __name__ == "__main__":
    start()
