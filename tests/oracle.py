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


def step(
    theta, grad, exp_avg, exp_avg_sq, count, *, lr, beta1, beta2, eps, weight_decay, maximize=False, mode=None,
    importance=None, anchor=None, weight=0.0,
):  # fmt: skip
    """Return θ, m and v after update number ``count`` (from 1), as float64; ``mode`` None is AdamW without penalty."""
    theta, grad, exp_avg, exp_avg_sq = map(wide, (theta, grad, exp_avg, exp_avg_sq))
    if maximize:
        grad = -grad
    if mode == "coupled":
        grad = grad + penalty_gradient(theta, anchor, importance, weight)
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad**2
    denom = (exp_avg_sq / (1 - beta2**count)).sqrt() + eps
    after = theta - lr * weight_decay * theta - lr * (exp_avg / (1 - beta1**count)) / denom
    if mode == "proximal":
        after = proximal_point(after, wide(anchor), 2 * weight * wide(importance), lr, denom)
    return after, exp_avg, exp_avg_sq


def record(path_integral, grad, before, after, maximize=False):
    """Return ω − g·(θ_after − θ_before), of weights as they are stored."""
    signed = -wide(grad) if maximize else wide(grad)
    return wide(path_integral) - signed * (wide(after) - wide(before))


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
