"""The order of samples and bookmarks: pure functions, so these tests read nothing."""

import json
import random
from collections import Counter

import pytest

from anymal.data.order import PENDING, Counts, Order, RankSampler, choice, merge_bookmarks, permutation
from anymal.errors import UserError


def dataset(*counts: int, name: str = "data", ratio: float = 1.0) -> Counts:
    return Counts(name=name, shards=[(f"{i:03d}.tar", n) for i, n in enumerate(counts)], ratio=ratio)


def places(order: Order, start: int, stop: int) -> list[tuple[int, int, int]]:
    return [order.locate(position) for position in range(start, stop)]


@pytest.mark.parametrize("shuffle", [0, 1, 3, 7, 100])
def test_an_epoch_holds_every_sample_once(shuffle):
    counts = (5, 0, 1, 9, 0, 4)
    order = Order([dataset(*counts)], seed=1, shuffle=shuffle)
    everything = sorted((0, s, i) for s, n in enumerate(counts) for i in range(n))
    epochs = [places(order, e * 19, (e + 1) * 19) for e in range(4)]
    assert all(sorted(epoch) == everything for epoch in epochs)
    if shuffle == 0:
        assert all(epoch == everything for epoch in epochs)
    else:
        assert len({tuple(epoch) for epoch in epochs}) == 4
    backwards = [order.locate(position) for position in reversed(range(76))]
    assert backwards[::-1] == [place for epoch in epochs for place in epoch]


def test_choices_never_change():
    found = [choice(3, 7, position) for position in range(3000)]
    assert all(900 < count < 1100 for count in Counter(found).values()) and set(found) == {0, 1, 2}
    assert found[:12] == [2, 0, 0, 1, 0, 0, 1, 2, 2, 1, 2, 1], "a run that goes on after an upgrade must draw as before"
    assert [choice(3, 8, position) for position in range(12)] != found[:12]


def test_order_follows_the_seed_and_never_changes():
    one = [places(Order([dataset(10, 10)], seed=seed, shuffle=8), 0, 40) for seed in (0, 1, 0)]
    assert one[0] == one[2] != one[1]
    # These must hold for ever: bookmarks written by an older version of us or of numpy rely on them.
    assert permutation(8, 0, 1, 2).tolist() == FIXED_PERMUTATION
    assert [s * 10 + i for _, s, i in one[0][:10]] == FIXED_ORDER


FIXED_PERMUTATION = [3, 4, 7, 6, 1, 5, 2, 0]
FIXED_ORDER = [13, 16, 11, 14, 12, 15, 17, 10, 1, 19]


@pytest.mark.parametrize(
    "ratios", [(1, 1), (0.7, 0.3), (1, 2, 4), (0.1, 0.9, 1e-9), (1 / 3, 2 / 3), (0.123456789, 0.31415926, 0.5)]
)
def test_ratios(ratios):
    order = Order([dataset(7, 5, name=str(d), ratio=r) for d, r in enumerate(ratios)], seed=0, shuffle=4)
    length = sum(order.cycle)
    assert length <= 10_001
    for cycle in range(2):
        realised = Counter(d for d, _, _ in places(order, cycle * length, (cycle + 1) * length))
        for d, ratio in enumerate(ratios):
            assert abs(realised[d] - length * ratio / sum(ratios)) <= 1


def test_blended_datasets_run_through_their_own_epochs():
    counts = {"a": (7, 5), "b": (3,)}
    order = Order(
        [dataset(*n, name=name, ratio=r) for (name, n), r in zip(counts.items(), (2, 5), strict=True)],
        seed=0,
        shuffle=4,
    )
    taken = places(order, 0, 700)
    for d, n in enumerate(counts.values()):
        mine = [(s, i) for index, s, i in taken if index == d]
        everything = sorted((s, i) for s, count in enumerate(n) for i in range(count))
        epochs = [mine[at : at + sum(n)] for at in range(0, len(mine) - sum(n), sum(n))]
        assert len(epochs) > 10 and all(sorted(epoch) == everything for epoch in epochs)


def test_no_rank_is_left_with_one_dataset():
    order = Order([dataset(10, name="a"), dataset(10, name="b")], seed=0, shuffle=4)
    for rank in range(2):
        seen = Counter(order.locate(position)[0] for position in range(rank, 400, 2))
        assert min(seen.values()) > 60


@pytest.mark.parametrize(
    "made, says",
    [
        (lambda: Order([dataset(0, 0)], seed=0, shuffle=1), "hold no sample"),
        (lambda: Order([dataset(1, ratio=0)], seed=0, shuffle=1), "must be positive"),
        (lambda: Order([dataset(1)], seed=-1, shuffle=1), "negative"),
        (lambda: Order([dataset(1)], seed=0, shuffle=-1), "negative"),
    ],
)
def test_what_cannot_be_ordered(made, says):
    with pytest.raises(UserError, match=says):
        made()


