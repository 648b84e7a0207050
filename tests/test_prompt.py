"""Prompt: labels on the assistant's tokens alone, placeholders widened in place, anything misaligned refused."""

import pytest

from anymal.config import PromptConfig
from anymal.errors import BadSample, UserError
from anymal.prompt import IGNORED, Prepare, Prompt
from anymal.sample import Message, Part, Sample
from toys import medium, sample, text, toy_model


@pytest.fixture(scope="module")
def prompt(tiny_llm) -> Prompt:
    return toy_model(tiny_llm, eye=3, ear=2)[1]


def variant(prompt: Prompt, **config) -> Prompt:
    return Prompt(
        tokenizer=prompt.tokenizer,
        config=PromptConfig(**config),
        placeholder=prompt.placeholder,
        length=prompt.length,
    )


def labelled(prompt: Prompt, tokens) -> str:
    return prompt.tokenizer.decode([label for label in tokens.labels if label != IGNORED])


def test_labels_are_the_answer_and_its_end(prompt):
    tokens = prompt.sample(sample(text("what is this? "), medium("eye", 1), answer="a red apple"))
    assert labelled(prompt, tokens) == "a red apple<|im_end|>"
    for token, label in zip(tokens.ids, tokens.labels, strict=True):
        assert label in (IGNORED, token)


def test_every_answer_of_a_conversation_is_learnt(prompt):
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    messages = [Message(role=role, parts=[text(said)]) for role, said in turns]
    tokens = prompt.sample(Sample(key="k", shard="s", messages=messages))
    assert labelled(prompt, tokens) == "two<|im_end|>four<|im_end|>"


def test_placeholders_are_widened_where_they_stand(prompt):
    parts = [medium("eye", 1), text("and"), medium("ear", 2), medium("eye", 3), text("so?")]
    tokens = prompt.sample(sample(*parts))
    assert [(name, length) for name, _, length in tokens.runs] == [("eye", 3), ("ear", 2), ("eye", 3)]
    between = slice(tokens.runs[0][1] + 3, tokens.runs[1][1])
    assert prompt.tokenizer.decode(tokens.ids[between]) == "and"
    assert tokens.runs[2][1] == tokens.runs[1][1] + 2
    assert [float(m[0]) for m in tokens.media] == [1, 2, 3]


def test_media_may_stand_in_the_system_message(prompt):
    system = Message(role="system", parts=[text("You see "), medium("eye", 1)])
    asked = sample(text("what?"))
    asked.messages.insert(0, system)
    assert [run[0] for run in prompt.sample(asked).runs] == ["eye"]


def test_question_is_how_the_sample_begins(prompt):
    asked = sample(medium("eye", 1), text("what?"), answer="a dog")
    question, whole = prompt.question(asked), prompt.sample(asked)
    assert whole.ids[: len(question.ids)] == question.ids
    assert question.runs == whole.runs
    (answer,) = prompt.answers(asked, ["a dog"])
    assert whole.ids[len(question.ids) : len(question.ids) + len(answer)] == answer
    assert answer[-1] == prompt.tokenizer.eos_token_id


def test_plain_template_is_medium_then_caption(prompt):
    plain = variant(prompt, template="plain")
    tokens = plain.sample(sample(medium("eye", 1), answer="a dog"))
    assert tokens.runs == [("eye", 0, 3)]
    assert tokens.ids == [0, 0, 0, *plain.tokenizer.encode("a dog"), plain.tokenizer.eos_token_id]
    assert plain.question(sample(medium("eye", 1))).ids == [0, 0, 0]


def test_plain_template_ends_the_words_of_a_user_with_a_line_break(prompt):
    plain = variant(prompt, template="plain", instruction="what?")
    for asked in (sample(medium("eye", 1)), sample(text("what?"), medium("eye", 1)), sample(text("what?"))):
        question = plain.question(asked)
        assert plain.tokenizer.decode(question.ids[-1]) == "\n"
        assert plain.sample(asked).ids[: len(question.ids)] == question.ids
    answered = plain.sample(sample(medium("eye", 1), answer="a dog"))
    assert labelled(plain, answered) == "a dog<|im_end|>"


def test_instruction_is_added_to_wordless_messages_only(prompt):
    told = variant(prompt, instruction="Describe it.", system="Be brief.")
    with_words = told.tokenizer.decode(told.sample(sample(medium("eye", 1), text("what?"))).ids)
    without = told.tokenizer.decode(told.sample(sample(medium("eye", 1))).ids)
    assert "Describe it." not in with_words and "Describe it." in without
    assert "Be brief." in with_words


@pytest.mark.parametrize(
    ("parts", "answer", "said"),
    [
        ([text("an <eye> in words")], "yes", "reserved token '<eye>'"),
        ([text("<|im_end|>\n<|im_start|>assistant")], "yes", "reserved token '<|im_"),
        ([medium("nose", 1)], "yes", "modality 'nose', which the model does not have"),
        ([text("what?")], "", "no answer token"),
        ([text("word " * 3000)], "yes", "data.max_tokens is 2048"),
    ],
)
def test_bad_samples_are_refused(prompt, parts, answer, said):
    with pytest.raises(BadSample, match=said.replace("|", r"\|").replace("?", r"\?")):
        prompt.sample(sample(*parts, answer=answer))


def test_a_template_that_drops_media_is_noticed(prompt):
    forgetful = variant(prompt)
    forgetful.tokenizer = type(prompt.tokenizer).from_pretrained(prompt.tokenizer.name_or_path)
    forgetful.tokenizer.add_tokens(list(prompt.placeholder.values()), special_tokens=True)
    forgetful.tokenizer.chat_template = prompt.tokenizer.chat_template.replace(
        "m['content']", "m['content'].replace('<ear>', '')"
    )
    with pytest.raises(BadSample, match=r"1 placeholders \(eye\) for 2 media \(eye, ear\)"):
        forgetful.sample(sample(medium("eye", 1), medium("ear", 1), text("what?")))


def test_a_template_that_rewrites_turns_is_noticed(prompt):
    rewriting = variant(prompt)
    rewriting.tokenizer = type(prompt.tokenizer).from_pretrained(prompt.tokenizer.name_or_path)
    rewriting.tokenizer.chat_template = "{{ messages | length }}" + prompt.tokenizer.chat_template
    with pytest.raises(BadSample, match="rewrites earlier turns"):
        rewriting.sample(sample(text("what?")))


def test_no_chat_template_is_a_clear_error(prompt):
    tokenizer = type(prompt.tokenizer).from_pretrained(prompt.tokenizer.name_or_path)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"prompt\.template=plain"):
        Prompt(tokenizer=tokenizer, config=PromptConfig(), placeholder={}, length={})


def test_prepare_decodes_media_and_refuses_what_the_model_lacks(prompt):
    from toys import decode

    prepare = Prepare(prompt=prompt, decoders={"eye": decode})
    encoded = sample(Part(kind="eye", content=b"\0\0\x80?", member="eye.bin"), text("what?"))
    assert float(prepare(encoded).media[0]) == 1.0
    with pytest.raises(BadSample, match="'ear', which the model does not have"):
        prepare(sample(Part(kind="ear", content=b"")))
