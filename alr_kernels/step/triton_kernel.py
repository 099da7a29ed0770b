"""The step as one Triton kernel, for CUDA, ROCm and XPU devices (and the CPU through Triton's interpreter).

One launch serves all tensors of a call: a program takes a chunk of one tensor, finds the addresses of its operands in
a table (``tables.py``), makes the scalars from the numbers in device memory, and steps tile after tile. The formulas
are in ``triton_math.py``.
"""

# mypy: allow-untyped-defs
# ruff: noqa: N803 - compile-time flags are capitals, as in Triton's own code
from __future__ import annotations

import contextlib
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from . import tables
from .plan import MUTATED, STATISTICS, Numbers, Operands, Options
from .triton_math import (
    Build, Sums, add_statistics, curvature, decode_exp_avg, dither, divide, encode_exp_avg, encode_exp_avg_sq, fourth_power,
    gradient, interleave, jit, join, missing, noise, proximal, round_stochastic, scalars, split, square_root,
    store_statistics, tl, to_float32, to_storage, triton,
)  # fmt: skip

if TYPE_CHECKING:
    from torch import Tensor

# A thread takes 8 elements of a tile, so that 2-byte operands are read and written 16 bytes at a time; where all are
# 4 bytes wide it takes 4, with half the registers and nothing exchanged through shared memory.
THREADS = 128
# Elements of a program: a prologue of some 3 µs (addresses, powers in float64) against 34 µs and more of streaming on
# an H200, and 61,000 programs at 1e9 elements for 132 multiprocessors, so that the last ones hardly matter.
CHUNK = 16384
OLDEST_TRITON = (3, 6)  # what the kernel was tested with from
MUTATED_ROLES = tuple(map(Operands._fields.index, MUTATED))


class Pointers(NamedTuple):
    """Addresses of one tensor's operands, in the order of ``Operands``; None where the build has no such operand."""

    param: Any
    grad: Any
    exp_avg: Any
    exp_avg_sq: Any
    importance: Any
    anchor: Any
    path_integral: Any
    remainder: Any
    exp_avg_scale: Any
    exp_avg_sq_scale: Any
    importance_scale: Any


class Tile(NamedTuple):
    """Which elements: [rows, 128] of them from ``first`` on."""

    first: Any  # int64, a multiple of the tile's size
    left: Any  # int32 elements from there to the tensor's end; None promises a whole tile
    rows: Any  # [rows, 1]
    columns: Any  # [1, 128]


class Loaded(NamedTuple):
    """One tile of operands, in float32."""

    before: Any  # θ
    g: Any  # gradient of the task, ω's
    exp_avg: Any
    exp_avg_sq: Any
    k: Any
    anchor: Any
    path_integral: Any


class Stepped(NamedTuple):
    """What the step makes of a tile, in float32."""

    after: Any
    exp_avg: Any
    exp_avg_sq: Any
    root: Any
    denom: Any


@jit
def address(row_ptr, column: tl.constexpr, dtype: tl.constexpr):
    return tl.load(row_ptr + column).to(tl.pointer_type(dtype))


@jit
def addresses(row_ptr, BUILD: tl.constexpr):
    importance, anchor, importance_scale, path_integral = None, None, None, None
    remainder, exp_avg_scale, exp_avg_sq_scale = None, None, None
    if BUILD.importance is not None:
        importance = address(row_ptr, 4, BUILD.importance)
        anchor = address(row_ptr, 5, BUILD.anchor)
        if BUILD.bits != 0:
            importance_scale = address(row_ptr, 10, tl.bfloat16)
    if BUILD.record:
        path_integral = address(row_ptr, 6, tl.float32)
    if BUILD.master == "split":
        remainder = address(row_ptr, 7, tl.int16)
    if BUILD.exp_avg == tl.int8:
        exp_avg_scale = address(row_ptr, 8, tl.float32)
        exp_avg_sq_scale = address(row_ptr, 9, tl.float32)
    param, grad = address(row_ptr, 0, BUILD.param), address(row_ptr, 1, BUILD.grad)
    exp_avg, exp_avg_sq = address(row_ptr, 2, BUILD.exp_avg), address(row_ptr, 3, BUILD.exp_avg_sq)
    return Pointers(
        param, grad, exp_avg, exp_avg_sq, importance, anchor, path_integral, remainder, exp_avg_scale,
        exp_avg_sq_scale, importance_scale,
    )  # fmt: skip


@jit
def pointers_at(ptr, first, offsets, ALIGNED: tl.constexpr):
    # `first` is a multiple of 16 bytes for every operand, so what is aligned at the tensor's start is so here. The
    # hint has to sit on a computed pointer, on an argument it is lost when the function is inlined.
    start = ptr + first
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    return start + offsets


