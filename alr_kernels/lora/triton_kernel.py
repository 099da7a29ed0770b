"""LoRA in effective space as two Triton kernels, for CUDA, ROCm and XPU devices (and the CPU through the interpreter).

One launch serves all pairs that have their shapes, formats and alignment in common. Their small factors, which move
from step to step, are stacked into one tensor; ω and Ω, which stay, are found through a table of addresses. Nothing is
read on the host. What several programs add up is stored in parts and summed by torch, in an order that does not change.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..codecs.storage import CODES
from ..step import tables
from ..step.triton_kernel import _device_of, available
from ..step.triton_math import tl
from . import penalty, reference
from .penalty import Pull
from .reference import Product
from .triton_tile import Build, pull_kernel, record_kernel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..codecs.encoded import Encoded

ROWS = 64  # of a tile: what one wgmma takes
# Options of both kernels. Four warps: with eight, Triton 3.6 makes an empty kernel of record's for sm_100. One stage:
# the loads of other programs hide those of this one, and what is staged takes registers that hold programs.
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
ENOUGH = 1024  # programs: twice the places of an H100 (132 multiprocessors, 4 programs each)
# More columns and rows than that take offsets within a tile, or a grid, beyond 32 and 16 bits.
MOST_COLUMNS, MOST_ROWS = 2**24, 65535 * ROWS
MOST_RANK = 64  # above it the pull is a matter of matrix products, which cuBLAS does best
SCRATCH = 2**28  # bytes of parts in one launch, or one pair's if those are more
ALIGNMENT = 16  # elements of a row, bytes of an address, for 128-bit accesses


def unavailable_reason(device_type: str) -> str:
    """Return '' when tensors on such a device are served, else why not."""
    there, reason = available(device_type)
    return "" if there else reason


class Kind(NamedTuple):
    """What the pairs of one launch have in common."""

    device: torch.device
    m: int
    n: int
    first: int  # inner size of Ĝ (0: it is dense), of the drift
    second: int  # of the move; r
    format: str  # of Ω
    aligned: bool


class Addresses:
    """Tables of addresses, int64 [P, 2] on the device, by what they hold, the last ``tables.KEPT``.

    As ``tables.Cache`` does, it keeps for good what a graph may read.
    """

    def __init__(self) -> None:
        self.upload = tables.Uploader()
        self._tables: OrderedDict[Any, tuple[Tensor, Any]] = OrderedDict()
        self._held: dict[Any, tuple[Tensor, Any]] = {}
        self._lock = threading.Lock()

    def find(self, rows: Sequence[tuple[Tensor, Tensor | None]], device: torch.device) -> Tensor:
        """Return the table of these tensors' addresses, 0 for None; upload it if it is new."""
        addresses = tuple(0 if tensor is None else tensor.data_ptr() for row in rows for tensor in row)
        key = (device, addresses)
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        stream = None if device.type == "cpu" else torch.get_device_module(device).current_stream(device)
        with self._lock:
            found = self._held.get(key) or self._tables.get(key)
            if found is None:
                # signed: some devices' addresses have the upper bit
                host = torch.tensor([a - (a >> 63 << 64) for a in addresses], dtype=torch.int64).view(-1, 2)
                found = self.upload(host, device, capturing), stream
            if capturing:
                self._held[key] = found
            else:
                tables._remember(self._tables, key, found)
            table, home = found
            if stream != home:
                table.record_stream(stream)
        return table


ADDRESSES = Addresses()


@torch.no_grad()
def record(
    path_integrals: Sequence[Tensor], gradients: Sequence[Product | Tensor], moves: Sequence[Product], clamp: bool
) -> None:
    """Do ``reference.record_`` of each pair."""
    groups: dict[Kind, list[int]] = defaultdict(list)
    for i, (omega, gradient, moved) in enumerate(zip(path_integrals, gradients, moves, strict=True)):
        m, n = omega.shape
        if not _fits(m, n):
            reference.record_(omega, gradient, moved, clamp)
            continue
        dense = isinstance(gradient, Tensor)
        first = 0 if dense else gradient.left.shape[1]
        aligned = _aligned(n, omega, gradient if dense else None)
        groups[Kind(omega.device, m, n, first, moved.left.shape[1], "", aligned)].append(i)
    for kind, members in groups.items():
        if kind.m and kind.n:
            omegas, grads = [path_integrals[i] for i in members], [gradients[i] for i in members]
            _record(kind, omegas, grads, [moves[i] for i in members], clamp)
    torch.autograd.graph.increment_version(list(path_integrals))


