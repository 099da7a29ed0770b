"""Order of values without sorting all of them: ranks of a sample, and what the largest share of them is, exactly."""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

HALF = 16  # bits of a digit; a float32 ≥ 0 has two, and is ordered as they are
DIGITS = 1 << HALF


def ranks(values: Tensor) -> Tensor:
    """Return ranks from 1, float64; equal values share the mean of theirs.

    >>> ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist()
    [3.5, 1.0, 3.5, 2.0]
    """
    ordered, order = torch.sort(values.reshape(-1))
    _, inverse, counts = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    shared = (last - (counts - 1) / 2)[inverse]
    return torch.empty_like(shared).index_copy_(0, order, shared)


def rank_correlation(first: Tensor, second: Tensor) -> float | None:
    """Return Spearman's ρ, ties by mean ranks; None where one side is constant."""
    if first.numel() < 2:
        return None
    return Moments.of(ranks(first), ranks(second)).correlation


def sampled(numel: int, count: int, key: str) -> Tensor:
    """Return ``count`` different places of ``numel``, in order: one at random in each of as many equal stretches.

    The same key gives the same places, whatever was drawn before.
    """
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
    noise = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    edges = torch.arange(count + 1) * numel // max(count, 1)
    return edges[:-1] + (noise * edges.diff()).long()


class Moments:
    """Means, variances and covariance of pairs, merged chunk by chunk (Chan et al. 1979), in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.means = (0.0, 0.0)
        self.squares = (0.0, 0.0, 0.0)  # Σ(x−x̄)², Σ(y−ȳ)², Σ(x−x̄)(y−ȳ)

    @classmethod
    def of(cls, first: Tensor, second: Tensor, among: Tensor | None = None) -> Moments:
        """Return those of pairs that are there at once; ``among``: which of them count, None: all."""
        found = cls()
        found.count = first.numel() if among is None else int(among.sum())
        if found.count:
            x, y = (part.double() if among is None else part.double().where(among, 0.0) for part in (first, second))
            found.means = (float(x.sum()) / found.count, float(y.sum()) / found.count)
            x, y = x - found.means[0], y - found.means[1]
            if among is not None:
                x, y = x.where(among, 0.0), y.where(among, 0.0)
            found.squares = (float(x.dot(x)), float(y.dot(y)), float(x.dot(y)))
        return found

    def add(self, other: Moments) -> None:
        """Add what another has gathered."""
        if not other.count:
            return
        total = self.count + other.count
        dx, dy = other.means[0] - self.means[0], other.means[1] - self.means[1]
        weight, part = self.count * other.count / total, other.count / total
        (xx, yy, xy), (more_xx, more_yy, more_xy) = self.squares, other.squares
        self.squares = (
            xx + more_xx + weight * dx * dx,
            yy + more_yy + weight * dy * dy,
            xy + more_xy + weight * dx * dy,
        )
        self.means = (self.means[0] + part * dx, self.means[1] + part * dy)
        self.count = total

    @property
    def correlation(self) -> float | None:
        """Pearson's r; None where one side does not vary beyond rounding."""
        floors = [self.count * (1e-13 * max(1.0, abs(mean))) ** 2 for mean in self.means]
        xx, yy, xy = self.squares
        if self.count < 2 or xx <= floors[0] or yy <= floors[1]:
            return None
        return max(-1.0, min(1.0, xy / math.sqrt(xx * yy)))


class Bound(NamedTuple):
    """Where the ``count`` largest of many values begin: all above ``bits``, and of those at it an equal part each."""

    bits: int
    part: float  # of each element at the bound


def bits_of(values: Tensor) -> Tensor:
    """Return float32 values ≥ 0 as integers in the same order."""
    return (values.float().reshape(-1) + 0.0).view(torch.int32)  # −0.0 + 0.0 is 0.0


class Selection:
    """Find the bound of the ``count`` largest of values that come in chunks, in two passes over them.

    Radix selection: the first pass (``count_upper``, then ``narrow``) counts the upper halves of the values' bits, the
    second (``count_lower``, then ``bound``) the lower halves of those in the bin in which the bound lies. Exact, in
    memory that does not grow with the values.
    """

    def __init__(self, count: int) -> None:
        self._left = count
        self._counts = torch.zeros(DIGITS // 2, dtype=torch.int64)  # of the first pass; the sign is always 0
        self._bin = -1

    def count_upper(self, counts: Tensor) -> None:
        """Take the first pass' counts of some values: ``upper_counts`` of their bits."""
        self._counts += counts

    def narrow(self) -> None:
        """End the first pass."""
        self._bin, self._left = _descend(self._counts, self._left)
        self._counts = torch.empty(0, dtype=torch.int64)

    def count_lower(self, bits: Tensor) -> None:
        """Take the second pass' values."""
        inside = bits[(bits >> HALF) == self._bin] & (DIGITS - 1)
        if not self._counts.numel():
            self._counts = torch.zeros(DIGITS, dtype=torch.int64)
        self._counts += torch.bincount(inside, minlength=DIGITS)

    def bound(self) -> Bound:
        """End the second pass and return what was found."""
        digit, left = _descend(self._counts, self._left)
        there = int(self._counts[digit])
        self._counts = torch.empty(0, dtype=torch.int64)
        return Bound((self._bin << HALF) | digit, left / there)


def upper_counts(bits: Tensor) -> Tensor:
    """Count the upper halves of bits."""
    return torch.bincount(bits >> HALF, minlength=DIGITS // 2)


def _descend(counts: Tensor, wanted: int) -> tuple[int, int]:
    """Return the digit in which the ``wanted``-th largest lies and which place it has there, from 1."""
    above = counts.flip(0).cumsum(0)  # how many have this digit or a larger one
    place = int(torch.searchsorted(above, wanted))
    return counts.numel() - 1 - place, wanted - (int(above[place - 1]) if place else 0)


def overlap(first: Tensor, second: Tensor, bounds: tuple[Bound, Bound]) -> float:
    """Return Σ min(w_a, w_b) over bits of two files; w: 1 above the bound, ``part`` at it, 0 below.

    An element at the bound is in by its part, the same in both, so that a file overlaps itself in all of it.
    """
    a, b = bounds
    inside = (first >= a.bits) & (second >= b.bits)
    if not bool(inside.any()):
        return 0.0
    weights = [
        torch.where(bits[inside] > bound.bits, 1.0, bound.part).double()
        for bits, bound in zip((first, second), bounds, strict=True)
    ]
    return float(torch.minimum(*weights).sum())
