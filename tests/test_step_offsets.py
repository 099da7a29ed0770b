"""Random bits are numbered over a whole parameter: shards that know where they begin step as the whole does."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from cases import BF16, COLUMNS, F32, Case, assert_same_columns, formed, guarded, numbers_of, same_bits
from test_step_formats import name_of

from alr_kernels import AlrAdamW
from alr_kernels.codecs.reference import BLOCK
from alr_kernels.step import native, reference
from alr_kernels.step.plan import Operands

RANDOM = [
    Case("stochastic", "bf16"),
    Case(moments="bf16"),
    Case("stochastic", "bf16", "bf16", "none"),
    Case(moments="int8", importance="none", mode="coupled"),
    Case("stochastic", "bf16", "int8", "int8", "bf16"),
    Case("split", "bf16", "int8", "int4", "bf16"),  # the loop of its own
]
cases = pytest.mark.parametrize("case", RANDOM, ids=name_of)
# Where the whole begins. The first tensor's indices outgrow 32 bits within a tile of the fourth rank, within a vector
# of the first; those of its blocks within a tile of the fourth.
STARTS = (0, 2**32 - 11 * 128, 2**32 - 101, 2**39 - 10 * 128, 5 * 2**32 + 77, 2**62)
CUTS = ((0, 1, 1, 4, 9), (0, 3, 5, 5, 5))  # rows of two tensors, for four ranks: uneven, some empty


def shapes_of(case):
    return ((9, 256), (5, 128)) if case.coded else ((9, 301), (5, 53))


def starts_of(case):
    return [start for start in STARTS if case.moments != "int8" or start % BLOCK == 0]


def shard(columns, rank):
    """Return the operands of one rank, of each its rows, with guards."""
    places = [cuts[rank : rank + 2] for cuts in CUTS]
    return {
        name: [guarded(tensor[slice(*place)]) for tensor, place in zip(tensors, places, strict=False)]
        for name, tensors in columns.items()
    }


def joined(shards):
    return {name: [torch.cat(parts) for parts in zip(*(s[name] for s in shards), strict=True)] for name in COLUMNS}


def step(module, columns, case, offsets):
    """Step with one count and key a tensor: what is the same on all ranks."""
    numbers = numbers_of(columns, [3.0, 16.0], [5, 2], offsets)
    module.step_(Operands(**columns), numbers, case.options)


def check_shards(module, case, start):
    """Step four ranks' shards; require the bits of the reference's step of the whole, which begins at ``start``."""
    whole = formed(case, shapes_of(case))
    shards = [shard(whole, rank) for rank in range(4)]
    for rank, columns in enumerate(shards):
        firsts = [cuts[rank] * shape[1] for cuts, shape in zip(CUTS, shapes_of(case), strict=True)]
        step(module, columns, case, [start + first for first in firsts])
    step(reference, whole, case, [start, start] if start else ())
    assert_same_columns(joined(shards), whole)


@cases
def test_shards_of_the_reference(case):
    for start in starts_of(case):
        check_shards(reference, case, start)


@cases
def test_shards_of_native_code(case, capability):
    for start in starts_of(case):
        check_shards(native, case, start)


@cases
def test_the_offset_is_what_the_bits_depend_on(case):
    """Each tensor has its own: without it, or with its neighbour's, much of what is rounded at random differs."""
    found = []
    for offsets in ((), (0, 0), (128, 2**40), (2**40, 128)):
        columns = formed(case, shapes_of(case))
        step(reference, columns, case, offsets)
        found.append(columns)
    assert_same_columns(found[1], found[0])
    name = "params" if case.param == "stochastic" else "exp_avg_sqs"
    for i in range(2):
        for other, another in pairwise([found[0], *found[2:]]):
            share = float((other[name][i] != another[name][i]).double().mean())
            assert share > 0.05, f"only {share:.2%} of the elements differ"


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("options", [{"master": "stochastic"}, {"state_dtype": "int8"}], ids=str)
def test_the_optimizer_passes_offsets_on(options, backend):
    """Three steps of two shards, each with its place in its slot, and of the whole."""
    if backend == "native" and not native.available()[0]:
        pytest.skip(native.available()[1])
    dtype = BF16 if "master" in options else F32
    whole = (torch.randn(96, 128) * 0.02).to(dtype)
    grads = [torch.randn(96, 128).to(dtype) for _ in range(3)]
    results = []
    for begin, end in ((0, 96), (0, 32), (32, 96)):
        first = torch.nn.Parameter(torch.zeros(2, dtype=dtype))  # the shard is not the first of its list
        param = torch.nn.Parameter(whole[begin:end].clone())
        optimizer = AlrAdamW([("a", first), ("w", param)], lr=1e-3, backend=backend, **options)
        optimizer._slots[0][1].offset = begin * 128
        for grad in grads:
            first.grad, param.grad = torch.ones_like(first), grad[begin:end].clone()
            optimizer.step()
        results.append({"param": param.detach(), **optimizer.state[param]})
    assert any(value.dtype is torch.int8 for value in results[0].values()) == ("state_dtype" in options)
    for name, value in results[0].items():
        if value.ndim:
            assert same_bits(torch.cat([part[name] for part in results[1:]]), value), name
