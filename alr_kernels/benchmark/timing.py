"""Timing in rounds: on a shared machine only a ratio of two times from the same round means something."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

Step = Callable[[], Any]


class Sample(NamedTuple):
    """One call, in seconds: on the device (CPU: the wall clock), and until the call returned to the host."""

    device_s: float
    host_s: float


def synchronize(device: str) -> None:
    """Wait until the device has done what was asked of it."""
    if device != "cpu":
        torch.cuda.synchronize()


def once(run: Step, device: str) -> Sample:
    """Time one call, the device being idle before."""
    if device == "cpu":
        begin = time.perf_counter()
        run()
        seconds = time.perf_counter() - begin
        return Sample(seconds, seconds)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin = time.perf_counter()
    start.record()
    run()
    host = time.perf_counter() - begin
    end.record()
    end.synchronize()
    return Sample(start.elapsed_time(end) / 1e3, host)


def in_rounds(
    steps: Mapping[str, Step], rounds: int, device: str, budget_s: float = float("inf")
) -> dict[str, list[Sample]]:
    """Time all steps in turn, ``rounds`` times over; fewer, but 3 at least, where that would take over ``budget_s``."""
    samples: dict[str, list[Sample]] = {name: [] for name in steps}
    begin = time.perf_counter()
    for done in range(rounds):
        for name, run in steps.items():
            samples[name].append(once(run, device))
        if done + 1 >= 3 and time.perf_counter() - begin > budget_s:
            break
    return samples


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return (median, 20th, 80th percentile)."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)]


def ratio(times: Sequence[Sample], others: Sequence[Sample]) -> tuple[float, float, float]:
    """Return (median, 20th, 80th percentile) over rounds of ``times`` / ``others`` of the same round."""
    return spread([a.device_s / b.device_s for a, b in zip(times, others, strict=True)])


def copier(device: str, nbytes: int) -> Step:
    """Return a plain copy between two buffers of ``nbytes`` each: the bandwidth that this run can have."""
    source = torch.zeros(max(nbytes // 4, 1), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
