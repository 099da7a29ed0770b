"""fisher_linear_ on every backend and instruction set, against per-sample gradients in float64."""

from __future__ import annotations

import pytest
import torch
from cases import BF16, F16, F32, F64, same_bits

from alr_kernels import _ops
from alr_kernels.importance import native
from alr_kernels.importance.estimators import reference

WHY_NOT = native.unavailable_reason("cpu")
if not WHY_NOT:
    from alr_kernels import _C
NATIVE = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)

# samples, tokens, rows, columns: below a micro-tile, edges of it in both directions, one token a sample, more tokens
# than are packed at a time, several tiles, nothing at all.
SHAPES = [
    (1, 1, 1, 1),
    (3, 7, 13, 17),
    (2, 5, 8, 32),
    (2, 5, 9, 33),
    (129, 1, 20, 40),
    (5, 1, 1, 3),
    (2, 128, 24, 64),
    (2, 129, 25, 65),
    (3, 300, 31, 95),
    (2, 16, 200, 300),
    (0, 4, 3, 3),
    (2, 0, 3, 3),
    (2, 3, 0, 3),
]


def case(shape, dtype=F32, seed=0):
    samples, tokens, rows, columns = shape
    generator = torch.Generator().manual_seed(seed)
    deltas = torch.randn(samples, tokens, rows, generator=generator)
    inputs = torch.randn(samples, tokens, columns, generator=generator) * 3
    importance = torch.rand(rows, columns, generator=generator)
    return importance, deltas.to(dtype), inputs.to(dtype)


def expected(importance, deltas, inputs, scale, power):
    """Return Ω with every per-sample gradient in memory, in float64."""
    grads = torch.einsum("ntr,ntc->nrc", deltas.double(), inputs.double())
    return importance.double() + scale * grads.abs().pow(power).sum(0)


def bound(deltas, inputs, scale, power):
    """Return what rounding may change: some ulps of the terms that are summed, raised to the power."""
    sizes = torch.einsum("ntr,ntc->nrc", deltas.double().abs(), inputs.double().abs())
    return 4e-6 * (1 + scale * sizes.pow(power).sum(0))


def check(got, importance, deltas, inputs, scale, power):
    error = (got.double() - expected(importance, deltas, inputs, scale, power)).abs()
    assert bool((error <= bound(deltas, inputs, scale, power)).all()), f"largest error {error.max():.3g}"


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_matches_float64(capability, shape, dtype, power):
    importance, deltas, inputs = case(shape, dtype)
    got = importance.clone()
    native.fisher_linear_(got, deltas, inputs, 0.25, power)
    check(got, importance, deltas, inputs, 0.25, power)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_matches_float64(shape, power):
    importance, deltas, inputs = case(shape)
    got = importance.clone()
    reference.fisher_linear_(got, deltas, inputs, 0.25, power)
    check(got, importance, deltas, inputs, 0.25, power)


def test_a_sample_is_squared_alone():
    """The square of the sum would be 0 here."""
    deltas, inputs = torch.tensor([[[1.0]], [[-1.0]]]), torch.ones(2, 1, 1)
    importance = torch.zeros(1, 1)
    _ops.fisher_linear_(importance, deltas, inputs, 0.5)
    assert importance.item() == 1.0


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("exponents", [(-20, 20), (19, -25), (-12, 3), (0, 0)], ids=str)
def test_small_and_large_factors_do_not_leave_float32(exponents, tokens):
    """The product is of ordinary size, or its square still is; δ² or x² alone need not be."""
    importance, deltas, inputs = case((4, tokens, 40, 70))
    deltas, inputs = deltas * 10.0 ** exponents[0], inputs * 10.0 ** exponents[1]
    importance.zero_()
    got = importance.clone()
    _ops.fisher_linear_(got, deltas, inputs, 0.25)
    assert bool(torch.isfinite(got).all())
    check(got, importance, deltas, inputs, 0.25, 2)


@NATIVE
@pytest.mark.parametrize("shape", [(3, 300, 31, 95), (129, 1, 200, 40), (4, 16, 500, 300)], ids=str)
def test_bits_do_not_depend_on_threads(capability, shape):
    importance, deltas, inputs = case(shape)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(importance.clone())
            native.fisher_linear_(results[-1], deltas, inputs, 1.0)
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(result, results[0]) for result in results[1:])


@NATIVE
def test_nothing_beyond_the_importance_is_written(capability):
    for rows, columns in ((13, 17), (9, 33), (145, 257)):
        importance, deltas, inputs = case((2, 3, rows, columns))
        around = torch.full((rows * columns + 128,), 7.0)
        inside = around[64:-64].view(rows, columns).copy_(importance)
        native.fisher_linear_(inside, deltas, inputs, 1.0)
        check(inside, importance, deltas, inputs, 1.0, 2)
        assert bool((around[:64] == 7).all())
        assert bool((around[-64:] == 7).all())


