"""Importance written in the form in which it is kept: finalise and merge in every format, statistics, histogram."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from cases import BF16, F16, F32, F64, same_bits

from alr_kernels import _ops
from alr_kernels.codecs import reference as codecs
from alr_kernels.codecs.encoded import Encoded
from alr_kernels.importance import native, reference
from alr_kernels.importance.statistics import histogram

if native.unavailable_reason("cpu"):
    pytest.skip(native.unavailable_reason("cpu"), allow_module_level=True)

from alr_kernels import _C

FORMATS = ("fp32", "bf16", "fp16", "int8", "int4")
CODED = ("int8", "int4")
SHAPES = ((0,), (1,), (17,), (127,), (129,), (65_537,), (3, 5, 7))  # floats only
BLOCKS = ((0, 128), (128,), (3, 256), (2, 5, 384), (257, 256))
SCALES = (1.0, 1e-14, 1e-30, 1e37)  # of ω: squares of Ω leave float32 at both ends
CAPABILITIES = _C.build_info()["cpu_capabilities_detected"]


def recorded(scale, dtype=F32, odd=True, shapes=None):
    """Return ω, θ and θ_start and formats: every format on every shape that it takes."""
    generator = torch.Generator().manual_seed(3)
    rows = [(shape, kept) for shape in shapes or (*SHAPES, *BLOCKS) for kept in FORMATS]
    rows = [(shape, kept) for shape, kept in rows if kept not in CODED or shape[-1] % 128 == 0]
    omega, params, starts = [], [], []
    for shape, _ in rows:
        draws = torch.randn(4, *shape, generator=generator)
        omega.append(draws[0] * torch.exp(3 * draws[1]) * scale)
        if odd and omega[-1].numel() > 8:
            omega[-1].view(-1)[[2, 5, 7]] = torch.tensor([math.nan, math.inf, -math.inf])
        params.append((draws[2] * 0.02).to(dtype))
        starts.append((draws[3] * 0.02).to(dtype))
    return omega, params, starts, [kept for _, kept in rows]


def assert_same(found, expected):
    for i, (x, y) in enumerate(zip(found[0], expected[0], strict=True)):
        assert x.format == y.format
        assert same_bits(x.values, y.values), f"values of tensor {i}, {x.format} {tuple(x.shape)}"
        assert (x.scales is None) == (y.scales is None)
        assert x.scales is None or same_bits(x.scales, y.scales), f"scales of tensor {i}"
    assert torch.equal(found[2], expected[2]), "histograms"


def assert_close_statistics(got, expected, size):
    """``size``: Σ|ω| of each tensor, to which sums that cancel are relative."""
    for column, name in enumerate(reference.STATISTICS):
        unit = expected[:, column].abs() if column else torch.tensor(size, dtype=F64)
        error = torch.where(got[:, column] == expected[:, column], 0.0, got[:, column] - expected[:, column]).abs()
        same = (error <= 1e-6 * unit) | (got[:, column].isnan() & expected[:, column].isnan())
        assert bool(same.all()), f"{name}: {error / unit}"


def sizes_of(omega):
    return [float(torch.where(w.isfinite(), w, 0.0).double().abs().sum()) for w in omega]


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_finalise_writes_what_the_reference_writes(scale, dtype, relative, capability):
    omega, params, starts, formats = recorded(scale, dtype)
    xi = 0.5 if relative else 1e-3
    found = native.finalise(omega, params, starts, formats, xi, relative=relative)
    expected = reference.finalise(omega, params, starts, formats, xi, relative=relative)
    assert_close_statistics(found[1], expected[1], sizes_of(omega))
    if not relative:  # the mean move is summed in another order: its last bit may differ
        assert_same(found, expected)


def test_statistics_and_histogram_are_the_oracles(capability):
    omega, params, starts, formats = recorded(1e-14, odd=False)
    found, stats, counts = native.finalise(omega, params, starts, formats, 1e-3)
    for i, row in enumerate(stats.tolist()):
        expected, names = oracle.finalise(omega[i], params[i], starts[i], 1e-3)
        size = float(omega[i].double().abs().sum())
        for name, value in names.items():
            unit = size if name == "path_integral_sum" else abs(value)
            assert abs(row[reference.STATISTICS.index(name)] - value) <= 1e-6 * unit, name
        wanted = oracle.histogram(expected)
        # an Ω whose float32 lies across a bin's edge from its float64 moves one count
        assert int((counts[i] - wanted).abs().sum()) <= 2 * int(1 + wanted.sum() * 1e-5)
        assert int(counts[i].sum()) == omega[i].numel()
        assert found[i].format == formats[i]


def test_histogram_bins_are_powers_of_four():
    importance = torch.tensor([0.0, 1e-45, 2.0**-64, 2.0**-63, 2.0**-61, 0.25, 0.999, 1.0, 3.99, 4.0, 2.0**63, 3e38])
    (_, _, counts) = native.merge([Encoded.dense(importance)], [None], ["fp32"], (1.0, 0.0))
    assert torch.equal(counts[0], oracle.histogram(importance))
    assert torch.equal(counts[0], histogram(importance))
    assert {b: n for b, n in enumerate(counts[0].tolist()) if n} == {0: 4, 1: 1, 30: 1, 31: 2, 32: 2, 63: 2}


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_change_exactly_at_the_thresholds(bits, capability):
    """Every code, at its threshold and next to it on both sides, beside a block's largest element of 1."""
    top, zero = 2**bits - 1, torch.tensor(0.0)
    edges = codecs.thresholds(top)
    for edge in edges.tolist():
        assert edge == float(np.float32(edge))
    expected = torch.arange(1, top + 1)
    below, above = edges.nextafter(zero), edges.nextafter(torch.tensor(9.0))
    odd = torch.tensor([0.0, 1e-45, 1e-40, 2.0**-126, 1.0, 1 + 2.0**-8])
    values = torch.cat([below, edges, above, odd])
    codes = torch.cat([expected - 1, expected, expected, torch.tensor([0, 0, 0, 0, top, top])])
    for value, code in zip(values.split(100), codes.split(100), strict=True):
        block = torch.cat([value, torch.zeros(127 - len(value)), torch.ones(1)])[None]
        # the scale is 1, also of 1 + 2^-8, a tie which rounds to the even 1
        (found,), *_ = native.merge([Encoded.dense(block)], [None], [f"int{bits}"], (1.0, 0.0))
        assert found.scales.tolist() == [[1.0]]
        got = oracle.unpack(found.values) if bits == 4 else found.values
        assert torch.equal(got[0, : len(code)].long(), code)
        assert torch.equal(found.values, codecs.encode_importance(block, bits)[0])


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_of_what_is_not_finite(bits, capability):
    blocks = torch.rand(4, 128)
    blocks[0, 3], blocks[1, 100], blocks[2, 7] = math.nan, math.inf, -1.0
    (found,), *_ = native.merge([Encoded.dense(blocks)], [None], [f"int{bits}"], (1.0, 0.0))
    expected = codecs.encode_importance(blocks, bits)
    assert same_bits(found.values, expected[0])
    assert same_bits(found.scales, expected[1])


