"""The formulas of the step as Triton functions, per element or per tile of [rows, 128].

They repeat ``penalty.py``, ``codecs/reference.py``, ``codecs/rounding.py`` and ``plan.py``: same names, same order,
same roundings. ``Build`` is what a kernel is compiled for.
"""

# mypy: allow-untyped-defs
# ruff: noqa: N803 - compile-time flags are capitals, as in Triton's own code
from __future__ import annotations

from typing import Any, NamedTuple

try:
    import triton
    import triton.language as tl

    missing = ""
except ImportError as error:  # triton_kernel.available() explains; everything stays importable
    triton, tl, missing = None, None, str(error)

# The interpreter truncates where it should round to bfloat16, so there that is done by hand; GPUs have an instruction.
INTERPRETED = bool(triton and triton.knobs.runtime.interpret)


def jit(fn=None, **options):
    """Return ``fn`` as ``triton.jit(**options)`` does, or as it is where Triton is missing."""
    if fn is None:
        return lambda fn: jit(fn, **options)
    return fn if triton is None else triton.jit(fn, **options)


class Build(NamedTuple):
    """Everything that decides which machine code runs; numbers and shapes do not. Dtypes are Triton's."""

    param: Any
    grad: Any
    exp_avg: Any  # int8: codes with block scales, exp_avg_sq then uint8
    exp_avg_sq: Any  # bfloat16: rounded at random
    importance: Any = None  # None: no penalty; uint8: codes with block scales
    bits: int = 0  # of importance codes: 8 or 4
    anchor: Any = None
    mode: str = "proximal"
    record: bool = False
    maximize: bool = False
    precise: bool = True
    master: str = "none"
    statistics: bool = False
    aligned: bool = True  # every operand lies at a multiple of 16 bytes
    interpreted: bool = INTERPRETED


class Scalars(NamedTuple):
    """What the kernel makes of the numbers, in float32: ``plan.StepScalars`` and the scales."""

    lr: Any
    decay: Any
    one_minus_beta1: Any
    beta2: Any
    one_minus_beta2: Any
    eps: Any
    step_size: Any
    rsqrt_bias2: Any
    curvature_scale: Any
    grad_scale: Any
    clip: Any
    key: Any  # uint32, of the random generator
    offset: Any  # int64, global index of the tensor's first element, for the same


class Sums(NamedTuple):
    """``plan.STATISTICS`` so far, [threads] each: what a thread adds up, it adds up alone."""

    penalty: Any
    grad_sq: Any
    pull_sq: Any
    grad_dot_pull: Any
    stiffness: Any  # float32, a maximum; the others are float64 sums
    drift_sq: Any


@jit
def powers(beta1, beta2, count):
    # plan.power(beta, count) of both, float64: by squaring, products alone.
    result1 = tl.cast(1.0, tl.float64)
    result2 = tl.cast(1.0, tl.float64)
    while count > 0:
        odd = (count & 1) == 1
        result1 = tl.where(odd, result1 * beta1, result1)
        result2 = tl.where(odd, result2 * beta2, result2)
        beta1 = beta1 * beta1
        beta2 = beta2 * beta2
        count = count >> 1
    return result1, result2


@jit
def scalars(hyper_ptr, count, unit_scale, key, offset, MAXIMIZE: tl.constexpr):
    # plan.step_scalars in float64, rounded to float32. hyper_ptr: plan.HYPER.
    lr = tl.load(hyper_ptr)
    beta1 = tl.load(hyper_ptr + 1)
    beta2 = tl.load(hyper_ptr + 2)
    eps = tl.load(hyper_ptr + 3)
    weight_decay = tl.load(hyper_ptr + 4)
    reg_lambda = tl.load(hyper_ptr + 5)
    grad_scale = tl.load(hyper_ptr + 6)  # inverse_scale
    clip = tl.load(hyper_ptr + 7)
    if MAXIMIZE:
        grad_scale = -grad_scale
    power1, power2 = powers(beta1, beta2, count)
    return Scalars(
        lr.to(tl.float32),
        (1.0 - lr * weight_decay).to(tl.float32),
        (1.0 - beta1).to(tl.float32),
        beta2.to(tl.float32),
        (1.0 - beta2).to(tl.float32),
        eps.to(tl.float32),
        (lr / (1.0 - power1)).to(tl.float32),
        (1.0 / tl.sqrt(1.0 - power2)).to(tl.float32),
        (reg_lambda * unit_scale).to(tl.float32),
        grad_scale.to(tl.float32),
        clip.to(tl.float32),
        mix(key ^ count.to(tl.uint32)),
        offset,
    )


