"""How documents become sequences: no token is lost, and each is in the loss exactly where something predicts it."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from alr_kernels.finetune.data import packing
from alr_kernels.finetune.data.packing import IGNORED

LENGTHS = st.lists(st.integers(0, 30), max_size=12)
LIMIT = st.integers(4, 12)


def documents(lengths):
    """Return documents of distinct tokens, each with its first token and every seventh out of the loss."""
    start, found = 0, []
    for length in lengths:
        ids = list(range(start, start + length))
        found.append((ids, [IGNORED if i == start or i % 7 == 0 else i for i in ids]))
        start += length
    return found


def copies(found):
    return [(list(ids), list(labels)) for ids, labels in found]


def flat(sequences, part):
    return [value for sequence in sequences for value in sequence[part]]


def check(given_, made, limit):
    """Every token is there, in order; every label, but those of tokens that begin a sequence."""
    assert flat(made, 0) == flat(given_, 0)
    assert all(len(ids) == len(labels) <= limit for ids, labels in made)
    first = {ids[0] for ids, _ in made}
    expected = [IGNORED if i in first else label for i, label in zip(flat(given_, 0), flat(given_, 1), strict=True)]
    assert flat(made, 1) == expected


@given(lengths=LENGTHS, limit=LIMIT)
def test_a_stream_is_cut_into_full_sequences(lengths, limit):
    found = documents(lengths)
    made = list(packing.stream(copies(found), limit))
    check(found, made, limit)
    sizes = [len(ids) for ids, _ in made]
    total = sum(lengths)
    assert len(sizes) == -(-total // limit)
    assert all(size == limit for size in sizes[:-2])
    assert total <= 1 or min(sizes) > 1  # no token is alone, where nothing predicts it
    assert sizes[-2:-1] in ([], [limit]) or sizes[-2:] == [limit - 1, 2]


@given(lengths=LENGTHS, limit=LIMIT)
def test_windows_are_of_one_document(lengths, limit):
    found = documents(lengths)
    made = list(packing.windows(copies(found), limit))
    check(found, made, limit)
    assert len(made) == sum(-(-length // limit) for length in lengths)
    starts = {ids[0] for ids, _ in found if ids}
    assert starts <= {ids[0] for ids, _ in made}


@given(lengths=st.lists(st.integers(0, 6), max_size=20), limit=LIMIT)
def test_rows_are_joined_whole(lengths, limit):
    found = documents([min(length, limit) for length in lengths if length])
    made = list(packing.joined(copies(found), limit))
    check(found, made, limit)
    starts = [ids[0] for ids, _ in found]
    assert {ids[0] for ids, _ in made} <= set(starts)
    for (ids, _), (following, _) in pairwise(made):  # as many as go in
        later = starts[starts.index(following[0]) + 1 :]
        row = (later[0] if later else following[-1] + 1) - following[0]
        assert len(ids) + row > limit


@given(lengths=LENGTHS, limit=LIMIT)
def test_what_is_cut_is_told(lengths, limit):
    found = documents(lengths)
    made = list(packing.truncated(copies(found), limit))
    assert [longer for _, longer in made] == [length > limit for length in lengths]
    assert [ids for (ids, _), _ in made] == [ids[:limit] for ids, _ in found]
    assert [labels for (_, labels), _ in made] == [labels[:limit] for _, labels in found]
