"""What a run costs: time of a step and of the optimizer in it, bytes by kind, the peak of memory."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn

    from ..optim import AlrAdamW

EVERY_STEP = 50  # steps at the beginning that are all timed; later one in ten, because timing waits for the device
MOMENTS = ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")


class Clock:
    """Times steps as the trainer goes through them; what it measures are medians.

    >>> clock = Clock(torch.device("cpu"))
    >>> for mark in ("begin", "pre", "post", "end"):
    ...     clock.mark(mark, 1)
    >>> sorted(clock.medians())
    ['optimizer', 'whole']
    """

    def __init__(self, device: torch.device) -> None:
        self._module = torch.get_device_module(device)
        self._at: dict[str, float] = {}
        self._times: dict[str, list[float]] = {"optimizer": [], "whole": []}

    def mark(self, what: str, step: int) -> None:
        """Note the time of "begin", "pre" (before the optimizer), "post" (after it) or "end" of a step."""
        if step > EVERY_STEP and step % 10:
            return
        self._module.synchronize()
        self._at[what] = time.perf_counter()
        for kind, first, last in (("optimizer", "pre", "post"), ("whole", "begin", "end")):
            if what == last and first in self._at:
                self._times[kind].append(self._at[what] - self._at.pop(first))

    def medians(self) -> dict[str, float | None]:
        """Return milliseconds of ``optimizer.step`` alone and of the whole step; None where none was timed."""
        return {kind: 1e3 * statistics.median(times) if times else None for kind, times in self._times.items()}


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that were in use so far: on a device of its tensors, on the CPU of the process."""
    module = torch.get_device_module(device)
    if hasattr(module, "max_memory_allocated"):
        return int(module.max_memory_allocated())
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def bytes_by_kind(model: nn.Module, optimizer: AlrAdamW) -> dict[str, int]:
    """Return what this process holds: weights, moments, importance, anchor, and other state of the optimizer.

    Memory that two share (an anchor that is the recording's start, too) counts once, as the first of these kinds.
    """
    kinds: dict[str, list[Any]] = {"weights": [], "moments": [], "importance": [], "anchor": [], "other": []}
    kinds["weights"] = [*model.parameters(), *model.buffers()]
    kinds["importance"] = optimizer.importance_tensors()
    for state in optimizer.state.values():
        for key, value in state.items():
            if torch.is_tensor(value):
                kinds["moments" if key in MOMENTS else key if key == "anchor" else "other"].append(value)
    seen: set[tuple[torch.device, int]] = set()
    return {kind: sum(_new_bytes(tensor, seen) for tensor in tensors) for kind, tensors in kinds.items()}


def _new_bytes(tensor: Any, seen: set[tuple[torch.device, int]]) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    key = (local.device, local.data_ptr())
    if key in seen and local.numel():
        return 0
    seen.add(key)
    return local.numel() * local.element_size()