@jit
def divide(x, y, PRECISE: tl.constexpr):
    # IEEE for y > 0; or to about 4 ulp in 3 instructions, where the approximate division takes 8.
    if PRECISE:
        return tl.math.div_rn(x, y)
    else:
        r = tl.rsqrt(y)
        return x * r * r


@jit
def square_root(x, PRECISE: tl.constexpr):
    if PRECISE:
        return tl.math.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@jit
def curvature(importance, curvature_scale):
    # k = curvature_scale * importance, the second derivative of the penalty.
    return importance * curvature_scale


@jit
def gradient(param, anchor, k):
    # dpenalty/dparam = k (param - anchor).
    return k * (param - anchor)


@jit
def proximal(decayed, move, anchor, k, lr, denom, PRECISE: tl.constexpr):
    # argmin |x - h|^2_denom / (2 lr) + k (x - anchor)^2 / 2, h = decayed - move/denom, from whichever end is nearer.
    t = k * lr
    gap = decayed - anchor
    near_adam = t <= denom
    numerator = tl.where(near_adam, -(move + t * gap), denom * gap - move)
    numerator = tl.where(k == 0.0, -move, numerator)  # no bit of AdamW's step changes
    return tl.where(near_adam, decayed, anchor) + divide(numerator, denom + t, PRECISE)


@jit
def to_float32(x):
    # By hand for bfloat16: Triton's interpreter gets subnormals wrong.
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@jit
def to_storage(x, dtype: tl.constexpr, BY_HAND: tl.constexpr):
    # Round to nearest even. NaN stays NaN.
    if BY_HAND and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@jit
def join(param, remainder):
    # The float32 number of a bf16 weight and its int16 remainder.
    high = param.to(tl.int16, bitcast=True).to(tl.int32) << 16
    return (high + remainder.to(tl.int32)).to(tl.float32, bitcast=True)


