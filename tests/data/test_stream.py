"""What a stream gives, end to end with real tars and workers: order, shares, resuming, packing."""

import json
import os
import random
import tarfile
import tracemalloc
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from anymal.config.schema import DataConfig, DatasetConfig
from anymal.data import shards
from anymal.data.loader import RawSample
from anymal.data.pool import in_order
from anymal.data.quarantine import Quarantine
from anymal.data.stream import merge_bookmarks, samples_once, tars, walk
from anymal.errors import BadSample, BudgetExceeded, UserError
from anymal.sample import Batch, Sample, Tokens
from streams import (
    SUFFIXES,
    batches,
    folder,
    keys,
    listed,
    numbered,
    numbers,
    prepare,
    prepare_badly_by_thirds,
    samples,
    stream,
    write,
)


def test_order_is_the_same_for_any_number_of_workers(tmp_path):
    data = folder(tmp_path / "d", 7, 5, 9)
    found = [batches(stream(data, workers=workers), 14) for workers in (0, 1, 2, 4)]  # more workers than shards
    for other in found[1:]:
        assert [b.keys for b in other] == [b.keys for b in found[0]]
        assert [b.bookmark for b in other] == [b.bookmark for b in found[0]]
        assert all(numbers(a) == numbers(b) for a, b in zip(found[0], other, strict=True))
    for batch in found[0]:
        assert numbers(batch) == [int(key) for key in batch.keys]  # media stay with their sample
    epochs = [key for batch in found[0] for key in batch.keys]
    assert sorted(epochs[:21]) == sorted(epochs[21:]) == [f"{i:05d}" for i in range(21)]
    assert epochs[:21] != epochs[21:]
    assert keys(stream(data, seed=1), 7) != [b.keys for b in found[0][:7]]
    assert samples(stream(data, shuffle=0), 7) == sorted(epochs[:21])


@pytest.mark.parametrize("world", [2, 3, 7])  # 7 ranks read 3 shards
def test_ranks_share_an_epoch(tmp_path, world):
    data = folder(tmp_path / "d", 7, 5, 9)
    found = []
    for rank in range(world):
        found += samples(stream(data, rank=rank, world=world, batch_size=1), len(range(rank, 21, world)))
    assert sorted(found) == [f"{i:05d}" for i in range(21)]


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_at_every_batch(tmp_path, workers):
    """Two blended datasets, bad samples, epochs that end within batches."""
    datasets = {
        "a": DatasetConfig(shards=str(folder(tmp_path / "a", 6, 5)), ratio=2),
        "b": DatasetConfig(shards=str(folder(tmp_path / "b", 4)), ratio=1),
    }
    options = {"workers": workers, "with_": prepare_badly_by_thirds}
    whole = batches(stream(datasets, **options), 14)
    for at, batch in enumerate(whole[:11]):
        bookmark = json.loads(json.dumps(merge_bookmarks([batch.bookmark])))
        rest = batches(stream(datasets, bookmark=bookmark, **options), 3)
        assert [b.keys for b in rest] == [b.keys for b in whole[at + 1 : at + 4]]
        assert [b.bookmark for b in rest] == [b.bookmark for b in whole[at + 1 : at + 4]]


def asked(sample: Sample) -> Tokens:
    """Keeps what the user says as the sample's key."""
    said = [part.content for part in sample.messages[0].parts if part.kind == "text"] or [sample.instruction]
    return replace(prepare(sample), key=f"{sample.key} {' '.join(said)}")


def instructed(tmp_path: Path) -> dict[str, DatasetConfig]:
    """A dataset with three instructions, one with none, and one whose users speak for themselves."""
    spoken = [{"type": "array"}, {"type": "text", "text": "and?"}]
    turns = [{"role": "user", "content": spoken}, {"role": "assistant", "content": "x"}]
    talk = [sample | {"json": json.dumps({"messages": turns}).encode()} for sample in numbered(90, 3)]
    shards = {"a": folder(tmp_path / "a", 5, 4), "b": folder(tmp_path / "b", 4), "c": write(tmp_path / "c.tar", talk)}
    texts = {"a": ["What?", "Who?", "Where?"], "b": [], "c": ["Never."]}
    return {name: DatasetConfig(shards=str(path), instructions=texts[name]) for name, path in shards.items()}


