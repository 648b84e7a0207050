"""Worker processes that prefetch: items → what a function makes of each, in order, whatever becomes of a process.

Beneath the loader, in place of torch's DataLoader. Decoders are C code that reads strangers' bytes: a crash must cost
one sample, not the run. torch's DataLoader ends when the first worker dies, and its signal handler raises in whatever
code the main process is running. Here each process has its own pipe, and its death shows as the end of that pipe. Its
items are then done again one by one, each in a fresh process; an item whose process dies again is the culprit. So the
result does not depend on which process died, or on how many there are.
"""

import atexit
import io
import mmap
import multiprocessing
import os
import pickle
import signal
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor

from anymal.errors import UserError

_fork = multiprocessing.get_context("fork")
MOST_PREFETCHED = 64
"""Most chunks that a process is given in advance: all its results then fit into the pipe. Otherwise the process could
wait for the main process to read results, while the main process waits for it to read the next chunk, for ever."""
_ALIGNED = 64  # bytes: where a tensor may begin, for every dtype
Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    processes: int,
    chunk: int,
    prefetch: int,
    timeout: float,
    on_crash: Callable[[Item, str], Result],
    name: Callable[[Item], str],
) -> Iterator[tuple[Item, Result]]:
    """Items → (item, what `work` made of it), in the same order.

    Args:
        work: Runs in forked processes; what it returns is pickled, its tensors travel in shared memory.
        items: Asked for a little ahead of their use; endless ones are fine.
        processes: How many; at least 1.
        chunk: Items that a process is given at a time: spreads the cost of passing them on.
        prefetch: Chunks that it is given before the first result is taken; `MOST_PREFETCHED` at most.
        timeout: Seconds that may pass without anything from a process that is waited for.
        on_crash: The result of an item that kills its process, given the item and the reason.
        name: What a message calls an item.

    Raises:
        UserError: An item takes longer than `timeout` even in a process of its own. The item is named.
    """
    items = iter(items)
    workers: list[_Process[Item, Result]] = []
    pending: deque[_Process[Item, Result]] = deque()  # whose results come next; each gives its own in order

    def submit(worker: _Process[Item, Result]) -> None:
        if some := list(islice(items, chunk)):
            worker.submit(some)
            pending.append(worker)

    try:
        workers += [_Process(work) for _ in range(processes)]
        for _ in range(min(prefetch, MOST_PREFETCHED)):
            for worker in workers:
                submit(worker)
        while pending:
            worker = pending.popleft()
            some = worker.submitted[0]
            try:
                results: Iterable[Result] = worker.results(timeout)
            except _Lost:
                worker.submitted.popleft()
                worker.start_again()
                results = _one_by_one(work, some, timeout, on_crash, name)
            submit(worker)
            yield from zip(some, results, strict=True)
    finally:
        for worker in workers:
            worker.end()


def _one_by_one(
    work: Callable[[Item], Result],
    items: list[Item],
    timeout: float,
    on_crash: Callable[[Item, str], Result],
    name: Callable[[Item], str],
) -> Iterator[Result]:
    """What becomes of each item in a process of its own."""
    for item in items:
        worker = _Process(work)
        try:
            worker.submit([item])
            yield from worker.results(timeout)
        except _Lost as lost:
            if lost.code is None:  # slow storage, too, so that a run that took it for bad would not repeat
                raise UserError(
                    f"nothing came of {name(item)} within data.timeout = {timeout:g} s, nor in a process of its own: "
                    "its decoder hangs, or the storage is slow. Take it out of its shard, or raise data.timeout"
                ) from None
            yield on_crash(item, _reason(lost.code))
        finally:
            worker.end()


def _reason(code: int) -> str:
    """Why a process ended, by its exit code."""
    if code == -signal.SIGKILL:
        return "its process was killed (signal 9, SIGKILL), probably for want of memory"
    if code < 0:
        names = [number.name for number in signal.Signals if number == -code]
        return f"the decoder died (signal {', '.join([str(-code), *names])})"
    return f"the decoder ended its process (exit code {code})"


class _Lost(Exception):
    """A process died; or, without a `code`, nothing came of it in time."""

    def __init__(self, code: int | None = None):
        super().__init__()
        self.code = code


