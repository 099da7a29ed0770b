"""Recording, finalising and merging importance in plain torch. Read this first; estimators/reference.py has Fisher's.

record     ω += −g · (θ_after − θ_before)                      (arXiv 2501.13669, eq. 3; Zenke et al. 2017)
finalise   Ω = max(ω, 0) / ((θ_end − θ_start)² + ξ)            (eq. 4-5; clamped once, at the end)
merge      Ω = a·Ω_a + b·Ω_b   or   max(Ω_a, Ω_b)              (a = γ, b = 1: online EWC, Schwarz et al. 2018)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..codecs.encoded import Encoded
from ..codecs.reference import encode_importance, encode_rank1
from ..codecs.storage import CODES, DTYPES
from .statistics import BINS, STATISTICS, histogram, statistics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["BINS", "STATISTICS", "accumulate_", "finalise", "merge"]

Result = tuple["list[Encoded]", "Tensor", "Tensor"]  # Ω per tensor; statistics [n, 7] float64; histograms [n, 64] int64


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


def squared_move(end: Tensor, start: Tensor, compute: torch.dtype) -> Tensor:
    """Return (θ_end − θ_start)²."""
    return (end.to(compute) - start.to(compute)).square()


def mean_move(move_sq: Tensor) -> Tensor:
    """Return mean((θ_end − θ_start)²), 0-dim float64; a weight that is lost counts as unmoved."""
    moved = torch.where(torch.isfinite(move_sq), move_sq, 0.0).double()
    return moved.mean() if moved.numel() else moved.sum()


@torch.no_grad()
def finalise(
    path_integrals: Sequence[Tensor],
    params: Sequence[Tensor],
    starts: Sequence[Tensor],
    formats: Sequence[str],
    xi: float,
    *,
    relative: bool = False,
) -> Result:
    """Return Ω in the given formats with its statistics; see ``_ops.finalise``."""
    importances, rows, counts = [], [], []
    for path_integral, param, start, kept in zip(path_integrals, params, starts, formats, strict=True):
        compute = path_integral.dtype
        move_sq = squared_move(param, start, compute)
        floor = xi * float(mean_move(move_sq)) if relative else xi  # ξ = ρ · mean((θ_end − θ_start)²)
        denominator = move_sq + floor  # 0 only where nothing moved and ξ is relative: no scale, hence Ω = 0
        importance = torch.where((path_integral > 0) & (denominator > 0), path_integral / denominator, 0.0)
        finite = torch.isfinite(path_integral) & torch.isfinite(importance)
        importance = torch.where(finite, importance, 0.0)
        importances.append(encoded(importance, kept))
        rows.append(statistics(path_integral, importance, finite))
        counts.append(histogram(importance))
    return importances, *_stacked(rows, counts)


@torch.no_grad()
def merge(
    first: Sequence[Encoded | None],
    second: Sequence[Encoded | None],
    formats: Sequence[str],
    weights: tuple[float, float] | None,
) -> Result:
    """Return a·Ω_a + b·Ω_b, or without weights max(Ω_a, Ω_b), in the given formats; None counts as 0."""
    importances, rows, counts = [], [], []
    for a, b, kept in zip(first, second, formats, strict=True):
        pair = [None if x is None else x.decoded() for x in (a, b)]
        like = next(x for x in pair if x is not None)
        compute = torch.promote_types(like.dtype, torch.float32)
        wide = [torch.zeros_like(like, dtype=compute) if x is None else x.to(compute) for x in pair]
        importance = torch.maximum(*wide) if weights is None else wide[0] * weights[0] + wide[1] * weights[1]
        importances.append(encoded(importance, kept))
        rows.append(statistics(None, importance))
        counts.append(histogram(importance))
    return importances, *_stacked(rows, counts)


def encoded(importance: Tensor, kept: str) -> Encoded:
    """Return Ω in a format."""
    if kept == "rank1":
        return Encoded(*encode_rank1(importance), kept)
    if kept not in CODES:
        return Encoded(importance.to(DTYPES[kept]), None, kept)
    return Encoded(*encode_importance(importance, CODES[kept]), kept)


def _stacked(rows: list[Tensor], counts: list[Tensor]) -> tuple[Tensor, Tensor]:
    if not rows:
        return torch.empty(0, len(STATISTICS), dtype=torch.float64), torch.empty(0, BINS, dtype=torch.int64)
    return torch.stack(rows).cpu(), torch.stack(counts).cpu()
