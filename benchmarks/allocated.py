"""Memory as torch's allocator sees it, for benchmarks and tests that measure it."""

from typing import Any


def peak_bytes(watched: Any) -> int:
    """The most bytes alive at once among those allocated while the profiler watched.

    Args:
        watched: A finished ``torch.profiler.profile(profile_memory=True)``. CPU allocations are counted; what was alive
            before it started (weights) is not.
    """
    alive = most = 0
    for event in _events(watched):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def kept_bytes(watched: Any) -> int:
    """The bytes still alive at the end among those allocated while the profiler watched. Arguments as `peak_bytes`."""
    return sum(event.nbytes() for event in _events(watched))


def _events(watched: Any) -> list[Any]:
    """Allocations (positive) and releases (negative) on the CPU, in order."""
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    return sorted((e for e in events if e.device_type().name == "CPU"), key=lambda event: event.start_ns())
