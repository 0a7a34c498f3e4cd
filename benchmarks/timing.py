"""Times in milliseconds by device events, interleaved over systems so that drift hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch


def interleaved(
    systems: dict[str, Callable[[], object]], repeats: int, calls: int, prepare: Callable[[str], object] = len
) -> dict[str, list[float]]:
    """Return milliseconds per call for every system: one warm-up each, then `repeats` rounds of `calls` calls.

    `prepare` gets the name of the system whose turn it is, outside the timed part.
    """
    for name, run in systems.items():
        prepare(name)
        run()
    times: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(repeats):
        for name, run in systems.items():
            prepare(name)
            times[name].append(milliseconds(run, calls))
    return times


def summary(times: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Return median, extremes, and the median over rounds of the overhead to `base` in percent, round by round."""
    return {
        name: {
            "ms": median(values),
            "min_ms": min(values),
            "max_ms": max(values),
            "overhead_percent": median(100 * (a / b - 1) for a, b in zip(values, times[base], strict=True)),
        }
        for name, values in times.items()
    }


def milliseconds(run: Callable[[], object], calls: int) -> float:
    """Return milliseconds per call, of several calls in a row."""
    if not torch.cuda.is_available():
        started = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - started) / calls * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls
