"""Evaluation: what is held and when, three conditions, and that every sample is decoded and encoded once."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from anymal.data.prepare import Prepare
from anymal.errors import BadSample
from anymal.evaluation.evaluate import evaluate, prepare_held_out
from anymal.evaluation.scores import figures
from anymal.model.generate import embed_prompt, log_likelihoods
from anymal.sample import Message, Part, Sample
from toys import ToyEncoder, decode, text, toy_model


def raw(kind: str, value: float) -> Part:
    """A toy medium as it is in a shard."""
    return Part(kind=kind, content=torch.tensor([float(value)]).numpy().tobytes(), member=f"{kind}.bin")


def closed(value: float, answer: str, key: str, options: tuple[str, ...] = ("yes", "the dog")) -> Sample:
    turns = [
        Message(role="user", parts=[raw("eye", value), text("what?")]),
        Message(role="assistant", parts=[text(answer)]),
    ]
    return Sample(key=key, shard="s.tar", messages=turns, options=list(options))


@pytest.fixture(scope="module")
def toy(tiny_llm):
    model, prompt = toy_model(tiny_llm, eye=3, ear=2)
    return model, Prepare(prompt=prompt, decoders={"eye": decode, "ear": decode})


def run(toy, samples: list[Sample], **sizes) -> list:
    model, prepare = toy
    held_out = (prepare_held_out(prepare, sample) for sample in samples)
    return list(evaluate(model, prepare.prompt.tokenizer, held_out, **{"max_new_tokens": 2, **sizes}))


def test_records_say_which_media_the_model_ignored(toy):
    samples = [replace(closed(i, "yes", f"k{i}"), ignored=["nose", "nose"] if i else []) for i in range(2)]
    result = figures(run(toy, samples), "sum")
    assert result["altered"] == {"nose ignored, which the model does not have,": 1}


def test_a_model_that_sees_is_told_from_its_controls(toy):
    """The toy LLM prefers an answer by what it sees; each sample's right answer is what it prefers with its medium."""
    model, prepare = toy
    samples = []
    for i, value in enumerate([-30.0, -10.0, -3.0, -1.0, 1.0, 3.0, 10.0, 30.0]):
        candidate = closed(value, "yes", f"k{i}")
        question = embed_prompt(model, prepare.prompt.question(prepare.decode(candidate)))
        (likelihood,) = log_likelihoods(model, [question], [prepare.prompt.answers(candidate, candidate.options)])
        samples.append(closed(value, candidate.options[int(likelihood.argmax())], f"k{i}"))
    assert len({s.answer() for s in samples}) == 2, "this toy LLM answers the same whatever it sees: change the options"
    result = figures(run(toy, samples, batch_size=3), "sum")
    assert result["own"]["accuracy"] == 1.0 and result["n"] == result["closed"] == 8 and result["chance"] == 0.5
    assert result["blank"]["accuracy"] < 1 and result["shuffled"]["accuracy"] < 1
    assert result["interval"][0] < 1.0 == result["interval"][1]
    assert "yes_no" not in result, "a yes and something else is no yes/no question"


def test_losses_and_likelihoods_are_those_of_the_own_the_blank_and_the_lent_medium(toy):
    model, prepare = toy
    samples = [closed(float(i), ("yes", "the dog")[i % 2], f"k{i}") for i in range(5)]
    by_key = {sample.key: sample for sample in samples}
    for record in run(toy, samples, batch_size=2):
        value = {"own": record.key, "shuffled": record.lender}.get(record.condition)
        shown = closed(0.0 if value is None else float(value[1:]), record.answer, record.key)
        prompts = [embed_prompt(model, prepare.prompt.question(prepare.decode(shown)))]
        ids = prepare.prompt.answers(shown, shown.options)
        (expected,) = log_likelihoods(model, prompts, [ids])
        assert [o.log_likelihood for o in record.options] == pytest.approx(expected.tolist(), rel=1e-4)
        assert [o.tokens for o in record.options] == list(map(len, ids))
        right = shown.options.index(by_key[record.key].answer())
        assert record.loss == pytest.approx(-float(expected[right]) / len(ids[right]), rel=1e-4)
        assert (record.lender is not None) == (record.condition == "shuffled")