def take(sampler: RankSampler, n: int, bad: set[int], rng: random.Random) -> list[int]:
    """What a stream with a packer does: n good positions, some of those read being kept for later."""
    taken, pending, positions = [], [], sampler.positions()
    while len(taken) < n:
        position = next(positions)
        if position in bad:
            continue
        pending.append(position)
        if rng.random() < 0.6:
            taken.append(pending.pop(rng.randrange(len(pending))))
    sampler.move(position, pending)
    return taken


@pytest.mark.parametrize("seed", range(40))
def test_changing_ranks_loses_and_repeats_nothing(seed):
    """Ranks drift apart by any amount, bad samples anywhere, ranks come and go: each good position is taken once."""
    rng = random.Random(seed)
    order = Order([dataset(50, 50)], seed=0, shuffle=10)
    bad = {position for position in range(3000) if rng.random() < rng.choice([0, 0.05, 0.4])}
    taken, bookmark = [], None
    for _ in range(6):
        world = rng.randint(1, 6)
        ranks = [RankSampler(order, rank=rank, world=world, bookmark=bookmark) for rank in range(world)]
        for sampler in ranks:
            for _ in range(rng.randint(0, 4)):
                taken += take(sampler, rng.randint(1, 5), bad, rng)
        bookmark = json.loads(json.dumps(merge_bookmarks([sampler.piece() for sampler in ranks])))
        again = [RankSampler(order, rank=r, world=world, bookmark=bookmark) for r in range(world)]
        for before, after in zip(ranks, again, strict=True):  # the same ranks go on exactly where they stood
            one, two = before.positions(), after.positions()
            assert [next(one) for _ in range(9)] == [next(two) for _ in range(9)]
        assert merge_bookmarks([sampler.piece() for sampler in again]) == bookmark
        passed = {p for done in bookmark["done"] for p in range(*done)} - set(bookmark[PENDING])
        assert (passed | set(range(bookmark["next"]))) - bad == set(taken)
        assert len(bookmark["done"]) <= 30
    last = RankSampler(order, rank=0, world=1, bookmark=bookmark)
    taken += take(last, 200, bad, rng)
    assert len(taken) == len(set(taken))
    end = merge_bookmarks([last.piece()])
    assert {p for p in range(end["next"]) if p not in bad} <= set(taken)


def test_bookmarks_of_other_data_are_refused():
    def of(*datasets, seed=0, shuffle=4):
        return Order(list(datasets), seed=seed, shuffle=shuffle)

    a, b = dataset(5, 5, name="a"), dataset(4, name="b", ratio=2)
    bookmark = merge_bookmarks([RankSampler(of(a, b), rank=0, world=1, bookmark=None).piece()])
    RankSampler(of(a, b), rank=1, world=3, bookmark=bookmark)
    for other, says in [
        (of(dataset(5, 6, name="a"), b), "'a' had 10 samples in 2 shards, now 11 in 2"),
        (of(dataset(4, 6, name="a"), b), "'a' had 10 samples"),
        (of(a), "'b' is gone"),
        (of(a, b, dataset(1, name="c")), "'c' is new"),
        (of(b, a), "another order"),
        (of(a, dataset(4, name="b", ratio=3)), "ratio of dataset 'b' was 2, is 3"),
        (of(a, b, seed=1), "run.seed was 0, is 1"),
        (of(a, b, shuffle=5), "data.shuffle was 4, is 5"),
    ]:
        with pytest.raises(UserError) as error:
            RankSampler(other, rank=0, world=1, bookmark=bookmark)
        assert says in str(error.value)


def test_pieces_of_some_ranks_are_no_bookmark():
    order = Order([dataset(5)], seed=0, shuffle=0)
    pieces = [RankSampler(order, rank=rank, world=2, bookmark=None).piece() for rank in range(2)]
    for wrong in (pieces[:1], [pieces[0], pieces[0]], []):
        with pytest.raises(UserError, match="one piece from every rank"):
            merge_bookmarks(wrong)
    other = RankSampler(Order([dataset(6)], seed=0, shuffle=0), rank=1, world=2, bookmark=None).piece()
    with pytest.raises(UserError, match="different data"):
        merge_bookmarks([pieces[0], other])
    with pytest.raises(UserError, match="not a merged bookmark"):
        RankSampler(order, rank=0, world=1, bookmark=pieces[0])
    with pytest.raises(UserError, match="rank 2"):
        RankSampler(order, rank=2, world=2, bookmark=None)


def test_a_place_far_away_is_found_at_once():
    order = Order([dataset(*[10_000] * 2_000, name="a"), dataset(*[7] * 100, name="b")], seed=0, shuffle=10_000)
    index, shard, sample = order.locate(10**12 + 12345)
    assert 0 <= sample < order.datasets[index].per_shard[shard]
