"""Memory as torch's allocator sees it, for the benchmarks and tests that measure it."""

from typing import Any


def peak_bytes(watched: Any) -> int:
    """The most bytes alive at once among those allocated while the profiler watched.

    Args:
        watched: A finished ``torch.profiler.profile(profile_memory=True)``. CPU allocations are counted; what was alive
            before it started (weights) is not.
    """
    alive = most = 0
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.device_type().name == "CPU":
            alive += event.nbytes()
            most = max(most, alive)
    return most
