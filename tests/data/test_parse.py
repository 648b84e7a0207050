"""Members of one tar sample → a conversation, or the reason why not."""

import json
import time

import pytest

from anymal.data.parse import parse
from anymal.errors import BadSample

SUFFIXES = {"jpg": "image", "png": "image", "npy": "array", "imu.npy": "imu"}


def conversation(*messages, **more) -> bytes:
    return json.dumps({"messages": list(messages), **more}).encode()


def user(*parts) -> dict:
    return {"role": "user", "content": list(parts)}


def of(members: dict) -> list:
    sample = parse("a.tar", "k", members, SUFFIXES)
    assert (sample.shard, sample.key) == ("a.tar", "k")
    return [(message.role, [(part.kind, part.content) for part in message.parts]) for message in sample.messages]


ANSWER = {"role": "assistant", "content": "yes"}
IMAGE = {"type": "image"}
TEXT = {"type": "text", "text": "what is it?"}


def test_pairs():
    image = {"jpg": b"1", "txt": "  a naïve cat\n".encode()}
    assert of(image) == [("user", [("image", b"1")]), ("assistant", [("text", "a naïve cat")])]
    metadata = {"json": b'{"url": "x", "width": 3}', "cls": b"4"}  # as img2dataset writes it
    assert of(image | metadata) == of(image)
    many = {"10.jpg": b"10", "imu.npy": b"i", "2.png": b"2", "txt": b"x", "a.npy": b"a"}
    assert of(many)[0] == ("user", [("image", b"2"), ("image", b"10"), ("array", b"a"), ("imu", b"i")])


def test_conversations():
    text = {"type": "text", "text": "which?"}
    members = {"10.jpg": b"10", "2.jpg": b"2", "imu.npy": b"i", "txt": b"not used"}
    turns = [
        {"role": "system", "content": "be brief"},
        user(IMAGE, text, {"type": "imu", "member": "IMU.npy"}, IMAGE),
        ANSWER,
    ]
    assert of(members | {"json": conversation(*turns)}) == [
        ("system", [("text", "be brief")]),
        ("user", [("image", b"2"), ("text", "which?"), ("imu", b"i"), ("image", b"10")]),
        ("assistant", [("text", "yes")]),
    ]
    turns[1] = user({"type": "imu"}, IMAGE, {"type": "image", "member": "2.jpg"})  # IMAGE is the one that is left
    assert of(members | {"json": conversation(*turns)})[1][1] == [("imu", b"i"), ("image", b"10"), ("image", b"2")]
    assert of({"json": conversation(user(text), ANSWER)})[0] == ("user", [("text", "which?")])
    closed = parse("a.tar", "k", {"json": conversation(user(text), ANSWER, options=["yes", "no"])}, SUFFIXES)
    assert closed.options == ["yes", "no"]
    assert closed.answer() == "yes"


@pytest.mark.parametrize(
    "members, says",
    [
        ({"jpg": b""}, "has no text: neither a txt nor a json"),
        ({"jpg": b"", "json": b'{"caption": "x"}'}, "has no text: neither"),
        ({"jpg": b"", "txt": b" \n"}, "its txt is empty"),
        ({"jpg": b"", "txt": b"\xff\xfe"}, "not UTF-8"),
        ({"jpg": b"", "txt": b"x", "json": b"{"}, "its json is not valid"),
        ({"jpg": b"", "json": b"\xff"}, "its json is not valid"),
        ({"txt": b"x", "mp4": b""}, "no medium of this run's modalities (image, array, imu); it holds txt, mp4"),
        ({"jpg": b"", "txt": b"x", "pth": b""}, "'pth' looks like a pickle, which is never unpickled"),
        ({"jpg": b"", "txt": b"x", "0.pyd": b""}, "never unpickled"),
        ({"json": b'{"messages": []}'}, "not empty"),
        ({"json": b'{"messages": {}}'}, "must be a list"),
        ({"json": conversation("hello")}, '"role" and "content"'),
        ({"json": conversation({"role": "human", "content": "x"})}, "system, user, assistant"),
        ({"json": conversation({"role": "user", "content": 3})}, "has the content 3"),
        ({"json": conversation(user({"type": "text"}))}, 'has the part {"type": "text"}'),
        ({"json": conversation(user({"type": "imag"}))}, "did you mean image?"),
        ({"json": conversation(user({"type": []}))}, "unknown type"),
        ({"json": conversation(user("hello"))}, "unknown type"),
        ({"json": conversation(user({"type": "image", "url": "http://x"}))}, "http://x"),
        ({"json": conversation(user({"type": "image", "member": 0}))}, '"member"'),
        ({"json": conversation(user({"type": "text", "text": " "}))}, "no message says anything"),
        ({"json": conversation(ANSWER, options=[1])}, "must be a list of texts"),
        ({"json": conversation(user(IMAGE), ANSWER)}, "refers to 1 image members, it holds 0"),
        (
            {"json": conversation(user(IMAGE), ANSWER), "0.jpg": b"", "1.png": b""},
            "refers to 1 image members, it holds 2",
        ),
        ({"json": conversation(user(IMAGE, IMAGE), ANSWER), "jpg": b""}, "refers to 2 image members, it holds 1 (jpg)"),
        ({"json": conversation(ANSWER), "imu.npy": b""}, "refers to 0 imu members, it holds 1 (imu.npy)"),
        (
            {"json": conversation(user({"type": "image", "member": "1.jpg"}), ANSWER), "0.jpg": b""},
            "has no image member '1.jpg'; did you mean 0.jpg?",
        ),
        (
            {"json": conversation(user({"type": "image", "member": "imu.npy"}), ANSWER), "imu.npy": b""},
            "has no image member 'imu.npy'",
        ),
        ({"json": b"[" * 100_000, "jpg": b"", "txt": b"x"}, "its json is nested too deeply"),
        ({"json": b'{"messages": ' + b"9" * 5000 + b"}"}, "its json is not valid"),
        ({"json": b" " * ((1 << 24) + 1)}, "its json has 16777217 bytes; at most 16777216 are read"),
        ({"json": conversation(*[user({"type": "text", "text": "x"})] * 513)}, "has 513 messages; at most 512"),
        (
            {"json": conversation(user(*[IMAGE | {"member": "jpg"}] * 1001), ANSWER), "jpg": b""},
            "refers to 1001 media; at most 1000",
        ),
        ({"json": conversation(ANSWER, options=["x"] * 1001)}, 'has 1001 "options"; at most 1000'),
    ],
)
def test_bad_samples(members, says):
    with pytest.raises(BadSample) as error:
        of(members)
    assert says in str(error.value)


