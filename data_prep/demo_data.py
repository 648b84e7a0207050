"""Make all of the demo's shards: four modalities, each with training pairs and held-out questions, and conversations.

    python data_prep/demo_data.py
    python data_prep/demo_data.py folder=data/demo cache=/some/folder

Writes ``folder/{image,audio,video,imu}/{train,test}`` for stage 1, ``folder/conversations/{train,test}`` for stage 2.
What each holds, where it comes from and what is held out stands at the head of the step that makes it: openmoji.py,
instruments.py, moving_pictures.py, smartwatch.py, conversations.py. Third step of the demo, after
`data_prep.demo_assets`; takes 24 CPU seconds.
"""

from dataclasses import dataclass
from pathlib import Path

from anymal.command_line import parse_args
from data_prep import conversations, instruments, moving_pictures, openmoji, smartwatch
from data_prep.demo_assets import cache_folder
from data_prep.steps import run, worker_pool


@dataclass(kw_only=True)
class Settings:
    """Settings of this step."""

    folder: str = ""
    """The folder to write into; empty takes data in the cache."""
    cache: str = ""
    """Folder of the downloads, as in demo_assets.py."""
    seed: int = 0
    """What is held out, drawn, played, moved and asked."""


def main(argv: list[str] | None = None) -> None:
    """The program."""
    settings = parse_args(Settings, __doc__, argv)
    folder = Path(settings.folder or cache_folder(settings.cache) / "data")
    common = {"cache": settings.cache, "seed": settings.seed}
    with worker_pool() as pool:
        for name, step in (("image", openmoji), ("audio", instruments), ("video", moving_pictures)):
            step.make(step.Settings(folder=str(folder / name), **common), pool)
    smartwatch.make(smartwatch.Settings(folder=str(folder / "imu"), **common))
    talk = conversations.Settings(media=str(folder), folder=str(folder / "conversations"), seed=settings.seed)
    conversations.make(talk)


if __name__ == "__main__":
    run(main)