def test_nobody_is_lent_its_own_media_or_such_of_another_kind(toy):
    samples = [closed(float(i), "yes", f"eye{i}") for i in range(5)]
    for i in range(3):
        parts = [raw("ear", i), raw("eye", i), text("what?")]
        turns = [Message(role="user", parts=parts), Message(role="assistant", parts=[text("yes")])]
        samples.insert(2 * i, Sample(key=f"both{i}", shard="s.tar", messages=turns))
    turns = [Message(role="user", parts=[text("no media")]), Message(role="assistant", parts=[text("so what")])]
    samples.append(Sample(key="text", shard="s.tar", messages=turns))
    records = run(toy, samples, batch_size=2)
    lent = {record.key: record.lender for record in records if record.condition == "shuffled"}
    assert sorted(lent) == sorted(lent.values()) == sorted(s.key for s in samples if s.key != "text")
    assert all(mine != other and mine[:3] == other[:3] for mine, other in lent.items())
    assert [r.condition for r in records if r.key == "text"] == ["own"]
    alone = run(toy, samples[1:2])
    assert [record.condition for record in alone] == ["own", "blank"], "there is nobody else's medium"
    assert figures(alone, "sum")["shuffled"] is None


def test_samples_of_the_same_key_in_two_shards_lend_to_each_other(toy):
    one, other = closed(1.0, "yes", "0000"), replace(closed(2.0, "yes", "0000"), shard="t.tar")
    lent = [record.shard for record in run(toy, [one, other]) if record.condition == "shuffled"]
    assert sorted(lent) == ["s.tar", "t.tar"]


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_records_do_not_depend_on_the_batch_and_each_medium_is_met_once(tiny_llm, batch_size):
    class Counting(ToyEncoder):
        seen = 0

        def forward(self, media):
            Counting.seen += len(media)
            return super().forward(media)

    model, prompt = toy_model(tiny_llm, eye=3)
    model.encoders["eye"] = Counting(3)
    read, held = [], []

    def counted(data):
        read.append(data)
        return decode(data)

    prepare = Prepare(prompt=prompt, decoders={"eye": counted})
    samples = [closed(float(i), ("yes", "the dog")[i % 2], f"k{i}") for i in range(8)]

    def stream():
        prepared = []
        for sample in samples:
            prepared.append(prepare_held_out(prepare, sample))
            yield prepared[-1]
            held.append(sum(bool(one.tokens.media) for one in prepared))

    found = list(evaluate(model, prompt.tokenizer, stream(), max_new_tokens=2, batch_size=batch_size))
    assert len(read) == 8, "each is decoded once"
    assert Counting.seen == 8 + 1, "each is encoded once, and the blank one"
    assert max(held) <= batch_size, "media are let go once they are encoded"
    key = lambda record: (record.key, record.condition)  # noqa: E731
    whole = run((model, Prepare(prompt=prompt, decoders={"eye": decode})), samples, batch_size=8)
    for one, other in zip(sorted(found, key=key), sorted(whole, key=key), strict=True):
        assert (one.said, one.lender, one.cut) == (other.said, other.lender, other.cut)
        assert one.loss == pytest.approx(other.loss, rel=1e-4)


def test_no_free_answer_is_made_where_none_is_asked_for(toy):
    samples = [closed(float(i), "yes", f"k{i}") for i in range(3)]
    silent = run(toy, samples, max_new_tokens=0)
    result = figures(silent, "sum")
    assert {record.said for record in silent} == {None}
    assert result["own"]["cider_d"] is None and result["own"]["loss"] > 0 and result["own"]["accuracy"] is not None


def test_samples_that_cannot_be_judged_are_bad(toy):
    prepare = toy[1]
    with pytest.raises(BadSample, match="'cat', which is not among its options"):
        prepare_held_out(prepare, closed(1.0, "cat", "k"))
    with pytest.raises(BadSample, match="without an answer"):
        prepare_held_out(prepare, closed(1.0, "yes", "k").question())


def test_a_seeded_sample_is_drawn_from_all_of_a_sorted_set(tmp_path):
    import webdataset as wds

    from anymal.config.schema import DataConfig
    from anymal.data.quarantine import Quarantine
    from anymal.data.stream import samples_once

    with wds.TarWriter(str(tmp_path / "sorted.tar")) as tar:
        for i in range(60):
            described = {
                "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": f"c{i // 20}"}]
            }
            tar.write({"__key__": f"{i:03d}", "json": json.dumps(described).encode()})
    orders = {}
    for seed, limit, workers in ((0, 12, 0), (0, 12, 2), (0, 0, 0), (1, 12, 0)):
        data = DataConfig(shards=str(tmp_path), workers=workers)
        once = partial(samples_once, data, suffixes={}, prepare=lambda s: (s.key, s.answer()))
        quarantine = Quarantine(None, max_in_a_row=0, max_share=0)
        orders[seed, limit, workers] = list(once(quarantine=quarantine, seed=seed, limit=limit))
    first = orders[0, 12, 0]
    assert {answer for _, answer in first} == {"c0", "c1", "c2"}, "not the first twelve of sorted data"
    assert first == orders[0, 12, 2] == orders[0, 0, 0][:12]
    assert first != orders[1, 12, 0]
    assert len({key for key, _ in orders[0, 0, 0]}) == 60
