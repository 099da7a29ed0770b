"""LoRA in effective space, U = s·B·A, in plain torch. Read this first.

``up`` [m, r] and ``down`` [r, n] are a pair's factors as they multiply to a weight [m, n] (B and A, or for a layer that
keeps its weight transposed, Aᵀ and Bᵀ), ``s`` its scaling. Every dense quantity is a product of low-rank factors and is
formed a few rows at a time; what stays is ω and Ω. Source: arXiv 2501.13669, eq. 3-7 on LoRA; docs/lora.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ELEMENTS = 1 << 18  # of a dense matrix that are formed at a time


class Product(NamedTuple):
    """A dense matrix [..., m, n] as left [..., m, k] · right [..., k, n]."""

    left: Tensor
    right: Tensor

    def scaled(self, scaling: float) -> Product:
        """Return both factors times s: s·B and s·A, by which ∂U/∂A and ∂U/∂B multiply."""
        return Product(self.left * scaling, self.right * scaling)


def move(before: Product, after: Product, scaling: float) -> Product:
    """Return s·(B₁A₁ − B₀A₀) = s·(B₁ − B₀)·A₁ + s·B₀·(A₁ − A₀), in which nothing large cancels."""
    left = torch.cat([after.left - before.left, before.left], -1).mul_(scaling)
    return Product(left, torch.cat([after.right, after.right - before.right], -2))


def row_blocks(m: int, n: int) -> list[slice]:
    """Return slices of the rows of a dense [m, n] that are formed at a time."""
    step = max(1, ELEMENTS // max(n, 1))
    return [slice(i, min(i + step, m)) for i in range(0, m, step)]


def record_(path_integral: Tensor, gradient: Product | Tensor, moved: Product, clamp: bool = False) -> None:
    """Add −Ĝ ⊙ (U_after − U_before) to ω [m, n]; ``clamp``: then set ω ← max(ω, 0), as the published code does."""
    for rows in row_blocks(*path_integral.shape):
        g = gradient.left[rows] @ gradient.right if isinstance(gradient, Product) else gradient[rows]
        path_integral[rows] -= g * (moved.left[rows] @ moved.right)
        if clamp:
            path_integral[rows].clamp_(min=0)


def record(
    path_integrals: Sequence[Tensor], gradients: Sequence[Product | Tensor], moves: Sequence[Product], clamp: bool
) -> None:
    """Do :func:`record_` of each pair."""
    for omega, gradient, moved in zip(path_integrals, gradients, moves, strict=True):
        record_(omega, gradient, moved, clamp)
