"""One tile of the Triton step: load the operands in whatever form they are kept, update, store.

Repeats ``reference.step_`` and ``formats.py``; the formulas are in ``triton_math.py``.
"""

# mypy: allow-untyped-defs
# ruff: noqa: N803 - compile-time flags are capitals, as in Triton's own code
# ruff: noqa: SIM108 - where a tile's type differs, Triton takes `if` at compile time only
from __future__ import annotations

from typing import Any, NamedTuple

from . import triton_math as f
from .triton_math import jit, tl


class Pointers(NamedTuple):
    """Addresses of one tensor's operands, in the order of ``Operands``."""

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
    # 0 stands for what there is not: Triton 3.6 cannot return a None among others.
    importance, anchor, importance_scale, path_integral = 0, 0, 0, 0
    remainder, exp_avg_scale, exp_avg_sq_scale = 0, 0, 0
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
    # [rows, 1]: one number a block. Tensors with scales are whole blocks. A shift, for signed // takes more.
    return f.to_float32(load_at(ptr, t.first // 128, t.rows, None if t.left is None else t.left // 128, False))


@jit
def store_scales(ptr, t, value):
    store_at(ptr, t.first // 128, t.rows, None if t.left is None else t.left // 128, value, False)


@jit
def load_importance(p, t, BUILD: tl.constexpr):
    if BUILD.bits == 0:
        return f.to_float32(load(p.importance, t, BUILD))
    elif BUILD.bits == 8:
        return f.fourth_power(load(p.importance, t, BUILD), load_scales(p.importance_scale, t), 255)
    else:  # two to a byte
        half = t.rows * 64 + tl.arange(0, 64)[None, :]
        packed = load_at(p.importance, t.first >> 1, half, None if t.left is None else t.left // 2, BUILD.aligned)
        return f.fourth_power(f.interleave(packed), load_scales(p.importance_scale, t), 15)


@jit
def load_tile(p, t, s, BUILD: tl.constexpr):
    # All loads come before all stores: nothing moves a load over a store that might alias it.
    param = load(p.param, t, BUILD)
    if BUILD.master == "split":
        before = f.join(param, load(p.remainder, t, BUILD))
    else:
        before = f.to_float32(param)
    g = f.to_float32(load(p.grad, t, BUILD)) * s.grad_scale
    exp_avg = load(p.exp_avg, t, BUILD)
    exp_avg_sq = load(p.exp_avg_sq, t, BUILD)
    if BUILD.exp_avg == tl.int8:
        exp_avg = f.decode_exp_avg(exp_avg, load_scales(p.exp_avg_scale, t))
        exp_avg_sq = f.fourth_power(exp_avg_sq, load_scales(p.exp_avg_sq_scale, t), 255)
    else:
        exp_avg = f.to_float32(exp_avg)
        exp_avg_sq = f.to_float32(exp_avg_sq)
    k, anchor, path_integral = 0, 0, 0
    if BUILD.importance is not None:
        k = f.curvature(load_importance(p, t, BUILD), s.curvature_scale)
        anchor = f.to_float32(load(p.anchor, t, BUILD))
    if BUILD.record:
        path_integral = load(p.path_integral, t, BUILD)
    return Loaded(before, g, exp_avg, exp_avg_sq, k, anchor, path_integral)


@jit
def update(x, s, BUILD: tl.constexpr):
    # reference.step_, between loading and storing.
    adam_grad = x.g * s.clip
    if BUILD.importance is not None and BUILD.mode == "coupled":
        adam_grad = tl.where(x.k == 0.0, adam_grad, adam_grad + f.gradient(x.before, x.anchor, x.k))
    exp_avg = x.exp_avg + (adam_grad - x.exp_avg) * s.one_minus_beta1
    exp_avg_sq = x.exp_avg_sq * s.beta2 + adam_grad * adam_grad * s.one_minus_beta2
    root = f.square_root(exp_avg_sq, BUILD.precise)
    denom = root * s.rsqrt_bias2 + s.eps
    decayed = x.before * s.decay
    move = exp_avg * s.step_size
    if BUILD.importance is not None and BUILD.mode == "proximal":
        after = f.proximal(decayed, move, x.anchor, x.k, s.lr, denom, BUILD.precise)
    else:
        after = decayed - f.divide(move, denom, BUILD.precise)
    return Stepped(after, exp_avg, exp_avg_sq, root, denom)


@jit
def store_param(p, t, after, random, BUILD: tl.constexpr):
    # Store θ and return it as it was stored.
    if BUILD.master == "split":
        param, remainder = f.split(after)
        store(p.param, t, param, BUILD)
        store(p.remainder, t, remainder, BUILD)
        return after
    else:
        if BUILD.master == "stochastic":
            param = f.round_stochastic(after, random & 0xFFFF)
        else:
            param = f.to_storage(after, BUILD.param, BUILD.interpreted)
        store(p.param, t, param, BUILD)
        return f.to_float32(param)


@jit
def store_moments(p, t, y, random, s, BUILD: tl.constexpr):
    if BUILD.exp_avg == tl.int8:
        u = f.dither(s.key, (s.offset + t.first) >> 7, t.rows, t.columns)
        codes, scales = f.encode_exp_avg(y.exp_avg, u, BUILD.precise)
        store(p.exp_avg, t, codes, BUILD)
        store_scales(p.exp_avg_scale, t, scales)
        codes, scales = f.encode_exp_avg_sq(y.root, y.exp_avg_sq, u, BUILD.precise)
        store(p.exp_avg_sq, t, codes, BUILD)
        store_scales(p.exp_avg_sq_scale, t, scales)
    else:
        store(p.exp_avg, t, f.to_storage(y.exp_avg, BUILD.exp_avg, BUILD.interpreted), BUILD)
        if BUILD.exp_avg_sq == tl.bfloat16:  # at random: 0.999 v would round to v for ever
            store(p.exp_avg_sq, t, f.round_stochastic(y.exp_avg_sq, random >> 16), BUILD)
        else:
            store(p.exp_avg_sq, t, f.to_storage(y.exp_avg_sq, BUILD.exp_avg_sq, BUILD.interpreted), BUILD)


@jit
def step_tile(p, first, left, s, sums, BUILD: tl.constexpr, SIZE: tl.constexpr):
    # Step SIZE elements from `first` on and return `sums` with theirs added.
    t = Tile(first, left, tl.arange(0, SIZE // 128)[:, None], tl.arange(0, 128)[None, :])
    x = load_tile(p, t, s, BUILD)
    y = update(x, s, BUILD)
    random = None
    if BUILD.master == "stochastic" or BUILD.exp_avg_sq == tl.bfloat16:
        random = f.noise(s.key, s.offset + first, t.rows * 128 + t.columns)
    stored = store_param(p, t, y.after, random, BUILD)
    store_moments(p, t, y, random, s, BUILD)
    if BUILD.record:
        store(p.path_integral, t, x.path_integral - x.g * (stored - x.before), BUILD)
    if BUILD.statistics:
        there = None if left is None else t.rows * 128 + t.columns < left
        return f.add_statistics(sums, x, y.denom, s.lr, there, BUILD.importance is not None)
    else:
        return sums
