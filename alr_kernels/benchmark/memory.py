"""Memory counted from live tensors: what is there, whoever holds it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


@contextmanager
def only_new_objects() -> Iterator[None]:
    """Let :func:`live_bytes` see only what is made from here on, so that looking through it takes no time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def live_bytes(device: str) -> int:
    """Return the bytes of all storages on the device that a live tensor uses; shared ones count once.

    A wrapper around other tensors (torchao's states) has no memory of its own and counts as those. ``p.grad`` is
    looked up, for its Python object may not exist yet.
    """
    gc.collect()
    tensors = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
    return nbytes_of(_with_gradients(tensors), device)


def nbytes_of(tensors: Iterable[Tensor], device: str) -> int:
    """Return the bytes of the tensors' storages on the device, shared ones once."""
    storages: dict[int, int] = {}
    for tensor in tensors:
        if tensor.device.type != device or isinstance(tensor, FakeTensor):
            continue
        try:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        except (RuntimeError, NotImplementedError):  # functional, sparse: no storage to count
            continue
    storages.pop(0, None)
    return sum(storages.values())


def _with_gradients(tensors: list[Tensor]) -> list[Tensor]:
    gradients = [tensor.grad for tensor in tensors if tensor.is_leaf]
    return tensors + [gradient for gradient in gradients if gradient is not None]


def allocated(device: str) -> int | None:
    """Return the bytes that the device's allocator has handed out, or None where it does not count (CPU)."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def peak_of(steps: Iterable[Callable[[], object]], device: str, before: int | None) -> int | None:
    """Run the steps and return the allocator's peak meanwhile, in bytes beyond ``before``; None on a CPU."""
    if before is not None:
        torch.cuda.reset_peak_memory_stats()
    for step in steps:
        step()
    if before is None:
        return None
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def extra_of(run: Callable[[], object], device: str) -> int | None:
    """Return the most memory that a call takes beyond what there was before it, in bytes; None where it is not known.

    On a CUDA device the allocator's count; on a CPU that of the process's resident pages, freed ones having been given
    back, so that memory counts whoever takes it; known on Linux with glibc, to a few hundred kilobytes.
    """
    if device == "cuda":
        return peak_of([run], device, allocated(device))
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _resident("VmRSS")
        run()
        return max(_resident("VmHWM") - before, 0)
    except (AttributeError, OSError):
        return None


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
