"""Score a checkpoint on held-out data, beside a blank and a shuffled control.

    anymal evaluate checkpoint=runs/demo/finetune sets.image=data/demo/image/test sets.imu=data/demo/imu/test
    anymal evaluate checkpoint=runs/demo/finetune sets.image=data/demo/image/test 'bits=[4,16,32]'

Writes to `out`: records.jsonl (a line for each sample and condition, with the free answer, the loss, and how likely
every option is), evaluation.json (the figures, computed from these), and some of the media. Prints tables.
"""


def start() -> None:
    """Run the program, for the command line."""
    from anymal.config.command_line import run_program
    from anymal.evaluation.run import main
    from anymal.launch.registry import registry

    run_program(lambda: main(__doc__, registry()))


if __name__ == "__main__":
    start()
