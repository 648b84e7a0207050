"""OpenMoji's pictures, moved → video shards: two-second clips with the motion that they show, and held-out pictures.

    python data_prep/demo/moving_pictures.py folder=data/demo/video

The pictures are real (see `anymal.data_prep.demo.openmoji`), the motion is generated: a picture crosses a plain
background to the left, right, up or down, or grows or shrinks. The clips are real mp4 files (h264). PyPI has no
captioned video, so this is what the demo uses, and its report says so. Validation and test
move pictures that no training shard holds, of images or of clips: the 28 and 42 that `anymal.data_prep.demo.openmoji`
holds out with the same seed. The test's 336 clips move each of its 42 pictures eight times.
"""

import io
import random
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from omegaconf import MISSING
from PIL import Image

from anymal.config.command_line import parse_args, run_program
from anymal.data_prep.demo.assets import cache_folder
from anymal.data_prep.demo.labelled import SPLITS, labelled_sample
from anymal.data_prep.demo.openmoji import Picture, draw, light_colour, pictures, split
from anymal.data_prep.steps import mapped, worker_pool
from anymal.data_prep.write import write_shards
from anymal.files import is_done

MOTIONS = {
    "moving left": (-1, 0, 0),
    "moving right": (1, 0, 0),
    "moving up": (0, -1, 0),
    "moving down": (0, 1, 0),
    "coming closer": (0, 0, 1),
    "going away": (0, 0, -1),
}
"""What is said of a motion → its direction to the right, down, and towards the viewer."""
_SIZE, _FRAMES, _RATE = 160, 16, 8


@dataclass(kw_only=True)
class Settings:
    """Settings of this step."""

    folder: str = MISSING
    """The folder to write train, validation and test into."""
    cache: str = ""
    """Folder of the downloads, as in assets.py."""
    per_motion: int = 48
    """Training clips of each motion."""
    validation_per_motion: int = 18
    """Clips of each motion for validation."""
    test_per_motion: int = 56
    """Clips of each motion for the test."""
    seed: int = 0
    """What is held out (as in openmoji.py), and how pictures move."""


@dataclass(frozen=True, kw_only=True)
class _Task:
    picture: Picture
    motion: str
    name: str
    cache: Path
    seed: int
    held_out: bool


def move(picture: Image.Image, motion: str, rng: random.Random) -> list[Image.Image]:
    """16 frames of 160 x 160 pixels: `picture` (RGBA) moving at constant speed over a plain background."""
    right, down, closer = MOTIONS[motion]
    background = light_colour(rng)
    travel, growth, size = rng.uniform(85, 105), rng.uniform(80, 110), rng.uniform(65, 75)
    x = _SIZE / 2 + (0 if right else rng.uniform(-20, 20))
    y = _SIZE / 2 + (0 if down else rng.uniform(-20, 20))
    frames = []
    for number in range(_FRAMES):
        part = number / (_FRAMES - 1) - 0.5  # -0.5 at the beginning, 0.5 at the end
        side = round(size + closer * part * growth)
        scaled = picture.resize((side, side), Image.Resampling.BILINEAR, reducing_gap=2)
        frame = Image.new("RGB", (_SIZE, _SIZE), background)
        corner = (round(x + right * part * travel - side / 2), round(y + down * part * travel - side / 2))
        frame.paste(scaled, corner, scaled)
        frames.append(frame)
    return frames


def encode(frames: list[Image.Image], rate: int) -> bytes:
    """An mp4 file (h264) of RGB frames of one size, `rate` a second. The same frames give the same bytes."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate))
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        # Without B-frames the file needs no edit list, which some decoders get wrong.
        stream.options = {"preset": "ultrafast", "crf": "26", "bf": "0"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return buffer.getvalue()


def _make(task: _Task) -> dict:
    """Move one picture; runs in a worker process. All its randomness comes from the seed and the sample's name."""
    frames = move(draw(task.picture.key, 130, task.cache), task.motion, random.Random(f"{task.seed}/{task.name}"))
    about = {"name": task.picture.name, "source": task.picture.key}
    options = MOTIONS if task.held_out else ()
    return labelled_sample(task.name, "video", "mp4", encode(frames, _RATE), task.motion, options=options, **about)


def _tasks(settings: Settings, cache: Path, name: str) -> list[_Task]:
    of_split, held_out = split(pictures(cache), settings.seed)[name], name != "train"
    counts = {
        "train": settings.per_motion,
        "validation": settings.validation_per_motion,
        "test": settings.test_per_motion,
    }
    per_motion = counts[name]
    random.Random(f"{settings.seed}/video/{name}").shuffle(of_split)
    todo = []
    for number in range(per_motion * len(MOTIONS)):
        picture, motion = of_split[number % len(of_split)], list(MOTIONS)[number // per_motion]
        key = f"video-{picture.key}-{motion.replace(' ', '-')}-{number // len(of_split)}"
        todo.append(_Task(picture=picture, motion=motion, name=key, cache=cache, seed=settings.seed, held_out=held_out))
    random.Random(settings.seed).shuffle(todo)
    return todo


def make(settings: Settings, pool: Executor) -> None:
    """Write the shards of every split into the settings' folder, whichever is not there yet."""
    cache, folder = cache_folder(settings.cache), Path(settings.folder)
    for name in SPLITS:
        if not is_done(folder / name):
            samples: Iterator[dict] = mapped(pool, _make, _tasks(settings, cache, name), f"moving pictures, {name}")
            write_shards(folder / name, samples, per_shard=48)


def main(argv: list[str] | None = None) -> None:
    """The program."""
    settings = parse_args(Settings, __doc__, argv)
    with worker_pool() as pool:
        make(settings, pool)


def start() -> None:
    """Run the program, for the command line."""
    run_program(main)


if __name__ == "__main__":
    start()