def test_instructions_are_drawn_by_seed_and_position(tmp_path):
    datasets = instructed(tmp_path)
    whole = batches(stream(datasets, with_=asked), 60)
    for workers in (1, 3):
        assert keys(stream(datasets, with_=asked, workers=workers), 60) == [b.keys for b in whole]
    for at in (0, 7, 30):
        bookmark = json.loads(json.dumps(merge_bookmarks([whole[at].bookmark])))
        rest = keys(stream(datasets, with_=asked, bookmark=bookmark, workers=1), 5)
        assert rest == [b.keys for b in whole[at + 1 : at + 6]]
    ranks = [keys(stream(datasets, with_=asked, rank=rank, world=2, batch_size=1), 90) for rank in (0, 1)]
    assert [key for both in zip(*ranks, strict=True) for (key,) in both] == [key for b in whole for key in b.keys]

    said = [key.split(" ", 1) for batch in whole for key in batch.keys]
    drawn = [(key, text) for key, text in said if text.endswith(("What?", "Who?", "Where?"))]
    assert len(drawn) == 60 and min(Counter(text for _, text in drawn).values()) > 10
    assert len({text for key, text in drawn if key == "00003"}) > 1, "another one in another epoch"
    assert {text for key, text in said if key >= "00090"} == {"and?"}, "who says something is told nothing"
    assert [text for _, text in said].count("") == 60
    assert keys(stream(datasets, with_=asked, seed=1), 60) != [b.keys for b in whole]


def test_instructions_are_given_outside_of_training_too(tmp_path):
    data, quarantine = (
        DataConfig(datasets=instructed(tmp_path), workers=0),
        Quarantine(None, max_in_a_row=0, max_share=0),
    )
    found = [tokens.key for tokens in samples_once(data, suffixes=SUFFIXES, prepare=asked, quarantine=quarantine)]
    assert all(key.endswith("?") for key in found[:9]) and found[9] == "00000 " and found[13] == "00090 and?"


@pytest.mark.parametrize("world", [1, 3])
def test_iterating_again_goes_on(tmp_path, world):
    data, ranks = folder(tmp_path / "d", 20), {"rank": world - 1, "world": world}
    whole, parts = keys(stream(data, **ranks), 6), stream(data, **ranks)
    before = parts.bookmark
    assert keys(parts, 2) + keys(parts, 3) + keys(parts, 1) == whole
    assert before["position"] == world - 1
    assert parts.bookmark["position"] == world - 1 + 18 * world


@pytest.mark.parametrize("seed", range(4))
def test_ranks_change_in_the_middle_of_an_epoch(tmp_path, seed):
    """Every good sample of the epoch exactly once, although ranks come and go and one in three samples is bad."""
    rng = random.Random(seed)
    data = folder(tmp_path / "d", 40, 1, 30, 29)
    good = {f"{i:05d}" for i in range(100) if i % 3}
    seen, bookmark = [], None
    for world in (2, 3, 1):
        pieces = []
        for rank in range(world):
            options = {"rank": rank, "world": world, "bookmark": bookmark, "batch_size": 2}
            made = stream(data, with_=prepare_badly_by_thirds, workers=rng.choice([0, 1]), **options)
            seen += samples(made, rng.randint(1, 4))
            pieces.append(made.bookmark)
        bookmark = json.loads(json.dumps(merge_bookmarks(pieces)))
    assert len(seen) == len(set(seen))
    rest = stream(data, with_=prepare_badly_by_thirds, bookmark=bookmark, batch_size=1)
    seen += samples(rest, len(good) - len(seen))
    assert sorted(seen) == sorted(good)


def test_ratios_are_realised(tmp_path):
    shards = {name: str(folder(tmp_path / name, n)) for name, n in (("a", 3), ("b", 11), ("c", 5))}
    made = stream({n: DatasetConfig(shards=s, ratio=r) for (n, s), r in zip(shards.items(), (5, 3, 2), strict=True)})
    assert sum((Counter(batch.datasets) for batch in batches(made, 20)), Counter()) == {"a": 30, "b": 18, "c": 12}