def test_any_strides_and_mixed_dtypes():
    importance, deltas, inputs = case((3, 5, 12, 20))
    turned = importance.T.contiguous().T
    _ops.fisher_linear_(
        turned, deltas.transpose(0, 1).contiguous().transpose(0, 1), inputs.repeat_interleave(2, -1)[..., ::2], 0.5
    )
    check(turned, importance, deltas, inputs, 0.5, 2)
    expanded = torch.ones(1, 1, 1).expand(3, 5, 12)
    got = importance.clone()
    _ops.fisher_linear_(got, expanded, inputs.to(BF16), 0.5, 1)
    check(got, importance, expanded, inputs.to(BF16), 0.5, 1)


def test_float64_goes_through_the_reference():
    importance, deltas, inputs = (tensor.double() for tensor in case((3, 5, 12, 20)))
    got = importance.clone()
    _ops.fisher_linear_(got, deltas, inputs, 0.5)
    assert got.dtype == F64
    torch.testing.assert_close(got, expected(importance, deltas, inputs, 0.5, 2), rtol=1e-13, atol=0)


def test_not_finite_gradients_show():
    importance, deltas, inputs = case((2, 3, 9, 33))
    deltas[1, 2, 4] = float("nan")
    inputs[0, 0, 1] = float("inf")
    _ops.fisher_linear_(importance, deltas, inputs, 1.0)
    bad = ~importance.isfinite()
    assert bool(bad[4].all())
    assert bool(bad[:, 1].all())
    assert int(bad.sum()) == 33 + 9 - 1


def test_autograd_sees_the_write():
    importance, deltas, inputs = case((2, 3, 4, 5))
    version = importance._version
    _ops.fisher_linear_(importance, deltas, inputs, 1.0)
    assert importance._version > version


def test_registered_op():
    importance, deltas, inputs = case((2, 3, 4, 5))
    torch.library.opcheck(
        torch.ops.alr_kernels.fisher_linear_.default,
        (importance, deltas, inputs, 1.0, 2),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compiled():
    importance, deltas, inputs = case((2, 3, 4, 5))
    compiled, eager = importance.clone(), importance.clone()
    torch.compile(lambda *operands: _ops.fisher_linear_(*operands, 0.5, 1), backend="eager", fullgraph=True)(
        compiled, deltas, inputs
    )
    _ops.fisher_linear_(eager, deltas, inputs, 0.5, 1)
    assert same_bits(compiled, eager)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"power": 3}, ValueError, r"power: expected 2 \(Fisher\) or 1 \(MAS\), got 3"),
        ({"deltas": torch.zeros(2, 3)}, ValueError, r"deltas \[n, t, rows\].*got \(4, 5\), \(2, 3\) and \(2, 3, 5\)"),
        ({"deltas": torch.zeros(1, 3, 4)}, ValueError, r"got \(4, 5\), \(1, 3, 4\) and \(2, 3, 5\)"),
        ({"inputs": torch.zeros(2, 3, 6)}, ValueError, r"\(2, 3, 6\)"),
        ({"importance": torch.zeros(4, 5, dtype=BF16)}, TypeError, "importance in float32 or float64"),
        ({"inputs": torch.zeros(2, 3, 5, dtype=torch.int64)}, TypeError, "torch.int64"),
        ({"inputs": torch.zeros(2, 3, 5, device="meta")}, ValueError, "on one device, got 'cpu', 'meta'"),
    ],
)
def test_refuses(change, error, message):
    importance, deltas, inputs = case((2, 3, 4, 5))
    operands = {"importance": importance, "deltas": deltas, "inputs": inputs, "scale": 1.0, "power": 2} | change
    with pytest.raises(error, match=message):
        _ops.fisher_linear_(**operands)


@NATIVE
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"importance": 0}, "expected importance to be an address, got 0"),
        ({"inputs": 0}, "expected inputs to be an address, got 0"),
        ({"samples": -1}, "expected samples of 0 or more, got -1"),
        ({"columns": -1}, "expected columns of 0 or more, got -1"),
        ({"dtype": 3}, r"expected dtype in \[0, 3\), got 3"),
        ({"power": 0}, "expected power of 1 or 2, got 0"),
        ({"num_threads": 0}, "expected num_threads of 1 or more, got 0"),
    ],
)
def test_raw_call_refuses(change, message):
    buffer = torch.zeros(64)
    arguments = dict.fromkeys(("importance", "deltas", "inputs"), buffer.data_ptr())
    arguments |= {"samples": 1, "tokens": 2, "rows": 2, "columns": 2, "scale": 1.0, "dtype": 0, "power": 2}
    with pytest.raises(ValueError, match=message):
        _C.fisher_linear_(**(arguments | {"num_threads": 1} | change))
