"""Accumulating and finalising importance on both backends, against the oracle and against each other."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from cases import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    SHAPES,
    copied,
    guards_are_untouched,
    operands,
    relative_error,
    same_bits,
    within,
)

from alr_kernels import AlrAdamW, _ops
from alr_kernels.importance import native, reference

NAMES = reference.STATISTICS
MODULES = {"reference": reference, "native": native}
WHY_NOT = native.unavailable_reason("cpu")
backends = pytest.mark.parametrize(
    "backend", ["reference", pytest.param("native", marks=pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT))]
)
both_xi = pytest.mark.parametrize(("xi", "relative"), [(1e-3, False), (1e-9, False), (0.1, True)])
param_dtypes = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)


def recording(dtype, grad_dtype=F32, shapes=SHAPES):
    """Return ω, g, θ and θ_before (or θ_start) of a recording that moved a tenth of the weights' size."""
    columns = operands(dtype, grad_dtype, shapes=shapes)
    return {
        "path_integrals": columns["path_integrals"],
        "grads": columns["grads"],
        "params": columns["params"],
        "starts": columns["anchors"],
    }


def finalise(backend, data, xi, relative=False):
    """Return Ω as float32, and statistics; other formats: test_finalise.py."""
    lists = (data["path_integrals"], data["params"], data["starts"])
    found, stats, counts = MODULES[backend].finalise(*lists, ["fp32"] * len(lists[0]), xi, relative=relative)
    assert all(x.scales is None and x.format == "fp32" for x in found)
    assert counts.shape == (len(found), reference.BINS)
    return [x.values for x in found], stats


@backends
@pytest.mark.parametrize("maximize", [False, True], ids=("minimise", "maximise"))
@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES, ids=str)
def test_accumulate_matches_oracle(backend, dtype, grad_dtype, maximize):
    data = recording(dtype, grad_dtype)
    before = copied(data)
    lists = (data["path_integrals"], data["grads"], data["params"], data["starts"])
    MODULES[backend].accumulate_(*lists, maximize=maximize)
    for i, omega in enumerate(data["path_integrals"]):
        was, grad, param, start = (before[name][i] for name in ("path_integrals", "grads", "params", "starts"))
        expected = oracle.record(was, grad, start, param, maximize)
        scale = was.double().abs() + (expected - was.double()).abs()
        within(relative_error(omega, expected, scale), "path_integral")
        assert same_bits(data["starts"][i], param), "θ_previous is θ afterwards"
        assert same_bits(data["params"][i], param)
        assert same_bits(data["grads"][i], grad)
    assert all(guards_are_untouched(tensor) for tensors in data.values() for tensor in tensors)


@backends
@both_xi
@param_dtypes
def test_finalise_matches_oracle(backend, dtype, xi, relative):
    data = recording(dtype)
    found, stats = finalise(backend, data, xi, relative)
    assert stats.dtype == F64
    assert stats.shape == (len(SHAPES), len(NAMES))
    for i, importance in enumerate(found):
        expected, row = oracle.finalise(data["path_integrals"][i], data["params"][i], data["starts"][i], xi, relative)
        within(relative_error(importance, expected, expected), "importance")
        assert importance.dtype == F32
        assert bool((importance >= 0).all())
        got = dict(zip(NAMES, stats[i].tolist(), strict=True))
        assert got.keys() == row.keys()
        for name, value in row.items():  # Σω cancels: relative to Σ|ω|
            scale = float(data["path_integrals"][i].double().abs().sum()) if name == "path_integral_sum" else abs(value)
            within(abs(got[name] - value) / scale if got[name] != value else 0.0, "statistics")
    assert all(guards_are_untouched(tensor) for tensors in data.values() for tensor in tensors)


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
@both_xi
@param_dtypes
def test_native_is_the_reference_bit_for_bit(dtype, xi, relative):
    data = recording(dtype, dtype)
    data["path_integrals"][2][::3] = torch.tensor([math.nan, math.inf, -math.inf] * 2)
    twin = copied(data)
    for backend, each in (("native", data), ("reference", twin)):
        MODULES[backend].accumulate_(each["path_integrals"], each["grads"], each["params"], copied(each)["starts"])
    for got, expected in zip(data["path_integrals"], twin["path_integrals"], strict=True):
        assert same_bits(got, expected)
    (found, stats), (wanted, table) = (finalise(b, d, xi, relative) for b, d in (("native", data), ("reference", twin)))
    if not relative:  # the mean move is summed in another order: its last bit may differ
        assert all(map(same_bits, found, wanted))
    for got, expected in zip(found, wanted, strict=True):
        assert torch.allclose(got, expected, rtol=3e-7, atol=0)
    sizes = torch.stack([torch.where(t.isfinite(), t, 0.0).double().abs().sum() for t in data["path_integrals"]])
    assert bool(((stats[:, 0] - table[:, 0]).abs() <= 1e-6 * sizes).all())  # a sum that cancels
    assert torch.allclose(stats[:, 1:], table[:, 1:], rtol=1e-6, atol=1e-12)
    assert torch.equal(stats[:, -2:], table[:, -2:])


