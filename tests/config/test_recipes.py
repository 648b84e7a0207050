"""Every recipe: it loads, takes the paper's tokens, trains what it says, and its loss falls on narrow stand-ins."""

import re

import pytest

import tiny_encoders
from recipe_table import PAPER, RECIPES, WIDTHS, measure, recipes, stages

LEARNS = {
    "eagle-x4": {
        "combine": {"projectors.image"},
        "joint": {"encoders.image", "llm", "projectors.image"},
        "": {"encoders.image", "projectors.image"},
    },
    "mini-gemini": {"pretrain": {"projectors.image"}, "finetune": {"llm", "projectors.image"}},
    "mini-gemini-hd": {"pretrain": {"projectors.image"}, "finetune": {"llm", "projectors.image"}},
    "sphinx": {"": {"llm", "projectors.image"}},
    "x-instructblip-like": {kind: {f"projectors.{kind}"} for kind in ("image", "video", "audio", "imu")},
    "pandagpt-like": {"": {"lora", "projectors.image"}},
    "mmit-lora": {"": {"lora", *(f"projectors.{kind}" for kind in ("image", "video", "audio", "imu"))}},
}
"""By recipe and stage; the stage "" stands for all others."""
HEAVY = ("sphinx", "mini-gemini-hd", "eagle-x4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stand_ins")


def test_every_recipe_has_its_papers_numbers():
    assert {name.removesuffix("-8b").removesuffix("-70b") for name in recipes()} == set(PAPER)
    for name in recipes():
        text = (RECIPES / f"{name}.yaml").read_text()
        assert re.search(r"arXiv \d{4}\.\d{5}", text), f"{name} does not name its source"
        for stage in stages(name):
            assert stage.model.llm.name.rsplit("/", 1)[-1] in WIDTHS


CASES = [
    pytest.param(name, stage, marks=[pytest.mark.slow] if name in HEAVY else [])
    for name in recipes()
    if not name.endswith("-70b")  # as the 8b ones, but for the LLM, which is not run here
    for stage in stages(name)
]


@pytest.mark.parametrize(("name", "stage"), CASES, ids=lambda value: getattr(value, "stage", value))
def test_a_recipe_takes_the_papers_tokens_and_learns(name, stage, tiny_llm, folder):
    media = {kind: make() for kind, make in tiny_encoders.MEDIA.items()} | {
        "image": tiny_encoders.picture(size=(448, 448))
    }
    row = measure(name, stage, llm=str(tiny_llm), media=media, folder=folder)
    assert row.tokens == row.paper
    kinds = {f"projectors.{kind}" for kind in row.tokens}
    expected = LEARNS.get(name, {}).get(stage.stage) or LEARNS.get(name, {}).get("", kinds)
    assert set(row.learns) == expected
    assert row.good, row.losses
