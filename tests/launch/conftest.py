"""The command `anymal` in this process: without the seconds that the imports of another would take."""

import signal
import sys
from collections.abc import Callable, Iterator

import pytest

from anymal.launch import command


@pytest.fixture
def run_command(monkeypatch) -> Iterator[Callable[..., int]]:
    """``anymal WORDS…`` → its exit code."""

    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["anymal", *map(str, words)])
        try:
            command.start()
        except SystemExit as end:
            return end.code or 0
        return 0

    before = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    }
    yield run
    for number, handler in before.items():
        signal.signal(number, handler)
