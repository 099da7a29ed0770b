"""The step as one Triton kernel, for CUDA, ROCm and XPU devices (and the CPU through Triton's interpreter).

One launch serves all tensors of a call: a program takes a chunk of one tensor, finds the addresses of its operands in
a table (``tables.py``), makes the scalars from the numbers in device memory and steps tile after tile
(``triton_tile.py``). Division and square root are the IEEE ones and contraction into fused multiply-adds is off, so
that results agree with the reference bit for bit; ``precise=False`` takes approximate ones.
"""

# mypy: allow-untyped-defs
# ruff: noqa: N803 - compile-time flags are capitals, as in Triton's own code
from __future__ import annotations

import contextlib
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from . import tables
from . import triton_math as f
from .plan import MUTATED, STATISTICS, Numbers, Operands, Options
from .triton_math import Build, Sums, jit, missing, tl, triton
from .triton_tile import address, addresses, step_tile

if TYPE_CHECKING:
    from torch import Tensor

# A thread takes 8 elements of a tile, so that 2-byte operands are read and written 16 bytes at a time; where all are
# 4 bytes wide it takes 4, with half the registers and nothing exchanged through shared memory.
THREADS = 128
# Elements of a program: enough to hide a prologue of some 3 µs (addresses, powers in float64) behind 34 µs and more of
# streaming on an H200 (estimated), few enough that a model of 1e8 elements makes 6,000 programs for 528 places.
CHUNK = 16384
OLDEST_TRITON = (3, 6)  # what the kernel was tested with from
MUTATED_ROLES = tuple(map(Operands._fields.index, MUTATED))


@jit(
    do_not_specialize=(
        "table_ptr", "chunk_ptr", "hyper_ptr", "unit_scale_ptr", "partial_ptr", "stride", "first_program",
    )
)  # fmt: skip
def step_kernel(
    table_ptr,  # tables.COLUMNS of each tensor, int64 [n, 17], read
    chunk_ptr,  # for each program: tensor << 32 | number of the chunk in it, int64, read
    hyper_ptr,  # plan.HYPER, fp64, read
    unit_scale_ptr,  # curvature / (reg_lambda * importance) of each tensor, fp64 [n], read
    partial_ptr,  # sums of each program, fp64 [6, stride], written; None without statistics
    stride: tl.int64,  # programs, those of other launches of this call included, int64
    first_program: tl.int64,  # how many of them came before this launch, int64
    BUILD: tl.constexpr,  # Build: dtypes and flags
    CHUNK: tl.constexpr,  # elements of a program
    TILE: tl.constexpr,  # elements at a time
    TAIL: tl.constexpr,  # elements at a time in what is left at a tensor's end: one a thread, few registers
):
    program = tl.program_id(0) + first_program
    chunk = tl.load(chunk_ptr + program)
    row = chunk >> 32
    first = (chunk & 0xFFFFFFFF) * CHUNK
    row_ptr = table_ptr + row * 17
    count = tl.load(address(row_ptr, 11, tl.float32)).to(tl.int32)
    key = tl.load(row_ptr + 13).to(tl.uint32)
    offset = tl.load(row_ptr + 16)
    s = f.scalars(hyper_ptr, count, tl.load(unit_scale_ptr + row), key, offset, BUILD.maximize)
    p = addresses(row_ptr, BUILD)
    left = tl.minimum(tl.load(row_ptr + 12) - first, CHUNK).to(tl.int32)
    left = tl.where(tl.load(hyper_ptr + 8) != 0.0, 0, left)  # found_inf: nothing changes
    done = left // TILE * TILE

    if BUILD.statistics:
        zeros = tl.zeros([TAIL], tl.float64)
        sums = Sums(zeros, zeros, zeros, zeros, tl.zeros([TAIL], tl.float32), zeros)
        for i in range(0, done, TILE):
            sums = step_tile(p, first + i, None, s, sums, BUILD, TILE)
        for i in range(done, left, TAIL):
            sums = step_tile(p, first + i, left - i, s, sums, BUILD, TAIL)
        f.store_statistics(partial_ptr + program, stride, sums)
    else:
        for i in range(0, done, TILE):
            step_tile(p, first + i, None, s, 0, BUILD, TILE)
        for i in range(done, left, TAIL):
            step_tile(p, first + i, left - i, s, 0, BUILD, TAIL)


@jit(do_not_specialize=("table_ptr", "partial_ptr", "hyper_ptr", "statistics_ptr", "stride"))
def statistics_kernel(
    table_ptr,  # tables.COLUMNS of each tensor, int64 [n, 17], read
    partial_ptr,  # sums of each program of step_kernel, fp64 [6, stride], read
    hyper_ptr,  # plan.HYPER, fp64, read
    statistics_ptr,  # plan.STATISTICS of each tensor, fp64 [n, 6], written
    stride: tl.int64,  # programs of step_kernel, int64
    SIZE: tl.constexpr,  # programs at a time
):
    # A program per tensor and statistic: sums in an order that does not change, the largest of the stiffness.
    row_ptr = table_ptr + tl.program_id(0) * 17
    column = tl.program_id(1)
    ptr = partial_ptr + column * stride + tl.load(row_ptr + 14)
    count = tl.load(row_ptr + 15).to(tl.int32)
    total = tl.zeros([SIZE], tl.float64)
    for i in range(0, count, SIZE):
        number = i + tl.arange(0, SIZE)
        values = tl.load(ptr + number, mask=number < count, other=0.0)
        total = tl.where(column == 4, tl.maximum(total, values), total + values)
    result = tl.where(column == 4, tl.max(total, 0), tl.sum(total, 0))
    if tl.load(hyper_ptr + 8) == 0.0:
        tl.store(statistics_ptr + tl.program_id(0) * 6 + column, result)


