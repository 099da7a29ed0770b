"""Tables of addresses on the device, with which one launch serves many tensors, and the cache that keeps them.

A table is uploaded when an address has changed (gradients move when they are set to None) and found again by the
addresses otherwise, which takes no work per tensor in Python. Tables are never written a second time, so a launch in
flight and a captured graph read what they were given.
"""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..codecs.reference import BLOCK
from ..codecs.rounding import MASK, mix
from .plan import Operands

if TYPE_CHECKING:
    from .plan import Numbers

# Of a row: the addresses of a tensor's operands and of its step count; elements; the generator's key but for the step;
# the first of its programs and how many they are; the global index of its first element.
COLUMNS = (*Operands._fields, "step", "numel", "key", "first_program", "programs", "offset")
STEP, NUMEL, KEY, FIRST_PROGRAM, PROGRAMS, OFFSET = range(len(Operands._fields), len(COLUMNS))
ELEMENTWISE = [i for i, role in enumerate(Operands._fields) if not role.endswith("scales")]
ALIGNMENT = 16  # bytes, of every operand with a value an element, for 128-bit accesses
KEPT = 32  # tables, and chunk maps, besides those that a graph may read
SPARE = 4  # tables for which pinned memory is set aside, for captures


@dataclass(frozen=True)
class Chunks:
    """Which program takes which chunk of which tensor: those of aligned tensors come first."""

    map: Tensor  # int64 [programs], on the device: tensor << 32 | number of the chunk in it
    aligned: int  # programs that serve aligned tensors
    first: Any  # int64 [n], NumPy: a tensor's first program
    counts: Any  # int64 [n], NumPy: its programs


@dataclass(frozen=True)
class Table:
    """What the programs of one call look up."""

    rows: Tensor  # int64 [n, len(COLUMNS)], on the device
    chunks: Chunks
    stream: Any  # for which it was allocated


class Uploader:
    """Copies to the device, from pinned memory and without waiting.

    torch's pinned allocator gives a buffer out again only when its copies are done. A capture must not ask it for more,
    and its graph copies once more in every replay: hence some memory is set aside in time and, once used, kept.
    """

    def __init__(self) -> None:
        self.count = 0
        self._spare = torch.empty(0, dtype=torch.int64)
        self._kept: list[Tensor] = []

    def __call__(self, host: Tensor, device: torch.device, capturing: bool) -> Tensor:
        self.count += 1
        if device.type != "cuda":
            return host.to(device)
        if not capturing:
            if len(self._spare) < SPARE * host.numel():
                self._spare = torch.empty(2 * SPARE * host.numel(), dtype=torch.int64, pin_memory=True)
            return host.pin_memory().to(device, non_blocking=True)
        if len(self._spare) < host.numel():  # no step before the capture: newer torch can, older ones say what is wrong
            pinned = host.pin_memory()
        else:
            pinned, self._spare = self._spare[: host.numel()].view(host.shape), self._spare[host.numel() :]
            pinned.copy_(host)
        target = torch.empty_like(host, device=device).copy_(pinned, non_blocking=True)
        self._kept += [pinned, target]
        return target