def one(backend, omega, end, start, xi, relative=False, dtype=F32):
    data = {"path_integrals": [torch.tensor(omega)], "params": [torch.tensor(end, dtype=dtype)]}
    data["starts"] = [torch.tensor(start, dtype=dtype)]
    (importance,), stats = finalise(backend, data, xi, relative)
    return importance, dict(zip(NAMES, stats[0].tolist(), strict=True))


@backends
def test_statistics_mean_what_their_names_say(backend):
    importance, row = one(backend, [3.0, -1.0, 0.5, -0.25], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], xi=0.5)
    assert importance.tolist() == [2.0, 0.0, 1.0, 0.0]  # 3/(1 + ½), clamped, ½/½, clamped
    assert row == {
        "path_integral_sum": 2.25, "negative_mass": 1.25, "l2": math.sqrt(5.0), "max": 2.0, "mean": 0.75,
        "numel": 4.0, "nonfinite": 0.0,
    }  # fmt: skip


@backends
def test_clamp_is_at_the_end_only(backend):
    """ω of +1 and −1 cancels: a clamp at each step would have kept the +1."""
    omega, start = [torch.zeros(1)], [torch.zeros(1)]
    for grad, param in ((-1.0, 1.0), (-1.0, 0.0)):
        MODULES[backend].accumulate_(omega, [torch.tensor([grad])], [torch.tensor([param])], start)
    assert omega[0].item() == 0.0
    assert one(backend, omega[0].tolist(), [0.0], [0.0], 1e-3)[0].item() == 0.0


@backends
def test_non_finite_elements_are_counted_and_left_out(backend):
    omega = [math.nan, math.inf, -math.inf, 1.0, -2.0]
    importance, row = one(backend, omega, [0.0] * 5, [0.0] * 5, xi=1.0)
    assert importance.tolist() == [0.0, 0.0, 0.0, 1.0, 0.0]
    assert row == {
        "path_integral_sum": -1.0, "negative_mass": 2.0, "l2": 1.0, "max": 1.0, "mean": 0.2, "numel": 5.0,
        "nonfinite": 3.0,
    }  # fmt: skip


@backends
@pytest.mark.parametrize("relative", [False, True])
def test_tensor_that_never_moved(backend, relative):
    importance, row = one(backend, [0.0] * 3, [0.1] * 3, [0.1] * 3, xi=1e-3, relative=relative)
    assert importance.tolist() == [0.0, 0.0, 0.0]
    assert (row["nonfinite"], row["max"], row["l2"]) == (0.0, 0.0, 0.0)


@backends
def test_tensor_that_came_back_to_its_start_with_relative_xi(backend):
    """All moves are 0 and so is ξ·mean(move²), while ω is not: Ω cannot be inf, nor may good ω count as non-finite."""
    importance, row = one(backend, [0.5, -0.5], [0.1, 0.1], [0.1, 0.1], xi=1e-3, relative=True)
    assert bool(torch.isfinite(importance).all())
    assert row["nonfinite"] == 0.0


@backends
@pytest.mark.parametrize("relative", [False, True])
def test_empty_tensors(backend, relative):
    data = recording(F32, shapes=((0,), (3, 0)))
    found, stats = finalise(backend, data, 1e-3, relative)
    assert [tuple(t.shape) for t in found] == [(0,), (3, 0)]
    assert torch.equal(stats, torch.zeros(2, len(NAMES), dtype=F64))
    found, stats = finalise(backend, {name: [] for name in data}, 1e-3, relative)
    assert found == []
    assert stats.shape == (0, len(NAMES))


@backends
def test_relative_xi_is_in_units_of_the_mean_squared_move(backend):
    """Scaling the moves and ω together by c and c² leaves the relative importance as it is."""
    omega, move = [0.3, 0.1, 0.7], [0.1, 0.2, 0.3]
    plain, _ = one(backend, omega, move, [0.0] * 3, 0.5, relative=True)
    scaled, _ = one(backend, [w * 64 for w in omega], [m * 8 for m in move], [0.0] * 3, 0.5, relative=True)
    assert torch.allclose(plain, scaled, rtol=1e-6)
    mean_square = sum(m * m for m in move) / 3
    expected = [w / (m * m + 0.5 * mean_square) for w, m in zip(omega, move, strict=True)]
    assert plain.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("layout", ["transposed", "holes"])
def test_dispatch_takes_operands_in_different_layouts(layout):
    arrange = {"transposed": lambda t: t.t().contiguous().t(), "holes": lambda t: t.repeat_interleave(2, 1)[:, ::2]}[
        layout
    ]
    data = recording(F32, shapes=((6, 10),))
    strided = {name: [arrange(t.clone()) if name != "params" else t.clone() for t in ts] for name, ts in data.items()}
    for each in (data, strided):
        _ops.accumulate_(each["path_integrals"], each["grads"], each["params"], each["starts"])
    for name, tensors in data.items():
        assert all(map(same_bits, tensors, strided[name])), name
    data["starts"], strided["starts"] = ([torch.full((6, 10), 0.5)], [arrange(torch.full((6, 10), 0.5))])
    (got, stats), (expected, table) = (
        _ops.finalise(each["path_integrals"], each["params"], each["starts"], ["fp32"], 1e-3)[:2]
        for each in (strided, data)
    )
    assert same_bits(got[0].values, expected[0].values)
    assert torch.allclose(stats, table, rtol=1e-12)


def test_mixed_dtypes_go_to_the_backends_that_serve_them():
    parts = [recording(dtype, shapes=((5,), (2, 3))) for dtype in (F32, F64, BF16)]
    data = {name: [t for part in parts for t in part[name]] for name in parts[0]}
    formats = ["fp64" if param.dtype is F64 else "fp32" for param in data["params"]]
    found, stats, _ = _ops.finalise(data["path_integrals"], data["params"], data["starts"], formats, 1e-3)
    for i, importance in enumerate(x.values for x in found):
        expected, row = oracle.finalise(data["path_integrals"][i], data["params"][i], data["starts"][i], 1e-3)
        within(relative_error(importance, expected, expected), "importance")
        assert float(stats[i, 2]) == pytest.approx(row["l2"], rel=1e-6)


def test_non_finite_recording_is_refused_unless_allowed():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = AlrAdamW([("w", param)], record=True)
    param.grad = torch.tensor([1.0, 1.0, math.nan])
    optimizer.step()
    with pytest.raises(ValueError, match=r"1 non-finite element\(s\) in 'w'.*allow_nonfinite=True"):
        optimizer.recorded_importance()
    importance = optimizer.recorded_importance(allow_nonfinite=True)
    assert importance.stats["w"].nonfinite == 1
    assert importance["w"][2] == 0
    assert float(importance["w"][0]) > 0


def test_reading_the_recording_changes_nothing():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = AlrAdamW([("w", param)], record=True)
    param.grad = torch.ones(3)
    optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[param].items()}
    first, second = optimizer.recorded_importance(1e-4), optimizer.recorded_importance(1e-4)
    assert same_bits(first["w"], second["w"])
    assert first["w"].data_ptr() != second["w"].data_ptr()
    assert all(same_bits(optimizer.state[param][key], value) for key, value in before.items())
