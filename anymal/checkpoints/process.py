"""Around a program: the process is left as it was found, for callers whose process goes on.

It stands in the lowest room that knows all that a program leaves in its process: handlers of signals, notes of recipes,
workers, and what is known of tars and of checkpoints' files.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from anymal import signals
from anymal.checkpoints import checksums
from anymal.config import settings
from anymal.data import index_files, manifest, pool


@contextmanager
def process_as_found() -> Iterator[None]:
    """Around a program's `main`, for callers whose process goes on, to another `main` perhaps: a notebook, a service.

    Signal handlers, torch's random numbers and what is noted of recipes are as before at the end, workers are gone, and
    what is known of files is forgotten, before and after: they may be others by the next call.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with ExitStack() as at_end:
        for restored in (signals.handlers_restored(), settings.notes_of_its_own(), torch.random.fork_rng(devices)):
            at_end.enter_context(restored)
        for forget in (checksums.forget, index_files.note_unwritten.cache_clear, manifest.forget):
            forget()
            at_end.callback(forget)
        at_end.enter_context(pool.none_left())
        yield
