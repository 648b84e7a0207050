"""Encode a recipe's media once: training then reads features in their place.

    anymal encode demo-pretrain
    anymal encode demo-pretrain data.features=int8      # half the bytes, a stated error
    torchrun --nproc_per_node 8 launch/encode.py anymal-image-8b data.shards=/data/laion

More is in docs/features.md. Takes the recipe of the training run and looks at its data and frozen encoders only, stage
by stage. Start it several times, on several machines that share the data's file system, and they share the work.
Started again, it goes on with what is missing.
"""


def start() -> None:
    """Run the program, for the command line."""
    from anymal.config.command_line import run_program
    from anymal.features.encode import main
    from anymal.launch.registry import registry

    run_program(lambda: main(__doc__, registry()))


if __name__ == "__main__":
    start()
