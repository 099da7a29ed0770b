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


def proximal(adam_point: Tensor, anchor: Tensor, k: Tensor, lr: float, denom: Tensor) -> Tensor:
    """Return argmin_θ ½‖θ − h‖²_D / lr + ½ k (θ − θ*)², the implicit penalty step in Adam's metric.

    With t = lr·k the solution blends h = ``adam_point`` and θ* = ``anchor``; it is evaluated from the
    nearer end, because the first form alone loses the resting offset once t/D passes 1/ulp:

        t ≤ D:  h + t/(D + t) · (θ* − h)          t > D:  θ* + D/(D + t) · (h − θ*)
    """
    t = k * lr
    near_adam = t <= denom
    weight = torch.where(near_adam, t, denom) / (denom + t)
    near = torch.where(near_adam, adam_point, anchor)
    far = torch.where(near_adam, anchor, adam_point)
    return torch.where(k == 0, adam_point, near + weight * (far - near))
