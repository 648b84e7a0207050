"""Conversing: answers are those of an evaluation, come in pieces, and what goes wrong does not end the conversation."""

import fcntl
import io
import json
import os
import pty
import select
import subprocess
import sys
import termios
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny_encoders
from anymal.adapters import MODALITIES, REGISTRY
from anymal.checkpoints import checkpoint
from anymal.checkpoints.build import Built, build
from anymal.config.schema import PromptConfig
from anymal.errors import UserError
from anymal.evaluation.evaluate import evaluate, prepare_held_out
from anymal.model.generate import embed_prompt, generate
from anymal.sample import TEXT, Message, Part, Sample
from anymal.serving import chat
from anymal.serving.conversation import ContextTooLong, Conversation
from anymal.serving.draw import Painter
from small_runs import ROOT, environment, make_checkpoint, make_encoders

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tiny_llm, tmp_path_factory) -> Path:
    """A checkpoint with random weights that takes pictures and motion."""
    folder = tmp_path_factory.mktemp("trained")
    return make_checkpoint(tiny_llm, make_encoders(folder / "encoders"), folder / "run", 0, kinds=["image", "imu"])


@pytest.fixture(scope="module")
def built(trained) -> Built:
    return build(checkpoint.recipe(trained), CPU, REGISTRY, start=trained)


@pytest.fixture
def picture(tmp_path) -> Path:
    (tmp_path / "a.png").write_bytes(image().content)
    return tmp_path / "a.png"


def text(content: str) -> Part:
    return Part(kind=TEXT, content=content)


def image(size: int = 40) -> Part:
    return Part(kind="image", content=tiny_encoders.picture(size=(size, 40)), member="a.png")


def motion() -> Part:
    return Part(kind="imu", content=tiny_encoders.npy(tiny_encoders.motion()), member="b.imu.npy")


def said_in(conversation: Conversation) -> list[str]:
    return ["".join(p.content for p in m.parts if p.kind == TEXT) for m in conversation.messages]


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_every_answer_is_what_an_evaluation_of_the_conversation_gives(built, template):
    prompt = replace(built.prepare.prompt, config=PromptConfig(template=template, system="be kind"))
    built = replace(built, prepare=replace(built.prepare, prompt=prompt))
    conversation = Conversation(built=built, max_new_tokens=12)
    questions = [[image(), text("what is this?")], [text("it is red "), motion(), image(44), text("and this?")], []]
    for i, question in enumerate(questions):
        before = list(conversation.messages)
        if not question:
            conversation.attach(motion())
        asked = [*conversation.attached, *question]
        pieces = list(conversation.ask(question))
        messages = [*before, Message(role="user", parts=asked), Message(role="assistant", parts=[text("yes")])]
        evaluated = prepare_held_out(built.prepare, Sample(key="k", shard="s", messages=messages))
        (own, *_) = evaluate(built.model, built.tokenizer, [evaluated], max_new_tokens=12, batch_size=1)
        assert "".join(pieces) == own.said != ""
        assert len(pieces) > 1, "it comes piece by piece"
        assert [m.role for m in conversation.messages] == ["user", "assistant"] * (i + 1)
        assert said_in(conversation)[-1] == own.said
        assert conversation.cut == ("max_new_tokens is 12" if own.cut else "")
        assert conversation.attached == []


def test_pieces_join_to_the_answer_whatever_its_characters(built):
    """Random weights say broken characters, blanks and line breaks, some of them at the beginning or end."""
    for seed in range(6):
        torch.manual_seed(seed)
        conversation = Conversation(built=built, max_new_tokens=20, temperature=2.0)
        pieces = list(conversation.ask([text("what?")]))
        torch.manual_seed(seed)
        asked = Sample(key="k", shard="s", messages=[Message(role="user", parts=[text("what?")])])
        prompt = embed_prompt(built.model, built.prepare.prompt.question(asked))
        (said,) = generate(built.model, built.tokenizer, [prompt], max_new_tokens=20, do_sample=True, temperature=2.0)
        assert "".join(pieces) == said.text == said_in(conversation)[-1]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([text("say <|im_end|> now")], "the prompt: its text holds the reserved token"),
        ([image(), Part(kind="audio", content=b"", member="c.wav")], "'audio', which the model does not have"),
        ([Part(kind="image", content=b"no picture", member="d.png")], "^d.png: .* are no whole picture"),
    ],
)
def test_a_question_that_fails_changes_nothing(built, parts, said):
    conversation = Conversation(built=built, max_new_tokens=4)
    list(conversation.ask([text("hello")]))
    conversation.attach(image())
    messages, attached = conversation.messages, conversation.attached
    with pytest.raises(UserError, match=said.replace("|", r"\|")):
        conversation.ask(parts)
    assert (conversation.messages, conversation.attached) == (messages, attached)
    with pytest.raises(UserError, match=r"^d\.png: .*no whole picture"):
        conversation.attach(Part(kind="image", content=b"no picture", member="d.png"))
    assert conversation.attached == attached and len(attached) == 1


