"""What every step of data preparation shares: a whole output or none, worker processes.

A step is a program of this folder. It reads a source and leaves one folder behind; started again with that folder in
place, it says so and does nothing.
"""

import concurrent.futures
import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tqdm import tqdm


@contextlib.contextmanager
def worker_pool(processes: int = 0) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """A pool of processes, one for each core that this process may use unless told otherwise.

    They are spawned, not forked: libraries with threads (PyAV's, torch's) do not survive a fork.
    """
    count = processes or len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(count, mp_context=context) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def mapped(pool: concurrent.futures.Executor, function: Callable, items: Iterable[Any], label: str) -> Iterator[Any]:
    """Results of `function` over `items`, computed in `pool`, in the order of the items, with a progress bar."""
    items = list(items)
    return tqdm(pool.map(function, items, chunksize=4), total=len(items), desc=label, unit=" samples", leave=False)
