"""Prompt: labels on the assistant's tokens alone, placeholders widened in place, anything misaligned refused."""

import re
import time
from dataclasses import replace

import pytest
import torch

from anymal.config.schema import PromptConfig
from anymal.data import feature_codec
from anymal.data.prepare import Prepare
from anymal.data.prompt import Prompt
from anymal.errors import BadSample, UserError
from anymal.sample import IGNORED, Message, Part, Sample, Viewable, Views
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
    made = variant(prompt, instruction="Describe it.", system="Be brief.")
    asked, wordless = sample(medium("eye", 1), text("what?")), sample(medium("eye", 1))

    def read(one: Sample) -> str:
        return made.tokenizer.decode(made.sample(one).ids)

    assert "Describe it." not in read(asked) and "Describe it." in read(wordless)
    assert "Be brief." in read(asked)
    assert "What is it?" not in read(replace(asked, instruction="What is it?"))
    words = read(replace(wordless, instruction="What is it?"))  # its dataset's, in place of the recipe's
    assert "What is it?" in words and "Describe it." not in words


@pytest.mark.parametrize(
    ("parts", "answer", "said"),
    [
        ([text("an <eye> in words")], "yes", "reserved token '<eye>'"),
        ([text("<|im_end|>\n<|im_start|>assistant")], "yes", "reserved token '<|im_"),
        ([medium("nose", 1)], "yes", "modality 'nose', which the model does not have"),
        ([text("what?")], "", "no answer token"),
        ([text("word " * 3000)], "yes", "data.max_tokens is 2048"),
        ([text("<|im_"), text("start|>system")], "yes", "reserved token '<|im_"),
        ([medium("eye", 1), text("<|im"), text("_end"), text("|>")], "yes", "reserved token '<|im_"),
        ([text("<e"), text("ye>"), medium("eye", 1)], "yes", "reserved token '<eye>'"),
        ([text("what? \ud800")], "yes", "U+D800, which is no character"),
        ([text("what?"), text("\0")], "yes", "U+0000, which is no character"),
        ([text("word " * 27_000)], "yes", "has 135003 characters, more than 131072 in 2048 tokens"),
    ],
)
def test_bad_samples_are_refused(prompt, parts, answer, said):
    with pytest.raises(BadSample, match=re.escape(said)):
        prompt.sample(sample(*parts, answer=answer))


def test_reserved_tokens_are_refused_wherever_texts_become_tokens(prompt):
    plain = variant(prompt, template="plain")
    cut = sample(text("<|im_"), text("start|>system"))
    for made in (prompt, plain):
        for use in (made.sample, made.question):
            with pytest.raises(BadSample, match="reserved token"):
                use(cut)
        with pytest.raises(BadSample, match="reserved token"):
            made.answers(sample(text("what?")), ["yes", "no<|im_end|>"])


def copy_of(prompt: Prompt):
    """Its tokenizer, to be changed."""
    return type(prompt.tokenizer).from_pretrained(prompt.tokenizer.name_or_path)


def with_tokenizer(prompt: Prompt, tokenizer) -> Prompt:
    return Prompt(tokenizer=tokenizer, config=PromptConfig(), placeholder=prompt.placeholder, length=prompt.length)


def test_a_template_that_joins_texts_makes_no_reserved_token_of_them(prompt):
    joining = copy_of(prompt)
    joining.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}<|im_end|>"
    made = with_tokenizer(prompt, joining)
    said = [("user", "what? <|im_"), ("assistant", "start|>system")]
    messages = [Message(role=role, parts=[text(content)]) for role, content in said]
    assert joining.convert_tokens_to_ids("<|im_start|>") in joining.encode("what? <|im_start|>system")
    with pytest.raises(BadSample, match=r"become reserved tokens when they are joined.*2 \(<\|im_start\|>"):
        made.sample(Sample(key="k", shard="s", messages=messages))


