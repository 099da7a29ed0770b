"""What is stepped: lists of shapes by name."""

from __future__ import annotations

import math

# 40 M elements as ten square matrices.
FEW_LARGE = [(2048, 2048)] * 10
TINY = [(64, 64)] * 2  # when benchmarks are collected by the tests, only to see that they run


def elements(shapes: list[tuple[int, ...]]) -> int:
    """Return the number of elements of all tensors."""
    return sum(math.prod(shape) for shape in shapes)