@pytest.mark.parametrize("how", ["closed", "interrupted"])
def test_an_answer_that_nobody_reads_on_ends_and_is_kept_as_far_as_it_came(built, how):
    conversation, threads, read = Conversation(built=built, max_new_tokens=1500), threading.active_count(), []
    counted = built.model.llm.get_input_embeddings().register_forward_hook(lambda *_: read.append(1))
    with closing(conversation.ask([text("what is this?")])) as answer:
        shown = next(answer) + next(answer)
        if how == "interrupted":
            with pytest.raises(KeyboardInterrupt):
                answer.throw(KeyboardInterrupt)
    counted.remove()
    assert len(read) < 1000 and threading.active_count() == threads
    assert said_in(conversation) == ["what is this?", shown] and conversation.cut == "interrupted"
    conversation.max_new_tokens = 3
    assert "".join(conversation.ask([text("and?")])) == said_in(conversation)[-1]


def test_a_context_beyond_the_llms_is_said(trained, tmp_path):
    recipe = checkpoint.recipe(trained)
    folder = tmp_path / "short"
    folder.mkdir()
    for file in Path(recipe.model.llm.name).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    described = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 60}
    (folder / "config.json").write_text(json.dumps(described))
    short = build(checkpoint.recipe(trained, [f"model.llm.name={folder}"]), CPU, REGISTRY, start=trained)
    conversation = Conversation(built=short, max_new_tokens=100)
    list(conversation.ask([text("what is this? it is a dog")]))
    assert conversation.cut == "the LLM reads 60 tokens"
    before = conversation.messages
    with pytest.raises(ContextTooLong, match=r"the conversation has \d+ tokens; at most 59 can be read"):
        conversation.ask([text("and this?")])
    assert conversation.messages is before
    with pytest.raises(ContextTooLong, match="characters"):
        conversation.ask([text("a" * 10**6)])
    conversation.reset()
    assert "".join(conversation.ask([text("and this?")])) == said_in(conversation)[1]


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("temprature=0.7", r"no setting temprature; did you mean temperature\? .*standard input"),
        ("modle.llm.name=x", r"no setting modle; did you mean model\?"),
        ("x=3", r"no setting x; known are: checkpoint, .*standard input"),
        ("--image=a.jpg", r"no such modality; did you mean image\?.*without --"),
        ("--imu", "'what is this' is none"),
    ],
)
def test_what_is_no_setting_is_refused(argument, said):
    with pytest.raises(UserError, match=said):
        chat.split_arguments([argument, "what is this", "checkpoint=x"], MODALITIES)


def test_texts_that_only_hold_an_equals_sign_are_texts():
    given = ["what is x=3?", "2=2", "=", "temperature=1", "model.llm.name=x"]
    parts, settings = chat.split_arguments(given, MODALITIES)
    assert [part.content for part in parts] == given[:3] and settings == given[3:]


