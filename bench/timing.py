"""Side-by-side timing: on a shared machine only a ratio measured in the same run means something."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def _once(run: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def side_by_side(
    candidates: dict[str, Callable[[], Any]], baseline: str, rounds: int, device: str = "cpu", warmup: int = 2
) -> dict[str, dict[str, float]]:
    """Time all candidates in turn, ``rounds`` times over.

    Returns:
        name → seconds (median, p20, p80) and ``ratio``: the median over rounds of its time divided by the
        baseline's time in the same round.
    """
    for run in candidates.values():
        for _ in range(warmup):
            run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            times[name].append(_once(run, device))
    result = {}
    for name, seconds in times.items():
        ordered = sorted(seconds)
        result[name] = {
            "median_s": statistics.median(seconds),
            "p20_s": ordered[int(0.2 * (len(ordered) - 1))],
            "p80_s": ordered[int(0.8 * (len(ordered) - 1))],
            "ratio": statistics.median(a / b for a, b in zip(seconds, times[baseline], strict=True)),
        }
    return result


def copy_bandwidth(device: str, megabytes: int = 256, rounds: int = 7) -> float:
    """Return bytes per second (read and written) of a plain device copy: the roof of this run."""
    source = torch.empty(megabytes * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.numel() / statistics.median(_once(lambda: target.copy_(source), device) for _ in range(rounds))
