"""What is known of a tensor's ω and Ω without keeping them: sums, extremes, and a histogram of Ω."""

from __future__ import annotations

import torch
from torch import Tensor

# Columns of the statistics, one float64 row per tensor; of Ω before it is encoded.
STATISTICS = ("path_integral_sum", "negative_mass", "l2", "max", "mean", "numel", "nonfinite")
BINS = 64  # of the histogram: bin b counts Ω in [4^b · 2^-63, 4^(b+1) · 2^-63); the first all below, the last all above


def statistics(path_integral: Tensor | None, importance: Tensor, finite: Tensor | None = None) -> Tensor:
    """Return one row of STATISTICS; ``finite``: which elements of ω count. Without ω its columns are 0."""
    wide = importance.double()
    omega = wide.new_zeros(()) if path_integral is None else torch.where(finite, path_integral, 0.0).double()
    columns = [
        omega.sum(),
        -omega.clamp(max=0).sum(),
        wide.square().sum().sqrt(),
        wide.max() if wide.numel() else wide.new_zeros(()),
        wide.sum() / max(wide.numel(), 1),
        wide.new_tensor(wide.numel()),
        wide.new_zeros(()) if finite is None else (~finite).sum().double(),
    ]
    return torch.stack(columns)


def histogram(importance: Tensor) -> Tensor:
    """Return the counts [BINS] int64 of Ω ≥ 0, by half the exponent of its float32 value."""
    bins = ((importance.float().reshape(-1).view(torch.int32) >> 24) - 32).clamp(0, BINS - 1)
    return torch.bincount(bins, minlength=BINS)
