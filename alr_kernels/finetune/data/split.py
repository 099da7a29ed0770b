"""Which rows are held out. A row's side is drawn by a hash of its content with the seed as key.

So rows of the same content are on one side, a row stays on its side wherever it stands, and rows that are added move
few others. ``max_rows`` draws from each side after that: what is held out of all the rows is never trained on by fewer.
"""

from __future__ import annotations

import numpy as np


def held_out(keys: np.ndarray, share: float) -> np.ndarray:
    """Draw about ``share`` of the rows, at least one and not all, with all rows of the same content on one side.

    Contents are taken in the order of their hashes; one that has more rows than are still to be drawn is passed over,
    so that a line which is often repeated does not become the whole held-out set.

    Args:
        keys: [rows] uint64, equal for rows of the same content; at least two distinct ones unless the share is 0 or 1.

    Returns:
        [rows] bool, True: held out.

    >>> held_out(np.array([5, 5, 9, 1], np.uint64), 0.25)
    array([False, False, False,  True])
    """
    if share in (0, 1):
        return np.full(len(keys), bool(share))
    contents, counts = np.unique(keys, return_counts=True)
    wanted = min(max(round(share * len(keys)), 1), len(keys) - 1)
    chosen = []
    for content, count in zip(contents, counts, strict=True):
        if count <= wanted:
            chosen.append(content)
            wanted -= count
        if not wanted:
            break
    if not chosen:
        chosen = [contents[counts.argmin()]]
    return np.isin(keys, np.array(chosen, dtype=keys.dtype))


def drawn(
    keys: np.ndarray, out: np.ndarray, share: float, rows: int | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (train, held out), each [rows] bool, of ``rows`` in all where there are more."""
    train = ~out
    if rows is None or rows >= len(keys):
        return train, out
    measured = min(int(out.sum()), rows if share == 1 else max(round(share * rows), 1 if share else 0))
    # Of all rows those of another order are drawn: in this one, those that training held out come first.
    order = np.argsort(_mixed(keys) if share == 1 else keys, kind="stable")
    fewer = np.zeros_like(out)
    fewer[order[out[order]][:measured]] = True
    learnt = np.random.default_rng(seed).permutation(np.flatnonzero(train))[: rows - measured]
    train = np.zeros_like(out)
    train[learnt] = True
    return train, fewer


def _mixed(keys: np.ndarray) -> np.ndarray:
    """Return other keys, [rows] uint64, of another order and as distinct: the finaliser of SplitMix64."""
    mixed = keys.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
