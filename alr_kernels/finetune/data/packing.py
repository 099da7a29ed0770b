"""Tokenised documents as sequences of at most ``limit`` tokens. A sequence is (ids, labels).

A model predicts a token from those before it in the sequence, so the first of each is predicted from nothing and its
label is -100.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ...importance.estimators.objectives import IGNORED

Sequence = tuple[list[int], list[int]]


def stream(documents: Iterable[Sequence], limit: int) -> Iterator[Sequence]:
    """Join documents and cut what comes of it every ``limit`` tokens; no token is lost, the last sequence is shorter.

    A token that would be left alone at the end, where nothing predicts it, takes its predecessor along.

    >>> list(stream([([1, 2], [-100, 2]), ([3, 4, 5], [-100, 4, 5])], 4))
    [([1, 2, 3], [-100, 2, -100]), ([4, 5], [-100, 5])]
    """
    ids: list[int] = []
    labels: list[int] = []
    for more_ids, more_labels in documents:
        ids += more_ids
        labels += more_labels
        whole = max(0, (len(ids) - 2) // limit) * limit  # two tokens or more stay
        for start in range(0, whole, limit):
            yield _from_nothing(ids[start : start + limit], labels[start : start + limit])
        del ids[:whole], labels[:whole]
    cut = limit - 1 if len(ids) == limit + 1 else limit
    for part in (slice(0, cut), slice(cut, None)):
        if ids[part]:
            yield _from_nothing(ids[part], labels[part])


def windows(documents: Iterable[Sequence], limit: int) -> Iterator[Sequence]:
    """Yield each document by itself, in consecutive windows when it is too long for one."""
    for document in documents:
        yield from stream([document], limit)


def truncated(rows: Iterable[Sequence], limit: int) -> Iterator[tuple[Sequence, bool]]:
    """Yield (the first ``limit`` tokens of each row, whether there were more)."""
    for ids, labels in rows:
        yield _from_nothing(ids[:limit], labels[:limit]), len(ids) > limit


def joined(rows: Iterable[Sequence], limit: int) -> Iterator[Sequence]:
    """Put as many rows into each sequence as go in whole, in their order; a prompt is never parted from its completion.

    >>> list(joined([([1, 2], [-100, 2]), ([3], [-100]), ([4, 5], [-100, 5])], 4))
    [([1, 2, 3], [-100, 2, -100]), ([4, 5], [-100, 5])]
    """
    ids: list[int] = []
    labels: list[int] = []
    for more_ids, more_labels in rows:
        if ids and len(ids) + len(more_ids) > limit:
            yield ids, labels
            ids, labels = [], []
        ids = ids + more_ids
        labels = labels + more_labels
    if ids:
        yield ids, labels


def _from_nothing(ids: list[int], labels: list[int]) -> Sequence:
    labels[:1] = [IGNORED] * len(labels[:1])
    return ids, labels
