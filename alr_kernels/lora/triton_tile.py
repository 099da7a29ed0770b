"""The two Triton kernels of LoRA in effective space, on tiles [ROWS, COLUMNS] of ω or Ω; see ``reference.py``.

Products of factors go through tensor cores as three TF32 products each (``"tf32x3"``), which is float32's accuracy;
plain TF32 is not. What does not change along a program's way is loaded once: ``record_kernel`` walks down a strip of
columns and keeps the right factors, which wgmma reads from shared memory; ``pull_kernel`` walks along a block of rows,
so that what it adds up for `up` stays in registers and what it hands on for `down` is stored in whole lines.

Per element at r = 8: ω is 8 bytes and 64 flops (192 of TF32), int8 Ω 1 byte, 0.5 of parts of `down` and 96 flops. At
3 TB/s an H100 passes 1.7 elements of ω a cycle and multiprocessor; record's loop takes 17 instructions an element and
the pull's 44, of the 76 that can be issued in that time (Triton 3.6, sm_90, counted in SASS; not yet run on a GPU).
"""

# mypy: allow-untyped-defs
# ruff: noqa: N803 - compile-time flags are capitals, as in Triton's own code
from __future__ import annotations

from typing import Any, NamedTuple

from ..step import triton_math as f
from ..step.triton_math import jit, tl
from ..step.triton_tile import address, pointers_at


class Build(NamedTuple):
    """Everything that decides which machine code runs, of both kernels; numbers and sizes do not."""

    first: int  # block of the first product's inner size: Ĝ's (0: Ĝ is dense), the drift's
    second: int  # of the move's; of the rank
    aligned: bool  # rows are multiples of 16 elements, and ω, Ω and a dense Ĝ start at multiples of 16 bytes
    precision: str  # of tl.dot
    first_loops: bool = False  # the inner size is several blocks
    second_loops: bool = False
    clamp: bool = False
    importance: Any = None  # dtype of Ω, Triton's; uint8: codes with block scales
    bits: int = 0  # of the codes
    up: bool = False  # whose derivatives are asked for
    down: bool = False
    curvature: bool = False


class Strip(NamedTuple):
    """Which columns of which pair."""

    pair: Any  # int64
    m: Any  # int32
    n: Any  # int32
    first: Any  # int32, a multiple of COLUMNS
    columns: Any  # [1, COLUMNS]
    there: Any  # [1, COLUMNS], which of them exist


@jit
def strip_of(m, n, first, COLUMNS: tl.constexpr):
    columns = tl.arange(0, COLUMNS)[None, :]
    return Strip(tl.program_id(2).to(tl.int64), m, n, first, columns, first + columns < n)


@jit
def width(units, ALIGNED: tl.constexpr):
    # The product tells the compiler that rows, and what masks leave of them, are multiples of 16 elements.
    if ALIGNED:
        return units * 16
    else:
        return units


@jit
def load_right(ptr, s, blocks, number, SIZE: tl.constexpr, ALIGNED: tl.constexpr):
    # The strip of block `number` of the pair's right factor, [SIZE, COLUMNS].
    start = (s.pair * blocks + number) * SIZE * s.n + s.first
    offsets = tl.arange(0, SIZE)[:, None] * s.n + s.columns
    return tl.load(pointers_at(ptr, start, offsets, ALIGNED), mask=s.there, other=0.0)


@jit
def load_left(ptr, s, first_row, blocks, number, SIZE: tl.constexpr, ROWS: tl.constexpr):
    # Rows of block `number` of the pair's left factor, [ROWS, SIZE].
    rows = tl.arange(0, ROWS)[:, None]
    start = (s.pair * s.m + first_row) * blocks * SIZE + number * SIZE
    offsets = rows * (blocks * SIZE) + tl.arange(0, SIZE)[None, :]
    return tl.load(pointers_at(ptr, start, offsets, True), mask=first_row + rows < s.m, other=0.0)