def available(device_type: str) -> tuple[bool, str]:
    """Tell whether ``step_`` can run on devices of this type, and if not, why and what to do."""
    if triton is None:
        return False, f"Triton cannot be imported ({missing}); install triton to use the fused step"
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
        return False, f"Triton {triton.__version__} is older than 3.6, which the step needs"
    if device_type == "cpu":
        if not isinstance(step_kernel, triton.JITFunction):  # Triton's knob, as it stood at import
            return True, ""
        return False, "Triton has no CPU backend here; set TRITON_INTERPRET=1 before import to run its interpreter"
    if device_type not in ("cuda", "xpu"):
        return False, f"the Triton step serves cuda (NVIDIA and ROCm) and xpu devices, not {device_type!r}"
    if not getattr(torch, device_type).is_available():
        return False, f"torch {torch.__version__} finds no {device_type} device"
    return True, ""


@torch.no_grad()
def step_(o: Operands, numbers: Numbers, options: Options, statistics: Tensor | None = None) -> None:
    """Update what ``o`` says is mutated; see ``reference.step_``. Nothing is read on the host.

    The operands of one parameter are dense, have the same strides and lie on one device: the caller sees to it.
    ``statistics``: [n, len(STATISTICS)] float64, contiguous, overwritten.
    """
    if not o.params:
        return
    build = build_of(o, options, statistics is not None)
    device = o.params[0].device
    with _device_of(device):
        table = tables.CACHE.find(o, numbers, options.seed, CHUNK)
        programs, aligned = len(table.chunks.map), table.chunks.aligned
        partials = None
        if statistics is not None:
            partials = torch.empty(len(STATISTICS), programs, dtype=torch.float64, device=device)
        common = (table.rows, table.chunks.map, numbers.hyper, numbers.unit_scales, partials, programs)
        launch = launch_options(build, device.type == "cuda" and not torch.version.hip)
        if aligned:
            step_kernel[(aligned,)](*common, 0, build, **launch)
        if aligned < programs:
            step_kernel[(programs - aligned,)](*common, aligned, build._replace(aligned=False), **launch)
        if statistics is not None:
            statistics_kernel[(len(o.params), len(STATISTICS))](
                table.rows, partials, numbers.hyper, statistics, programs, SIZE=1024, num_warps=4
            )
    torch.autograd.graph.increment_version(list(chain.from_iterable(o[i] for i in MUTATED_ROLES)))


def build_of(o: Operands, options: Options, statistics: bool) -> Build:
    """Return what the kernel is compiled for, with one spelling for what is the same machine code."""
    bits = 0
    if o.importances and o.importances[0].dtype is torch.uint8:
        bits = 8 if o.importances[0].shape == o.params[0].shape else 4
    roles = (o.params, o.grads, o.exp_avgs, o.exp_avg_sqs, o.importances, o.anchors)
    master = "split" if o.remainders else "stochastic" if options.master == "stochastic" else "none"
    return _build(
        tuple(tensors[0].dtype if tensors else None for tensors in roles), bits, options.mode, bool(o.path_integrals),
        options.maximize, options.precise, master, statistics,
    )  # fmt: skip


@cache
def _build(
    dtypes: tuple[torch.dtype | None, ...], bits: int, mode: str, record: bool, maximize: bool, precise: bool,
    master: str, statistics: bool,
) -> Build:  # fmt: skip
    if torch.float64 in dtypes:
        raise TypeError(f"the Triton step computes in float32: expected operands of at most 32 bits, got {dtypes}")
    param, grad, exp_avg, exp_avg_sq, importance, anchor = (
        None if dtype is None else getattr(tl, str(dtype).removeprefix("torch.")) for dtype in dtypes
    )
    if (exp_avg == tl.int8) != (exp_avg_sq == tl.uint8):
        raise TypeError(f"moments: expected float dtypes, or codes int8 and uint8, got {dtypes[2]} and {dtypes[3]}")
    return Build(
        param, grad, exp_avg, exp_avg_sq, importance, bits, anchor, mode if importance else "none", record, maximize,
        precise, "none" if master == "stochastic" and param != tl.bfloat16 else master, statistics,
    )  # fmt: skip


@cache
def launch_options(build: Build, nvidia: bool) -> dict[str, Any]:
    """Return the other compile-time arguments of ``step_kernel`` and the compiler's options."""
    roles = (build.param, build.grad, build.exp_avg, build.exp_avg_sq, build.importance, build.anchor)
    wide = all(role is None or role.primitive_bitwidth == 32 for role in roles)
    options: dict[str, Any] = {
        "CHUNK": CHUNK,
        "TILE": THREADS * (4 if wide else 8),
        "TAIL": THREADS,
        "num_warps": THREADS // (64 if torch.version.hip else 32),
        "enable_fp_fusion": False,
    }
    if nvidia and not wide:
        options["maxnreg"] = registers(build)
    return options


def registers(build: Build) -> int:
    """Return how many registers a thread may have: as many as fit 4, 3 or 2 programs a multiprocessor, without spills.

    Left alone, ptxas takes up to 168 where 128 do, and spills to keep to 168 where it should take more.
    """
    coded = build.exp_avg == tl.int8
    pressure = build.statistics + (coded and build.statistics + build.record)
    pressure += coded and build.precise and build.master != "split"
    pressure += not coded and build.bits > 0 and build.record and build.precise and build.master == "stochastic"
    return (128, 168, 255)[min(pressure, 2)]


def _device_of(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a guard that makes the device the current one: Triton launches on the current device."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)