def test_a_dataset_whose_shards_are_not_there_is_named(tmp_path):
    datasets = {
        "a": DatasetConfig(shards=str(folder(tmp_path / "a", 3))),
        "b": DatasetConfig(shards=str(tmp_path / "b")),
    }
    with pytest.raises(UserError, match=r"^data\.datasets\.b: there is no shard .*/b$"):
        tars(DataConfig(datasets=datasets))
    with pytest.raises(UserError, match=r"^there is no shard .*/b$"):
        tars(DataConfig(shards=str(tmp_path / "b")))


def test_datasets_with_epochs_are_through_together(tmp_path):
    shards = {name: str(folder(tmp_path / name, n)) for name, n in (("a", 6), ("b", 9))}
    made = stream({n: DatasetConfig(shards=s, epochs=e) for (n, s), e in zip(shards.items(), (2, 1), strict=True)})
    assert sum((Counter(batch.datasets) for batch in batches(made, 7)), Counter()) == {"a": 12, "b": 9}
    mixed = {"a": DatasetConfig(shards=shards["a"], epochs=2), "b": DatasetConfig(shards=shards["b"])}
    with pytest.raises(UserError, match="some have epochs and some a ratio"):
        stream(mixed)


def prepare_long(sample: Sample) -> Tokens:
    """As many tokens as the key says, modulo 23; every fifth is bad."""
    number = int(sample.key)
    if number % 5 == 4:
        raise BadSample("one in five")
    return replace(prepare(sample), ids=[number] * (number % 23 + 1), labels=[number] * (number % 23 + 1))


PACKED = {"row_tokens": 40, "max_tokens": 40, "packing_buffer": 3, "with_": prepare_long}


def cut(whole: list[Batch], at: int) -> dict:
    return json.loads(json.dumps(merge_bookmarks([whole[at].bookmark])))


@pytest.mark.parametrize("group_by", ["none", "dataset"])
@pytest.mark.parametrize("workers", [0, 2])
def test_packing_resumes_at_every_batch(tmp_path, workers, group_by):
    """What a packer held when the bookmark was made is read again, and goes into the same rows."""
    datasets = {
        "a": DatasetConfig(shards=str(folder(tmp_path / "a", 16, 5)), ratio=2),
        "b": DatasetConfig(shards=str(folder(tmp_path / "b", 14)), ratio=1),
    }
    options = {"workers": workers, "group_by": group_by, **PACKED}
    whole = batches(stream(datasets, **options), 24)
    for at in range(20):
        rest = batches(stream(datasets, bookmark=cut(whole, at), **options), 4)
        assert [b.keys for b in rest] == [b.keys for b in whole[at + 1 : at + 5]]
        again = batches(stream(datasets, bookmark=cut(rest, 1), **options), 2)  # and once more from there
        assert [b.keys for b in again] == [b.keys for b in whole[at + 3 : at + 5]]
    if group_by == "dataset":
        assert all(len(batch.datasets) == 1 for batch in whole)


def test_rows_are_full_and_nothing_is_left_behind(tmp_path):
    data, filled = folder(tmp_path / "d", 60, 40), {}
    for packing_buffer in (0, 3, 9):
        found = batches(stream(data, **PACKED | {"packing_buffer": packing_buffer}), 60)
        lengths = [sum(int(key) % 23 + 1 for key in batch.keys) for batch in found]
        assert max(lengths) <= 40
        filled[packing_buffer] = sum(lengths) / len(lengths) / 40
    assert filled[0] < 0.85 and filled[3] > 0.9 and filled[9] > 0.95, filled
    keys = [key for batch in found for key in batch.keys]
    first = {f"{i:05d}" for i in range(100) if i % 5 != 4}
    seen = Counter(keys)
    assert set(seen) == first and max(seen.values()) - min(seen.values()) <= 1  # at most a few rows behind