class _Process(Generic[Item, Result]):
    """One process, and the chunks of items that it was given and whose results have not come, in order."""

    def __init__(self, work: Callable[[Item], Result]):
        self._work, self._owner = work, os.getpid()
        self.submitted: deque[list[Item]] = deque()
        self._start()

    def _start(self) -> None:
        try:
            self._pipe, theirs = _fork.Pipe()
            self._process = _fork.Process(target=_serve, args=(self._work, theirs), daemon=True)
            _running.add(self)
            self._process.start()
        except OSError as error:
            raise UserError(f"a worker could not be started: {error.strerror}; try fewer: data.workers") from error
        theirs.close()  # from here on only the process holds it, so that its death is the end of the pipe

    def submit(self, items: list[Item]) -> None:
        self.submitted.append(items)
        with suppress(OSError):  # it is dead, which shows when the results are waited for
            self._pipe.send(items)

    def results(self, timeout: float) -> list[Result]:
        """Those of the chunk that was submitted first.

        Raises:
            _Lost: The process died, or nothing came within `timeout` seconds.
        """
        if not self._pipe.poll(timeout):
            raise _Lost
        try:
            results = _receive(self._pipe)
        except (EOFError, OSError):
            self._process.join(10)
            self.end()
            raise _Lost(self._process.exitcode) from None
        self.submitted.popleft()
        return results

    def start_again(self) -> None:
        """A fresh process, given what this one has not done."""
        self.end()
        self._start()
        submitted, self.submitted = self.submitted, deque()
        for items in submitted:
            self.submit(items)

    def end(self) -> None:
        """Kill it: one that hangs would hear of nothing else."""
        self.close()
        if self._owner == os.getpid() and self._process.pid is not None:  # it may not have been started
            self._process.kill()
            self._process.join()

    def close(self) -> None:
        self._pipe.close()


_running: WeakSet[_Process[Any, Any]] = WeakSet()


@atexit.register
def _end_all(but: Collection[_Process[Any, Any]] = ()) -> None:
    # multiprocessing would ask them to terminate and wait: for ever, since they ignore it.
    for process in set(_running).difference(but):
        process.end()


@contextmanager
def none_left() -> Iterator[None]:
    """Processes that were started inside end with it, also those of an iteration that an error's traceback holds."""
    before = set(_running)
    try:
        yield
    finally:
        _end_all(but=before)


def _serve(work: Callable[[Any], Any], pipe: Connection) -> None:
    """What a process does until the main process closes the pipe, or is gone."""
    # Ctrl-C, and the warnings that a launcher or Slurm sends to every process, are the main process's to handle: it
    # finishes its step, for which it needs its workers, and then ends them.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    for process in list(_running):  # copies of the main process's ends, which would keep pipes open
        process.close()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of a tokenizer do not survive the fork
    torch.set_num_threads(1)  # nor do OpenMP's
    while True:
        try:
            items = pipe.recv()
        except (EOFError, OSError):
            return
        results = [work(item) for item in items]
        try:
            _send(pipe, results)
        except BrokenPipeError:
            return


def _send(pipe: Connection, value: Any) -> None:
    """Pass on any picklable value, its pickle and its tensors' bytes in memory that both processes share.

    Only the handle of that memory goes through the pipe, so nobody waits for a reader. It is no file in /dev/shm, which
    is small in many containers.
    """
    tensors: list[tuple[int, Tensor]] = []
    end = 0

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> tuple[int, int, torch.dtype, tuple[int, ...]] | None:
            nonlocal end
            if not isinstance(obj, Tensor):
                return None
            start, flat = end, obj.detach().contiguous().reshape(-1).view(torch.uint8)
            tensors.append((start, flat))
            end += _aligned(len(flat))
            return start, len(flat), obj.dtype, tuple(obj.shape)

    written = io.BytesIO()
    Pickler(written, pickle.HIGHEST_PROTOCOL).dump(value)
    length = written.tell()
    first = _aligned(length)
    memory = os.memfd_create("anymal")
    try:
        os.ftruncate(memory, first + end)
        shared = torch.frombuffer(mmap.mmap(memory, first + end), dtype=torch.uint8)
        shared[:length] = torch.frombuffer(written.getbuffer(), dtype=torch.uint8)
        for start, flat in tensors:
            shared[first + start : first + start + len(flat)] = flat
        pipe.send((length, first + end))
        reduction.send_handle(pipe, memory, os.getppid())
    finally:
        os.close(memory)


def _receive(pipe: Connection) -> Any:
    """What `_send` sent; only our own processes write it. Tensors stay in the shared memory, which ends with them."""
    length, size = pipe.recv()
    memory = reduction.recv_handle(pipe)
    try:  # not by mmap, which keeps a descriptor: rows wait for a whole step, and a process has but some 1,000
        shared = torch.from_file(f"/proc/self/fd/{memory}", shared=True, size=size, dtype=torch.uint8)
    finally:
        os.close(memory)
    flat = shared[_aligned(length) :]

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid: tuple[int, int, torch.dtype, tuple[int, ...]]) -> Tensor:
            start, count, dtype, shape = pid
            return flat[start : start + count].view(dtype).reshape(shape)

    return Unpickler(io.BytesIO(shared[:length].numpy().tobytes())).load()


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
