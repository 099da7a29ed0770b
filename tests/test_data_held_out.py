"""What is held out: drawn by content, disjoint, the same wherever rows stand."""

from __future__ import annotations

from collections import Counter

import numpy as np
from data_cases import loaded, numbered, said, same, tokenizer
from hypothesis import given
from hypothesis import strategies as st

from alr_kernels.finetune.data import split

KEYS = st.lists(st.integers(0, 12), min_size=2, max_size=60).filter(lambda keys: len(set(keys)) > 1)


@given(keys=KEYS, share=st.floats(0.01, 0.99), order=st.randoms())
def test_contents_are_on_one_side_wherever_they_stand(keys, share, order):
    keys = np.array(keys, dtype=np.uint64)
    out = split.held_out(keys, share)
    assert not set(keys[out].tolist()) & set(keys[~out].tolist())
    assert 0 < out.sum() < len(keys)
    smallest = min(Counter(keys.tolist()).values())
    assert out.sum() <= max(round(share * len(keys)), smallest, 1)
    moved = np.array(order.sample(range(len(keys)), len(keys)))
    assert (split.held_out(keys[moved], share) == out[moved]).all()


@given(count=st.integers(2, 200), rows_=st.integers(1, 250), share=st.floats(0, 0.9), seed=st.integers(0, 99))
def test_fewer_rows_are_drawn_from_either_side(count, rows_, share, seed):
    keys = np.random.default_rng(seed).permutation(count).astype(np.uint64)
    out = split.held_out(keys, share)
    learnt, measured = split.drawn(keys, out, share, rows_, seed)
    assert not (learnt & out).any()
    assert not (measured & ~out).any()
    assert (learnt | measured).sum() <= rows_
    assert (learnt | measured).sum() >= min(rows_, count) - 1  # a share of all and of few may round apart
    again = split.drawn(keys, out, share, rows_, seed)
    assert (again[0] == learnt).all()
    assert (again[1] == measured).all()
    moved = np.random.default_rng(1).permutation(count)  # what is measured does not depend on where rows stand
    assert (split.drawn(keys[moved], out[moved], share, rows_, seed)[1] == measured[moved]).all()


def test_other_seeds_draw_other_rows():
    keys, out = np.arange(100, dtype=np.uint64), np.zeros(100, dtype=bool)
    one, other = (np.flatnonzero(split.drawn(keys, out, 0.0, 20, seed)[0]) for seed in (0, 1))
    assert len(one) == len(other) == 20
    assert one.max() > 50 < other.max()
    assert one.tolist() != other.tolist()


def contents(tokens, dataset):
    return {said(tokens, row)[0] for row in dataset}


def test_what_is_held_out_is_drawn_by_the_seed():
    tokens, packing = tokenizer(), {"packing": False}
    files = {"a.jsonl": numbered(60) + numbered(60)[:30], "b.jsonl": numbered(60)[::-1] + numbered(70)[:30]}
    one = loaded(files, "a.jsonl", tokens, packing, held_out=0.2)
    held, learnt = contents(tokens, one.held_out), contents(tokens, one.train)
    assert not held & learnt
    assert held | learnt == {f"text number {i}</s>" for i in range(60)}
    assert len(one.held_out) == one.facts["held_out_rows"] == 18
    assert contents(tokens, loaded(files, "b.jsonl", tokens, packing, held_out=0.2).held_out) == held
    assert contents(tokens, loaded(files, "a.jsonl", tokens, packing, held_out=0.2, seed=1).held_out) != held


def test_fewer_rows_are_never_trained_on_what_all_hold_out():
    """So text that was learnt from some rows is measured on others, also when they are drawn from all."""
    tokens, packing = tokenizer(), {"packing": False}
    files = {"a.jsonl": numbered(200)}
    few = loaded(files, "a.jsonl", tokens, packing, max_rows=50, held_out=0.1)
    everything = loaded(files, "a.jsonl", tokens, packing | {"train": False}, held_out=0.1)
    assert (few.facts["rows"], few.facts["train_rows"], len(few.train), len(few.held_out)) == (50, 45, 45, 5)
    assert contents(tokens, few.held_out) < contents(tokens, everything.held_out)
    assert not contents(tokens, few.train) & contents(tokens, everything.held_out)


def test_what_is_measured_alone_is_what_is_measured_beside():
    files = {"a.jsonl": numbered(60)}
    both, alone = (loaded(files, "a.jsonl", how={"train": train}, held_out=0.3) for train in (True, False))
    assert alone.train is None
    assert same(alone.held_out, both.held_out)
    assert alone.facts["train_tokens"] is alone.facts["loss_tokens"] is None
    known = ("fingerprint", "train_rows", "held_out_rows", "held_out_tokens", "held_out_loss_tokens")
    assert [alone.facts[name] for name in known] == [both.facts[name] for name in known]


def test_other_data_to_measure_on():
    tokens, packing = tokenizer(), {"packing": False}
    files = {
        "a.jsonl": [{"body": f"text number {i}"} for i in range(40)],
        "b.jsonl": [{"body": "text number 3"}],
        "c.txt": "one",
    }
    found = loaded(files, "a.jsonl", tokens, packing, held_out_data="b.jsonl", columns="text=body")
    assert contents(tokens, found.held_out) == {"text number 3</s>"}
    assert contents(tokens, found.train) == {f"text number {i}</s>" for i in range(40) if i != 3}
    assert (found.facts["overlap"], found.facts["train_rows"], found.facts["held_out_rows"]) == (1, 39, 1)
    text = loaded(files, "a.jsonl", tokens, packing, held_out_data="c.txt", columns="text=body")
    assert contents(tokens, text.held_out) == {"one</s>"}
    alone = loaded(
        files, "is not read", tokens, packing | {"train": False}, held_out_data="b.jsonl", columns="text=body"
    )
    assert same(alone.held_out, found.held_out)
    whole = loaded(files, "c.txt", tokens, packing | {"train": False}, held_out=1)
    assert contents(tokens, whole.held_out) == {"one</s>"}


def test_fingerprints_are_of_content():
    def fingerprint(texts, **source):
        return loaded({"a.jsonl": [{"text": text} for text in texts]}, "a.jsonl", **source).facts["fingerprint"]

    texts = ["one", "two", "three"]
    assert fingerprint(texts) == fingerprint(texts, held_out=0.5, seed=3) == fingerprint([*texts, " "])
    others = (["one", "two", "three "], ["two", "one", "three"], ["one", "two"], [*texts, "one"])
    assert len({fingerprint(texts), *map(fingerprint, others), fingerprint(texts, max_rows=2)}) == 6


def test_a_limit_does_not_draw_the_held_out_rows_first():
    keys = np.random.default_rng(0).integers(0, 2**63, 1000, dtype=np.uint64)
    out = split.held_out(keys, 0.1)
    everything = np.ones(1000, dtype=bool)
    _, drawn = split.drawn(keys, everything, 1, 100, 0)
    assert drawn.sum() == 100
    assert (drawn & out).sum() < 30
    _, again = split.drawn(keys[::-1], everything, 1, 100, 0)
    assert (again[::-1] == drawn).all(), "wherever they stand"
