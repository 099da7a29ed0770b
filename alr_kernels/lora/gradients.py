"""What is known of G = dL/dU from the gradients that backward made of a pair's factors: two estimators, both low rank.

The third, ``exact``, is G itself, which exact.py gathers from inputs and output gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import Product

CUT = 1e-8  # eigenvalues of a Gram matrix below this part of the largest one count as zero


def orthonormal(factors: Sequence[Tensor], cut: float = CUT) -> list[tuple[Tensor, Tensor]]:
    """Return Q = F·V·Λ^(−½) and V·Λ^(−½) of each FᵀF = VΛVᵀ [..., r, r], float64; dropped directions are zeros."""
    wide = [factor.double() for factor in factors]
    values, vectors = torch.linalg.eigh(torch.stack([factor.mT @ factor for factor in wide]))
    kept = values > cut * values.amax(-1, keepdim=True)
    root = torch.where(kept, values.clamp(min=1e-300).rsqrt(), 0.0)
    return [(factor @ to, to) for factor, to in zip(wide, vectors * root.unsqueeze(-2), strict=True)]


def tangent(factors: Product, grad_up: Tensor | None, grad_down: Tensor | None, scaling: float) -> Product:
    """Return Ĝ = P_B·G + G·P_A − P_B·G·P_A, the part of G = dL/dU that rank-r moves can see; gauge-free.

    From dL/dB = s·G·Aᵀ and dL/dA = s·Bᵀ·G, with orthonormal bases Q of B's columns and A's rows:
    X = Q_Bᵀ·G, Y = G·Q_A, Ĝ = Q_B·(X − X·Q_A·Q_Aᵀ) + Y·Q_Aᵀ. A factor without a gradient is frozen: its part is not.
    """
    lefts, rights = [], []
    (rows, to_rows), (columns, to_columns) = orthonormal([factors.right.mT, factors.left])  # Q_A [n, r], Q_B [m, r]
    if grad_down is not None:
        x = to_columns.mT @ grad_down.double() / scaling
        lefts.append(columns)
        rights.append(x - (x @ rows) @ rows.mT if grad_up is not None else x)
    if grad_up is not None:
        lefts.append(grad_up.double() @ to_rows / scaling)
        rights.append(rows.mT)
    dtype = torch.promote_types(factors.left.dtype, torch.float32)
    return Product(torch.cat(lefts, -1).to(dtype), torch.cat(rights, -2).to(dtype))


def factored(factors: Product, grad_up: Tensor, grad_down: Tensor, scaling: float, lr: float | Tensor) -> Product:
    """Return s·(B·gA + gB·A − lr·gB·gA), the published code's: SGD's move of U by −lr. It depends on the gauge."""
    up, down = factors
    return Product(torch.cat([up, grad_up], -1) * scaling, torch.cat([grad_down, down - lr * grad_down], -2))
