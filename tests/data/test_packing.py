"""Rows: what goes into them, and that the samples in one cannot see one another."""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
import transformers

import tiny_encoders
from anymal.adapters import REGISTRY
from anymal.checkpoints.build import build
from anymal.config.schema import Config, DataConfig
from anymal.config.settings import load
from anymal.data.packing import Item, Packer, pack
from anymal.errors import UserError
from anymal.model.llm import isolates_packed_samples
from anymal.model.trainable import select_trainable
from anymal.sample import Message, Part, Sample, Tokens
from small_runs import make_encoders, settings
from toys import medium, sample, text, toy_model

KINDS = ["image", "audio", "imu"]


def item(position: int, length: int, *, modality: str = "", dataset: str = "d") -> Item:
    runs = [(modality, 0, 1)] if modality else []
    tokens = Tokens(key=str(position), ids=[0] * length, labels=[], runs=runs, media=[])
    return Item(position=position, dataset=dataset, tokens=tokens)


def rows(packer: Packer, items: list[Item]) -> list[list[int]]:
    return [[i.position for i in row] for new in items for row in packer.add(new)]


def test_samples_that_do_not_fit_begin_the_next_row():
    packer = Packer(DataConfig(row_tokens=10, max_tokens=10, packing_buffer=2))
    items = [item(p, n) for p, n in enumerate([6, 5, 3, 5, 1, 4, 4])]
    assert rows(packer, items) == [[4, 2, 0], [1, 3]]  # 1 + 3 + 6 and 5 + 5: full to the last token
    assert packer.pending() == [5, 6]


def test_batch_size_counts_samples():
    assert rows(Packer(DataConfig(batch_size=2)), [item(p, 99) for p in range(5)]) == [[0, 1], [2, 3]]


def test_what_an_encoder_costs_counts():
    packer = Packer(DataConfig(row_tokens=10, max_tokens=4, packing_buffer=0, encoder_cost={"eye": 4}))
    assert rows(packer, [item(p, 1, modality="eye") for p in range(4)]) == [[0, 1], [2, 3]]
    alone = Packer(DataConfig(row_tokens=10, max_tokens=4, packing_buffer=0, encoder_cost={"eye": 40}))
    assert rows(alone, [item(p, 1, modality="eye") for p in range(3)]) == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("group_by", "expected"), [("modality", [[0, 2], [1, 3], [4, 6]]), ("dataset", [[0, 1], [2, 3], [4, 5], [6, 7]])]
)
def test_rows_have_one_modality_or_one_dataset(group_by, expected):
    made = [item(p, 5, modality=("eye", "ear")[p % 2], dataset=f"d{p // 2}") for p in range(8)]
    packer = Packer(DataConfig(row_tokens=10, max_tokens=10, group_by=group_by))
    assert rows(packer, made)[: len(expected)] == expected


@pytest.mark.parametrize("seed", range(30))
def test_what_was_pending_goes_into_the_same_rows_when_given_again(seed):
    """The property that bookmarks rest on, from every row on, for any lengths and groups."""
    rng = random.Random(seed)
    made = [
        item(p, rng.randint(1, 20), modality=rng.choice(["", "eye", "ear"]), dataset=rng.choice("ab"))
        for p in range(150)
    ]
    group_by = rng.choice(["none", "modality", "dataset"])
    data = DataConfig(
        row_tokens=rng.choice([20, 33]), max_tokens=20, packing_buffer=rng.randint(0, 6), group_by=group_by
    )
    packer, found = Packer(data), []
    for new in made:
        for n, row in enumerate(later := packer.add(new)):
            pending = sorted([*packer.pending(), *(i.position for r in later[n + 1 :] for i in r)])
            found.append(([i.position for i in row], new.position, pending))
    for at, (_, last, pending) in enumerate(found):
        again = rows(Packer(data), [made[p] for p in pending] + made[last + 1 :])
        assert again == [row for row, _, _ in found[at + 1 :]]
    seen = Counter(p for row, _, _ in found for p in row)
    assert max(seen.values()) == 1 and set(seen) | set(packer.pending()) == set(range(150))


def test_a_row_says_where_its_samples_begin():
    batch = pack([item(p, n).tokens for p, n in enumerate([3, 1, 4])])
    assert batch.offsets.tolist() == [0, 3, 4, 8] and batch.offsets.dtype == torch.int32
    assert batch.to("meta").offsets.device.type == "meta"  # it moves with the rest
    assert [begin for begin, position in enumerate(batch.positions[0].tolist()) if position == 0] == [0, 3, 4]


def test_a_row_must_hold_the_longest_sample():
    with pytest.raises(UserError, match=r"row_tokens is 100, but a sample may have data\.max_tokens = 2048"):
        DataConfig(row_tokens=100)