class Cache:
    """Tables by what they hold, the last ``KEPT``.

    Tables that a graph may read are kept for as long as the cache: what a capture finds stays, what it has to make is
    uploaded in every replay and therefore is of no use to anybody else.
    """

    def __init__(self) -> None:
        self.upload = Uploader()
        self._tables: OrderedDict[Any, Table] = OrderedDict()
        self._chunks: OrderedDict[Any, Chunks] = OrderedDict()
        self._held: dict[Any, Table] = {}
        self._lock = threading.Lock()

    def find(self, o: Operands, numbers: Numbers, seed: int, chunk: int) -> Table:
        """Return the table of these operands, for programs of ``chunk`` elements; upload it if it is new."""
        device = o.params[0].device
        sizes = tuple(map(Tensor.numel, o.params))
        addresses = tuple(map(Tensor.data_ptr, chain(*o, numbers.steps)))
        shape = (device, chunk, tuple(map(len, o)), sizes)
        key = (shape, seed, tuple(numbers.keys), tuple(numbers.offsets), addresses)
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        stream = None if device.type == "cpu" else torch.get_device_module(device).current_stream(device)
        with self._lock:
            table = self._held.get(key) or self._tables.get(key)
            if table is None:
                table = self._make(o, addresses, shape, numbers, seed, capturing, stream)
                if not capturing:
                    _remember(self._tables, key, table)
            elif capturing:
                self._held[key] = table
            elif key in self._tables:
                self._tables.move_to_end(key)
            if stream != table.stream:
                for tensor in (table.rows, table.chunks.map):
                    tensor.record_stream(stream)
        return table

    def _make(
        self, o: Operands, addresses: tuple[int, ...], shape: tuple[Any, ...], numbers: Numbers, seed: int,
        capturing: bool, stream: Any,
    ) -> Table:  # fmt: skip
        device, chunk, _, sizes = shape
        rows = _rows(o, addresses, sizes, numbers, seed)
        aligned = (rows[:, ELEMENTWISE] % ALIGNMENT == 0).all(1)
        key = (*shape, aligned.tobytes())
        chunks = self._chunks.get(key)
        if chunks is None:
            _check(o, sizes)
            chunks = _chunks(rows[:, NUMEL], aligned, chunk)
            chunks = replace(chunks, map=self.upload(chunks.map, device, capturing))
        if not capturing:
            _remember(self._chunks, key, chunks)
        rows[:, FIRST_PROGRAM], rows[:, PROGRAMS] = chunks.first, chunks.counts
        return Table(self.upload(torch.from_numpy(rows), device, capturing), chunks, stream)


def _remember(store: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    store[key] = value
    store.move_to_end(key)
    if len(store) > KEPT:
        store.popitem(last=False)


# NumPy, not torch, whose threads cost more than such small arrays: 30 ms a table beside a busy process on two cores.


def _rows(o: Operands, addresses: tuple[int, ...], sizes: tuple[int, ...], numbers: Numbers, seed: int) -> Any:
    """Return a table, [n, len(COLUMNS)] int64, all but the programs."""
    uneven = {
        role: len(tensors) for role, tensors in zip(o._fields, o, strict=True) if len(tensors) not in (0, len(sizes))
    }
    if uneven:
        raise ValueError(f"expected {len(sizes)} tensors of each role, got {uneven}")
    rows = np.zeros((len(sizes), len(COLUMNS)), np.int64)
    present = [i for i, tensors in enumerate(o) if tensors] + [STEP]
    # unsigned: some devices' addresses have the upper bit
    rows[:, present] = np.frombuffer(array("Q", addresses), np.int64).reshape(len(present), len(sizes)).T
    rows[:, NUMEL] = sizes
    rows[:, KEY] = mix(mix(seed & MASK) ^ np.array(numbers.keys, np.int64))
    rows[:, OFFSET] = np.array(numbers.offsets or 0, np.int64)
    return rows


def _chunks(sizes: Any, aligned: Any, chunk: int) -> Chunks:
    """Cut tensors into chunks; the map is still on the host."""
    counts = (sizes + chunk - 1) // chunk
    order = np.argsort(~aligned, kind="stable")
    first = np.empty_like(counts)
    first[order] = counts[order].cumsum() - counts[order]
    tensor = np.repeat(order, counts[order])
    number = np.arange(len(tensor)) - first[tensor]
    return Chunks(torch.from_numpy(tensor << 32 | number), int(counts[aligned].sum()), first, counts)


def _check(o: Operands, sizes: tuple[int, ...]) -> None:
    """Refuse what would make the kernel read or write beyond a tensor's end."""
    for role, tensors in zip(o._fields, o, strict=True):
        wanted: tuple[int, ...] = sizes
        if role.endswith("scales"):
            wanted = tuple(size // BLOCK for size in sizes)
            uneven = [size for size in sizes if size % BLOCK] if tensors else []
            if uneven:
                raise ValueError(f"{role}: expected tensors of whole blocks of {BLOCK}, got {uneven[0]} elements")
        got = tuple(map(Tensor.numel, tensors))
        if role == "importances" and got != wanted:
            wanted = tuple(size // 2 for size in sizes)  # codes of 4 bits
        if tensors and got != wanted:
            raise ValueError(f"{role}: expected {wanted} elements, got {got}")


CACHE = Cache()
