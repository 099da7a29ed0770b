"""The pull of importance kept as rank1: closed forms, against dense float64 on what it decodes to."""

from __future__ import annotations

import pytest
import torch
from cases import F32, F64
from lora_cases import SHAPES, Case, case, check_pull

from alr_kernels import _ops_lora
from alr_kernels.codecs.encoded import Encoded
from alr_kernels.codecs.reference import encode_rank1
from alr_kernels.lora import penalty
from alr_kernels.lora.penalty import SIDES
from alr_kernels.lora.reference import Product

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
sides = pytest.mark.parametrize("sides", SIDES)
curvatures = pytest.mark.parametrize("curvature", [False, True])


def ranked(shape, dtype=F32, seed=0) -> Case:
    c = case(shape, dtype=dtype, seed=seed)
    return c._replace(importance=Encoded(*encode_rank1(c.importance.values), "rank1"))


def pulled(cases, sides="both", curvature=False, backend="auto"):
    scales = torch.tensor([c.scale for c in cases], dtype=F64)
    lists = ([c.importance for c in cases], scales, [c.drift for c in cases], [c.factors for c in cases])
    return _ops_lora.lora_pull(*lists, sides, curvature, backend)


@shapes
@sides
@curvatures
def test_the_closed_form_equals_the_dense_formula(shape, sides, curvature):
    c = ranked(shape)
    got = penalty.pull_rank1(c.importance, c.scale, c.drift, c.factors, sides, curvature)
    check_pull(got, c, sides, curvature)
    dense = penalty.pull(c.importance, c.scale, c.drift, c.factors, sides, curvature)  # a few rows at a time
    check_pull(dense, c, sides, curvature)
    for a, b in zip(got, dense, strict=True):
        assert (a is None) is (b is None)
        assert a is None or (a.dtype, a.shape, a.is_contiguous()) == (b.dtype, b.shape, b.is_contiguous())


@shapes
def test_float64_factors_are_computed_in_float64(shape):
    """As far as the float32 numbers of Ω's factors are exact."""
    c = ranked(shape, F64)
    wide = c.importance.values.double()[:, None] * c.importance.scales.double()
    exact = c._replace(importance=Encoded.dense(wide))
    (got,) = pulled([c], curvature=True)
    check_pull(got, exact, curvature=True, limit=1e-13)
    assert got.grad_up.dtype is F64


@shapes
def test_the_value_is_in_float64(shape):
    c = ranked(shape)
    (got,) = pulled([c], "none")
    rows, columns = (side.double() for side in c.importance[:2])
    gap = c.drift.left.double() @ c.drift.right.double()
    expected = 0.5 * c.scale * (torch.outer(rows, columns) * gap * gap).sum()
    torch.testing.assert_close(got.value, expected, rtol=1e-9, atol=0)


@sides
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_pairs_of_other_forms_keep_their_places(sides, backend, dtype):
    dense, few = SHAPES[3:7], SHAPES[5:9]
    cases = [c for pair in zip(dense, few, strict=True) for c in (case(pair[0], dtype=dtype), ranked(pair[1], dtype))]
    for order in (cases, cases[::-1]):
        for got, c in zip(pulled(order, sides, True, backend), order, strict=True):
            check_pull(got, c, sides, True)


@pytest.mark.parametrize("curvature", [False, True])
def test_no_importance_pulls_nothing(curvature):
    c = ranked((33, 256, 4))
    zeros = c._replace(importance=Encoded(*encode_rank1(torch.zeros(33, 256)), "rank1"))
    (got,) = pulled([zeros], curvature=curvature)
    assert not any(part.any() for part in got if part is not None)


def test_a_scale_may_be_a_tensor_of_the_device():
    c = ranked((33, 256, 4))
    plain = penalty.pull_rank1(c.importance, c.scale, c.drift, c.factors, "both", True)
    scale = torch.tensor(c.scale, dtype=F64)
    for a, b in zip(penalty.pull_rank1(c.importance, scale, c.drift, c.factors, "both", True), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_nothing_dense_is_made():
    """2^17 × 2^17 elements would be 64 GiB."""
    m = n = 2**17
    generator = torch.Generator().manual_seed(0)

    def product(k):
        return Product(torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator))

    importance = Encoded(torch.rand(m, generator=generator), torch.rand(n, generator=generator) / n, "rank1")
    pull = penalty.pull_rank1(importance, 0.5, product(2), product(1), "both", True)
    assert pull.value > 0
    assert pull.grad_up.shape == pull.curvature_up.shape == (m, 1)
    assert pull.grad_down.shape == pull.curvature_down.shape == (1, n)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_backend_that_is_not_there_is_still_named(backend):
    reason = _ops_lora.lora_backends("cpu", F64)[backend]
    with pytest.raises(RuntimeError, match=backend):
        pulled([ranked((13, 17, 3), F64)], backend=backend)
    assert "reference" in reason