# ---------------------------------------------------------------- merge


def kept_in(kept, values):
    return reference.encoded(values, kept)


def pairs_of(shape, kinds):
    generator = torch.Generator().manual_seed(7)
    first, second, formats = [], [], []
    for a in (*kinds, None):
        for b in (*kinds, None):
            for out in kinds:
                if a or b:
                    x, y = torch.exp(3 * torch.randn(2, *shape, generator=generator))
                    first.append(a and kept_in(a, x))
                    second.append(b and kept_in(b, y))
                    formats.append(out)
    return first, second, formats


@pytest.mark.parametrize("weights", [(0.3, 1.7), None, (1.0, 0.0)], ids=str)
@pytest.mark.parametrize(("shape", "kinds"), [((5, 256), FORMATS), ((131,), FORMATS[:3]), ((0, 128), FORMATS)], ids=str)
def test_merge_is_the_references(weights, shape, kinds, capability):
    first, second, formats = pairs_of(shape, kinds)
    found, expected = (module.merge(first, second, formats, weights) for module in (native, reference))
    assert_same(found, expected)
    assert_close_statistics(found[1], expected[1], [0.0] * len(formats))
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        if formats[i] == "fp32":
            wanted = oracle.merged(a and a.decoded(), b and b.decoded(), weights)
            got = found[0][i].values.double()
            right = ((got - wanted).abs() <= 2e-7 * wanted) | (got == wanted) | (got.isnan() & wanted.isnan())
            assert bool(right.all())  # fp16 has infinities here


