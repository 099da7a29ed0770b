"""What every formula should give, in float64 and in plain torch; imports nothing of the package.

One tensor at a time. Penalty gradients come from autograd of the penalty's value, and the proximal step is the closed
form of its argmin, so that no line here is a copy of a line under test.
"""

from __future__ import annotations

import math

import torch


def wide(tensor):
    return tensor.detach().to(torch.float64)


def penalty(theta, anchor, importance, weight):
    """Return weight · Σ Ω (θ − θ*)²; ``weight`` is λ·α/normaliser."""
    return weight * (importance * (theta - anchor) ** 2).sum()


def penalty_gradient(theta, anchor, importance, weight):
    leaf = wide(theta).requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(penalty(leaf, wide(anchor), wide(importance), weight), leaf)
    return gradient


def weights(importance, alphas, reg_lambda, normalize):
    """Return name → λ·α/normaliser; ``alphas`` is name → α, the normaliser the mean of α·Ω over all elements."""
    normalizer = 1.0
    if normalize:
        total = sum(alphas[name] * float(wide(tensor).sum()) for name, tensor in importance.items())
        normalizer = total / sum(tensor.numel() for tensor in importance.values())
    return {name: reg_lambda * alphas[name] / normalizer for name in importance}


def softmax_coefficients(importance, layer_of, temperature=None):
    """Return layer → softmax(‖Ω_l‖ / T), T the mean norm unless given."""
    squares = {}
    for name, tensor in importance.items():
        squares[layer_of(name)] = squares.get(layer_of(name), 0.0) + float((wide(tensor) ** 2).sum())
    norms = torch.tensor(list(squares.values()), dtype=torch.float64).sqrt()
    alphas = torch.softmax(norms / (norms.mean() if temperature is None else temperature), 0)
    return dict(zip(squares, alphas.tolist(), strict=True))


def proximal_point(h, anchor, k, lr, denom):
    """Return argmin_θ ½ D (θ − h)² / lr + ½ k (θ − θ*)²."""
    return (denom * h + lr * k * anchor) / (denom + lr * k)


def task_gradient(grad, maximize=False, inverse_scale=1.0):
    """Return the gradient of the loss that is minimised, from that of the scaled loss."""
    return (-wide(grad) if maximize else wide(grad)) * inverse_scale


def clip_factor(grads, max_norm, inverse_scale=1.0):
    """Return min(1, max_norm / ‖g‖) over all tensors, after unscaling."""
    norm = math.sqrt(sum(float((wide(grad) * inverse_scale).square().sum()) for grad in grads))
    return min(1.0, max_norm / norm)


def denominator(exp_avg_sq, count, beta2, eps):
    """Return D = √v̂ + eps."""
    return (wide(exp_avg_sq) / (1 - beta2**count)).sqrt() + eps


def step(
    theta, grad, exp_avg, exp_avg_sq, count, *, lr, beta1, beta2, eps, weight_decay, maximize=False, mode=None,
    importance=None, anchor=None, weight=0.0, inverse_scale=1.0, clip=1.0,
):  # fmt: skip
    """Return θ, m and v after update number ``count`` (from 1), as float64; ``mode`` None is AdamW without penalty."""
    theta, exp_avg, exp_avg_sq = map(wide, (theta, exp_avg, exp_avg_sq))
    grad = task_gradient(grad, maximize, inverse_scale) * clip
    if mode == "coupled":
        grad = grad + penalty_gradient(theta, anchor, importance, weight)
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad**2
    denom = denominator(exp_avg_sq, count, beta2, eps)
    after = theta - lr * weight_decay * theta - lr * (exp_avg / (1 - beta1**count)) / denom
    if mode == "proximal":
        after = proximal_point(after, wide(anchor), 2 * weight * wide(importance), lr, denom)
    return after, exp_avg, exp_avg_sq


def record(path_integral, grad, before, after, maximize=False, inverse_scale=1.0):
    """Return ω − g·(θ_after − θ_before), of weights as they are stored and the gradient before clipping."""
    return wide(path_integral) - task_gradient(grad, maximize, inverse_scale) * (wide(after) - wide(before))


def statistics(theta, grad, anchor, importance, weight, lr, denom):
    """Return name → (value, size of the terms that were summed) of one tensor; ``grad`` is the task gradient."""
    drift, pull = wide(theta) - wide(anchor), penalty_gradient(theta, anchor, importance, weight)
    stiffness = (2 * weight * lr * wide(importance) / denom).flatten().tolist()
    sums = {
        "penalty": float(penalty(wide(theta), wide(anchor), wide(importance), weight)),
        "grad_sq": float((grad * grad).sum()),
        "pull_sq": float((pull * pull).sum()),
        "grad_dot_pull": float((grad * pull).sum()),
        "stiffness": max(stiffness, default=0.0),
        "drift_sq": float((drift * drift).sum()),
    }
    return {name: (value, abs(value)) for name, value in sums.items()} | {
        "grad_dot_pull": (sums["grad_dot_pull"], float((grad * pull).abs().sum()))
    }