SEEN = [
    sample(medium("eye", 1), text("what is this?"), answer="a dog", key="a"),
    sample(text("hear "), medium("ear", 5), text(" and see "), medium("eye", 2), answer="a red apple", key="b"),
    sample(text("only text"), answer="yes it is", key="c"),
]
OTHER = sample(medium("eye", 90), text("what is this?"), answer="a dog", key="a")


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("attention", ["packed", "eager", "sdpa", "flex_attention"])
def test_another_sample_changes_no_bit_of_a_logit(tiny_llm, attention, bits):
    model, prompt = toy_model(tiny_llm, attention=attention, bits=bits, eye=3, ear=2)
    found = []
    with torch.no_grad():  # flex attention has no backward pass on a CPU
        for first in (SEEN[0], OTHER):
            batch = pack([prompt.sample(s) for s in [first, *SEEN[1:]]])
            found.append(model.logits(batch, model.encode(batch.media))[0])
    own = sum(label != -100 for label in prompt.sample(OTHER).labels)
    assert not torch.allclose(found[0][:own], found[1][:own], atol=0.1)
    assert torch.equal(found[0][own:], found[1][own:])


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ARCHITECTURES = [
    ("Llama", {"intermediate_size": 64}, True),
    ("Gemma2", {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}, True),
    ("GPT2", {}, True),
    ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32}, False),
    ("Mamba", {}, False),
]


@pytest.mark.parametrize(("name", "more", "isolates"), ARCHITECTURES, ids=[name for name, *_ in ARCHITECTURES])
def test_an_llm_that_mixes_packed_samples_is_found_out(name, more, isolates):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL, **more, initializer_range=0.2)
    assert isolates_packed_samples(transformers.AutoModelForCausalLM.from_config(config).eval()) == isolates


@pytest.mark.parametrize("attention", ["packed", "eager", "sdpa"])
def test_no_gradient_crosses_from_one_sample_to_another(tiny_llm, attention):
    model, prompt = toy_model(tiny_llm, attention=attention, eye=3, ear=2)
    batch = pack([prompt.sample(s) for s in SEEN])
    row = model.embed(batch, model.encode(batch.media))[0].detach().requires_grad_()
    output = model.llm(inputs_embeds=row, position_ids=batch.positions, use_cache=False).logits[0]
    lengths = [len(prompt.sample(s).ids) for s in SEEN]
    for n, part in enumerate(output.split(lengths)):
        (gradient,) = torch.autograd.grad(part.square().sum(), row, retain_graph=True)
        for other, theirs in enumerate(gradient[0].split(lengths)):
            assert (theirs.abs().max() > 0) == (other == n)


MEDIA = {
    "image": [tiny_encoders.picture(size=(40, 48)), tiny_encoders.picture(size=(60, 48))],
    "audio": [tiny_encoders.sound(seconds=1.0), tiny_encoders.sound(seconds=1.5)],
    "imu": [tiny_encoders.npy(tiny_encoders.motion()), tiny_encoders.npy(2 * tiny_encoders.motion())],
}


@pytest.fixture(scope="module")
def real(tiny_llm, tmp_path_factory):
    """A model with real adapters, and four samples of each modality and of none, tokenised."""
    folder = tmp_path_factory.mktemp("packing")
    arguments = settings(tiny_llm, make_encoders(folder / "encoders"), folder / "run", "x", KINDS)
    built = build(load(Config, None, arguments), torch.device("cpu"), REGISTRY)
    select_trainable(built.model, ["projectors"])
    made = []
    for n in range(16):
        kind = [*KINDS, "text"][n % 4]
        asked = [] if kind == "text" else [Part(kind=kind, content=MEDIA[kind][n // 4 % 2])]
        turns = [
            Message(role="user", parts=[*asked, text("what is this? " * (n % 3 + 1))]),
            Message(role="assistant", parts=[text("a red apple " * (n % 5 + 1))]),
        ]
        made.append(built.prepare(Sample(key=f"{kind}-{n}", shard="s", messages=turns)))
    return built.model, made


def gradients(model, batches: list[list[Tokens]]) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    total = 0.0
    for tokens in batches:
        batch = pack(tokens)
        loss, _ = model(batch, model.encode(batch.media))
        loss.backward()
        total += loss.item()
    return total, [p.grad.clone() for p in model.projectors.parameters()]


def test_packed_and_unpacked_losses_and_gradients_are_equal(real):
    """Every modality, at 4 bits: rows of about 200 tokens, against each sample alone."""
    model, tokens = real
    packer = Packer(DataConfig(row_tokens=200, max_tokens=150, packing_buffer=2))
    filled = [row for p, t in enumerate(tokens) for row in packer.add(Item(position=p, dataset="d", tokens=t))]
    left = [t for p, t in enumerate(tokens) if p in packer.pending()]
    packed = [[i.tokens for i in row] for row in filled] + [left]
    assert len(filled) >= 2 and sum(map(len, packed)) == len(tokens)
    one, ours = gradients(model, packed)
    other, theirs = gradients(model, [[t] for t in tokens])
    assert one == pytest.approx(other, rel=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_another_medium_changes_no_other_samples_logits(real, kind):
    model, tokens = real
    first = next(t for t in tokens if t.group() == kind)
    changed = replace(first, media=[m + 1 if m.is_floating_point() else 255 - m for m in first.media])
    rest = [t for t in tokens if t is not first][:7]
    found = []
    with torch.no_grad():
        for mine in (first, changed):
            batch = pack([*rest[:3], mine, *rest[3:]])
            found.append(model.logits(batch, model.encode(batch.media))[0])
    before = sum(label != -100 for t in rest[:3] for label in t.labels)
    own = sum(label != -100 for label in first.labels)
    same = [torch.equal(a, b) for a, b in zip(*found, strict=True)]
    assert same == [True] * before + [False] * own + [True] * (len(same) - before - own)