@pytest.mark.parametrize("seed", range(6))
def test_packing_ranks_and_workers_change_in_the_middle_of_an_epoch(tmp_path, seed):
    """Every good sample of the epoch exactly once: what each rank held is dealt out anew."""
    rng = random.Random(seed)
    data = folder(tmp_path / "d", 40, 1, 30, 29)
    good = {f"{i:05d}" for i in range(100) if i % 5 != 4}
    seen, bookmark = [], None
    for world in (2, 3, 1, 2):
        pieces = []
        for rank in range(world):
            options = PACKED | {"rank": rank, "world": world, "bookmark": bookmark, "workers": rng.choice([0, 1])}
            made = stream(data, **options)
            seen += samples(made, rng.randint(1, 2))
            pieces.append(made.bookmark)
        bookmark = json.loads(json.dumps(merge_bookmarks(pieces)))
    assert len(seen) == len(set(seen)) < len(good)
    rest = stream(data, with_=prepare_long, bookmark=bookmark, batch_size=1)
    seen += samples(rest, len(good) - len(seen))
    assert sorted(seen) == sorted(good)


@pytest.mark.parametrize("workers", [0, 2])
def test_torch_global_random_numbers_are_left_alone(tmp_path, workers):
    """A resumed run must draw the same dropout masks, whatever was read before."""
    made = stream(folder(tmp_path / "d", 5), workers=workers)
    before = torch.get_rng_state()
    batches(made, 2)
    assert torch.equal(torch.get_rng_state(), before)


def decoded(sample: Sample) -> tuple[str, str, list]:
    tokens = prepare(sample)
    return sample.shard, sample.key, tokens.media


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_once(tmp_path, workers):
    first, second = folder(tmp_path / "a", 7, 0, 5), folder(tmp_path / "b", 4)
    datasets = {"x": DatasetConfig(shards=str(first), ratio=9), "y": DatasetConfig(shards=str(second))}
    data = DataConfig(datasets=datasets, workers=workers, shuffle=5)
    found = []
    for rank in range(2):
        quarantine = Quarantine(None, max_in_a_row=1, max_share=1)
        options = {"quarantine": quarantine, "rank": rank, "world": 2}
        found.append(list(samples_once(data, suffixes=SUFFIXES, prepare=decoded, **options)))
        assert (quarantine.good, quarantine.bad) == (8, 1)  # the empty shard is the bad one
    merged = [sample for both in zip(*found, strict=True) for sample in both]
    assert [key for _, key, _ in merged] == [f"{i:05d}" for i in [*range(12), *range(4)]]
    assert all(int(key) == media[0].item() for _, key, media in merged)
    with pytest.raises(UserError, match="hold no sample"):
        next(samples_once(DataConfig(shards=str(first / "001.tar")), suffixes={}, prepare=decoded, **options))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_run_ignores_changes_neither_its_order_nor_the_index(tmp_path, workers):
    """Pictures beside some samples are nothing to a run of arrays: the same batches and bookmarks as without."""
    found, indexes = {}, {}
    for also in (False, True):
        data = tmp_path / str(also)
        data.mkdir()
        for shard in range(2):
            made = numbered(10 * shard, 10)
            for sample in made[::3] if also else ():
                sample["jpg"] = b"whatever"
            write(data / f"{shard}.tar", made)
        kinds = ["array"], ["image", "array"]
        for modalities in kinds if also else kinds[:1]:
            for index in data.glob("*.json"):
                index.unlink()
            log = tmp_path / f"{also}-{len(modalities)}.jsonl"
            rows = batches(stream(data, path=log, modalities=modalities, workers=workers), 8)
            found[also, len(modalities)] = [(batch.keys, batch.bookmark, numbers(batch)) for batch in rows]
            indexes[also, len(modalities)] = {p.name: p.read_bytes() for p in data.glob("*.json")}
            assert log.exists() == (len(modalities) == 2)
    assert found[True, 1] == found[False, 1] != found[True, 2], "with pictures, which do not decode, they are bad"
    assert indexes[True, 1] == indexes[True, 2] and "anymal.index.json" in indexes[True, 1]