def _record(kind: Kind, omegas: list[Tensor], gradients: list[Any], moves: list[Product], clamp: bool) -> None:
    build, columns = record_build(kind, clamp)
    gradient, grad_blocks = (None, None), 0
    if build.first:
        gradient, grad_blocks = _stacked(gradients, build.first)
    moved, move_blocks = _stacked(moves, build.second)
    strips, tiles = -(-kind.n // columns), -(-kind.m // ROWS)
    taken = min(max(strips * tiles // ENOUGH, 1), 8)  # of the shape alone: sums do not depend on which pairs come along
    with _device_of(kind.device):
        denses = [None if build.first else gradient for gradient in gradients]
        table = ADDRESSES.find(list(zip(omegas, denses, strict=True)), kind.device)
        record_kernel[(strips, -(-tiles // taken), len(omegas))](
            table, *gradient, *moved, kind.m, _units(kind), grad_blocks, move_blocks, taken, build, ROWS, columns,
            **OPTIONS,
        )  # fmt: skip


def record_build(kind: Kind, clamp: bool) -> tuple[Build, int]:
    """Return what ``record_kernel`` is compiled for, and the columns of a tile: as many as registers hold."""
    first, second = (_block(size, 32) if size else 0 for size in (kind.first, kind.second))
    loops = kind.first > first, kind.second > second
    columns = 64 if kind.aligned and first == second == 16 and not any(loops) else 32
    return Build(first, second, kind.aligned, precision(kind.device), *loops, clamp), columns


@torch.no_grad()
def pulls(
    importances: Sequence[Encoded], scales: Tensor, drifts: Sequence[Product], factors: Sequence[Product],
    sides: str, curvature: bool,
) -> list[Pull]:  # fmt: skip
    """Do ``penalty.pull`` of each pair."""
    results: list[Any] = [None] * len(importances)
    groups: dict[Kind, list[int]] = defaultdict(list)
    each = scales.unbind()
    for i, (importance, drift, (up, down)) in enumerate(zip(importances, drifts, factors, strict=True)):
        (m, rank), n = up.shape, down.shape[1]
        if not (m and n):
            results[i] = penalty.empty_pull(up, down, sides, curvature)
        elif rank > MOST_RANK or not _fits(m, n) or importance.format == "fp64":
            results[i] = penalty.pull(importance, each[i], drift, factors[i], sides, curvature)
        else:
            aligned = _aligned(n, importance.values)
            groups[Kind(up.device, m, n, drift.left.shape[1], rank, importance.format, aligned)].append(i)
    for kind, members in groups.items():
        most = max(1, SCRATCH // _scratch(kind, sides, curvature))
        for start in range(0, len(members), most):
            chosen = members[start : start + most]
            rows = [(importances[i], each[i], drifts[i], factors[i]) for i in chosen]
            for i, result in zip(chosen, _pull(kind, rows, sides, curvature), strict=True):
                results[i] = result
    return results


def _pull(kind: Kind, rows: list[tuple[Encoded, Tensor, Product, Product]], sides: str, curvature: bool) -> list[Pull]:
    importances, scales, drifts, factors = map(list, zip(*rows, strict=True))
    build, columns = pull_build(kind, sides, curvature)
    strips, chunks, taken = _chunks(kind)
    pairs, rank, device = len(rows), kind.second, kind.device
    drift, drift_blocks = _stacked(drifts, build.first)
    (up, down), rank_blocks = _stacked(factors, build.second)
    bounds = penalty.bounds(Product(up, down)) if build.curvature else (None, None)
    value = torch.empty(pairs, strips, chunks, dtype=torch.float64, device=device)
    parts: list[Tensor | None] = []
    for wanted in (True, build.curvature):
        parts.append(torch.empty(pairs, chunks, kind.m, rank, device=device) if wanted and build.up else None)
        parts.append(torch.empty(pairs, strips, rank, kind.n, device=device) if wanted and build.down else None)
    with _device_of(device):
        table = ADDRESSES.find([(importance.values, importance.scales) for importance in importances], device)
        pull_kernel[(chunks * rank_blocks, strips, pairs)](
            table, torch.stack(scales), *drift, up, down, *bounds, value, *parts, kind.m, _units(kind), drift_blocks,
            rank_blocks, rank, taken, build, ROWS, columns, **OPTIONS,
        )  # fmt: skip
    summed = [[None] * pairs if part is None else part.sum(1).unbind() for part in parts]
    return [Pull(*row) for row in zip((value.sum((1, 2)) * 0.5).unbind(), *summed, strict=True)]


def pull_build(kind: Kind, sides: str, curvature: bool) -> tuple[Build, int]:
    """Return what ``pull_kernel`` is compiled for, and the columns of a tile: as many as registers hold."""
    up, down = sides in ("both", "up"), sides in ("both", "down")
    curvature = curvature and (up or down)
    widest = 16 if curvature or not kind.aligned else 32
    first, second = _block(kind.first, widest), _block(kind.second, widest)
    bits = CODES.get(kind.format, 0)
    dtype = tl.uint8 if bits else {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}[kind.format]
    return Build(
        first, second, kind.aligned, precision(kind.device), kind.first > first, importance=dtype, bits=bits, up=up,
        down=down, curvature=curvature,
    ), PULL_COLUMNS  # fmt: skip


PULL_COLUMNS = 32


def _chunks(kind: Kind) -> tuple[int, int, int]:
    """Return how many blocks of rows there are, how many programs share one, and how many tiles each of them takes."""
    strips, tiles = -(-kind.m // ROWS), -(-kind.n // PULL_COLUMNS)
    taken = min(max(strips * tiles // ENOUGH, 1), 32)  # of the shape alone, as in record
    return strips, -(-tiles // taken), taken


def _scratch(kind: Kind, sides: str, curvature: bool) -> int:
    """Return the bytes of one pair's parts."""
    strips, chunks, _ = _chunks(kind)
    numbers = (sides in ("both", "up")) * chunks * kind.m + (sides in ("both", "down")) * strips * kind.n
    return 8 * strips * chunks + 4 * kind.second * (1 + curvature) * numbers


def precision(device: torch.device) -> str:
    """Return how float32 numbers are multiplied: exactly that is what ROCm's matrix units and XPU offer."""
    return "tf32x3" if device.type == "cuda" and not torch.version.hip else "ieee"


def _block(size: int, widest: int) -> int:
    return 16 if size <= 16 else widest


def _fits(m: int, n: int) -> bool:
    return m <= MOST_ROWS and n <= MOST_COLUMNS


def _aligned(n: int, *tensors: Tensor | None) -> bool:
    return n % ALIGNMENT == 0 and all(t is None or t.data_ptr() % ALIGNMENT == 0 for t in tensors)


def _units(kind: Kind) -> int:
    return kind.n // ALIGNMENT if kind.aligned else kind.n


def _stacked(products: list[Product], block: int) -> tuple[tuple[Tensor, Tensor], int]:
    """Return left [P, m, k] and right [P, k, n] factors with k filled up with zeros to whole blocks; and the blocks."""
    size = products[0].left.shape[1]
    blocks = -(-size // block)
    missing = blocks * block - size
    left, right = (_batch([product[side] for product in products]) for side in (0, 1))
    if missing:
        left, right = torch.nn.functional.pad(left, (0, missing)), torch.nn.functional.pad(right, (0, 0, 0, missing))
    return (left, right), blocks


def _batch(tensors: list[Tensor]) -> Tensor:
    if len(tensors) == 1 and tensors[0].data_ptr() % ALIGNMENT == 0:
        return tensors[0].unsqueeze(0)
    return torch.stack(tensors)
