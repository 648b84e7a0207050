"""Mutants of captions and conversations: control tokens in pieces, deep and long JSON, NUL, surrogates, wrong types."""

import json
from random import Random
from typing import Any

from fuzz_bytes import Case, blind, shuffled

from tiny_encoders import picture

PICTURE = picture(size=(20, 20))
PIECES = (
    *(
        "a dog",
        " ",
        "",
        "<|im_",
        "start|>",
        "<|im_start|",
        ">",
        "<|",
        "im_end|>system\n",
        "<|endof",
        "text|>",
        "<im",
        "age>",
    ),
    *(
        "<image>",
        "<|im_end|>",
        "\0",
        "\ud800",
        "\udfff\ud800",
        "\u202e",
        "😀",
        "é" * 300,
        "\ufeff",
        "a\u0301" * 50,
        "{{ x }}",
    ),
)
VALUES = (
    *(
        None,
        True,
        -1,
        0,
        3,
        1e308,
        10**40,
        float("nan"),
        "",
        "x",
        "image",
        "\0",
        "\ud800",
        "assistant",
        "system",
        [],
        {},
        [[]],
    ),
    *(
        [None],
        {"type": "image"},
        {"type": "text", "text": 3},
        {"type": "x" * 200_000},
        {"role": "user"},
        "0.png",
        "png",
    ),
    *([0, 5, 3], {"0": 1}, {"-1": "no"}, [1 << 40], [0.5], "y" * 3000, {"type": "image", "member": "z" * 200_000}),
)


def _parts(rng: Random) -> list[dict]:
    pieces = PIECES if rng.random() < 0.6 else PIECES[:3]
    said = [rng.choice(pieces) for _ in range(rng.choice((1, 2, 2, 3, 8)))]
    if rng.random() < 0.1:
        token = rng.choice(("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<image>", "<audio>"))
        cut = rng.randint(1, len(token) - 1)
        said += [token[:cut], token[cut:]]
    return [{"type": "text", "text": text} for text in said]


def conversation(rng: Random) -> dict:
    """Messages with one picture, most of them as they should be."""
    turns = []
    for i in range(rng.choice((2, 2, 2, 4, 4, 10, 10, 800))):
        content: Any = _parts(rng)
        if rng.random() < 0.3:
            content = "".join(part["text"] for part in content)
        turns.append({"role": ("user", "assistant")[i % 2], "content": content})
    if rng.random() < 0.1:
        turns.insert(0, {"role": "system", "content": rng.choice(PIECES)})
    first = turns[0]["content"]
    turns[0]["content"] = [
        {"type": "image"},
        *(first if isinstance(first, list) else [{"type": "text", "text": first}]),
    ]
    return {"messages": turns}


def mutate_tree(rng: Random, value: Any) -> Any:
    """Replace, drop, double or reorder something in nested lists and dicts."""
    if isinstance(value, dict | list) and value and rng.random() < 0.75:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        if isinstance(value, list) and rng.random() < 0.2:
            return shuffled(rng, value)
        copied = value.copy()
        copied[key] = mutate_tree(rng, value[key])
        return copied
    if isinstance(value, int) and rng.random() < 0.6:
        return value + rng.choice((-1, 1, 1000, -value - 1, 1 << 32, 1 << 63, 10**25))
    return rng.choice(VALUES)


def to_json(rng: Random, value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=rng.random() < 0.7)
    data = text.encode(errors="surrogatepass")
    choice = rng.random()
    if choice < 0.06:
        deep = rng.choice((200, 990, 5000, 100_000))
        opened = rng.choice((b"[" * deep, b'{"a":' * deep, b"[" * deep + b"]" * deep))
        at = rng.choice([0, *(i + 1 for i in range(len(data[:5000])) if data[i : i + 1] == b":")])
        return data[:at] + opened + data[at:]
    return blind(rng, data) if choice < 0.15 else data


def make_json(rng: Random) -> Case:
    held, value = {"png": PICTURE}, conversation(rng)
    choice = rng.random()
    if choice < 0.45:
        value = mutate_tree(rng, value)
    elif choice < 0.5:  # names that differ little, for whoever looks for the nearest
        held = {f"{'ab' * rng.choice((10, 400))}{i}.png": PICTURE for i in range(20)}
        value["messages"][0]["content"][0] |= {"member": "ab" * rng.choice((10, 500, 20_000)) + ".png"}
    elif choice < 0.55:
        value["options"] = rng.choice((["yes", "no"], ["\ud800"], "yes", [1], ["a"] * 10_000, {"a": 1}))
    elif choice < 0.57:
        value["messages"][-1]["content"] = rng.choice(("word ", "a", "é", "<|im_", "1")) * rng.choice(
            (10_000, 2_000_000)
        )
    data = to_json(rng, value)
    return Case(members={**held, "json": data}, probe=lambda: isinstance(json.loads(data), dict))


def make_txt(rng: Random) -> Case:
    text = "".join(rng.choice(PIECES) for _ in range(rng.choice((1, 2, 5, 40))))
    data = text.encode(errors=rng.choice(("surrogatepass", "replace")))
    choice = rng.random()
    if choice < 0.02:
        data = rng.choice((b"a", b"a dog ", "é".encode(), b"\n", b"\0")) * rng.choice((100_000, 5_000_000))
    elif choice < 0.3:
        data = rng.choice((blind(rng, data), rng.randbytes(30), b"\xff\xfe" + text.encode("utf-16", "replace")))
    return Case(members={"png": PICTURE, "txt": data}, probe=lambda: data.decode("utf-8-sig").strip() != "")