@jit
def load_at(ptr, first, offsets, left, ALIGNED: tl.constexpr):
    # Only without a mask does Triton load 128 bits at a time.
    if left is None:
        return tl.load(pointers_at(ptr, first, offsets, ALIGNED))
    else:
        return tl.load(pointers_at(ptr, first, offsets, ALIGNED), mask=offsets < left, other=0)


@jit
def store_at(ptr, first, offsets, left, value, ALIGNED: tl.constexpr):
    if left is None:
        tl.store(pointers_at(ptr, first, offsets, ALIGNED), value)
    else:
        tl.store(pointers_at(ptr, first, offsets, ALIGNED), value, mask=offsets < left)


@jit
def load(ptr, t, BUILD: tl.constexpr):
    return load_at(ptr, t.first, t.rows * 128 + t.columns, t.left, BUILD.aligned)


@jit
def store(ptr, t, value, BUILD: tl.constexpr):
    store_at(ptr, t.first, t.rows * 128 + t.columns, t.left, value, BUILD.aligned)


@jit
def load_scales(ptr, t):
    # [rows, 1]: one number a block. Tensors with scales are whole blocks.
    return load_at(ptr, t.first // 128, t.rows, None if t.left is None else t.left // 128, False)


@jit
def store_scales(ptr, t, value):
    store_at(ptr, t.first // 128, t.rows, None if t.left is None else t.left // 128, value, False)


@jit
def load_importance(p, t, BUILD: tl.constexpr):
    if BUILD.bits == 0:
        return to_float32(load(p.importance, t, BUILD))
    elif BUILD.bits == 8:
        return fourth_power(load(p.importance, t, BUILD), to_float32(load_scales(p.importance_scale, t)), 255)
    else:  # two to a byte
        half = t.rows * 64 + tl.arange(0, 64)[None, :]
        packed = load_at(p.importance, t.first // 2, half, None if t.left is None else t.left // 2, BUILD.aligned)
        return fourth_power(interleave(packed), to_float32(load_scales(p.importance_scale, t)), 15)


@jit
def load_tile(p, t, s, BUILD: tl.constexpr):
    # All loads come before all stores: nothing moves a load over a store that might alias it.
    param = load(p.param, t, BUILD)
    if BUILD.master == "split":
        before = join(param, load(p.remainder, t, BUILD))
    else:
        before = to_float32(param)
    g = to_float32(load(p.grad, t, BUILD)) * s.grad_scale
    exp_avg = load(p.exp_avg, t, BUILD)
    exp_avg_sq = load(p.exp_avg_sq, t, BUILD)
    if BUILD.exp_avg == tl.int8:
        exp_avg = decode_exp_avg(exp_avg, load_scales(p.exp_avg_scale, t))
        exp_avg_sq = fourth_power(exp_avg_sq, load_scales(p.exp_avg_sq_scale, t), 255)
    else:
        exp_avg = to_float32(exp_avg)
        exp_avg_sq = to_float32(exp_avg_sq)
    k, anchor, path_integral = None, None, None
    if BUILD.importance is not None:
        k = curvature(load_importance(p, t, BUILD), s.curvature_scale)
        anchor = to_float32(load(p.anchor, t, BUILD))
    if BUILD.record:
        path_integral = load(p.path_integral, t, BUILD)
    return Loaded(before, g, exp_avg, exp_avg_sq, k, anchor, path_integral)


@jit
def update(x, s, BUILD: tl.constexpr):
    # reference.step_, between loading and storing.
    adam_grad = x.g * s.clip
    if BUILD.importance is not None and BUILD.mode == "coupled":
        adam_grad = tl.where(x.k == 0.0, adam_grad, adam_grad + gradient(x.before, x.anchor, x.k))
    exp_avg = x.exp_avg + (adam_grad - x.exp_avg) * s.one_minus_beta1
    exp_avg_sq = x.exp_avg_sq * s.beta2 + adam_grad * adam_grad * s.one_minus_beta2
    root = square_root(exp_avg_sq, BUILD.precise)
    denom = root * s.rsqrt_bias2 + s.eps
    decayed = x.before * s.decay
    move = exp_avg * s.step_size
    if BUILD.importance is not None and BUILD.mode == "proximal":
        after = proximal(decayed, move, x.anchor, x.k, s.lr, denom, BUILD.precise)
    else:
        after = decayed - divide(move, denom, BUILD.precise)
    return Stepped(after, exp_avg, exp_avg_sq, root, denom)


@jit
def store_param(p, t, after, random, BUILD: tl.constexpr):
    # Store θ and return it as it was stored.
    if BUILD.master == "split":
        param, remainder = split(after)
        store(p.param, t, param, BUILD)
        store(p.remainder, t, remainder, BUILD)
        return after
    else:
        if BUILD.master == "stochastic":
            param = round_stochastic(after, random & 0xFFFF)
        else:
            param = to_storage(after, BUILD.param, BUILD.interpreted)
        store(p.param, t, param, BUILD)
        return to_float32(param)


@jit
def store_moments(p, t, y, random, s, BUILD: tl.constexpr):
    if BUILD.exp_avg == tl.int8:
        u = dither(s.key, t.first // 128, t.rows, t.columns)
        codes, scales = encode_exp_avg(y.exp_avg, u, BUILD.precise)
        store(p.exp_avg, t, codes, BUILD)
        store_scales(p.exp_avg_scale, t, scales)
        codes, scales = encode_exp_avg_sq(y.root, y.exp_avg_sq, u, BUILD.precise)
        store(p.exp_avg_sq, t, codes, BUILD)
        store_scales(p.exp_avg_sq_scale, t, scales)
    else:
        store(p.exp_avg, t, to_storage(y.exp_avg, BUILD.exp_avg, BUILD.interpreted), BUILD)
        if BUILD.exp_avg_sq == tl.bfloat16:  # at random: 0.999 v would round to v for ever
            store(p.exp_avg_sq, t, round_stochastic(y.exp_avg_sq, random >> 16), BUILD)
        else:
            store(p.exp_avg_sq, t, to_storage(y.exp_avg_sq, BUILD.exp_avg_sq, BUILD.interpreted), BUILD)


@jit
def step_tile(p, first, left, s, sums, BUILD: tl.constexpr, SIZE: tl.constexpr):
    # Step SIZE elements from `first` on and return `sums` with theirs added.
    t = Tile(first, left, tl.arange(0, SIZE // 128)[:, None], tl.arange(0, 128)[None, :])
    x = load_tile(p, t, s, BUILD)
    y = update(x, s, BUILD)
    random = None
    if BUILD.master == "stochastic" or BUILD.exp_avg_sq == tl.bfloat16:
        random = noise(s.key, first, t.rows * 128 + t.columns)
    stored = store_param(p, t, y.after, random, BUILD)
    store_moments(p, t, y, random, s, BUILD)
    if BUILD.record:
        store(p.path_integral, t, x.path_integral - x.g * (stored - x.before), BUILD)
    if BUILD.statistics:
        there = None if left is None else t.rows * 128 + t.columns < left
        return add_statistics(sums, x, y.denom, s.lr, there)
    else:
        return sums


@jit(do_not_specialize=("table_ptr", "chunk_ptr", "hyper_ptr", "unit_scale_ptr", "partial_ptr", "stride"))
def step_kernel(
    table_ptr,  # tables.COLUMNS of each tensor, int64 [n, 16], read
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
    row_ptr = table_ptr + row * 16
    count = tl.load(address(row_ptr, 11, tl.float32)).to(tl.int32)
    key = tl.load(row_ptr + 13).to(tl.uint32)
    s = scalars(hyper_ptr, count, tl.load(unit_scale_ptr + row), key, BUILD.maximize)
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
        store_statistics(partial_ptr + program, stride, sums)
    else:
        for i in range(0, done, TILE):
            step_tile(p, first + i, None, s, None, BUILD, TILE)
        for i in range(done, left, TAIL):
            step_tile(p, first + i, left - i, s, None, BUILD, TAIL)


@jit(do_not_specialize=("table_ptr", "partial_ptr", "hyper_ptr", "statistics_ptr", "stride"))
def statistics_kernel(
    table_ptr,  # tables.COLUMNS of each tensor, int64 [n, 16], read
    partial_ptr,  # sums of each program of step_kernel, fp64 [6, stride], read
    hyper_ptr,  # plan.HYPER, fp64, read
    statistics_ptr,  # plan.STATISTICS of each tensor, fp64 [n, 6], written
    stride: tl.int64,  # programs of step_kernel, int64
    SIZE: tl.constexpr,  # programs at a time
):
    # A program per tensor and statistic: sums in an order that does not change, the largest of the stiffness.
    row_ptr = table_ptr + tl.program_id(0) * 16
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


@lru_cache(maxsize=None)
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


@lru_cache(maxsize=None)
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
    return (128, 168, 255)[min(pressure, 2)]


def _device_of(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a guard that makes the device the current one: Triton launches on the current device."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)