@jit
def split(x):
    # (bf16, int16 remainder) of float32; the pair is the number, bit for bit.
    bits = tl.where(x == x, x.to(tl.uint32, bitcast=True), 0x7FC00000)
    high = ((bits + 0x8000) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return high, bits.to(tl.uint16).to(tl.int16, bitcast=True)


@jit
def mix(x):
    # A hash of 32 bits: xor-shift and multiply, twice. uint32, which wraps.
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@jit
def noise(key, first, places):
    # 32 random bits of the elements first + places (int64, int32), a function of key and index alone. The sum may carry
    # into the upper half.
    low = (first & 0xFFFFFFFF) + places  # int64: fewest instructions and registers, of seven ways to carry
    high = (first >> 32) + (low >> 32)
    return mix((low.to(tl.uint32) ^ key) + high.to(tl.uint32) * 0x9E3779B9)


@jit
def round_stochastic(x, bits):
    # bf16 of float32: the magnitude plus 16 random bits, cut off.
    whole = (x.to(tl.uint32, bitcast=True) + bits) >> 16
    return tl.where(x == x, whole, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@jit
def dither(key, first_block, rows, columns):
    # u in [0, 1) of the moments' codes: a random number a block, plus j golden ratios (mod 1).
    whole = noise(key, first_block, rows) + columns.to(tl.uint32) * 0x9E3779B9
    return (whole >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24


@jit
def approximate_sqrt(x):
    # Root of x >= 0 to 3e-7, the same bits everywhere: a guess by the exponent, three Newton steps of 1/sqrt(x).
    half = x * 0.5
    y = (0x5F37642F - (x.to(tl.int32, bitcast=True) >> 1)).to(tl.float32, bitcast=True)
    y = y * (1.5 - half * y * y)
    y = y * (1.5 - half * y * y)
    y = y * (1.5 - half * y * y)
    return x * y


@jit
def code_root(x, PRECISE: tl.constexpr):
    # 1 instruction instead of 16 where v's root is approximate, so that its codes are the GPU's own in any case.
    if PRECISE:
        return approximate_sqrt(x)
    else:
        return tl.sqrt(x)


@jit
def inverse(peak, PRECISE: tl.constexpr):
    return tl.where(peak < 1.1754943508222875e-38, 0.0, divide(tl.full(peak.shape, 1.0, tl.float32), peak, PRECISE))


@jit
def to_codes(root, least, top: tl.constexpr, offset):
    # floor(root * top + offset) as float32, at most `top`; NaN gives 0.
    return tl.minimum(tl.maximum(root * top + offset, least), top).to(tl.int32)


@jit
def interleave(packed):
    # Codes of 4 bits, two to a byte, low half first: [rows, 64] to [rows, 128].
    return tl.interleave(packed & 15, packed >> 4)


@jit
def fourth_power(codes, scales, top: tl.constexpr):
    # Ω or v of codes up to `top`.
    c = codes.to(tl.float32)
    square = c * c
    return square * square * (scales * (1.0 / top**4))


@jit
def decode_exp_avg(codes, scales):
    c = codes.to(tl.float32)
    return c * tl.abs(c) * (scales * (1.0 / 127**2))


@jit
def encode_exp_avg(exp_avg, offset, PRECISE: tl.constexpr):
    # (codes int8 [rows, 128], scales float32 [rows, 1]); offset: u.
    size = tl.abs(exp_avg)
    peak = tl.maximum(tl.max(size, 1, keep_dims=True), 0.0)  # NaN counts as 0
    codes = to_codes(code_root(size * inverse(peak, PRECISE), PRECISE), 0.0, 127.0, offset)
    return tl.where(exp_avg < 0.0, -codes, codes).to(tl.int8), peak


@jit
def encode_exp_avg_sq(root, exp_avg_sq, offset, PRECISE: tl.constexpr):
    # (codes uint8 [rows, 128], scales float32 [rows, 1]) of v, given its root.
    peak = tl.maximum(tl.max(exp_avg_sq, 1, keep_dims=True), 0.0)  # NaN counts as 0
    top = square_root(peak, PRECISE)  # the largest root: rounding keeps the order
    least = tl.where(exp_avg_sq > 0.0, 1.0, 0.0)  # v > 0 never becomes 0, where m/root would leap
    return to_codes(code_root(root * inverse(top, PRECISE), PRECISE), least, 255.0, offset).to(tl.uint8), peak


@jit
def by_thread(x, total):
    # The tile x as [threads, what each of them holds].
    return tl.reshape(x, [total.shape[0], x.numel // total.shape[0]])


@jit
def add_statistics(sums, x, denom, lr, there, PENALTY: tl.constexpr):
    # penalty.statistics of one tile, float64 sums of float32 factors. there: which elements exist, None if all do.
    g = x.g.to(tl.float64)
    if there is not None:
        g = tl.where(there, g, 0.0)
    grad_sq = sums.grad_sq + tl.sum(by_thread(g * g, sums.grad_sq), 1)
    if not PENALTY:
        return Sums(sums.penalty, grad_sq, sums.pull_sq, sums.grad_dot_pull, sums.stiffness, sums.drift_sq)
    else:
        k = x.k if there is None else tl.where(there, x.k, 0.0)
        # The approximate quotient is right to 5e-7; another IEEE division costs 14 instructions, and spills.
        stiffness = tl.max(by_thread(divide(k * lr, denom, False), sums.stiffness), 1)
        drift = x.before - x.anchor
        pull = (k * drift).to(tl.float64)
        drift = drift.to(tl.float64)
        return Sums(
            sums.penalty + tl.sum(by_thread(pull * drift, sums.penalty), 1),
            grad_sq,
            sums.pull_sq + tl.sum(by_thread(pull * pull, sums.pull_sq), 1),
            sums.grad_dot_pull + tl.sum(by_thread(g * pull, sums.grad_dot_pull), 1),
            tl.maximum(sums.stiffness, stiffness),
            sums.drift_sq + tl.sum(by_thread(drift * drift, sums.drift_sq), 1),
        )


@jit
def store_statistics(ptr, stride, sums):
    # plan.STATISTICS of one program, `stride` apart.
    tl.store(ptr, 0.5 * tl.sum(sums.penalty, 0))
    tl.store(ptr + stride, tl.sum(sums.grad_sq, 0))
    tl.store(ptr + 2 * stride, tl.sum(sums.pull_sq, 0))
    tl.store(ptr + 3 * stride, tl.sum(sums.grad_dot_pull, 0))
    tl.store(ptr + 4 * stride, tl.max(sums.stiffness, 0).to(tl.float64))
    tl.store(ptr + 5 * stride, tl.sum(sums.drift_sq, 0))
