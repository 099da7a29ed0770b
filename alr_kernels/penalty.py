"""The penalty, stated once: its value, its gradient and its proximal step.

    penalty = λ Σ_l α_l Σ_i Ω_i (θ_i − θ*_i)²         (no ½; arXiv 2501.13669, eq. 7)
    k_i     = curvature_scale · Ω_i = 2 λ α_l Ω_i / normaliser      (its second derivative)

Everything below is plain torch, any device, computed in the dtype of its arguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def curvature(importance: Tensor, curvature_scale: float) -> Tensor:
    """Return k = curvature_scale · Ω, the second derivative of the penalty."""
    return importance * curvature_scale


def value(param: Tensor, anchor: Tensor, importance: Tensor, curvature_scale: float) -> Tensor:
    """Return the penalty of one tensor, Σ_i ½ k_i (θ_i − θ*_i)², as a float64 0-dim tensor."""
    delta = param.double() - anchor.double()
    return 0.5 * curvature_scale * (importance.double() * delta * delta).sum()


def gradient(param: Tensor, anchor: Tensor, k: Tensor) -> Tensor:
    """Return dpenalty/dθ = k (θ − θ*)."""
    return k * (param - anchor)


def proximal(decayed: Tensor, move: Tensor, anchor: Tensor, k: Tensor, lr: float, denom: Tensor) -> Tensor:
    """Return argmin_θ ½‖θ − h‖²_D / lr + ½ k (θ − θ*)², the implicit penalty step in Adam's metric.

    h = ``decayed`` − ``move``/D is where AdamW would go and D = ``denom``. With t = lr·k the solution takes a single
    division, from whichever end is nearer: from afar the resting offset is lost once t/D passes 1/ulp.

        t ≤ D:  θ_d − (move + t·(θ_d − θ*)) / (D + t)          t > D:  θ* + (D·(θ_d − θ*) − move) / (D + t)
    """
    t = k * lr
    gap = decayed - anchor
    near_adam = t <= denom
    numerator = torch.where(near_adam, -(move + t * gap), denom * gap - move)
    numerator = torch.where(k == 0, -move, numerator)  # no bit of AdamW's step changes
    return torch.where(near_adam, decayed, anchor) + numerator / (denom + t)


def statistics(param: Tensor, g: Tensor, anchor: Tensor, k: Tensor, lr: float, denom: Tensor) -> Tensor:
    """Return [penalty, Σg², Σ(k(θ − θ*))², Σ g·k(θ − θ*), max lr·k/D, Σ(θ − θ*)²] of one tensor, float64."""
    g, drift, curve = g.double(), param.double() - anchor.double(), k.double()
    pull = curve * drift
    stiffness = (curve * lr / denom.double()).amax() if k.numel() else torch.zeros((), dtype=torch.float64)
    sums = [0.5 * (pull * drift).sum(), g.square().sum(), pull.square().sum(), (g * pull).sum()]
    return torch.stack([*sums, stiffness.to(g.device), drift.square().sum()])
