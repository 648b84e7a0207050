"""Generation and scoring, against the slow way of doing the same."""

import pytest
import torch

from anymal.evaluate import evaluate, pieces
from anymal.generate import embed_prompt, generate, log_likelihoods
from anymal.packing import pack
from anymal.prompt import Prepare
from anymal.sample import Message, Part, Sample
from toys import medium, sample, text, toy_model

ASKED = [
    sample(medium("eye", 1), text("what is this?"), key="a"),
    sample(text("hear "), medium("ear", 5), text(" and see "), medium("eye", 2), text("and tell me what"), key="b"),
]
OPTIONS = [["a dog", "yes", "it is a red apple"], ["a", "the table is red"]]


@pytest.fixture(scope="module", params=[32, 4])
def toy(request, tiny_llm):
    return toy_model(tiny_llm, bits=request.param, eye=3, ear=2)


def test_likelihoods_are_minus_the_loss_of_each_answer(toy):
    model, prompt = toy
    prompts = [embed_prompt(model, prompt.question(s)) for s in ASKED]
    ids = [prompt.answers(s, several) for s, several in zip(ASKED, OPTIONS, strict=True)]
    found = log_likelihoods(model, prompts, ids)
    for s, several, likelihoods in zip(ASKED, OPTIONS, found, strict=True):
        for answer, likelihood in zip(several, likelihoods, strict=True):
            tokens = prompt.sample(sample(*s.messages[0].parts, answer=answer))
            batch = pack([tokens])
            loss, _ = model(batch, model.encode(batch.media))
            torch.testing.assert_close(likelihood, -loss.detach(), rtol=1e-4, atol=1e-3)


def test_greedy_answers_are_the_likeliest_tokens_one_by_one(toy):
    model, prompt = toy
    prompts = [embed_prompt(model, prompt.question(s)) for s in ASKED]
    together = generate(model, prompt.tokenizer, prompts, max_new_tokens=6)
    for one, answer in zip(prompts, together, strict=True):
        row, ids = one.row, []
        for _ in range(6):
            logits = model.llm(inputs_embeds=row, use_cache=False).logits[0, -1]
            ids.append(int(logits.argmax()))
            if ids[-1] == prompt.tokenizer.eos_token_id:
                break
            row = torch.cat([row, model.llm.get_input_embeddings()(torch.tensor([[ids[-1]]]))], dim=1)
        assert answer == prompt.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_generation_leaves_training_as_it_was(toy):
    from anymal.model import fingerprint, select_trainable

    model, prompt = toy
    select_trainable(model, ["projectors"])
    before = fingerprint(model)
    generate(model, prompt.tokenizer, [embed_prompt(model, prompt.question(ASKED[0]))], max_new_tokens=3)
    model.train()
    batch = pack([prompt.sample(s) for s in ASKED])
    model(batch, model.encode(batch.media))[0].backward()
    assert fingerprint(model) == before
    assert model.projectors["eye"].scale.grad.abs() > 0


def raw(kind: str, value: float) -> Part:
    """A toy medium as it is in a shard."""
    return Part(kind=kind, content=torch.tensor([float(value)]).numpy().tobytes(), member=f"{kind}.bin")


def closed(value: float, answer: str, key: str) -> Sample:
    data = torch.tensor([value]).numpy().tobytes()
    turns = [
        Message(role="user", parts=[Part(kind="eye", content=data, member="eye.bin"), text("what?")]),
        Message(role="assistant", parts=[text(answer)]),
    ]
    return Sample(key=key, shard="s.tar", messages=turns, options=["yes", "the dog"])