def test_media_of_other_modalities_than_the_runs_are_ignored():
    def seen(members: dict, *modalities) -> tuple:
        sample = parse("a.tar", "k", members, SUFFIXES, *modalities)
        return [part.member for part in sample.media()], sample.ignored

    pair = {"0.jpg": b"0", "1.jpg": b"1", "imu.npy": b"i", "a.npy": b"a", "b.npy": b"b", "txt": b"two cats"}
    assert seen(pair, ["image"]) == (["0.jpg", "1.jpg"], ["array", "array", "imu"])
    assert seen(pair, ["array", "image"]) == (["0.jpg", "1.jpg", "a.npy", "b.npy"], ["imu"])
    everything = (["0.jpg", "1.jpg", "a.npy", "b.npy", "imu.npy"], [])
    assert seen(pair) == seen(pair, ["imu", "array", "image"]) == everything
    asked = {"jpg": b"0", "imu.npy": b"i", "json": conversation(user(IMAGE, TEXT), ANSWER)}
    assert seen(asked, ["image"]) == (["jpg"], ["imu"])
    motion = {"jpg": b"0", "imu.npy": b"i", "txt": b"x"}
    assert seen(motion, ["image", "array"]) == (["jpg"], ["imu"]), "a recording of motion is no array"
    words = {"json": conversation(user(TEXT), ANSWER)}
    assert seen(words, ["image"]) == seen(words, []) == ([], [])
    tag = {"jpg": b"0", "txt": b"write <imu> into the page"}
    assert seen(tag, ["image"]) == (["jpg"], []), "there is no such medium that it could mean"


@pytest.mark.parametrize(
    "members, says",
    [
        ({"txt": b"x", "imu.npy": b"i"}, "has no medium of this run's modalities (image); it holds txt, imu.npy"),
        ({"json": conversation(user(TEXT), ANSWER), "imu.npy": b"i"}, "has no medium of this run's modalities (image)"),
        (
            {"json": conversation(user(IMAGE, {"type": "imu"}, TEXT), ANSWER), "jpg": b"0", "imu.npy": b"i"},
            """has the part {"type": "imu"}, but imu is not one of this run's modalities (image)""",
        ),
        ({"json": conversation(user({"type": "imu"}, TEXT), ANSWER)}, "but imu is not one of this run's modalities"),
        (
            {"jpg": b"0", "imu.npy": b"i", "txt": b"<imu> is how it moves"},
            "its text refers to its imu by <imu>, but imu is not one of this run's modalities (image)",
        ),
        (
            {
                "jpg": b"0",
                "imu.npy": b"i",
                "npy": b"",
                "json": conversation(user(IMAGE, TEXT | {"text": "<imu>"}), ANSWER),
            },
            "its text refers to its imu by <imu>",
        ),
        (
            {"jpg": b"", "json": conversation(user({"type": "sounds"}, TEXT), ANSWER)},
            "this run's types are text, image",
        ),
    ],
)
def test_samples_that_need_another_modality_are_bad(members, says):
    with pytest.raises(BadSample) as error:
        parse("a.tar", "k", members, SUFFIXES, ["image"])
    assert says in str(error.value)


def test_names_of_strangers_are_compared_and_repeated_in_part_only():
    name = "ab" * 100_000
    members = {f"{name}{i}.jpg": b"" for i in range(20)}
    for part in ({"type": "image", "member": f"{name}x.jpg"}, {"type": name}):
        began = time.process_time()
        with pytest.raises(BadSample) as error:
            of(members | {"json": conversation(user(part), ANSWER)})
        assert time.process_time() - began < 1
        assert len(str(error.value)) < 500