@jit
def add_blocks(
    total, left_ptr, right_ptr, s, first_row, blocks, SIZE: tl.constexpr, BUILD: tl.constexpr, ROWS: tl.constexpr
):
    # Add the tile of left · right that all blocks but the first make.
    for i in range(1, blocks):
        x = load_left(left_ptr, s, first_row, blocks, i, SIZE, ROWS)
        y = load_right(right_ptr, s, blocks, i, SIZE, BUILD.aligned)
        total = tl.dot(x, y, total, input_precision=BUILD.precision)
    return total


@jit
def tile_at(ptr, s, first_row, ALIGNED: tl.constexpr, ROWS: tl.constexpr):
    start = tl.cast(first_row, tl.int64) * s.n + s.first
    return pointers_at(ptr, start, tl.arange(0, ROWS)[:, None] * s.n + s.columns, ALIGNED)


@jit
def load_curvature(row_ptr, s, first_row, scale, BUILD: tl.constexpr, ROWS: tl.constexpr):
    # One tile of k = scale·Ω, float32; 0 outside.
    rows = tl.arange(0, ROWS)[:, None]
    there = first_row + rows < s.m
    ptr = address(row_ptr, 0, BUILD.importance)
    if BUILD.bits == 0:
        values = tl.load(tile_at(ptr, s, first_row, BUILD.aligned, ROWS), mask=there & s.there, other=0.0)
        return f.curvature(f.to_float32(values), scale)
    else:  # rows are whole blocks of 128, and a strip lies in one of them
        if BUILD.bits == 8:
            codes = tl.load(tile_at(ptr, s, first_row, BUILD.aligned, ROWS), mask=there, other=0)
        else:  # two to a byte
            start = (tl.cast(first_row, tl.int64) * s.n + s.first) // 2
            offsets = rows * (s.n // 2) + tl.arange(0, s.columns.shape[1] // 2)[None, :]
            codes = f.interleave(tl.load(pointers_at(ptr, start, offsets, BUILD.aligned), mask=there, other=0))
        blocks = s.n // 128
        scale_ptr = address(row_ptr, 1, tl.bfloat16) + (tl.cast(first_row, tl.int64) * blocks + s.first // 128)
        scales = f.to_float32(tl.load(scale_ptr + rows * blocks, mask=there, other=0.0))
        return f.fourth_power(codes, f.curvature(scales, scale), 255 if BUILD.bits == 8 else 15)


@jit(
    do_not_specialize=(
        "table_ptr", "grad_left_ptr", "grad_right_ptr", "move_left_ptr", "move_right_ptr", "m", "units",
        "grad_blocks", "move_blocks", "tiles",
    )
)  # fmt: skip
def record_kernel(
    table_ptr,  # addresses of ω (mutated) and of a dense Ĝ (read) of each pair, both fp32 [m, n]; int64 [P, 2], read
    grad_left_ptr,  # Ĝ's left factors, fp32 [P, m, grad_blocks * BUILD.first], read; None where Ĝ is dense
    grad_right_ptr,  # Ĝ's right factors, fp32 [P, grad_blocks * BUILD.first, n], read; None where Ĝ is dense
    move_left_ptr,  # fp32 [P, m, move_blocks * BUILD.second], read
    move_right_ptr,  # fp32 [P, move_blocks * BUILD.second, n], read
    m: tl.int32,  # rows, int32
    units: tl.int32,  # columns, in units of 16 where BUILD.aligned, int32
    grad_blocks: tl.int32,  # inner size of Ĝ in blocks of BUILD.first, int32
    move_blocks: tl.int32,  # of the move in blocks of BUILD.second, int32
    tiles: tl.int32,  # of ROWS rows, that a program takes, int32
    BUILD: tl.constexpr,  # Build
    ROWS: tl.constexpr,  # of a tile
    COLUMNS: tl.constexpr,  # of a tile
):
    s = strip_of(m, width(units, BUILD.aligned), tl.program_id(0) * COLUMNS, COLUMNS)
    row_ptr = table_ptr + s.pair * 2
    omega_ptr = address(row_ptr, 0, tl.float32)
    move_right = load_right(move_right_ptr, s, move_blocks, 0, BUILD.second, BUILD.aligned)
    if BUILD.first != 0:
        grad_right = load_right(grad_right_ptr, s, grad_blocks, 0, BUILD.first, BUILD.aligned)
    start = tl.program_id(1) * tiles * ROWS
    for first_row in range(start, tl.minimum(start + tiles * ROWS, m), ROWS):
        pointers = tile_at(omega_ptr, s, first_row, BUILD.aligned, ROWS)
        there = (first_row + tl.arange(0, ROWS)[:, None] < m) & s.there
        omega = tl.load(pointers, mask=there, other=0.0)
        if BUILD.first == 0:
            dense_ptr = tile_at(address(row_ptr, 1, tl.float32), s, first_row, BUILD.aligned, ROWS)
            g = tl.load(dense_ptr, mask=there, other=0.0)
        else:
            left = load_left(grad_left_ptr, s, first_row, grad_blocks, 0, BUILD.first, ROWS)
            g = tl.dot(left, grad_right, input_precision=BUILD.precision)
            if BUILD.first_loops:
                g = add_blocks(g, grad_left_ptr, grad_right_ptr, s, first_row, grad_blocks, BUILD.first, BUILD, ROWS)
        left = load_left(move_left_ptr, s, first_row, move_blocks, 0, BUILD.second, ROWS)
        moved = tl.dot(left, move_right, input_precision=BUILD.precision)
        if BUILD.second_loops:
            moved = add_blocks(
                moved, move_left_ptr, move_right_ptr, s, first_row, move_blocks, BUILD.second, BUILD, ROWS
            )
        omega -= g * moved
        if BUILD.clamp:
            omega = tl.where(omega < 0.0, 0.0, omega)  # NaN stays
        tl.store(pointers, omega, mask=there)


@jit
def store_up(ptr, s, first_row, chunk, chunks, q, rank, value, ROWS: tl.constexpr):
    # A program's part of what belongs to `up`: value [ROWS, q] into [P, chunks, m, rank].
    rows = tl.arange(0, ROWS)[:, None]
    start = ((s.pair * chunks + chunk) * s.m + first_row) * rank
    tl.store(ptr + start + (rows * rank + q), value, mask=(first_row + rows < s.m) & (q < rank))


@jit
def store_down(ptr, s, q, rank, value, ALIGNED: tl.constexpr):
    # A tile's part of what belongs to `down`: value [q, COLUMNS] into [P, blocks of rows, rank, n].
    start = (s.pair * tl.num_programs(1) + tl.program_id(1)) * rank * s.n + s.first
    tl.store(pointers_at(ptr, start, q * s.n + s.columns, ALIGNED), value, mask=(q < rank) & s.there)


@jit(
    do_not_specialize=(
        "table_ptr", "scale_ptr", "drift_left_ptr", "drift_right_ptr", "up_ptr", "down_ptr", "bound_up_ptr",
        "bound_down_ptr", "value_ptr", "grad_up_ptr", "grad_down_ptr", "curvature_up_ptr", "curvature_down_ptr", "m",
        "units", "drift_blocks", "rank_blocks", "rank", "tiles",
    )
)  # fmt: skip
def pull_kernel(
    table_ptr,  # addresses of Ω, [m, n] of BUILD.importance, and of its scales, bf16 [m, n / 128]; int64 [P, 2], read
    scale_ptr,  # k / Ω of each pair, fp64 [P], read
    drift_left_ptr,  # fp32 [P, m, drift_blocks * BUILD.first], read
    drift_right_ptr,  # fp32 [P, drift_blocks * BUILD.first, n], read
    up_ptr,  # s·B, fp32 [P, m, rank_blocks * BUILD.second], read where BUILD.down
    down_ptr,  # s·A, fp32 [P, rank_blocks * BUILD.second, n], read where BUILD.up
    bound_up_ptr,  # |up| ⊙ Σ_q|up|, as up_ptr, read; None unless BUILD.curvature
    bound_down_ptr,  # |down| ⊙ Σ_q|down|, as down_ptr, read; None unless BUILD.curvature
    value_ptr,  # Σ k gap² of each program, fp64 [P, blocks of rows, chunks], written
    grad_up_ptr,  # parts by chunk, fp32 [P, chunks, m, rank], written; or None
    grad_down_ptr,  # parts by block of rows, fp32 [P, blocks of rows, rank, n], written; or None
    curvature_up_ptr,  # as grad_up_ptr
    curvature_down_ptr,  # as grad_down_ptr
    m: tl.int32,  # rows, int32
    units: tl.int32,  # columns, in units of 16 where BUILD.aligned, int32
    drift_blocks: tl.int32,  # inner size of the drift in blocks of BUILD.first, int32
    rank_blocks: tl.int32,  # rank in blocks of BUILD.second, int32
    rank: tl.int32,  # r, int32
    tiles: tl.int32,  # of COLUMNS columns, that a program takes: a chunk, int32
    BUILD: tl.constexpr,  # Build
    ROWS: tl.constexpr,  # of a tile
    COLUMNS: tl.constexpr,  # of a tile, divides 128
):
    # Programs of one chunk that serve several blocks of the rank lie side by side: they find Ω in the L2 cache.
    SIZE: tl.constexpr = BUILD.second
    block, chunk = tl.program_id(0) % rank_blocks, tl.program_id(0) // rank_blocks
    chunks = tl.num_programs(0) // rank_blocks
    n = width(units, BUILD.aligned)
    first_row = tl.program_id(1) * ROWS
    start = chunk * tiles * COLUMNS
    s = strip_of(m, n, start, COLUMNS)
    scale = tl.load(scale_ptr + s.pair).to(tl.float32)
    drift_left = load_left(drift_left_ptr, s, first_row, drift_blocks, 0, BUILD.first, ROWS)
    if BUILD.down:
        up = load_left(up_ptr, s, first_row, rank_blocks, block, SIZE, ROWS)
        if BUILD.curvature:
            bound_up = load_left(bound_up_ptr, s, first_row, rank_blocks, block, SIZE, ROWS)
    q = block * SIZE + tl.arange(0, SIZE)
    grad_up = tl.zeros([ROWS, SIZE], tl.float32)
    curvature_up = tl.zeros([ROWS, SIZE], tl.float32)
    value = tl.zeros([ROWS], tl.float64)
    for first in range(start, tl.minimum(start + tiles * COLUMNS, n), COLUMNS):
        s = strip_of(m, n, first, COLUMNS)
        k = load_curvature(table_ptr + s.pair * 2, s, first_row, scale, BUILD, ROWS)
        drift_right = load_right(drift_right_ptr, s, drift_blocks, 0, BUILD.first, BUILD.aligned)
        gap = tl.dot(drift_left, drift_right, input_precision=BUILD.precision)
        if BUILD.first_loops:
            gap = add_blocks(gap, drift_left_ptr, drift_right_ptr, s, first_row, drift_blocks, BUILD.first, BUILD, ROWS)
        force = k * gap
        value += tl.sum(force * gap, 1).to(tl.float64)
        if BUILD.up:
            down = load_right(down_ptr, s, rank_blocks, block, SIZE, BUILD.aligned)
            grad_up = tl.dot(force, tl.trans(down), grad_up, input_precision=BUILD.precision)
            if BUILD.curvature:
                bound_down = load_right(bound_down_ptr, s, rank_blocks, block, SIZE, BUILD.aligned)
                curvature_up = tl.dot(k, tl.trans(bound_down), curvature_up, input_precision=BUILD.precision)
        if BUILD.down:
            grad_down = tl.dot(tl.trans(up), force, input_precision=BUILD.precision)
            store_down(grad_down_ptr, s, q[:, None], rank, grad_down, BUILD.aligned)
            if BUILD.curvature:
                curvature_down = tl.dot(tl.trans(bound_up), k, input_precision=BUILD.precision)
                store_down(curvature_down_ptr, s, q[:, None], rank, curvature_down, BUILD.aligned)
    if block == 0:
        number = (s.pair * tl.num_programs(1) + tl.program_id(1)) * chunks + chunk
        tl.store(value_ptr + number, tl.sum(value, 0))
    if BUILD.up:
        store_up(grad_up_ptr, s, first_row, chunk, chunks, q[None, :], rank, grad_up, ROWS)
        if BUILD.curvature:
            store_up(curvature_up_ptr, s, first_row, chunk, chunks, q[None, :], rank, curvature_up, ROWS)
