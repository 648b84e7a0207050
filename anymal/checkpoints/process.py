"""What a program leaves in its process, and how it is undone, for callers whose process goes on.

Signal handlers, notes on recipes, worker processes, and caches of what is known about tars and checkpoints' files. This
is the lowest room that may import all of these.
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

    At the end signal handlers, torch's random state and notes on recipes are as before, and workers have ended. Caches
    of files are emptied before and after: the files may have changed by the next call.
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
