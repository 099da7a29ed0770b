"""Block codes of importance and moments, and importance as an outer product, in plain torch. Read this first.

    importance   c = #{j: ((j − ½)/255)⁴ ≤ Ω/s}       Ω ≈ s·(c/255)⁴     s: block's max, bf16; 8 or 4 bits (15)
    exp_avg      c = ± floor((|m|/s)^(1/2) · 127 + u)   m ≈ s·c|c|/127²    s: block's max, fp32; int8
    exp_avg_sq   c = floor((√v/√s)^(1/2) · 255 + u)   v ≈ s·(c/255)⁴     s: block's max, fp32; uint8, ≥ 1 where v > 0
    rank1        r = Ω·1,  s = 1ᵀΩ/(1ᵀΩ·1)            Ω ≈ r·s            both fp32: m + n numbers for m·n

u, uniform in [0, 1), is another one in every step: an average that moves by less than half a code would otherwise stay
where it is (v of weights whose gradients fell 100 × was 128 × too large after 4,000 steps, and 1.2 × with u).

Blocks are BLOCK consecutive elements. Every backend repeats these lines, so that codes agree bit for bit; hence the
square root of the codes is made of integer and float32 operations that are the same everywhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 128
ELEMENTS = 2**20  # that are summed together, so that no float64 temporary is as large as the tensor
BF16_MAX = 3.3895313892515355e38
FLOAT32_MAX = torch.finfo(torch.float32).max
TINY = 1.17549435e-38  # the smallest normal float32: blocks below it are zero


def approximate_sqrt(x: Tensor) -> Tensor:
    """Return √x of float32 x ≥ 0 to 3e-7: a first guess by its exponent, three Newton steps of 1/√x.

    Two would be good to 5e-6, which keeps a block's largest v 1.5 % low: one time in 900 it would miss its code.
    """
    half = x * 0.5
    y = (0x5F37642F - (x.view(torch.int32) >> 1)).view(torch.float32)
    for _ in range(3):
        y = y * (1.5 - half * y * y)
    return x * y


def _blocks(x: Tensor) -> Tensor:
    return x.reshape(x.numel() // BLOCK, BLOCK)


def _scales(peak: Tensor, x: Tensor) -> Tensor:
    return peak.reshape(*x.shape[:-1], x.shape[-1] // BLOCK)


def _inverse(peak: Tensor) -> Tensor:
    return torch.where(peak < TINY, 0.0, 1.0 / peak)


def _codes(root: Tensor, top: int, offset: Tensor | float = 0.5) -> Tensor:
    """Return floor(root · top + offset), at most ``top``; NaN gives 0."""
    return torch.nan_to_num(root * top + offset, nan=0.0).clamp(max=float(top)).to(torch.int32)


def thresholds(top: int) -> Tensor:
    """Return ((c − ½)/top)⁴ for c = 1 … top, float32: where (Ω/s)^(1/4) · top, rounded, becomes c."""
    return ((torch.arange(1, top + 1) - 0.5) * (1.0 / top)).square().square()


def encode_importance(importance: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return (codes uint8, two to a byte for 4 bits, low half first; scales bf16 [..., n/128])."""
    blocks, top = _blocks(importance.float()), 2**bits - 1
    scales = blocks.amax(1, keepdim=True).clamp(max=BF16_MAX).to(torch.bfloat16)
    ratio = torch.nan_to_num(blocks * _inverse(scales.float()), nan=0.0)
    codes = torch.bucketize(ratio, thresholds(top).to(ratio.device), right=True).to(torch.uint8)
    if bits == 4:
        codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
    *rows, columns = importance.shape
    return codes.reshape(*rows, columns * bits // 8), scales.reshape(*rows, columns // BLOCK)


def decode_importance(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Return Ω as float32, shaped as it was encoded."""
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    return _fourth_power(codes, scales, 2**bits - 1)


def _fourth_power(codes: Tensor, scales: Tensor, top: int) -> Tensor:
    square = _blocks(codes).float().square()
    return (square * square * (scales.reshape(scales.numel(), 1).float() * (1.0 / top**4))).view(codes.shape)


def encode_rank1(importance: Tensor) -> tuple[Tensor, Tensor]:
    """Return (row sums [m], column sums over the total [...]) of Ω [m, ...] float32, both summed in float64.

    Their outer product has Ω's row and column sums, and is Ω where that has rank 1. Ω = 0 gives zeros; a row's sum that
    float32 does not hold becomes its largest number.
    """
    m, *rest = importance.shape
    matrix = importance.reshape(m, math.prod(rest))
    rows, columns = (matrix.new_zeros(size, dtype=torch.float64) for size in matrix.shape)
    for part, sums in zip(*(x.split(max(1, ELEMENTS // max(math.prod(rest), 1))) for x in (matrix, rows)), strict=True):
        wide = part.double()
        sums.copy_(wide.sum(1))
        columns += wide.sum(0)
    total = columns.sum()
    shares = torch.where(total == 0, 0.0, columns / total)
    return rows.clamp(max=FLOAT32_MAX).float(), shares.float().reshape(rest)


def decode_rank1(values: Tensor, scales: Tensor) -> Tensor:
    """Return Ω ≈ r·s as float32, shaped as it was encoded."""
    return torch.outer(values, scales.reshape(-1)).reshape(values.shape + scales.shape)


def encode_exp_avg(exp_avg: Tensor, offset: Tensor | float = 0.5) -> tuple[Tensor, Tensor]:
    """Return (codes int8, scales float32 [..., n/128]); ``offset``: u, [n/128, 128], or ½ to round to nearest."""
    blocks = _blocks(exp_avg)
    peak = torch.nan_to_num(blocks.abs(), nan=0.0, posinf=torch.inf).amax(1, keepdim=True)
    codes = _codes(approximate_sqrt(blocks.abs() * _inverse(peak)), 127, offset)
    signed = torch.where(blocks < 0, -codes, codes).to(torch.int8)
    return signed.view(exp_avg.shape), _scales(peak, exp_avg)


def decode_exp_avg(codes: Tensor, scales: Tensor) -> Tensor:
    """Return m as float32."""
    c = _blocks(codes).float()
    return (c * c.abs() * (scales.reshape(scales.numel(), 1) * (1.0 / 127**2))).view(codes.shape)


def encode_exp_avg_sq(root: Tensor, exp_avg_sq: Tensor, offset: Tensor | float = 0.5) -> tuple[Tensor, Tensor]:
    """Return (codes uint8, scales float32 [..., n/128]) of v, given √v."""
    roots, peak = _blocks(root), torch.nan_to_num(_blocks(exp_avg_sq), nan=0.0, posinf=torch.inf).amax(1, keepdim=True)
    top = torch.nan_to_num(roots, nan=0.0, posinf=torch.inf).amax(1, keepdim=True)
    codes = _codes(approximate_sqrt(roots * _inverse(top)), 255, offset).clamp(min=1)
    codes = torch.where(roots > 0, codes, 0).to(torch.uint8)  # v > 0 never becomes 0, where m/√v would leap
    return codes.view(root.shape), _scales(peak, root)


def decode_exp_avg_sq(codes: Tensor, scales: Tensor) -> Tensor:
    """Return v as float32."""
    return _fourth_power(codes, scales, 255)