def test_a_walk_takes_samples_as_they_lie_and_bad_ones_as_training_does(tmp_path):
    tar = write(tmp_path / "a.tar", numbered(0, 6))
    with tarfile.open(tar) as opened:
        last = opened.getmembers()[-1]
    tar.write_bytes(tar.read_bytes()[: last.offset_data + 512])  # what is left of the last sample is whole, perhaps
    (tmp_path / "b.tar").touch()
    log = tmp_path / "log.jsonl"

    def use(raw: RawSample) -> tuple:
        if raw.key == "00002":
            raise ZeroDivisionError("a user's own error")
        assert shards.read(*raw.place) == (raw.key, raw.members)
        return raw.key, raw.members["txt"], raw.shard

    quarantine = Quarantine(log, max_in_a_row=1, max_share=1)
    found = list(walk(DataConfig(shards=str(tmp_path), workers=0), use=use, quarantine=quarantine))
    assert found == [(f"{i:05d}", str(i).encode(), str(tar)) for i in (0, 1, 3, 4)]
    assert (quarantine.good, quarantine.bad) == (4, 3)
    assert [(Path(one["shard"]).name, one["key"]) for one in listed(log)] == [
        ("b.tar", ""),
        ("a.tar", "00002"),
        ("a.tar", "00005"),
    ]
    batches(stream(tmp_path, path=tmp_path / "training.jsonl", with_=prepare_all_but_2), 2)
    assert {one["key"] for one in listed(tmp_path / "training.jsonl")} == {one["key"] for one in listed(log)}
    with pytest.raises(BudgetExceeded, match="00002"):
        strict = Quarantine(None, max_in_a_row=1, max_share=0.2, grace=3)
        list(walk(DataConfig(shards=str(tar), workers=0), use=use, quarantine=strict))


def prepare_all_but_2(sample: Sample):
    assert sample.key != "00002"
    return prepare(sample)


def test_a_few_samples_of_many_cost_no_memory(tmp_path):
    """The samples that a run shows are the first of its training data: hundreds of millions, perhaps."""
    tar = str(folder(tmp_path / "d", 200) / "000.tar")
    data = DataConfig(datasets={f"{i}": DatasetConfig(shards=tar) for i in range(500)}, workers=0)
    quarantine = Quarantine(None, max_in_a_row=9, max_share=0.5)
    once = partial(samples_once, data, suffixes=SUFFIXES, prepare=lambda sample: sample.key, quarantine=quarantine)
    next(once())  # imports, and the tar's index
    tracemalloc.start()
    under_way = once()
    assert next(under_way) == "00000"
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 2e6  # bytes, for 100,000 samples


def test_workers_pass_on_every_tensor():
    tensors = [torch.arange(5, dtype=torch.int16), torch.tensor(True), torch.randn(2, 3).to(torch.bfloat16)]
    tensors += [
        torch.zeros(0, 4),
        torch.randn(4, 6).t(),
        torch.tensor([1 + 2j]),
        torch.tensor(3.5, dtype=torch.float64),
    ]
    value = {"a": tensors, "b": [("x", tensors[0])], "c": np.arange(3)}
    options = {"processes": 1, "chunk": 2, "prefetch": 2, "timeout": 60, "on_crash": None, "name": str}
    (_, back), (_, plain) = in_order([value, [1, "x"]].__getitem__, range(2), **options)
    for one, two in zip(tensors, back["a"], strict=True):
        assert one.dtype == two.dtype and one.shape == two.shape and torch.equal(one, two)
    assert back["b"][0][1].tolist() == [0, 1, 2, 3, 4] and back["c"].tolist() == [0, 1, 2]
    assert plain == [1, "x"]


def test_results_that_wait_hold_no_files_open():
    """A step's rows wait with their media; a process may have but some hundred files open."""
    options = {"processes": 1, "chunk": 1, "prefetch": 2, "timeout": 60, "on_crash": None, "name": str}
    before = len(os.listdir("/proc/self/fd"))
    kept = [result for _, result in in_order(torch.ones, range(1, 101), **options)]
    assert len(os.listdir("/proc/self/fd")) < before + 10
    assert [result.sum().item() for result in kept] == list(range(1, 101))
