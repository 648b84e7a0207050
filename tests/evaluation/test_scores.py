"""Figures from records: the ways of choosing, controls of free answers, empty answers, precisions side by side."""

from dataclasses import replace

import pytest

from anymal.checkpoints import precision
from anymal.evaluation.scores import (
    Option,
    Record,
    agreement,
    choices,
    figures,
    predictions,
    read_records,
    write_record,
)
from anymal.evaluation.tables import print_table


def record(key="k", condition="own", answer="dog", said="dog", cut=False, loss=1.0, **options) -> Record:
    scored = [Option(text=text.replace("_", " "), log_likelihood=value, tokens=2) for text, value in options.items()]
    lender = "other" if condition == "shuffled" else None
    asked = {"shard": "s.tar", "question": "what?", "answer": answer, "said": said, "cut": cut, "loss": loss}
    return Record(key=key, condition=condition, lender=lender, options=scored, **asked)


def test_the_sum_favours_short_options_and_the_others_do_not():
    """The long option is worth more per byte, and more than with a blank medium; the sum takes the short one."""
    right = "a_large_red_apple"
    own = record(answer="a large red apple", dog=-3.0, **{right: -6.0})
    blank = record(condition="blank", answer="a large red apple", dog=-2.0, **{right: -12.0})
    chosen = {rule: choices([own, blank], rule) for rule in ("sum", "bytes", "blank")}
    name = ("s.tar", "k")
    assert {rule: made["own"][name] for rule, made in chosen.items()} == {
        "sum": "dog",  # -3 > -6
        "bytes": "a large red apple",  # -6 / 17 > -3 / 3
        "blank": "a large red apple",  # -6 + 12 > -3 + 2
    }
    result = figures([own, blank], "bytes")
    assert result["own"]["accuracy_by"] == {"sum": 0.0, "bytes": 1.0, "blank": 1.0}
    assert result["own"]["accuracy"] == 1.0 and result["rule"] == "bytes"
    assert result["blank"]["accuracy_by"] == {"sum": 0.0, "bytes": 0.0, "blank": None}, "all are equal there"
    assert figures([own], "blank")["own"]["accuracy"] is None, "nothing to compare with"


def test_an_option_that_differs_in_letter_case_alone_is_another():
    assert figures([record(answer="Polish", Polish=-2.0, polish=-1.0)], "sum")["own"]["accuracy"] == 0.0


def test_free_answers_have_controls():
    """What a model says of no medium at all can score as well as what it says of its own."""
    answers = ["a dog on the grass", "a red car in town", "two people at sea"]
    records = []
    for i, answer in enumerate(answers):
        records += [
            record(key=f"k{i}", answer=answer, said=answer),
            record(key=f"k{i}", condition="blank", answer=answer, said=answers[0], loss=3.0),
            record(key=f"k{i}", condition="shuffled", answer=answer, said=answers[(i + 1) % 3], loss=2.0),
        ]
    result = figures(records, "sum")
    assert result["own"]["cider_d"] > 2 * result["blank"]["cider_d"] > 0
    assert result["shuffled"]["cider_d"] < result["blank"]["cider_d"]
    assert [result[name]["exact"] for name in ("own", "blank", "shuffled")] == [1.0, pytest.approx(1 / 3), 0.0]
    assert [result[name]["loss"] for name in ("own", "blank", "shuffled")] == [1.0, 3.0, 2.0]
    assert result["own"]["accuracy"] is None and result["chance"] is None and result["closed"] == 0


def test_empty_and_cut_answers_are_counted():
    said = ["", "  ", "dog", "a dog and a cat and"]
    records = [record(key=f"k{i}", said=text, cut=text.endswith("and")) for i, text in enumerate(said)]
    own = figures(records, "sum")["own"]
    assert (own["empty"], own["cut"], own["exact"]) == (0.5, 0.25, 0.25)


def test_what_decoding_left_out_is_counted_by_sample():
    cropped = replace(record(), altered=["audio cropped to the middle 10 s"] * 2)
    result = figures([cropped, replace(record(key="k2"), condition="blank", altered=cropped.altered)], "sum")
    assert result["altered"] == {"audio cropped to the middle 10 s": 1}
    lines = print_table({"precisions": {"4": {"sounds": result}}}).splitlines()
    assert "sounds: audio cropped to the middle 10 s in 1 of 1" in lines


