"""20,000 shards of 10,000 samples, 512 ranks of 8 workers, from counts alone: no tar is there.

    python benchmarks/scale_sim.py

What the order and the bookmarks cost at that size, how evenly the work falls, and whether every sample comes exactly
once when 512 ranks become 384 in the middle of an epoch. One sample in a hundred is bad, so the ranks drift apart.
"""

import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from anymal.config.command_line import run_program
from anymal.data import manifest
from anymal.data.order import Counts, Order, RankSampler, merge_bookmarks

SHARDS, SAMPLES = 20_000, 10_000
RANKS, FEWER, WORKERS, BATCH, SHUFFLE = 512, 384, 8, 16, 10_000
STEPS = 30  # batches of each rank before the ranks change
CHECKED = 10  # and after
BAD_EVERY = 100
BOOKMARK_GOAL, DEAL_GOAL = 1_000_000, 1.0  # bytes, ms for one batch


BAD = (np.random.default_rng(0).random(1 << 20) < 1 / BAD_EVERY).tolist()


def bad(position: int) -> bool:
    """Whether the sample there is bad."""
    return BAD[position % len(BAD)]


def good_batches(sampler: RankSampler, n: int) -> tuple[list[int], list[int]]:
    """The positions that a rank takes for `n` batches of good samples, bad ones left out; and how many it looked at."""
    taken, positions, looked = [], sampler.positions(), 0
    while len(taken) < n * BATCH:
        position = next(positions)
        looked += 1
        if not bad(position):
            taken.append(position)
    sampler.move(position, [])
    return taken, looked


def dealing_out(order: Order, start: int) -> float:
    """Milliseconds of CPU time to say where the samples of one batch lie, as the main process of a rank does."""
    sampler = RankSampler(order, rank=7, world=RANKS, bookmark=None)
    positions = iter(range(start + sampler.position, 1 << 62, RANKS))
    for _ in range(BATCH):
        order.locate(next(positions))
    times = []
    for _ in range(300):
        begun = time.process_time()  # CPU time: what else runs on the machine is not in it
        for _ in range(BATCH):
            order.locate(next(positions))
        times.append(time.process_time() - begun)
    return 1000 * float(np.mean(times))  # the mean, so that a new window's permutation is in it


def shards_touched(order: Order, taken: list[int]) -> tuple[int, int]:
    """How many shards one rank's positions lie in, and the most samples from one of them."""
    found = np.unique([order.locate(position)[1] for position in taken], return_counts=True)[1]
    return len(found), int(found.max())


def surveying(counts: int) -> float:
    """CPU seconds to learn the counts of so many tars (here empty files) from their manifest, one look at each."""
    with tempfile.TemporaryDirectory() as folder:
        tars, known = [], {}
        for i in range(counts):
            tar = Path(folder, f"{i:06d}.tar")
            tar.touch()
            stat = os.stat(tar)
            known[tar.name] = [stat.st_size, stat.st_mtime_ns, SAMPLES]
            tars.append(str(tar))
        Path(folder, manifest.NAME).write_text(json.dumps({"version": manifest.VERSION, "tars": known}))
        begun = time.process_time()
        assert sum(len(shard) for shard in manifest.survey(tars).values()) == counts * SAMPLES
        return time.process_time() - begun


def change_of_ranks(order: Order) -> dict[str, float]:
    """Run 512 ranks, bookmark, go on with 384, and compare what was taken with what there is."""
    samplers = [RankSampler(order, rank=rank, world=RANKS, bookmark=None) for rank in range(RANKS)]
    before, looked = zip(*(good_batches(sampler, STEPS) for sampler in samplers), strict=True)
    pieces = [json.loads(json.dumps(sampler.piece())) for sampler in samplers]
    begun = time.process_time()
    merged = merge_bookmarks(pieces)
    merge = time.process_time() - begun
    bookmark = json.loads(text := json.dumps(merged))
    begun = time.process_time()
    fewer = [RankSampler(order, rank=rank, world=FEWER, bookmark=bookmark) for rank in range(FEWER)]
    after = [good_batches(sampler, CHECKED)[0] for sampler in fewer]
    again = json.dumps(merge_bookmarks([sampler.piece() for sampler in fewer]))
    taken = np.array([position for rank in [*before, *after] for position in rank])
    # All up to the slowest rank's place must be there, and nothing twice.
    through = min(sampler.position for sampler in fewer)
    wanted = [position for position in range(through) if not bad(position)]
    exact = len(np.unique(taken)) == len(taken) and np.array_equal(np.sort(taken[taken < through]), wanted)
    touched = [shards_touched(order, before[rank]) for rank in (0, RANKS // 2, RANKS - 1)]
    print(
        f"{RANKS} ranks, {STEPS} batches of {BATCH}: looked at {min(looked)} to {max(looked)} samples each for "
        f"{STEPS * BATCH} good ones; in {[shards for shards, _ in touched]} shards (3 ranks), "
        f"at most {max(most for _, most in touched)} from one\n"
        f"{RANKS} to {FEWER} ranks: {len(taken):,} samples taken, the first {through:,} positions checked, "
        f"{'each exactly once' if exact else 'NOT each exactly once'}; merging took {merge:.2f} s"
    )
    spread = max(looked) / min(looked)
    return {"bookmark": len(text), "bookmark_after": len(again), "exact": exact, "merge": merge, "spread": spread}


def main() -> None:
    """Print what was found, and one line of figures."""
    survey = surveying(SHARDS)
    begun = time.process_time()
    listed = [(f"{i:06d}.tar", SAMPLES) for i in range(SHARDS)]
    order = Order([Counts(name="data", shards=listed)], seed=0, shuffle=SHUFFLE)
    made = time.process_time() - begun
    deal = median(dealing_out(order, start) for start in (0, SHARDS * SAMPLES // 2, SHARDS * SAMPLES * 3 + 5))
    print(
        f"{SHARDS:,} shards x {SAMPLES:,}: counts from the manifest in {survey:.2f} s, Order in {made:.3f} s, a batch "
        f"of {BATCH} dealt out in {deal:.3f} ms; {WORKERS} workers hold no state, so they cost nothing of this"
    )
    found = change_of_ranks(order)
    biggest = max(found["bookmark"], found["bookmark_after"])
    met = biggest < BOOKMARK_GOAL and deal < DEAL_GOAL and found["exact"]
    print(
        f"bookmark_bytes={found['bookmark']} bookmark_bytes_after_change={found['bookmark_after']} "
        f"deal_ms_per_batch={deal:.3f} order_s={made:.3f} survey_s={survey:.2f} merge_s={found['merge']:.2f} "
        f"spread={found['spread']:.3f} exact={found['exact']} goal={'met' if met else 'missed'}"
    )


if __name__ == "__main__":
    run_program(main)
