"""Importance of a linear layer from per-sample gradients, in plain torch. Read this first.

With inputs x_n [t, in] and output gradients δ_n [t, out] of sample n's loss, the weight's gradient is δ_nᵀ x_n:

    Ω += scale · Σ_n |δ_nᵀ x_n|^power        (power 2: Fisher, Kirkpatrick et al. 2017; 1: MAS, Aljundi et al. 2018)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def raised(grad: Tensor, power: int) -> Tensor:
    """Return |g|^power of per-sample gradients."""
    return grad.square() if power == 2 else grad.abs()


@torch.no_grad()
def fisher_linear_(importance: Tensor, deltas: Tensor, inputs: Tensor, scale: float, power: int = 2) -> None:
    """Add scale · Σ_n |δ_nᵀ x_n|^power to Ω [rows, columns]; δ [n, t, rows], x [n, t, columns]."""
    for delta, x in zip(deltas, inputs, strict=True):
        grad = delta.to(importance.dtype).T @ x.to(importance.dtype)
        importance.add_(raised(grad, power), alpha=scale)
