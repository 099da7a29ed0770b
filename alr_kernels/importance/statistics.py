"""What is known of a tensor's ω and Ω without keeping them: sums, extremes, and a histogram of Ω."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _validate_importance
from ..codecs.encoded import Encoded

# Columns of the statistics, one float64 row per tensor; of Ω before it is encoded.
STATISTICS = ("path_integral_sum", "negative_mass", "l2", "max", "mean", "numel", "nonfinite")
BINS = 64  # of the histogram: bin b counts Ω in [4^b · 2^-63, 4^(b+1) · 2^-63); the first all below, the last all above
EDGES = tuple(4.0**b * 2.0**-63 for b in range(BINS))  # where the bins begin; the first takes what is below, too
CHUNK = 2**20  # elements looked at together, so that no temporary is as large as the tensor


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


def bin_of(importance: Tensor) -> Tensor:
    """Return the bin of each Ω ≥ 0, flat: half the exponent of its float32 value."""
    return ((importance.float().reshape(-1).view(torch.int32) >> 24) - 32).clamp(0, BINS - 1)


def histogram(importance: Tensor) -> Tensor:
    """Return the counts [BINS] int64 of Ω ≥ 0; see :func:`bin_of`."""
    return torch.bincount(bin_of(importance), minlength=BINS)


class TensorStats(NamedTuple):
    """Statistics of one tensor (or layer). The first two are None when no path integral was recorded."""

    path_integral_sum: float | None  # Σω: how much these weights lowered the loss, to first order
    negative_mass: float | None  # Σ max(−ω, 0): what the clamp threw away
    l2: float  # ‖Ω‖₂
    max: float
    mean: float
    numel: int
    nonfinite: int  # elements of ω (or of a sample's gradient) that were NaN or inf; their Ω is 0
    histogram: tuple[int, ...] = (0,) * BINS  # elements with Ω in [4^b · 2^-63, 4^(b+1) · 2^-63); ends are open

    def __repr__(self) -> str:
        values = zip(self._fields[:-1], self[:-1], strict=True)
        return f"TensorStats({', '.join(f'{name}={value}' for name, value in values)}, histogram=...)"

    @classmethod
    def of_row(cls, row: Tensor, counts: Tensor, has_path_integral: bool = True) -> TensorStats:
        """Build from a row of ``STATISTICS`` and a histogram."""
        total, negative, l2, largest, mean, numel, nonfinite = row.tolist()
        known = has_path_integral and not math.isnan(total)
        return cls(
            path_integral_sum=total if known else None,
            negative_mass=negative if known else None,
            l2=l2,
            max=largest,
            mean=mean,
            numel=int(numel),
            nonfinite=int(nonfinite),
            histogram=tuple(counts.tolist()),
        )

    def after(self, known: Sequence[TensorStats | None], weights: Sequence[float] | None) -> TensorStats:
        """Return it with what is known of ω: self is of Σ wᵢ·Ωᵢ, or of max(Ωᵢ) without weights.

        ``known``: statistics of the Ωᵢ, None where one counts as 0.
        """
        return self._replace(
            path_integral_sum=_linear(weights, [past and past.path_integral_sum for past in known], known),
            negative_mass=_linear(weights, [past and past.negative_mass for past in known], known),
            nonfinite=sum(past.nonfinite for past in known if past is not None),
        )

    def row(self) -> list[float]:
        """Return it as a row of ``STATISTICS``; NaN where nothing is known."""
        omega = (math.nan if value is None else value for value in (self.path_integral_sum, self.negative_mass))
        return [*omega, self.l2, self.max, self.mean, self.numel, self.nonfinite]

    @classmethod
    def of(cls, importance: Tensor | Encoded, name: str = "importance") -> TensorStats:
        """Compute what can be known from Ω alone, once its values are checked."""
        dense = importance.decoded() if isinstance(importance, Encoded) else importance.detach()
        _validate_importance.importance_values(name, dense)
        parts = [dense] if dense.numel() <= CHUNK else dense.reshape(-1).split(CHUNK)
        return cls.pooled(cls.of_row(statistics(None, part), histogram(part), False) for part in parts)

    @classmethod
    def pooled(cls, parts: Iterable[TensorStats]) -> TensorStats:
        """Combine the statistics of several tensors."""
        rows = list(parts)
        numel = sum(row.numel for row in rows)

        def total(values: list[float | None]) -> float | None:
            known = [value for value in values if value is not None]
            return math.fsum(known) if known else None

        return cls(
            total([row.path_integral_sum for row in rows]),
            total([row.negative_mass for row in rows]),
            math.hypot(*(row.l2 for row in rows)),
            max((row.max for row in rows), default=0.0),
            math.fsum(row.mean * row.numel for row in rows) / max(numel, 1),
            numel,
            sum(row.nonfinite for row in rows),
            tuple(map(sum, zip(*(row.histogram for row in rows), strict=True))) or (0,) * BINS,
        )


def _linear(
    weights: Sequence[float] | None, values: Sequence[float | None], known: Sequence[TensorStats | None]
) -> float | None:
    """Return Σ wᵢ·xᵢ; None where one that is there is not known, or where a maximum was taken."""
    if weights is None or any(value is None and past is not None for value, past in zip(values, known, strict=True)):
        return None
    return math.fsum(weight * (value or 0.0) for weight, value in zip(weights, values, strict=True))


class Summary(dict[str, TensorStats]):
    """Statistics by name: all that coefficients need of an importance, so that its tensors can be let go."""

    @property
    def stats(self) -> Mapping[str, TensorStats]:
        """What :func:`layer_norms` looks for."""
        return self


def stacked(rows: Iterable[TensorStats]) -> tuple[Tensor, Tensor]:
    """Return statistics [n, 7] float64 and histograms [n, BINS] int64."""
    listed = list(rows)
    table = torch.tensor([row.row() for row in listed], dtype=torch.float64)
    counts = torch.tensor([row.histogram for row in listed], dtype=torch.int64)
    return table.reshape(-1, len(STATISTICS)), counts.reshape(-1, BINS)
