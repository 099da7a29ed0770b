"""The penalty of a LoRA pair in effective space, stated once: its value, its derivatives by the factors, their bounds.

    penalty = Σ_ij ½ k_ij (U_ij − U*_ij)²,  U = s·B·A,  k = scale·Ω       (arXiv 2501.13669, eq. 7, on LoRA)

U − U* comes as a product of thin matrices and is formed a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import penalty
from ..codecs.encoded import Encoded
from .reference import Product, row_blocks

SIDES = ("both", "up", "down", "none")  # whose derivatives are asked for


class Pull(NamedTuple):
    """What the penalty does to a pair: its value, derivatives and their majorising curvatures, where asked for."""

    value: Tensor  # 0-dim float64, Σ ½ k (U − U*)²
    grad_up: Tensor | None  # [m, r] (k ⊙ (U − U*))·(sA)ᵀ
    grad_down: Tensor | None  # [r, n] (sB)ᵀ·(k ⊙ (U − U*))
    curvature_up: Tensor | None  # [m, r] k·(|sA| ⊙ Σ_q|sA|)ᵀ
    curvature_down: Tensor | None  # [r, n] (|sB| ⊙ Σ_q|sB|)ᵀ·k


def empty_pull(up: Tensor, down: Tensor, sides: str, curvature: bool) -> Pull:
    """Return zeros for what is asked for."""
    return empty_pulls([Product(up, down)], sides, curvature)[0]


def empty_pulls(factors: Sequence[Product], sides: str, curvature: bool) -> list[Pull]:
    """Return zeros for what is asked for of each pair; of pairs of one shape they are slices of one tensor a field."""
    if len({(up.shape, down.shape) for up, down in factors}) != 1:
        return [empty_pull(*pair, sides, curvature) for pair in factors]
    count, (up, down) = len(factors), factors[0]
    wanted = [sides in ("both", "up"), sides in ("both", "down")]
    wanted += [want and curvature for want in wanted]
    values = torch.zeros(count, dtype=torch.float64, device=up.device)
    zeros = [
        like.new_zeros(count, *like.shape) if want else None for like, want in zip((up, down) * 2, wanted, strict=True)
    ]
    fields = [[None] * count if field is None else field.unbind() for field in (values, *zeros)]
    return [Pull(*row) for row in zip(*fields, strict=True)]


def bounds(factors: Product) -> Product:
    """Return |up| ⊙ Σ_q|up| [..., m, r] and |down| ⊙ Σ_q|down| [..., r, n]: what k is multiplied by in a curvature."""
    up, down = factors.left.abs(), factors.right.abs()
    return Product(up * up.sum(-1, keepdim=True), down * down.sum(-2, keepdim=True))


def pull(
    importance: Encoded, scale: float | Tensor, drift: Product, factors: Product, sides: str, curvature: bool
) -> Pull:
    """Return the penalty ½Σ k (U − U*)², k = ``scale``·Ω, and its derivatives by A and B.

    ``drift``: U − U*. ``factors``: s·B and s·A. The curvatures are diagonals that majorise the penalty's Hessian in one
    factor while the other stands still: (Σ_q B_iq a_q)² ≤ Σ_q |B_iq| · Σ_q |B_iq| a_q².
    """
    up, down = factors
    result = empty_pull(up, down, sides, curvature)
    bound_up, bound_down = bounds(factors)
    for rows in row_blocks(up.shape[0], down.shape[1]):
        k = penalty.curvature(importance.rows(rows).decoded().to(up.dtype), scale)
        gap = drift.left[rows] @ drift.right
        force = k * gap
        result.value.add_((force.double() * gap.double()).sum(), alpha=0.5)
        if result.grad_up is not None:
            result.grad_up[rows] = force @ down.T
        if result.grad_down is not None:
            result.grad_down.add_(up[rows].T @ force)
        if result.curvature_up is not None:
            result.curvature_up[rows] = k @ bound_down.T
        if result.curvature_down is not None:
            result.curvature_down.add_(bound_up[rows].T @ k)
    return result


def pull_rank1(
    importance: Encoded, scale: float | Tensor, drift: Product, factors: Product, sides: str, curvature: bool
) -> Pull:
    """Return what :func:`pull` does for Ω = r·cᵀ, the form rank1, from products of the factors alone.

    With U − U* = L·R the force is scale·diag(r)·L·R·diag(c), and the value ½·scale·tr(Lᵀdiag(r)L · R diag(c)Rᵀ).
    Nothing [m, n] is made: time and memory grow with m + n. Sums that end in the value are in float64.
    """
    (up, down), (left, right), (bound_up, bound_down) = factors, drift, bounds(factors)
    rows, columns, _ = importance
    assert columns is not None
    result = empty_pull(up, down, sides, curvature)
    wide_left, wide_right = left.double(), right.double()
    within = (wide_left.T * rows.double()) @ wide_left, (wide_right * columns.double()) @ wide_right.T
    result.value.copy_(penalty.curvature((within[0] * within[1]).sum(), scale)).mul_(0.5)
    k_rows, columns = penalty.curvature(rows.to(up.dtype), scale), columns.to(up.dtype)
    weighted = right * columns
    if result.grad_up is not None:
        result.grad_up.copy_(left @ (weighted @ down.T)).mul_(k_rows[:, None])
    if result.grad_down is not None:
        result.grad_down.copy_(((up.T * k_rows) @ left) @ weighted)
    if result.curvature_up is not None:
        result.curvature_up.copy_(torch.outer(k_rows, bound_down @ columns))
    if result.curvature_down is not None:
        result.curvature_down.copy_(torch.outer(k_rows @ bound_up, columns))
    return result


def pulls(
    importances: Sequence[Encoded], scales: Tensor, drifts: Sequence[Product], factors: Sequence[Product],
    sides: str, curvature: bool,
) -> list[Pull]:  # fmt: skip
    """Do :func:`pull` of each pair."""
    rows = zip(importances, scales.unbind(), drifts, factors, strict=True)
    return [pull(*row, sides, curvature) for row in rows]
