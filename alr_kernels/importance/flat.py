"""Encoded importance as flat lists of tensors, which is what registered ops take and return."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..codecs.encoded import Encoded
from ..codecs.storage import DTYPES, IN_TWO
from .statistics import BINS, STATISTICS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from .reference import Result

Flat = tuple["list[Tensor]", "list[Tensor]", "Tensor", "Tensor"]  # what the registered ops return of a Result


def flattened(result: Result) -> Flat:
    """Return it as the registered ops do: values, scales (empty where there are none), statistics, histograms."""
    importances, stats, histograms = result
    values = [x.values for x in importances]
    scales = [x.values.new_empty(0, dtype=torch.bfloat16) if x.scales is None else x.scales for x in importances]
    return values, scales, stats, histograms


def unflattened(values: Sequence[Tensor], scales: Sequence[Tensor], formats: Sequence[str]) -> list[Encoded | None]:
    """Return importances from flat lists; the format '' says that there is none."""
    rows = zip(values, scales, formats, strict=True)
    return [Encoded(v, s if kept in IN_TWO else None, kept) if kept else None for v, s, kept in rows]


def fake_outputs(like: Sequence[Encoded], formats: Sequence[str]) -> Flat:
    """Return uninitialised outputs of an op whose importances are shaped as ``like``."""
    empty = [Encoded.empty(x.shape, kept, x.values.device) for x, kept in zip(like, formats, strict=True)]
    for i, (x, kept) in enumerate(zip(like, formats, strict=True)):
        if x.scales is None and kept not in IN_TWO:  # floats of floats keep their layout
            empty[i] = Encoded(torch.empty_like(x.values, dtype=DTYPES[kept]), None, kept)
    stats = torch.empty(len(like), len(STATISTICS), dtype=torch.float64, device="cpu")
    return flattened((empty, stats, torch.empty(len(like), BINS, dtype=torch.int64, device="cpu")))
