"""Checks of single values that every ``_validate*.py`` shares; without torch, for the command line."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any


def listed(names: Iterable[str], limit: int = 5) -> str:
    """Return at most ``limit`` names and how many more there are."""
    ordered = sorted(names)
    tail = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(repr(name) for name in ordered[:limit]) + tail


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence: a hint at the known name that is most like ``name``, or a full stop.

    >>> nearest("lamda", ["lambda", "lr"])
    "; did you mean 'lambda'?"
    >>> nearest("xyz", ["lambda", "lr"])
    '.'
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else "."


def choice(option: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{option}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def number(
    option: str, value: Any, *, low: float = 0.0, high: float = math.inf, open_low: bool = False, closed: bool = False
) -> float:
    """Return ``value`` as float when it lies in [low, high); ``open_low``: without low, ``closed``: with high."""
    try:
        result = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{option}: expected a number, got {type(value).__name__} {value!r}") from None
    if not (low <= result < high or (closed and result == high)) or (open_low and result == low):
        interval = f"{'(' if open_low else '['}{low}, {high}{']' if closed else ')'}"
        raise ValueError(f"{option}: expected a number in {interval}, got {value!r}")
    return result


def count(option: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{option}: expected an integer ≥ 1, got {value!r}")


def seed(value: Any, option: str = "seed") -> int:
    if not isinstance(value, int) or not 0 <= value < 2**32:
        raise ValueError(f"{option}: expected an integer in [0, 2^32), got {value!r}")
    return value
