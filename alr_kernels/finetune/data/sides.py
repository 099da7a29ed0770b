"""What is trained on and what is measured on: rows, and which of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ... import _validate_data as validate
from . import split
from .files import held_out_source
from .rows import Rows, read
from .source import Progress, Source


@dataclass
class Side:
    """Rows of a source, and which of them are on this side: ``mask`` [rows] bool."""

    rows: Rows
    mask: np.ndarray


@dataclass
class Sides:
    """Both sides; ``overlap``: rows that are not trained on because the data to measure on have them."""

    train: Side | None
    held_out: Side | None
    overlap: int = 0

    def read(self) -> list[Rows]:
        """Return every source once."""
        rows = [side.rows for side in (self.train, self.held_out) if side]
        return rows if len(rows) < 2 or rows[0] is not rows[1] else rows[:1]

    def fingerprint(self) -> str:
        """Return the SHA-256 of the content of all rows on either side, in the order of their sources.

        It depends neither on names of files nor on which side a row is.
        """
        total = hashlib.sha256()
        for rows in self.read():
            used = np.zeros(len(rows.keys), dtype=bool)
            for side in (self.train, self.held_out):
                if side and side.rows is rows:
                    used |= side.mask
            total.update(rows.digests[used].tobytes())
        return total.hexdigest()

    def facts(self) -> dict[str, Any]:
        """Return what is known before anything is tokenised."""
        first = self.read()[0]
        counts = {"train": _count(self.train), "held_out": _count(self.held_out)}
        return {
            "format": first.kind,
            "columns": first.columns,
            "unit": first.unit,
            "held_out_format": self.held_out.rows.kind if self.held_out else None,
            "fingerprint": self.fingerprint(),
            "rows": sum(count for count in counts.values() if count),
            **{f"{side}_rows": count for side, count in counts.items()},
            "overlap": self.overlap,
            "files": sum(rows.files for rows in self.read()),
            "ignored_files": sum(rows.ignored for rows in self.read()),
        }


def _count(side: Side | None) -> int | None:
    return int(side.mask.sum()) if side else None


def divide(source: Source, train: bool, progress: Progress | None) -> Sides:
    """Read a source, and the one to measure on where that is another, and draw both sides.

    What would be trained on is not read when ``train`` is False and all that is measured on comes from elsewhere.

    Raises:
        ValueError: when a side that is asked for would be empty.
    """
    if source.held_out_data is None:
        rows = read(source, progress)
        if 0 < source.held_out < 1:
            validate.two_contents(source, rows.unit, len(rows.keys), bool((rows.keys != rows.keys[0]).any()))
        out = split.held_out(rows.keys, source.held_out)
        learnt, out = split.drawn(rows.keys, out, source.held_out, source.max_rows, source.seed)
        return Sides(Side(rows, learnt), Side(rows, out) if out.any() else None)
    elsewhere = read(held_out_source(source), progress)
    held_out = Side(elsewhere, np.ones(len(elsewhere.keys), dtype=bool))
    if not train:
        return Sides(None, held_out)
    rows = read(replace(source, held_out=0.0, held_out_data=None), progress)
    learnt, _ = split.drawn(rows.keys, np.zeros(len(rows.keys), dtype=bool), 0.0, source.max_rows, source.seed)
    known = learnt & np.isin(rows.keys, elsewhere.keys)
    learnt &= ~known
    validate.not_all_known(source, bool(learnt.any()))
    return Sides(Side(rows, learnt), held_out, int(known.sum()))
