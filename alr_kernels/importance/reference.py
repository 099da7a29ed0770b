"""Recording and finalising element-wise importance, in plain torch. Read this first.

    accumulate:  ω += −g · (θ_after − θ_before)                     every step
    finalise:    Ω  = max(ω, 0) / ((θ_end − θ_start)² + ξ)          once, at the end

Source: arXiv 2501.13669, eq. 3-5; Zenke et al. 2017 (Synaptic Intelligence).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# Columns of the statistics that finalise() returns, one float64 row per tensor.
STATISTICS = ("path_integral_sum", "negative_mass", "l2", "max", "mean", "numel", "nonfinite")


@torch.no_grad()
def accumulate_(
    path_integrals: Sequence[Tensor],
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    previous: Sequence[Tensor],
    *,
    maximize: bool = False,
) -> None:
    """Add −g · (θ − θ_previous) to ω and refresh the copy θ_previous ← θ; see ``_ops.accumulate_``."""
    for path_integral, grad, param, before in zip(path_integrals, grads, params, previous, strict=True):
        compute = path_integral.dtype
        g = -grad.to(compute) if maximize else grad.to(compute)
        path_integral.sub_(g * (param.to(compute) - before.to(compute)))
        before.copy_(param)


@torch.no_grad()
def finalise(
    path_integrals: Sequence[Tensor],
    params: Sequence[Tensor],
    starts: Sequence[Tensor],
    xi: float,
    *,
    relative: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """Return (Ω per tensor, statistics [n, 7] float64); see ``_ops.finalise``."""
    importances, rows = [], []
    for path_integral, param, start in zip(path_integrals, params, starts, strict=True):
        compute = path_integral.dtype
        move_sq = (param.to(compute) - start.to(compute)).square()
        floor = xi
        if relative:  # ξ = ρ · mean((θ_end − θ_start)²)
            floor = xi * float(move_sq.double().mean()) if move_sq.numel() else 0.0
        denominator = move_sq + floor  # 0 only where nothing moved and ξ is relative: no scale, hence Ω = 0
        importance = torch.where((path_integral > 0) & (denominator > 0), path_integral / denominator, 0.0)
        finite = torch.isfinite(path_integral) & torch.isfinite(importance)
        importance = torch.where(finite, importance, 0.0)
        omega = torch.where(finite, path_integral, 0.0).double()
        wide = importance.double()
        count = max(importance.numel(), 1)
        rows.append(
            torch.stack(
                [
                    omega.sum(),
                    -omega.clamp(max=0).sum(),
                    wide.square().sum().sqrt(),
                    wide.max() if importance.numel() else wide.new_zeros(()),
                    wide.sum() / count,
                    wide.new_tensor(importance.numel()),
                    (~finite).sum().double(),
                ]
            )
        )
        importances.append(importance)
    stats = torch.stack(rows).cpu() if rows else torch.empty(0, len(STATISTICS), dtype=torch.float64)
    return importances, stats
