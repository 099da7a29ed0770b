"""What is known of G = dL/dU from the gradients that backward made of a pair's factors: two estimators, both low rank.

The third, ``exact``, is G itself, which exact.py gathers from inputs and output gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .reference import Product

CUT = 1e-8  # eigenvalues of a Gram matrix below this part of the largest one count as zero


def inverse_roots(grams: Tensor, cut: float = CUT) -> Tensor:
    """Return V·Λ^(−½) of FᵀF = VΛVᵀ [..., r, r], with which F is orthonormal; dropped directions: zeros."""
    finite = (
        torch.isfinite(grams).all(-1).all(-1)[..., None, None]
    )  # eigh would refuse all for one; times its factor it is NaN again
    values, vectors = torch.linalg.eigh(torch.where(finite, grams, 0.0))
    kept = values > cut * values.amax(-1, keepdim=True)
    root = torch.where(kept, values.clamp(min=1e-300).rsqrt(), 0.0)
    return vectors * root.unsqueeze(-2)


def _gram(factor: Tensor) -> Tensor:
    wide = factor.double()
    return wide.mT @ wide


def tangent(
    factors: Product, grad_up: Tensor | None, grad_down: Tensor | None, scaling: float,
    summed: Callable[[Tensor], Tensor] = torch.Tensor.double,
) -> Product:  # fmt: skip
    """Return Ĝ = P_B·G + G·P_A − P_B·G·P_A, the part of G = dL/dU that rank-r moves can see; gauge-free.

    From dL/dB = s·G·Aᵀ and dL/dA = s·Bᵀ·G, with orthonormal bases Q of B's columns and A's rows: X = Q_Bᵀ·G, Y = G·Q_A,
    Ĝ = Q_B·(X − X·Q_A·Q_Aᵀ) + Y·Q_Aᵀ. A factor without a gradient does not move: its part is left out. Where only some
    rows of the left factor are here, ``summed`` makes its Gram matrix that of all, and the result is of these rows.
    """
    left, right = factors
    dtype = torch.promote_types(left.dtype, torch.float32)
    of_rows, of_columns = inverse_roots(torch.stack([_gram(right.mT), summed(_gram(left))]))
    rows = right.mT.double() @ of_rows  # Q_A [n, r]
    lefts, rights = [], []
    if grad_down is not None:
        x = (of_columns.mT / scaling) @ grad_down.double()
        if grad_up is not None:
            x -= (x @ rows) @ rows.mT
        rights.append(x.to(dtype))
        del x  # float64 of thin factors counts beside ω: none is kept longer than needed
        lefts.append((left.double() @ of_columns).to(dtype))  # Q_B [m, r]
    if grad_up is not None:
        lefts.append((grad_up.double() @ (of_rows / scaling)).to(dtype))
        rights.append(rows.mT.to(dtype))
    del rows
    return Product(torch.cat(lefts, -1), torch.cat(rights, -2))


def factored(factors: Product, grad_up: Tensor, grad_down: Tensor, scaling: float, lr: float | Tensor) -> Product:
    """Return s·(B·gA + gB·A − lr·gB·gA), the published code's: SGD's move of U by −lr. It depends on the gauge."""
    up, down = factors
    return Product(torch.cat([up, grad_up], -1) * scaling, torch.cat([grad_down, down - lr * grad_down], -2))
