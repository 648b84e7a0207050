"""Tiles: which grid a picture gets, how it is cut, and what is left of it when the context is short."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_encoders
from anymal.adapters import REGISTRY
from anymal.adapters.image.tiles import any_resolution, area_preserving, cut, grid_rule, largest_grid
from anymal.checkpoints.build import build
from anymal.config.schema import Config
from anymal.config.settings import load
from anymal.data.packing import pack
from anymal.data.view_budget import degrade
from anymal.errors import BadSample, UserError
from anymal.evaluation.evaluate import prepare_held_out
from anymal.model.trainable import select_trainable
from anymal.sample import Message, Part, Sample
from toys import text


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((336, 336), (1, 2)),  # all keep every pixel, two tiles waste least, the first of two counts
        ((672, 336), (2, 1)),
        ((336, 672), (1, 2)),
        ((700, 650), (2, 2)),
        ((1000, 340), (3, 1)),  # keeps all of its pixels but for a few, 2x1 keeps 672 x 228 of them
        ((340, 1000), (1, 3)),
        ((1000, 610), (2, 2)),
        ((4000, 100), (3, 1)),
    ],
)
def test_any_resolution_grids(size, grid):
    """Worked out by hand: most pixels kept, then fewest wasted, of the grids of LLaVA-NeXT with tiles of 336 pixels."""
    assert any_resolution(size, 336) == grid


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((448, 448), (1, 1)),
        ((100, 100), (1, 1)),
        ((896, 448), (2, 1)),
        ((448, 896), (1, 2)),
        ((896, 896), (2, 2)),  # 2x2: 0.6 · 1; 1x1 covers only a quarter
        ((1344, 1344), (3, 3)),
        ((1792, 1344), (4, 3)),
        ((4480, 448), (10, 1)),
        ((448 * 20, 448), (12, 1)),  # the twelve that are allowed: min(0.6, 0.6) · 12 / 20
        ((1000, 500), (2, 1)),  # covers 0.80 of the area, beyond 0.6 nothing is won
        ((1200, 600), (4, 2)),  # 2x1 covers 0.557 < 0.6; 4x2 covers it all
    ],
)
def test_area_preserving_grids(size, grid):
    """Worked out by hand from min(A'/A, 0.6) · min(r'/r, r/r') with tiles of 448 pixels, at most 12."""
    assert area_preserving(size, 448, 12) == grid


def test_area_preserving_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for width, height in rng.integers(50, 4000, (50, 2)):
        columns, rows = area_preserving((width, height), 448, 9)

        ratios = {(c, r): (c / r) / (width / height) for c in range(1, 10) for r in range(1, 10) if c * r <= 9}
        areas = {(c, r): c * r * 448**2 / (width * height) for c, r in ratios}
        worth = {grid: min(areas[grid], 0.6) * min(ratio, 1 / ratio) for grid, ratio in ratios.items()}
        assert worth[columns, rows] == pytest.approx(max(worth.values()))


def test_rules_have_names():
    assert grid_rule("2x2")((10, 999), 224, 1) == (2, 2)
    assert grid_rule("any_resolution")((672, 336), 336, 2) == (2, 1)
    with pytest.raises(UserError, match="tiles is 'twobytwo'; it can be any_resolution, area, or columns x rows"):
        grid_rule("twobytwo")


@pytest.mark.parametrize(("name", "tiles"), [("2x2", 4), ("1x1", 1), ("any_resolution", 4), ("area", 12)])
def test_the_most_tiles_that_a_rule_gives(name, tiles):
    assert largest_grid(grid_rule(name), 336, 12) == tiles


def picture(width: int, height: int) -> Image.Image:
    """A picture of four plain quarters: red, green, blue, white in reading order."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2, 0] = pixels[: height // 2, width // 2 :, 1] = 255
    pixels[height // 2 :, : width // 2, 2] = pixels[height // 2 :, width // 2 :] = 255
    return Image.fromarray(pixels)


def test_tiles_follow_the_whole_in_reading_order():
    views = cut(picture(448, 448), (2, 2), 224, pad=None)
    assert [view.size for view in views] == [(224, 224)] * 5
    middle = [view.getpixel((112, 112)) for view in views[1:]]
    assert middle == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    assert views[0].getpixel((20, 20)) == (255, 0, 0) and views[0].getpixel((200, 200)) == (255, 255, 255)


def test_a_tile_of_padding_is_none():
    views = cut(picture(448, 200), (2, 2), 224, pad=(1, 2, 3))
    assert views[3] is None and views[4] is None and None not in views[:3]
    assert views[1].getpixel((0, 223)) == (1, 2, 3)
    assert cut(picture(448, 226), (2, 2), 224, pad=(1, 2, 3))[3] is not None  # two rows of it are left


def test_a_single_tile_is_the_whole():
    assert len(cut(picture(90, 90), (1, 1), 224, pad=None)) == 1


@pytest.mark.parametrize(
    ("choices", "room", "expected"),
    [
        ([[13, 7, 5, 3, 1]], 20, [13]),
        ([[13, 7, 5, 3, 1]], 6, [5]),
        ([[13, 7, 5, 3, 1], [13, 7, 5, 3, 1]], 14, [7, 7]),
        ([[13, 7, 5, 3, 1], [13, 7, 5, 3, 1]], 13, [7, 5]),
        ([[5, 1], [13, 7, 5, 3, 1]], 9, [5, 3]),  # steps down: 13, 7, 5 (of equal ones the last), 3
        ([[32, 16, 8, 4], [1]], 10, [8, 1]),
        ([[32, 16, 8, 4], [3]], 1, [4, 3]),  # not even the least fits: the prompt refuses the sample
        ([], 0, []),
    ],
)
def test_what_is_left_when_the_context_is_short(choices, room, expected):
    assert degrade(choices, room) == expected


def built(tiny_llm, tmp_path, kind: str, *more: str, max_tokens: int = 400):
    where = f"model.modalities.{kind}"
    given = [f"model.llm.name={tiny_llm}", f"{where}.encoder={tiny_encoders.clip(tmp_path / kind)}", "data.shards=x"]
    given += [f"{where}.projector.tokens=8", f"data.max_tokens={max_tokens}", "model.llm.bits=32"]
    return build(
        load(Config, None, [*given, *(f"{where}.options.{text}" for text in more)]), torch.device("cpu"), REGISTRY
    )


def asked(*media: Part) -> Sample:
    turns = [Message(role="user", parts=[*media, text("what is this?")])]
    return Sample(key="k", shard="s", messages=[*turns, Message(role="assistant", parts=[text("a dog")])])


def loss(made, sample: Sample) -> torch.Tensor:
    batch = pack([made.prepare(sample)])
    return made.model(batch, made.model.encode(batch.media))[0]


def test_corners_of_a_real_encoder_and_the_learnt_skip(tiny_llm, tmp_path):
    """SPHINX's five views; of a picture twice as wide as high two corners are padding."""
    made = built(tiny_llm, tmp_path, "image", "tiles=2x2")
    select_trainable(made.model, ["projectors"])
    square = made.prepare(asked(Part(kind="image", content=tiny_encoders.picture(size=(48, 48)))))
    assert [length for _, _, length in square.runs] == [8] * 5 and not square.skips
    wide = asked(Part(kind="image", content=tiny_encoders.picture(size=(64, 32))))
    tokens = made.prepare(wide)
    assert [length for _, _, length in tokens.runs] == [8] * 3 and len(tokens.skips) == 2
    loss(made, wide).backward()
    assert made.model.projectors["image"].skip.grad.abs().sum() > 0
    squashed = built(tiny_llm, tmp_path, "image", "tiles=2x2", "pad=false")
    assert not squashed.prepare(wide).skips and not hasattr(squashed.model.projectors["image"], "skip")


def test_a_tile_is_encoded_as_a_picture_of_its_own(tiny_llm, tmp_path):
    made = built(tiny_llm, tmp_path, "image", "tiles=2x2")
    data = tiny_encoders.picture(size=(64, 64))
    picture = tiny_encoders.opened(data)
    decode = made.adapters["image"].decode
    for view, expected in zip(
        made.prepare(asked(Part(kind="image", content=data))).media,
        cut(picture, (2, 2), 32, pad=(127, 127, 127)),
        strict=True,
    ):
        assert torch.equal(view, decode.images.prepare([expected])["pixel_values"][0])


def test_pictures_give_way_to_the_text(tiny_llm, tmp_path):
    """Eagle 2.5: all of the text, and as many tiles as are left."""
    data = tiny_encoders.picture(size=(128, 128))  # four by four tiles of 32 pixels by area
    counts = {}
    for most in (400, 120, 70, 40):
        made = built(tiny_llm, tmp_path, "image", "tiles=area", "max_tiles=16", max_tokens=most)
        tokens = made.prepare(asked(Part(kind="image", content=data), Part(kind="image", content=data)))
        words = len(tokens.ids) - 8 * len(tokens.runs)
        counts[most] = len(tokens.runs)
        assert len(tokens.ids) <= most and words == len(made.prepare(asked()).ids), "the text is whole"
    assert counts[400] == 34 > counts[120] > counts[70] > counts[40] >= 2


def test_a_question_to_a_sample_shows_what_training_shows(tiny_llm, tmp_path):
    made = built(tiny_llm, tmp_path, "image", "tiles=area", "max_tiles=16", max_tokens=120)
    picture = Part(kind="image", content=tiny_encoders.picture(size=(128, 128)))
    counts = set()
    for words in (1, 7, 14):
        sample = asked(picture).answered("a dog and " * words)
        tokens = made.prepare(sample)
        assert made.prepare.question(sample).runs == tokens.runs
        counts.add(len(tokens.runs))
    assert len(counts) > 1
    assert made.prepare.question(asked(picture).question()).runs  # nothing to leave room for


def test_evaluation_cuts_for_the_longest_option_whichever_is_right(tiny_llm, tmp_path):
    made = built(tiny_llm, tmp_path, "image", "tiles=area", "max_tiles=16", max_tokens=120)
    picture = Part(kind="image", content=tiny_encoders.picture(size=(128, 128)))
    options = ["a dog", "a red apple on the table " * 7]
    closed = [replace(asked(picture).answered(option), options=options) for option in options]
    questions = [prepare_held_out(made.prepare, sample) for sample in closed]
    views = [len(question.tokens.runs) for question in questions]
    assert views[0] == views[1] < len(made.prepare(asked(picture)).runs)
    assert max(map(len, questions[0].ids)) + len(questions[0].tokens.ids) <= 120
    free = [asked(picture).answered(answer) for answer in ("a dog", "a dog " * 20)]
    short, long = (prepare_held_out(made.prepare, sample).tokens.runs for sample in free)
    assert short == long  # nor does an answer that is to be given freely tell how long it is
    with pytest.raises(BadSample, match=r"has \d+ tokens, data\.max_tokens is 120"):
        prepare_held_out(made.prepare, replace(closed[0], options=["a dog", "a dog " * 100]))


def test_frames_give_way_to_the_text(tiny_llm, tmp_path):
    clip = Part(kind="video", content=tiny_encoders.clip_bytes())
    full = built(tiny_llm, tmp_path, "video", "frames=6", "views=true")
    tokens = full.prepare(asked(clip))
    assert len(tokens.runs) == 6
    tight = built(tiny_llm, tmp_path, "video", "frames=6", "views=true", max_tokens=len(tokens.ids) - 17)
    fewer = tight.prepare(asked(Part(kind="video", content=tiny_encoders.clip_bytes())))
    assert len(fewer.runs) == 3 and torch.equal(fewer.media[1], tokens.media[3])
    assert torch.isfinite(loss(tight, asked(Part(kind="video", content=tiny_encoders.clip_bytes()))))
