"""Values as JSON and YAML hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from datetime import datetime
from typing import Any


def plain(value: Any) -> Any:
    """Return a value made of dicts, lists, texts and numbers alone, as YAML and JSON hold; NaN and infinities are None.

    >>> from pathlib import Path
    >>> plain({"nll": float("nan"), "shape": (2, 3), "file": Path("a")})
    {'nll': None, 'shape': [2, 3], 'file': 'a'}
    """
    if value is None or isinstance(value, (bool, str)):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, (set, frozenset)):
        return sorted(map(plain, value))
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if hasattr(value, "tolist"):  # of numpy and torch, one number or many
        return plain(value.tolist())
    return str(value)
