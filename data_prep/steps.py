"""Worker processes for the programs of data preparation.

What these programs also share stands elsewhere: a whole output folder or none, and nothing to do where it is there
(`anymal.files.whole_folder`, `is_done`); settings and errors without a traceback (`anymal.config.command_line`).
"""

import concurrent.futures
import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
R = TypeVar("R")


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


def mapped(
    pool: concurrent.futures.Executor, function: Callable[[T], R], items: Iterable[T], label: str
) -> Iterator[R]:
    """Results of `function` over `items`, computed in `pool`, in the order of the items, with a progress bar."""
    items = list(items)
    results = pool.map(function, items, chunksize=4)
    return iter(tqdm(results, total=len(items), desc=label, unit=" samples", leave=False))