def test_controls_of_fewer_samples_are_named():
    records = [record(key=f"k{i}", condition=c) for i in range(3) for c in ("own", "blank")]
    records.append(record(key="k0", condition="shuffled"))
    lines = print_table({"precisions": {"4": {"pets": figures(records, "sum")}}}).splitlines()
    (found,) = (line for line in lines if line.startswith("pets: "))
    assert found.startswith("pets: shuffled is of 1 of 3 samples")


def test_yes_no_sets_have_popes_figures():
    records = []
    for i, (answer, yes) in enumerate([("yes", -1.0), ("no", -1.0), ("yes", -3.0)]):
        options = {"Yes": yes, "no": -2.0}
        own = record(key=f"k{i}", answer={"yes": "Yes"}.get(answer, answer), said="No, it is not", **options)
        records += [own, record(key=f"k{i}", condition="blank", answer=own.answer, said="", **options)]
    found = figures(records, "sum")["yes_no"]
    assert found["chosen"]["yes_ratio"] == pytest.approx(2 / 3) and found["said"]["yes_ratio"] == 0
    assert found["blank"] == found["chosen"] and found["shuffled"] is None
    assert figures([record(key="k", dog=-1.0, cat=-2.0)], "sum").get("yes_no") is None


def test_yes_and_no_with_a_full_stop_are_yes_and_no():
    options = {"Yes.": -1.0, "No.": -2.0}
    records = [record(key=f"k{i}", answer=answer, said=answer, **options) for i, answer in enumerate(options)]
    found = figures(records, "sum")["yes_no"]
    assert found["said"]["accuracy"] == 1.0 and found["chosen"]["yes_ratio"] == 1.0


def test_records_survive_the_file(tmp_path):
    records = [record(key=f"k{i}", condition=c, dog=-1.5, cat=-2.0) for i in range(2) for c in ("own", "shuffled")]
    lines = [write_record(one, set="pets", bits=4) for one in records]
    lines += [write_record(records[0], set="pets", bits=32), write_record(records[0], set="cars", bits=4)]
    (tmp_path / "records.jsonl").write_text("".join(lines))
    assert read_records(tmp_path / "records.jsonl", set="pets", bits=4) == records
    assert len(read_records(tmp_path / "records.jsonl", set="pets", bits=32)) == 1


def test_two_precisions_agree_where_they_choose_alike():
    at_4 = [record(key=f"k{i}", dog=-1.0, cat=-2.0) for i in range(4)]
    at_32 = [record(key=f"k{i}", dog=-1.0, cat=-2.0 if i else -0.5) for i in range(4)]
    assert agreement(at_4, at_32, "sum") == 0.75 and agreement(at_4, at_4, "sum") == 1.0
    assert agreement([record()], [record()], "sum") is None


def test_a_prediction_holds_what_was_said_and_nothing_invented():
    own = record(said="", dog=-1.0, cat=-2.0)
    (found,) = predictions([own, record(condition="blank", said="cat", dog=-1.0, cat=-2.0)], "sum")
    assert found["choice"] == "dog" and found["said"] == ""


def test_drift_is_remembered_beside_the_checkpoint(tmp_path):
    def measured(accuracy, loss=1.0, samples="a", rule="sum"):
        own = {"n": 48, "accuracy": accuracy, "cider_d": 1.0, "loss": loss, "empty": 0.0}
        return {"own": own, "samples": samples, "rule": rule}

    assert precision.note(tmp_path, 4, 4) == ""
    assert "was not measured yet" in precision.note(tmp_path, 4, 32)
    assert precision.save(tmp_path, 4, {4: {"audio": measured(0.75)}, 32: {"audio": measured(0.60)}})
    assert precision.save(tmp_path, 4, {32: {"captions": measured(None, 2.5)}})
    assert precision.save(tmp_path, 4, {4: {"captions": measured(None, 2.0)}})
    note = precision.note(tmp_path, 4, 32)
    assert note.endswith("Measured: audio accuracy 75% → 60% (n=48); captions loss 2.000 → 2.500 (n=48)")
    for other in ({"samples": "b"}, {"rule": "bytes"}):
        precision.save(tmp_path, 4, {32: {"audio": measured(0.20, **other)}})
        assert "audio" not in precision.note(tmp_path, 4, 32), "figures of other samples, or otherwise chosen"
    for others in ("[damaged", '{"sets": {"audio": {"4": {"n": 1}, "32": {"n": 1}}}}', '{"sets": []}'):
        (tmp_path / precision.NAME).write_text(others)
        assert "was not measured yet" in precision.note(tmp_path, 4, 32)
    assert precision.save(tmp_path, 4, {4: {"audio": measured(0.75)}})
    assert not precision.save(tmp_path / "missing", 4, {})