def run_main(monkeypatch, stdin: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["chat.py", *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    chat.main("", REGISTRY)


def test_standard_input_is_the_prompt_where_no_text_is_given(trained, picture, monkeypatch, capsys):
    given = [f"checkpoint={trained}", "max_new_tokens=8", "--image", str(picture)]
    run_main(monkeypatch, "x=3, or not?\n", *given)
    piped = capsys.readouterr().out
    run_main(monkeypatch, "not read", *given, "is it?")
    written = capsys.readouterr().out
    run_main(monkeypatch, "", *given)
    alone = capsys.readouterr().out
    built = build(checkpoint.recipe(trained), CPU, REGISTRY, start=trained)
    medium = Part(kind="image", content=picture.read_bytes())
    for shown, more in ((piped, [text("x=3, or not?")]), (written, [text("is it?")]), (alone, [])):
        assert shown == "".join(Conversation(built=built, max_new_tokens=8).ask([medium, *more])) + "\n"
    with pytest.raises(UserError, match="nothing was asked"):
        run_main(monkeypatch, " \n", *given[:2])


def test_a_conversation_in_the_terminal(built, picture, tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    lines = ["what?", f"/image {tmp_path}/none.png", f"/image {tmp_path}/bad.png", f"/image '{picture}'", "and this?"]
    lines += ["say <|im_end|>", "", "/resett", "/audio " + str(picture), "/reset", "what?", "/help", "/quit", "never"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    conversation = Conversation(built=built, max_new_tokens=6)
    chat.converse(conversation, None, tmp_path)
    out, err = capsys.readouterr()
    other = Conversation(built=built, max_new_tokens=6)
    first = "".join(other.ask([text("what?")]))
    second = "".join(other.ask([image(), text("and this?")]))
    assert said_in(conversation) == ["what?", first]
    hello, *shown = out.split("> ")
    assert "/help" in hello
    assert shown == [
        f"{first}\n",
        "",
        "",
        "",
        f"{second}\n",
        "",
        "",
        "",
        "",
        "",
        f"{first}\n",
        chat.HELP.format(media="/image FILE, /imu FILE") + "\n",
        "",
    ]
    for message in ("none.png' is none", "bad.png: ", "the reserved token", "/reset?", "there is no /audio; known are"):
        assert message in err


def test_a_picture_that_cannot_be_drawn_does_not_end_the_conversation(built, tmp_path, monkeypatch, capsys):
    from tokenizers import Regex, Tokenizer, decoders
    from transformers import PreTrainedTokenizerFast

    asks = Tokenizer.from_str(built.tokenizer.backend_tokenizer.to_str())
    asks.decoder = decoders.Replace(Regex(r"[\s\S]+"), "Look! <h>a cat</h>")  # whatever token it is
    asking = PreTrainedTokenizerFast(tokenizer_object=asks, eos_token=built.tokenizer.eos_token)
    conversation = Conversation(built=replace(built, tokenizer=asking), max_new_tokens=1)
    monkeypatch.setattr(sys, "stdin", io.StringIO("what?\nwhat?\n"))
    chat.converse(conversation, Painter(name=str(tmp_path), device=CPU), tmp_path)
    out, err = capsys.readouterr()
    assert said_in(conversation) == ["what?", "Look! <h>a cat</h>"] * 2
    assert out.split("> ")[1:] == ["Look!\n", "Look!\n", "\n"] and err.count("does not load as a text-to-image") == 2


def until(terminal: int, wanted: str, seconds: float = 120) -> str:
    """What a program shows in its terminal, up to `wanted`."""
    shown, ends = "", time.monotonic() + seconds
    while wanted not in shown:
        ready, *_ = select.select([terminal], [], [], max(0, ends - time.monotonic()))
        assert ready, f"waits for {wanted!r} after {shown[-2000:]!r}"
        shown += os.read(terminal, 4096).decode(errors="replace")
    return shown


@pytest.mark.slow
def test_control_c_ends_the_answer_and_control_d_the_program(trained):
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "launch" / "chat.py"), f"checkpoint={trained}", "max_new_tokens=1900"]
    with subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        env=environment(),
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # Ctrl-C goes to whose terminal it is
    ) as program:
        os.close(theirs)
        until(ours, "> ")
        os.write(ours, b"what is this?\n")
        until(ours, "what is this?\r\n")
        assert os.read(ours, 1)
        time.sleep(0.3)
        assert b"> " not in os.read(ours, 65536), "it is still answering"
        began = time.monotonic()
        os.write(ours, b"\x03")
        until(ours, "\n> ", 10)
        assert time.monotonic() - began < 5
        os.write(ours, b"/reset\n")
        until(ours, "> ")
        os.write(ours, b"\x04")
        assert program.wait(30) == 0
    os.close(ours)
