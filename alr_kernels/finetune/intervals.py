"""How sure a difference between two models is that were measured on the same rows: a paired bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DRAWS = 2000
LEVEL = 0.95
BLOCK = 1 << 20  # rows drawn at a time


@dataclass(frozen=True)
class Change:
    """A difference and the interval that holds it in 95 of 100 resamplings of the rows."""

    value: float
    low: float | None  # None where there is one row only
    high: float | None

    def __neg__(self) -> Change:
        swapped = [None if bound is None else -bound for bound in (self.high, self.low)]
        return Change(-self.value, *swapped)

    def as_dict(self) -> dict[str, Any]:
        """Return value, low and high for JSON; what is not finite is None."""
        return {
            name: x if x is not None and np.isfinite(x) else None
            for name, x in (("value", self.value), ("low", self.low), ("high", self.high))
        }


def paired(parts: Sequence[tuple[np.ndarray, np.ndarray]], seed: int = 0) -> Change:
    """Return the mean over ``parts`` of sum(differences)/sum(weights), with a percentile bootstrap over rows.

    Each resampling draws, in each part, as many rows as there are, with replacement: a row brings its difference and
    its weight along. Rows are taken to be independent.

    Args:
        parts: (differences after - before, weights), each [rows] float64: nats and tokens, or scores and ones.
        seed: of the drawing; the same seed gives the same interval.

    >>> paired([(np.array([1.0, 1.0]), np.array([2.0, 2.0]))])
    Change(value=0.5, low=0.5, high=0.5)
    """
    value = float(np.mean([differences.sum() / weights.sum() for differences, weights in parts]))
    if any(len(differences) < 2 for differences, _ in parts) or not np.isfinite(value):
        return Change(value, None, None)
    generator = np.random.default_rng(seed)
    drawn = np.mean([_resampled(*part, generator) for part in parts], axis=0)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Change(value, float(low), float(high))


def _resampled(differences: np.ndarray, weights: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return [DRAWS] ratios. Rows without weight are left out, or a draw might weigh nothing."""
    kept = weights > 0
    differences, weights = differences[kept], weights[kept]
    block = max(1, BLOCK // len(weights))
    found = []
    for start in range(0, DRAWS, block):
        rows = generator.integers(len(weights), size=(min(block, DRAWS - start), len(weights)))
        found.append(differences[rows].sum(1) / weights[rows].sum(1))
    return np.concatenate(found)
