"""Trade-offs between what was learnt and what was forgotten, compared at equal learning.

A run leaves points (domain NLL, general NLL). Reading the general NLL at the same domain NLL for every run compares how
much each paid for the same learning; reading it at the end would reward whoever learnt less.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

Point = tuple[float, float]  # domain NLL and general NLL, in nats per byte: lower is better in both


def lower_envelope(points: Iterable[Point]) -> list[Point]:
    """Return the points that no other point beats in both coordinates, by rising domain NLL.

    >>> lower_envelope([(3.0, 0.0), (2.0, 0.5), (2.5, 0.6), (1.5, 0.9)])
    [(1.5, 0.9), (2.0, 0.5), (3.0, 0.0)]
    """
    envelope: list[Point] = []
    for point in sorted(p for p in set(points) if all(map(math.isfinite, p))):
        if not envelope or point[1] < envelope[-1][1]:
            envelope.append(point)
    return envelope


def general_at(points: Iterable[Point], level: float) -> float | None:
    """Interpolate the lower envelope linearly at one domain NLL.

    Returns:
        The general NLL; None where the level is below all points (it was not reached). Above all points it is that of
        the least-trained point.
    """
    envelope = lower_envelope(points)
    if not envelope or level < envelope[0][0]:
        return None
    for (left, high), (right, low) in itertools.pairwise(envelope):
        if level <= right:
            return high + (low - high) * (level - left) / (right - left)
    return envelope[-1][1]


def shared_level(runs: Sequence[Iterable[Point]]) -> float:
    """Return the best domain NLL that all of them reached: the worst of their best.

    Raises:
        ValueError: there is no run, or one without a finite point.
    """
    envelopes = [lower_envelope(points) for points in runs]
    if not envelopes or not all(envelopes):
        raise ValueError("shared_level: expected at least one run, each with a finite point.")
    return max(envelope[0][0] for envelope in envelopes)