def test_encoding_again_is_merging_with_nothing(capability):
    values = torch.rand(3, 256)
    codes, scales = codecs.encode_importance(values, 4)
    (found,), *_ = _ops.merge([None], [Encoded.dense(values)], ["int4"], (0.0, 1.0))
    assert same_bits(found.values, codes)
    assert same_bits(found.scales, scales)
    (again,), *_ = _ops.merge([found], [None], ["int4"], (1.0, 0.0))
    assert same_bits(again.values, codes)


def test_merge_refuses_what_does_not_fit():
    a, b = Encoded.dense(torch.rand(2, 128)), Encoded.dense(torch.rand(128, 2))
    with pytest.raises(ValueError, match="same shape"):
        _ops.merge([a], [b], ["fp32"])
    with pytest.raises(ValueError, match="same shape"):
        _ops.merge([None], [None], ["fp32"])
    with pytest.raises(ValueError, match="multiples of 128"):
        native.merge([Encoded.dense(torch.rand(5))], [None], ["int8"], None)
    cut = kept_in("int8", torch.rand(2, 128))
    with pytest.raises(ValueError, match="scales of first"):
        native.merge([cut._replace(scales=cut.scales[:1])], [None], ["fp32"], None)


@pytest.mark.parametrize("other", ["fp32", "int4"])
def test_layouts_change_no_value(other):
    omega, params, starts = torch.randn(3, 256, 128)
    turned = [t.t().contiguous().t() for t in (omega, params, starts)]
    for kept in ("fp32", "int4"):
        (found,), *stats = _ops.finalise(*([t] for t in turned), [kept], 1e-3)
        (expected,), *wanted = _ops.finalise([omega], [params], [starts], [kept], 1e-3)
        assert torch.equal(found.values, expected.values)
        assert kept == "int4" or found.values.stride() == turned[0].stride()
        assert torch.allclose(stats[0], wanted[0], rtol=1e-6)
        (both,), *_ = _ops.merge([found], [kept_in(other, omega.abs())], [kept], None)
        (right,), *_ = _ops.merge([expected], [kept_in(other, omega.abs())], [kept], None)
        assert torch.equal(both.values, right.values)


def test_threads_and_capabilities_change_no_bit_of_anything():
    omega, params, starts, formats = recorded(1e-14, shapes=((300, 1024), (65_537,), (17,)))
    before, threads = _C.cpu_capability(), torch.get_num_threads()
    results = []
    try:
        for capability, count in [(name, 1) for name in CAPABILITIES] + [(before, 2), (before, 3)]:
            _C.set_cpu_capability(capability)
            torch.set_num_threads(count)
            found = native.finalise(omega, params, starts, formats, 0.1, relative=True)
            results.append((found, native.merge(found[0], found[0][::-1][::-1], formats, (0.3, 0.6))))
    finally:
        _C.set_cpu_capability(before)
        torch.set_num_threads(threads)
    for pair in results[1:]:
        for got, expected in zip(pair, results[0], strict=True):
            assert_same(got, expected)
            assert torch.equal(got[1], expected[1]), "statistics"


