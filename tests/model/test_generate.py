"""Generation and scoring, against the slow way of doing the same."""

import pytest
import torch

from anymal.data.packing import pack
from anymal.model.generate import embed_prompt, generate, log_likelihoods
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
        assert answer.text == prompt.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert answer.cut == (prompt.tokenizer.eos_token_id not in ids)


def test_generation_leaves_training_as_it_was(toy):
    from anymal.model.trainable import fingerprint, select_trainable

    model, prompt = toy
    select_trainable(model, ["projectors"])
    before = fingerprint(model)
    generate(model, prompt.tokenizer, [embed_prompt(model, prompt.question(ASKED[0]))], max_new_tokens=3)
    model.train()
    batch = pack([prompt.sample(s) for s in ASKED])
    model(batch, model.encode(batch.media))[0].backward()
    assert fingerprint(model) == before
    assert model.projectors["eye"].scale.grad.abs() > 0
