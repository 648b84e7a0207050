"""Make all of the demo's shards: four modalities, and conversations about them, each as train, validation and test.

    python data_prep/demo/data.py
    python data_prep/demo/data.py folder=data/demo cache=/some/folder seed=1

Writes ``folder/{image,audio,video,imu}/{train,validation,test}`` for stage 1 and ``folder/conversations/…`` for stage
2. ``train`` is learnt from, settings are chosen by ``validation``, and ``test`` is reported, once. `seed` draws who and
what is held out, so that anybody can draw a test that nobody has seen; whatever learns from ``train`` belongs to that
seed. What each holds, where it comes from and what is held out stands at the head of the step that makes it:
openmoji.py, instruments.py, moving_pictures.py, smartwatch.py, conversations.py. Third step of the demo, after
`anymal.data_prep.demo.assets`; takes 20 CPU seconds.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from anymal.config.command_line import parse_args, run_program
from anymal.data_prep.demo import conversations, instruments, moving_pictures, openmoji, smartwatch
from anymal.data_prep.demo.assets import cache_folder
from anymal.data_prep.demo.labelled import SPLITS
from anymal.data_prep.steps import worker_pool
from anymal.errors import UserError


@dataclass(kw_only=True)
class Settings:
    """Settings of this step."""

    folder: str = ""
    """The folder to write into; empty takes data in the cache."""
    cache: str = ""
    """Folder of the downloads, as in assets.py."""
    seed: int = 0
    """What is held out, drawn, played, moved and asked."""


def claim(folder: Path, seed: int) -> None:
    """Note in `folder` which splits it holds: shards of two seeds, side by side, would train on what is tested.

    Raises:
        UserError: It holds shards of other splits.
    """
    note, wanted = folder / "splits.json", {"splits": list(SPLITS), "seed": seed}
    if not note.is_file() and not any(folder.glob("*/*/*.tar")):
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(wanted))
    if not note.is_file() or json.loads(note.read_text()) != wanted:
        raise UserError(f"{folder} holds shards of other splits than those of seed={seed}: remove it, or give another")


def main(argv: list[str] | None = None) -> None:
    """The program."""
    settings = parse_args(Settings, __doc__, argv)
    folder = Path(settings.folder or cache_folder(settings.cache) / "data")
    claim(folder, settings.seed)
    cache, seed = settings.cache, settings.seed
    with worker_pool() as pool:
        openmoji.make(openmoji.Settings(folder=str(folder / "image"), cache=cache, seed=seed), pool)
        instruments.make(instruments.Settings(folder=str(folder / "audio"), cache=cache, seed=seed), pool)
        moving_pictures.make(moving_pictures.Settings(folder=str(folder / "video"), cache=cache, seed=seed), pool)
    smartwatch.make(smartwatch.Settings(folder=str(folder / "imu"), cache=cache, seed=seed))
    talk = conversations.Settings(media=str(folder), folder=str(folder / "conversations"), seed=seed)
    conversations.make(talk)


def start() -> None:
    """Run the program, for the command line."""
    run_program(main)


if __name__ == "__main__":
    start()
