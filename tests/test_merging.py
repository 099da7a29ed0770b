"""Two importances in one: every rule against the oracle, on every form of storage, and what becomes of the rest."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import BF16, F32, same_bits

from alr_kernels import Importance
from alr_kernels.importance import TensorStats

SHAPE = (32, 128)
RULES = [("sum", None), ("max", None), ("weighted", 0.3), ("weighted", 0.0), ("decayed", 0.9), ("decayed", 1.0)]
rules = pytest.mark.parametrize(("rule", "weight"), RULES)


def spread(seed, *shape, decades=4.0):
    generator = torch.Generator().manual_seed(seed)
    return 10 ** (decades * (torch.rand(shape or SHAPE, generator=generator) - 0.5))


def expected_of(rule, weight, a, b):
    a, b = (None if x is None else x.double() for x in (a, b))
    a, b = (torch.zeros_like(b if a is None else a) if x is None else x for x in (a, b))
    return {
        "sum": a + b,
        "max": torch.maximum(a, b),
        "weighted": (weight or 0) * a + (1 - (weight or 0)) * b,
        "decayed": (weight or 0) * a + b,
    }[rule]


@rules
def test_rules_are_the_formulas_and_what_one_lacks_is_zero(rule, weight):
    a = Importance({"both": spread(1), "first": spread(2, 7)}, method="mas", steps=3)
    b = Importance({"both": spread(3), "second": spread(4, 3, 5)}, method="mas", steps=4)
    merged = a.merged(b, rule, weight)
    assert list(merged) == ["both", "first", "second"]
    for name in merged:
        wanted = expected_of(rule, weight, a.get(name), b.get(name))
        torch.testing.assert_close(merged[name].double(), wanted, rtol=2e-7, atol=0)
        assert merged[name].dtype is F32
        row, fresh = merged.stats[name], TensorStats.of(merged[name])
        assert row[:2] == fresh[:2] == (None, None)
        assert row[2:-1] == pytest.approx(fresh[2:-1], rel=1e-6)
        assert row.histogram == fresh.histogram
    assert (merged.method, merged.steps, merged.is_normalized) == ("mas", 7, False)


@rules
@pytest.mark.parametrize("second", ["fp32", "bf16", "int8", "int4", "rank1"])
@pytest.mark.parametrize("first", ["fp32", "bf16", "int8", "int4", "rank1"])
def test_result_has_the_form_of_the_first(first, second, rule, weight):
    a = Importance({"both": spread(1), "first": spread(2)}).astype(first)
    b = Importance({"both": spread(3), "second": spread(4), "vector": spread(5, 4)}).astype(second)
    merged = a.merged(b, rule, weight)
    assert {merged.encoded(name).format for name in ("both", "first", "second")} == {first}
    assert merged.encoded("vector").format == "fp32"
    for name in merged:
        wanted = expected_of(rule, weight, a.get(name), b.get(name))  # of what the codes mean
        if first in ("int8", "int4") and name != "vector":
            codes, scales = merged.encoded(name)[:2]
            codes = oracle.unpack(codes) if first == "int4" else codes
            kind = f"importance {first[3:]}"
            assert same_bits(scales.double(), oracle.code_scales(wanted.float(), kind))
            off = codes.double() - oracle.encode(wanted.float(), kind)[0]
            assert off.abs().max() <= 1
            assert off.count_nonzero() < 20, "more than ties differ"
        elif first == "bf16" and name != "vector":
            assert merged[name].dtype is BF16
            torch.testing.assert_close(merged[name].double(), wanted, rtol=2**-8, atol=0)
        elif first == "rank1" and name != "vector":
            product = torch.outer(wanted.sum(1), wanted.sum(0) / wanted.sum()).nan_to_num()  # 0 of no importance
            torch.testing.assert_close(merged[name].double(), product, rtol=5e-7, atol=0)
        else:
            torch.testing.assert_close(merged[name].double(), wanted, rtol=2e-7, atol=0)


def test_sums_of_the_path_integral_go_along():
    row = TensorStats(2.0, 0.5, 1.0, 1.0, 1.0, 2, 1)
    known = Importance({"w": torch.ones(2)}, method="path_integral", xi=0.1, stats={"w": row})
    unknown = Importance({"w": torch.ones(2)}, method="path_integral", xi=0.1)
    other = Importance({"v": torch.ones(2)}, method="path_integral", xi=0.2, stats={"v": row})
    twice = known.merged(known, "decayed", 0.5)
    assert (twice.stats["w"].path_integral_sum, twice.stats["w"].negative_mass) == (3.0, 0.75)
    assert (twice.stats["w"].nonfinite, twice.xi) == (2, 0.1)
    assert known.merged(unknown).stats["w"].path_integral_sum is None
    assert known.merged(known, "max").stats["w"].path_integral_sum is None
    both = known.merged(other, "weighted", 0.25)
    assert both.xi is None
    assert (both.stats["w"].path_integral_sum, both.stats["v"].path_integral_sum) == (0.5, 1.5)


def test_estimators_merge_once_they_are_normalized():
    fisher, mas = (Importance({"w": spread(i)}, method=method) for i, method in enumerate(("fisher", "mas")))
    merged = fisher.normalized().merged(mas.normalized(), "weighted", 0.5)
    assert merged.method == "fisher+mas"
    assert merged.stats["w"].mean == pytest.approx(1.0, rel=1e-6)
    again = merged.merged(mas.normalized(), "decayed", 0.9)  # the unit stays
    assert (again.method, again.is_normalized) == ("fisher+mas", True)
    with pytest.raises(ValueError, match="both normalized"):
        merged.merged(mas)
    with pytest.raises(ValueError, match="both normalized"):
        fisher.normalized().merged(fisher.normalized()).merged(fisher)
    assert fisher.normalized().select(["w"]).is_normalized


def test_an_empty_one_merges():
    full = Importance({"w": torch.rand(32, 128)}).astype("int4")
    for merged in (Importance({}).merged(full), full.merged(Importance({}))):
        assert merged.encoded("w").format == "int4"
        assert torch.equal(merged["w"], full["w"])


def test_neither_is_changed_and_names_may_be_wrapped():
    a, b = Importance({"module.w": spread(1)}).astype("int4"), Importance({"w": spread(2)})
    before = [t.clone() for t in (*a.encoded("w")[:2], b["w"])]
    a.merged(b)
    assert all(torch.equal(x, y) for x, y in zip(before, (*a.encoded("w")[:2], b["w"]), strict=True))
    assert list(a.merged(b)) == ["w"]