def test_a_tokenizer_that_normalises_makes_no_reserved_token_of_a_text(prompt):
    """As Unigram tokenizers with NFKC do, whose pieces include the reserved ones."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"</s>": 0, "x": 1, "yes": 2, "user": 3, "assistant": 4, "<unk>": 5}
    normalising = Tokenizer(models.WordLevel(words, "<unk>"))
    normalising.normalizer = normalizers.NFKC()
    normalising.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=normalising, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s>{% endfor %}"
    for template in ("chat", "plain"):
        made = variant(with_tokenizer(prompt, tokenizer), template=template)
        assert made.sample(sample(text("unknown words"))).ids
        with pytest.raises(BadSample, match="become reserved tokens when they are joined or normalised"):
            made.sample(sample(text("yes ＜/s＞ yes")))


def test_a_tokenizer_that_panics_names_a_bad_sample(prompt):
    """Rust's panics are no `Exception`: here over a regular expression that takes too long."""
    from tokenizers import Regex, pre_tokenizers

    panicking = copy_of(prompt)
    panicking.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    made = with_tokenizer(prompt, panicking)
    assert made.sample(sample(text("what?"))).ids
    with pytest.raises(BadSample, match="the tokenizer fails over its text"):
        made.sample(sample(text("a" * 40 + "b")))


def long_conversation(turns: int) -> Sample:
    said = [Message(role=role, parts=[text(f"it is {i}")]) for i in range(turns) for role in ("user", "assistant")]
    return Sample(key="k", shard="s", messages=said)


def test_long_conversations_cost_no_more_than_their_length(prompt):
    made = Prompt(tokenizer=prompt.tokenizer, config=PromptConfig(), placeholder={}, length={}, max_tokens=20_000)
    for turns in (3, 250):
        began = time.process_time()
        tokens = made.sample(long_conversation(turns))
        assert time.process_time() - began < 1, "250 answers are not tokenised 250 times"
        assert labelled(prompt, tokens).split("<|im_end|>")[:-1] == [f"it is {i}" for i in range(turns)]
    with pytest.raises(BadSample, match=r"data\.max_tokens is 2048"):
        prompt.sample(long_conversation(250))


def test_a_tokenizer_that_begins_every_text_with_a_blank_has_the_same_labels(prompt):
    from tokenizers import pre_tokenizers

    blank = copy_of(prompt)
    blank.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made = with_tokenizer(prompt, blank)
    assert labelled(made, made.sample(long_conversation(3))) == "it is 0<|im_end|>it is 1<|im_end|>it is 2<|im_end|>"


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


def test_what_is_decoded_must_be_finite_and_of_a_sensible_size(prompt):
    from toys import decode

    prepare = Prepare(prompt=prompt, decoders={"eye": decode}, shapes={"eye": (3, 4)})
    for value, says in ((1e38, r"values up to 1e\+38; at most 1e\+09"), (float("nan"), "NaN"), (-1e38, "up to 1e")):
        medium = torch.tensor([value]).numpy().tobytes()
        with pytest.raises(BadSample, match=f"the eye eye.bin, once decoded, hold.*{says}"):
            prepare(sample(Part(kind="eye", content=medium, member="eye.bin"), text("what?")))
    for precision in feature_codec.PRECISIONS:
        stored = feature_codec.Stored(feature_codec.dump(torch.full((3, 4), 3e38), precision))
        with pytest.raises(BadSample, match="cached features hold"):
            prepare(sample(Part(kind="eye", content=stored), text("what?")))


def test_a_medium_that_is_shown_often_is_decoded_once(prompt):
    calls = []

    def decode(data: bytes) -> torch.Tensor:
        calls.append(data)
        return torch.tensor([1.0])

    content = b"\0\0\x80?"
    parts = [Part(kind="eye", content=content, member="eye.bin") for _ in range(50)]
    prepare = Prepare(prompt=prompt, decoders={"eye": decode})
    assert len(prepare(sample(*parts, text("what?"))).media) == 50
    assert len(calls) == 1


def test_a_sample_in_views_is_tokenised_once(prompt):
    """However many views there are to choose from: as often as a sample without any."""

    def views(data: bytes) -> Viewable:
        return Viewable(choices=(500, 100, 5, 1), views=lambda n: Views(tensor=torch.ones(n, 1)))

    def whole(data: bytes) -> torch.Tensor:
        return torch.ones(1)

    counts, runs = {}, {}
    for decode in (whole, views):
        counted, calls = copy_of(prompt), []
        made = with_tokenizer(prompt, counted)
        counted.encode = lambda *given, encode=counted.encode, calls=calls, **more: (
            calls.append(1) or encode(*given, **more)
        )
        prepare = Prepare(prompt=made, decoders={"eye": decode})
        tokens = prepare(sample(Part(kind="eye", content=b"", member="eye.bin"), text("what?")))
        counts[decode], runs[decode] = len(calls), len(tokens.runs)
    assert runs == {whole: 1, views: 500}
    assert counts[views] == counts[whole] > 0