def finalise(path_integral, end, start, xi, relative=False):
    """Return Ω and its statistics by name; elements whose ω is not finite have Ω = 0 and enter no sum."""
    omega, move_sq = wide(path_integral), (wide(end) - wide(start)) ** 2
    finite = torch.isfinite(omega)
    if relative and move_sq.numel():
        xi = xi * float(move_sq.mean())
    omega = torch.where(finite, omega, torch.zeros_like(omega))
    importance = torch.where(omega > 0, omega / (move_sq + xi), torch.zeros_like(omega))
    return importance, {
        "path_integral_sum": float(omega.sum()),
        "negative_mass": float(-omega[omega < 0].sum()),
        "l2": math.sqrt(float((importance**2).sum())),
        "max": max(importance.flatten().tolist(), default=0.0),
        "mean": float(importance.sum()) / max(importance.numel(), 1),
        "numel": importance.numel(),
        "nonfinite": int((~finite).sum()),
    }


def histogram(importance, bins=64):
    """Return the counts of ⌊log₄ Ω + 31½⌋, held between the first bin and the last; 0 falls in the first."""
    exponent = torch.frexp(wide(importance)).exponent - 1  # ⌊log₂ Ω⌋
    places = torch.div(exponent + bins - 1, 2, rounding_mode="floor").clamp(0, bins - 1)
    return torch.bincount(torch.where(wide(importance) > 0, places, 0).flatten(), minlength=bins)


def merged(first, second, weights):
    """Return a·Ω_a + b·Ω_b, or the larger where weights is None; None is 0 everywhere."""
    like = first if second is None else second
    a, b = (torch.zeros_like(like, dtype=torch.float64) if x is None else wide(x) for x in (first, second))
    return torch.maximum(a, b) if weights is None else weights[0] * a + weights[1] * b


# ---------------------------------------------------------------- forms of storage

BLOCK = 128
CODES = {"exp_avg": (2, 127), "exp_avg_sq": (4, 255), "importance 8": (4, 255), "importance 4": (4, 15)}


def _per_block(function, values, scales):
    rows = wide(values).reshape(-1, BLOCK)
    return function(rows, wide(scales).reshape(-1, 1).expand(len(rows), 1)).reshape(values.shape)


def code_scales(values, kind):
    """Return max |x| of each block of 128 along the last dimension, rounded to bf16 for importance."""
    peaks = wide(values).abs().unflatten(-1, (values.shape[-1] // BLOCK, BLOCK)).amax(-1)
    return wide(peaks.to(torch.bfloat16)) if kind.startswith("importance") else peaks


def code_positions(values, scales, kind):
    """Return ±top·(|x|/scale)^(1/exponent): the code before it is rounded; 0 in a block of zeros."""
    exponent, top = CODES[kind]

    def position(x, scale):
        return torch.where(scale > 0, x.sign() * top * (x.abs() / scale.clamp(min=1e-300)) ** (1 / exponent), 0.0)

    return _per_block(position, values, scales)


def code_rounded(positions, kind):
    """Return the nearest code, halves away from 0, none beyond the largest."""
    return positions.sign() * (positions.abs() + 0.5).floor().clamp(max=CODES[kind][1])


def encode(values, kind):
    """Return (codes, scales) as float64; a v > 0 never has code 0."""
    scales = code_scales(values, kind)
    codes = code_rounded(code_positions(values, scales, kind), kind)
    return torch.where(values > 0, codes.clamp(min=1), codes) if kind == "exp_avg_sq" else codes, scales


def decode(codes, scales, kind):
    exponent, top = CODES[kind]
    return _per_block(lambda c, scale: c.sign() * scale * (c.abs() / top) ** exponent, codes, scales)


def pack(codes):
    """Return two codes of 4 bits a byte: the first of a pair counts ones, the second sixteens."""
    pairs = codes.unflatten(-1, (codes.shape[-1] // 2, 2))
    return pairs[..., 0] + 16 * pairs[..., 1]


def unpack(packed):
    return torch.stack((packed % 16, packed // 16), -1).flatten(-2)


def _unsigned(tensor, bits):
    return tensor.view(torch.int32 if bits == 32 else torch.int16).long() % 2**bits


def split(x):
    """Return the halves of float32 bits as integers: high = ⌊(bits + 2¹⁵) / 2¹⁶⌋, low = bits − high·2¹⁶."""
    bits = _unsigned(x, 32)
    high = torch.div(bits + 2**15, 2**16, rounding_mode="floor")
    return high, bits - high * 2**16


def join(param, remainder):
    """Return the float64 value of a bf16 number and its int16 remainder."""
    bits = (_unsigned(param, 16) * 2**16 + remainder.long()) % 2**32
    return torch.where(bits >= 2**31, bits - 2**32, bits).int().view(torch.float32).double()


def bf16_neighbours(x):
    """Return the largest bf16 number ≤ x and the smallest ≥ x, of finite float64 x, as float64."""
    exponent = torch.frexp(wide(x)).exponent.clamp(min=-125)  # of x in [½, 1)·2^exponent
    spacing = torch.ldexp(torch.ones_like(wide(x)), exponent - 8)
    return torch.floor(wide(x) / spacing) * spacing, torch.ceil(wide(x) / spacing) * spacing


def nearest_bf16(x):
    """Return float32 x as bf16, halves away from 0: what a split master shows."""
    size = wide(x).abs()
    low, high = bf16_neighbours(size)
    return (torch.where(size - low < high - size, low, high) * wide(x).sign()).to(torch.bfloat16)
