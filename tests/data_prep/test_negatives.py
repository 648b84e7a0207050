"""Yes/no questions about what is and what is not in a picture: balanced, repeatable, and never a wrong no."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

import tiny_encoders
from anymal.data.loader import RawSample
from anymal.data.parse import parse
from anymal.data_prep import negatives
from anymal.data_prep.demo.labelled import labelled_sample
from anymal.data_prep.negatives import WAYS, Chooser, Picture, describe
from anymal.data_prep.objects import Names, forms, occurs, read_table
from anymal.data_prep.write import read_shards, write_shards
from anymal.errors import BudgetExceeded, UserError

NAMES = ["fox", "owl", "cat"]
TABLE = [["person", "man", "woman"], ["dog", "puppy"], ["hot dog"], ["fire truck", "fire engine"], ["knife"]]


@pytest.mark.parametrize(
    ("word", "single"),
    [
        ("dogs", "dog"),
        ("buses", "bus"),
        ("horses", "horse"),
        ("ponies", "pony"),
        ("knives", "knife"),
        ("shelves", "shelf"),
        ("firemen", "fireman"),
        ("people", "person"),
        ("glass", "glass"),
    ],
)
def test_a_plural_has_its_singular_among_its_forms(word, single):
    assert single in forms(word) and word in forms(word)


def test_a_name_occurs_as_whole_words_in_the_singular_or_the_plural():
    assert occurs("fire truck", "Two fire trucks, parked.")
    assert occurs("apples", "a red apple")
    assert not occurs("truck fire", "a fire truck")
    assert not occurs("cat", "a category of cattle")
    assert not occurs("", "anything")


def test_a_table_gives_every_object_one_name():
    names = Names(TABLE)
    assert [names.name(said) for said in ("Women", "puppies", "fire engines", "Blue  Cow")] == [
        "person",
        "dog",
        "fire truck",
        "blue cow",
    ]
    assert names.found_in("Two men, a PUPPY and fire engines; no woman had a hot dog.") == [
        "person",
        "dog",
        "fire truck",
        "hot dog",
    ]
    assert names.found_in("") == Names().found_in("a dog") == []


@pytest.mark.parametrize(
    ("name", "present", "text", "same"),
    [
        ("dog", ["dogs"], "", True),
        ("dog", ["puppy dog"], "", True),
        ("red apple", ["apple"], "", True),
        ("person", ["fire truck"], "a woman drives", True),  # the table's spelling of it stands in the caption
        ("person", ["man"], "", True),
        ("dog", ["cat"], "a cat", False),
    ],
)
def test_what_may_be_there_under_another_name(name, present, text, same):
    names = Names(TABLE)
    assert names.may_be(name, map(names.name, present), text) is same


def pictures(*objects: list[str]) -> list[Picture]:
    return [
        Picture(number=i, key=f"k{i}", location=("a.tar", 0, 0), member="png", objects=listed, caption="")
        for i, listed in enumerate(objects)
    ]


def test_popular_and_adversarial_are_counted_over_the_data():
    data = pictures(["table", "fork"], ["table", "fork"], ["table", "cup"], ["sky"], ["sky"], ["sky"], ["sky"], ["cup"])
    chooser = Chooser(data, Names(), seed=0)
    assert chooser.questions(data[7], "popular", 2) == [("cup", "yes"), ("sky", "no")]
    assert chooser.questions(data[7], "adversarial", 2) == [("cup", "yes"), ("table", "no")]
    fork = pictures(["fork"])[0]
    assert [name for name, _ in chooser.questions(fork, "adversarial", 6)] == ["fork", "table"], "as many yes as no"
    seen = Counter(Chooser(data, Names(), seed=seed).questions(fork, "random", 2)[1][0] for seed in range(300))
    assert set(seen) == {"table", "cup", "sky"} and min(seen.values()) > 60


ALIKE = [{"dog", "dogs", "hot dog"}, {"man", "people"}, {"glass", "glasses"}, {"cup", "red cup"}, {"sky"}, {"tree"}]


@pytest.mark.parametrize("seed", range(3))
def test_any_data_give_balanced_questions_without_a_wrong_no(seed):
    rng, names, asked = random.Random(seed), Names([["man", "person"]]), 0
    known = sorted(set().union(*ALIKE))
    listed = [rng.sample(known, rng.randint(0, 5)) for _ in range(60)]
    data = pictures(*[list(dict.fromkeys(map(names.name, objects))) for objects in listed])
    chooser = Chooser(data, names, seed)
    for picture, there in zip(data, listed, strict=True):
        present = []
        for way in WAYS:
            found = chooser.questions(picture, way, 6)
            yes = [name for name, answer in found if answer == "yes"]
            no = [name for name, answer in found if answer == "no"]
            assert len(yes) == len(no) == len(set(no)) <= 3
            assert set(yes) <= set(picture.objects)
            for absent in no:
                assert not next(group for group in ALIKE if absent in group) & set(there)
            present.append(yes)
            asked += len(found)
        most = max(present, key=len)
        assert all(yes == most[: len(yes)] for yes in present), "all ways ask for the same present objects"
    assert asked > 300


def shards_of(folder: Path, samples: list[dict]) -> str:
    write_shards(folder, [{"__key__": f"s{i}"} | sample for i, sample in enumerate(samples)], per_shard=4)
    return str(folder)


def program(tmp_path: Path, *settings: str) -> Path:
    negatives.main([f"out={tmp_path / 'out'}", *settings])
    return tmp_path / "out"


def test_annotated_pictures_become_conversations(tmp_path):
    data = [
        {"png": tiny_encoders.picture(size=(30 + i, 30)), "json": {"objects": listed}}
        for i, listed in enumerate([["dog", "cat"], [{"name": "cat"}, {"name": "Apples"}], ["dog"], [], ["ball"]])
    ]
    out = program(tmp_path, f"shards={shards_of(tmp_path / 'in', data)}", "questions=4")
    assert sorted(folder.name for folder in out.iterdir()) == sorted(WAYS)
    for way in WAYS:
        found = list(read_shards(out / way))
        assert [s["json"]["source"] for s in found].count("s0") == 4
        assert [s["json"]["source"] for s in found].count("s3") == 0, "nothing to say yes to"
        for raw in found:
            members = {name: value for name, value in raw.items() if not name.startswith("__")}
            number = int(raw["json"]["source"][1:])
            assert raw["png"] == data[number]["png"], "pictures are copied byte for byte"
            sample = parse(
                "0.tar", raw["__key__"], members | {"json": json.dumps(raw["json"]).encode()}, {"png": "image"}
            )
            there = json.dumps(data[number]["json"]).lower()
            assert sample.options == ["yes", "no"]
            assert (sample.answer() == "yes") == (raw["json"]["object"].removesuffix("s") in there)
        asked = {raw["json"]["messages"][0]["content"][1]["text"] for raw in found}
        assert "Is there a dog in the picture?" in asked and "Is there an apples in the picture?" in asked


def test_the_same_data_and_seed_give_the_same_bytes_wherever_they_lie(tmp_path, capsys):
    data = [{"png": tiny_encoders.picture(), "json": {"objects": [f"thing{i}", f"thing{i + 1}"]}} for i in range(9)]
    tars = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        out = program(tmp_path / name, f"shards={shards_of(tmp_path / name / 'in', data)}", f"seed={seed}")
        tars[name] = [(out / way / "000000.tar").read_bytes() for way in WAYS]
    assert tars["a"] == tars["b"] and tars["a"] != tars["c"]
    capsys.readouterr()
    program(tmp_path / "a", "shards=nowhere")
    assert capsys.readouterr().out.count("is there already") == 3, "started again, it does nothing"


def test_captions_and_closed_questions_tell_what_is_there(tmp_path):
    label = [labelled_sample(f"l{i}", "image", "png", tiny_encoders.picture(), name) for i, name in enumerate(NAMES)]
    asked = labelled_sample("q", "image", "png", tiny_encoders.picture(), "owl", options=["fox", "owl"])
    write_shards(tmp_path / "in", [*label, asked], per_shard=9)
    found = list(read_shards(program(tmp_path, f"shards={tmp_path / 'in'}", "ways=[random]") / "random"))
    yes = [
        (s["json"]["source"], s["json"]["object"])
        for s in found
        if s["json"]["messages"][1]["content"][0]["text"] == "yes"
    ]
    assert yes == [("l0", "fox"), ("l1", "owl"), ("l2", "cat"), ("q", "owl")]


def objects_of(described: dict, caption: str) -> list[str]:
    members = {"jpg": b"", "json": json.dumps(described).encode(), "txt": caption.encode()}
    return describe(Names(), RawSample(shard="a.tar", place=("a.tar", 0, 0), key="k", members=members)).objects


def test_articles_are_no_part_of_a_name():
    names = ["a dog", "An owl", "the red cat", "anvil", "theatre"]
    assert objects_of({"objects": names}, "") == ["dog", "owl", "red cat", "anvil", "theatre"]


@pytest.mark.parametrize("answer", ["yes", "No", "B", "3", "12.5", "no."])
def test_an_answer_that_names_nothing_is_no_object(answer):
    described = {"options": [answer, "cat"], "messages": [{"role": "assistant", "content": answer}]}
    assert objects_of(described, "fox") == ["fox"], "the caption is asked instead"
    described = {"options": ["cat"], "messages": [{"role": "assistant", "content": "cat"}]}
    assert objects_of(described, "fox") == ["cat"]


def test_a_table_finds_objects_in_captions(tmp_path):
    (tmp_path / "objects.txt").write_text("person, man, woman\ncat\n\ndog, puppy\n")
    captions = ["Two women and a puppy.", "A cat.", "The sea."]
    data = [{"png": tiny_encoders.picture(), "txt": caption} for caption in captions]
    shards = f"shards={shards_of(tmp_path / 'in', data)}"
    out = program(tmp_path, shards, f"synonyms={tmp_path / 'objects.txt'}", "ways=[popular]")
    found = [(s["json"]["source"], s["json"]["object"]) for s in read_shards(out / "popular")]
    assert found[1] == ("s0", "cat") and len(found) == 4
    assert {source for source, _ in found} == {"s0", "s1"}, "the sea is no object that the table knows"


def test_bad_samples_are_named_and_counted(tmp_path):
    good = [{"png": tiny_encoders.picture(), "json": {"objects": [name]}} for name in ("dog", "cat")]
    bad = [
        {"json": {"objects": ["dog"]}},
        {"0.png": b"", "1.png": b"", "json": {"objects": ["dog"]}},
        {"png": b"", "json": {"objects": "dog"}},
        {"png": b"", "json": {"objects": [{"box": 1}]}},
        {"png": b"", "json": b"{"},
        {"png": b"", "txt": b"\xff"},
        {"png": b"", "txt": "a man rides a horse"},
        {"png": b"", "json": {"width": 3}},
    ]
    shards = f"shards={shards_of(tmp_path / 'in', [*good, *bad])}"
    out = program(tmp_path, shards, "max_bad_share=0.9")
    lines = [json.loads(line) for line in (tmp_path / "out.skipped.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [f"s{i}" for i in range(2, 10)]
    assert "give synonyms=FILE" in lines[6]["reason"] and "wanted is one" in lines[0]["reason"]
    assert len(list(read_shards(out / "random"))) == 4
    (tmp_path / "strict").mkdir()
    with pytest.raises(BudgetExceeded, match="s2"):
        program(tmp_path / "strict", shards, "max_bad_share=0")
    assert not (tmp_path / "strict" / "out").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["questions=3"], "must be even"),
        (["ways=[poplar]"], r"ways\[0\] is 'poplar'; it can be random, popular or adversarial; did you mean popular\?"),
        (["synonyms=nowhere.txt"], "there is no file nowhere.txt"),
        (["question=4"], "question"),
        ([], "in none is another one missing"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path, settings, said):
    shards = shards_of(tmp_path / "in", [{"png": tiny_encoders.picture(), "json": {"objects": ["dog"]}}])
    with pytest.raises(UserError, match=said):
        program(tmp_path, f"shards={shards}", *settings)


def test_an_empty_table_is_refused(tmp_path):
    (tmp_path / "objects.txt").write_text(" ,\n\n")
    with pytest.raises(UserError, match="names no object"):
        read_table(tmp_path / "objects.txt")
