"""CPU seconds and memory of this process."""

from __future__ import annotations

import contextlib
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def cpu_seconds(function: Callable[[], Any]) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


def peak_mb() -> float:
    """The most memory this process has held since it started or since ``memory_mb`` (Linux counts in kilobytes)."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1024
    # Elsewhere: a process that a larger one has started begins with the other's peak.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory_mb() -> float:
    """What this process holds now; ``peak_mb`` counts from here, where Linux lets a process forget its peak."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return peak_mb()


def repeated(function: Callable[[], Any], first: float, min_seconds: float, max_calls: int = 1000) -> float:
    """CPU seconds of one call, the median over more calls when the first one was short (and then without it)."""
    if first >= min_seconds:
        return first
    calls = min(max_calls, max(3, int(min_seconds / max(first, 1e-5))))
    return statistics.median(cpu_seconds(function) for _ in range(calls))


def interleaved(variants: Mapping[str, Callable[[], Any]], rounds: int, min_seconds: float) -> dict[str, list[float]]:
    """CPU seconds of one call of each variant, one entry for each round, round by round."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    for function in variants.values():
        function()
    for _ in range(rounds):
        for name, function in variants.items():
            found[name].append(repeated(function, cpu_seconds(function), min_seconds))
    return found