def test_ties_of_one_call_with_float64():
    """float64 is the reference's; the rest of the same call is native."""
    wide, narrow = torch.rand(2, 128, dtype=F64), torch.rand(2, 128)
    found, stats, counts = _ops.merge([Encoded.dense(wide), Encoded.dense(narrow)], [None] * 2, ["fp64", "int8"])
    assert found[0].values.dtype is F64
    assert torch.equal(found[0].values, wide)
    assert same_bits(found[1].values, codecs.encode_importance(narrow, 8)[0])
    assert counts.sum(1).tolist() == stats[:, 5].tolist() == [256, 256]


# ---------------------------------------------------------------- registered ops


@pytest.mark.parametrize("weights", [[0.5, 2.0], None], ids=str)
def test_opcheck_importance_as_codes(weights):
    formats = ["int4", "int8", "fp32"]
    lists = [[torch.randn(shape) for shape in ((3, 256), (2, 128), (5,))] for _ in range(3)]
    torch.library.opcheck(torch.ops.alr_kernels.finalise.default, (*lists, formats, 1e-3, False))
    values, scales, *_ = torch.ops.alr_kernels.finalise(*lists, formats, 1e-3)
    absent = (
        [values[0], torch.empty(0), values[2].clone()],
        [scales[0], torch.empty(0), scales[2]],
        ["int4", "", "fp32"],
    )
    arguments = (values, scales, formats, *absent, ["bf16", "int4", "fp16"], weights)
    torch.library.opcheck(torch.ops.alr_kernels.merge.default, arguments)


def test_compiled_importance_calls_the_ops():
    omega, params, starts = (torch.randn(3, 256) for _ in range(3))

    def run(omega, params, starts):
        found, stats, counts = _ops.finalise([omega], [params], [starts], ["int4"], 1e-3)
        (both,), *_ = _ops.merge(found, [None], ["int8"], (2.0, 1.0))
        return found[0].values, both.values, both.scales, stats, counts

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(omega, params, starts)
    assert all(map(torch.equal, compiled, run(omega, params, starts)))


# ---------------------------------------------------------------- more elements than an int32 counts


def available_bytes():
    line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


@pytest.mark.large
def test_more_than_two_to_the_31_elements():
    rows, columns = 2**24 + 3, 128
    numel = rows * columns
    if not Path("/proc/meminfo").exists() or available_bytes() < 6 * 2**30:
        pytest.skip("needs 6 GiB of available memory")
    omega = torch.from_numpy(np.zeros((rows, columns), dtype=np.float32))  # pages that are only read cost nothing
    params, starts = (torch.from_numpy(np.zeros((rows, columns), dtype=np.float32)) for _ in range(2))
    places = [(0, 1.0), (2**31 - 1, 2.0), (2**31, 3.0), (2**31 + 77, 4.0), (numel - 1, 5.0)]
    for place, value in places:
        omega.view(-1)[place] = value
    (found,), stats, counts = native.finalise([omega], [params], [starts], ["int4"], 1.0)
    del params, starts
    assert stats[0].tolist() == [15.0, 0.0, math.sqrt(55.0), 5.0, 15.0 / numel, float(numel), 0.0]
    assert counts[0].tolist() == [numel - 5 if b == 0 else {31: 1, 32: 4}.get(b, 0) for b in range(64)]

    def check(x, factor):
        assert int(x.values.count_nonzero()) == len(places)
        assert x.scales.view(-1)[[0, 2**24 - 1, 2**24, rows - 1]].tolist() == [factor * v for v in (1.0, 2.0, 4.0, 5.0)]
        for place, _ in places:
            byte = int(x.values.view(-1)[place // 2])
            code = byte >> 4 if place % 2 else byte & 15
            assert code == (14 if place == 2**31 else 15), place  # (3/4)^(1/4) · 15 = 13.96

    check(found, 1.0)
    (both,), stats, _ = native.merge([found], [found], ["int4"], (1.0, 1.0))
    check(both, 2.0)
    assert float(stats[0, 3]) == pytest.approx(10.0)