def test_evaluation_tells_a_model_that_sees_from_its_controls(tiny_llm):
    """The toy LLM prefers an answer by what it sees; each sample's right answer is what it prefers with its medium."""
    from toys import decode

    model, prompt = toy_model(tiny_llm, eye=3)
    prepare = Prepare(prompt=prompt, decoders={"eye": decode})
    values = [-30.0, -10.0, -3.0, -1.0, 1.0, 3.0, 10.0, 30.0]
    samples = []
    for i, value in enumerate(values):
        candidate = closed(value, "yes", f"k{i}")
        question = embed_prompt(model, prompt.question(prepare.decode(candidate)))
        (likelihood,) = log_likelihoods(model, [question], [prompt.answers(candidate, candidate.options)])
        samples.append(closed(value, candidate.options[int(likelihood.argmax())], f"k{i}"))
    done = []
    result = evaluate(model, prepare, samples, max_new_tokens=4, batch_size=3, progress=done.append)
    assert result["accuracy"] == 1.0 and result["n"] == 8 and result["chance"] == 0.5
    assert sum(done) == pieces(samples) == 8 + 3 * 8
    answers = [s.answer() for s in samples]
    assert len(set(answers)) == 2, "this toy LLM answers the same whatever it sees: choose other options"
    assert result["blank"] < 1 and result["shuffled"] < 1
    assert [p["choice"] for p in result["predictions"]] == answers
    assert result["interval"][0] < 1.0 == result["interval"][1]
    assert "yes_no" not in result, "a yes and something else is no yes/no question"


def test_sets_of_yes_no_questions_have_popes_figures(tiny_llm):
    from toys import decode

    model, prompt = toy_model(tiny_llm, eye=3)
    prepare = Prepare(prompt=prompt, decoders={"eye": decode})
    samples = [closed(float(i), ("yes", "no", "yes")[i % 3], f"k{i}") for i in range(6)]
    for i, s in enumerate(samples):
        s.options = ["yes", "no"] if i % 2 else ["No", "Yes"]
    result = evaluate(model, prepare, samples, max_new_tokens=2)
    assert list(result["yes_no"]) == ["said", "chosen", "blank", "shuffled"]
    assert all(figures["n"] == 6 for figures in result["yes_no"].values())
    for name, condition in (("chosen", "accuracy"), ("blank", "blank"), ("shuffled", "shuffled")):
        assert result["yes_no"][name]["accuracy"] == result[condition]
    yes = [p["choice"].lower() == "yes" for p in result["predictions"]]
    assert result["yes_no"]["chosen"]["yes_ratio"] == sum(yes) / 6
    alone = evaluate(model, prepare, samples[:1], max_new_tokens=2)
    assert alone["yes_no"]["shuffled"] is None, "there is nobody else's medium"


def test_shuffled_media_are_never_ones_own(tiny_llm):
    from anymal.evaluate import _lenders
    from toys import decode

    _, prompt = toy_model(tiny_llm, eye=3, ear=2)
    asked = [sample(raw("eye", i), text("what?")) for i in range(5)]
    asked += [sample(raw("ear", i), raw("eye", i), text("what?")) for i in range(5, 8)]
    asked += [sample(text("no media, and nobody else has none"))]
    lenders = _lenders(Prepare(prompt=prompt, decoders={"eye": decode, "ear": decode}), asked, seed=0)
    assert sorted(lenders) == list(range(9)) and lenders.pop(8) is None
    assert sorted(lenders.values()) == list(range(8))
    for mine, other in lenders.items():
        assert mine != other and (mine < 5) == (other < 5)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_figures_do_not_depend_on_the_batch_and_few_media_are_held(tiny_llm, monkeypatch, batch_size):
    import anymal.evaluate
    from toys import decode

    model, prompt = toy_model(tiny_llm, eye=3)
    prepare = Prepare(prompt=prompt, decoders={"eye": decode})
    samples = [closed(float(i), ("yes", "the dog")[i % 2], f"k{i}") for i in range(8)]
    whole = evaluate(model, prepare, samples, max_new_tokens=2, batch_size=8)
    held, encode = [], anymal.evaluate._encode
    monkeypatch.setattr(anymal.evaluate, "_encode", lambda m, q, n: held.append(len(q)) or encode(m, q, n))
    assert evaluate(model, prepare, samples, max_new_tokens=2, batch_size=batch_size) == whole
    assert max(held) <= batch_size + 1 and sum(held) <= 8 + 1, "each is encoded once, and one a second time"
