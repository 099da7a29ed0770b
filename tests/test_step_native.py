"""The C++ step and codec on every instruction set of this machine: the reference's bits, and what is C++'s own."""

from __future__ import annotations

import math

import pytest
import torch
from cases import (
    BF16,
    CHOICES,
    COLUMNS,
    F32,
    F64,
    GUARD,
    HYPER,
    Case,
    assert_same_columns,
    copied,
    counts_of,
    decoded,
    encoded,
    formed,
    guarded,
    guards_are_untouched,
    numbers_of,
    same_bits,
    ulp,
)
from test_step_formats import PAIRWISE, name_of

from alr_kernels.codecs import native as codec
from alr_kernels.codecs import reference as codec_reference
from alr_kernels.codecs import rounding
from alr_kernels.importance import native as importance_native
from alr_kernels.step import native, reference
from alr_kernels.step.plan import STATISTICS, Operands, Options

if not native.available()[0]:
    pytest.skip(native.available()[1], allow_module_level=True)

_C = native._C
STIFFNESS = STATISTICS.index("stiffness")
SIZES = ((0,), (1,), (17,), (127,), (128,), (129,), (4096,), (3, 5, 7), (40, 128), (33, 384), (257, 256))
CODED_SIZES = ((0, 128), (1, 128), (40, 128), (33, 384), (257, 256))
SMALLEST = Case("split", "bf16", "int8", "int4", "bf16")
# One of each kind of loop: alone in its format, with halves, with codes, with random rounding.
VARIETY = [Case(), SMALLEST, Case("fp16", "fp16", anchor="fp16"), Case("stochastic", "bf16", "bf16", "int8", "bf16")]
cases = pytest.mark.parametrize("case", VARIETY, ids=name_of)
# The loop of the smallest form, and every loop that is all but it.
NEARLY_SMALLEST = [
    SMALLEST._replace(**{name: value}, mode=mode)
    for mode in ("proximal", "coupled")
    for name in ("param", "grad", "moments", "importance", "anchor")
    for value in CHOICES[name]
]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def sizes_of(case):
    return CODED_SIZES if case.coded else SIZES


def step(implementation, columns, options, rotation=0, **hyper):
    """Take a step and return its statistics."""
    statistics = torch.full((len(columns["params"]), len(STATISTICS)), math.nan, dtype=F64)
    numbers = numbers_of(columns, counts_of(columns, rotation), **hyper)
    implementation.step_(Operands(**columns), numbers, options, statistics)
    return statistics


def assert_guarded(columns):
    assert all(guards_are_untouched(tensor) for tensors in columns.values() for tensor in tensors)


@pytest.mark.parametrize("case", [*PAIRWISE, *dict.fromkeys(NEARLY_SMALLEST)], ids=name_of)
def test_bits_are_the_references(case, capability):
    columns = formed(case, sizes_of(case))
    expected = copied(columns)
    options = case.options._replace(precise=True)
    hyper = {"clip": case.clip, "inverse_scale": case.inverse_scale}
    for rotation in range(2):
        got = step(native, columns, options, rotation, **hyper)
        wanted = step(reference, expected, options, rotation, **hyper)
        assert_same_columns(columns, expected)
        scale = wanted.abs()
        scale[:, 3] = (wanted[:, 1] * wanted[:, 2]).sqrt()  # Σ g·pull cancels
        assert bool(((got - wanted).abs() <= 1e-4 * scale).all()), "statistics"
    assert_guarded(columns)


@pytest.mark.parametrize("role", ["params", "grads", "anchors", "importances"])
@cases
def test_special_numbers(case, role, capability):
    odd = torch.tensor([math.nan, math.inf, -math.inf, 1e-42, -1e-42, 0.0, -0.0, 6e-8, 65504.0, 3e38, -3e38])
    if role == "importances":
        odd = odd[odd.sign() >= 0]
    columns = formed(case, sizes_of(case))
    for tensor in columns[role]:
        if tensor.is_floating_point():
            tensor.view(-1)[: len(odd)] = odd[: tensor.numel()].to(tensor.dtype)
    expected = copied(columns)
    for rotation in range(2):
        got = step(native, columns, case.options, rotation)[:, STIFFNESS]
        wanted = step(reference, expected, case.options, rotation)[:, STIFFNESS]
        assert_same_columns(columns, expected)
        assert torch.equal(got.isnan(), wanted.isnan()), "a stiffness that is NaN is not lost"


def test_numbers_beyond_the_last_vector_count_for_nothing(capability):
    columns = formed(Case(), SIZES)
    expected = copied(columns)
    for lists in (columns, expected):
        for name in ("exp_avg_sqs", "grads"):
            for tensor in lists[name]:
                tensor.fill_(1e-3)
    got, wanted = step(native, columns, Options(), eps=0.0), step(reference, expected, Options(), eps=0.0)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("role", ["exp_avg", "exp_avg_sq"])
def test_codes_do_not_pass_the_highest(role, capability):
    """Where a block's largest meets u next to 1, root · top + u rounds to top + 1."""
    case, shape, blocks = Case(moments="int8"), (257, 256), 514
    for key in range(100):
        noise_key = rounding.noise_key(case.options.seed, key, 1)
        u = rounding.dither(noise_key, blocks, codec_reference.BLOCK, torch.device("cpu"))
        if float(u.max()) > 1 - 2**-20:
            break
    place = int(u.argmax())
    columns = formed(case, (shape,))
    columns["grads"][0].view(-1)[place] = 1e3
    expected = copied(columns)
    for implementation, lists in ((native, columns), (reference, expected)):
        implementation.step_(Operands(**lists), numbers_of(lists, [1.0], keys=[key]), case.options)
    assert_same_columns(columns, expected)
    assert int(columns[f"{role}s"][0].view(-1)[place]) == (127 if role == "exp_avg" else 255)


def test_blocks_of_zeros_and_of_extremes(capability):
    columns = formed(SMALLEST, ((6, 128),))
    grad = columns["grads"][0]
    for row, value in enumerate((0.0, 1e-30, 1e30, 1e-42)):
        for name in ("exp_avg_scales", "exp_avg_sq_scales"):
            columns[name][0].view(-1)[row] = value
        grad[row] = value
    for name in ("exp_avgs", "exp_avg_sqs"):
        columns[name][0][:2] = 0
    columns["importance_scales"][0].view(-1)[2:5] = torch.tensor([0.0, math.inf, 1e38], dtype=BF16)
    expected = copied(columns)
    for rotation in range(3):
        step(native, columns, SMALLEST.options, rotation)
        step(reference, expected, SMALLEST.options, rotation)
        assert_same_columns(columns, expected)
    assert int(columns["exp_avg_sqs"][0][0].max()) == 0


@cases
def test_threads_change_no_bit(case, capability, threads):
    results = []
    for count in (1, 2, 5):
        threads(count)
        columns = formed(case, ((257, 256), (3, 128), (513, 128)))
        results.append((columns, step(native, columns, case.options)))
    for columns, statistics in results[1:]:
        assert_same_columns(columns, results[0][0])
        assert same_bits(statistics, results[0][1])


@pytest.mark.parametrize("mode", ["none", "coupled", "proximal"])
@pytest.mark.parametrize("moments", ["fp32", "int8"])
def test_fast_is_near_precise(moments, mode, capability):
    """θ to 4 ulps of what it is made of, moments to 3 roundings; of codes 1 in 50 is the next one."""
    case = Case(moments=moments, importance="none" if mode == "none" else "fp32", mode=mode)
    columns = formed(case, CODED_SIZES)
    before, precise = copied(columns), copied(columns)
    got = step(native, columns, case.options._replace(precise=False))
    wanted = step(native, precise, case.options)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    for i in range(1, len(CODED_SIZES)):
        fast, exact, was = decoded(columns, i), decoded(precise, i), decoded(before, i)
        made_of = [value["params"].abs() for value in (exact, was)] + [(was["params"] * 0 + HYPER["lr"])]
        if mode != "none":
            made_of.append((was["params"] - was["anchors"]).abs())
        unit = ulp(torch.stack(made_of).amax(0), F32)
        assert float(((fast["params"] - exact["params"]).abs() / unit).max()) <= 4
        for name in ("exp_avgs", "exp_avg_sqs"):
            if moments == "int8":
                distance = (columns[name][i].int() - precise[name][i].int()).abs()
                assert int(distance.max()) <= 1
                assert float(distance.double().mean()) < 0.02
            elif mode != "coupled":
                size = was[name].abs() + was["grads"].abs() ** (2 if name == "exp_avg_sqs" else 1)
                assert float(((fast[name] - exact[name]).abs() / size).max()) <= 3 * 2.0**-24


def test_fast_keeps_nan_and_zero(capability):
    columns = formed(Case(), ((64,),))
    options = Options(precise=False)
    columns["params"][0][:20] = math.nan
    columns["grads"][0][20:40] = math.inf
    for name in ("grads", "exp_avgs", "exp_avg_sqs", "importances"):
        columns[name][0][40:] = 0.0
    expected = columns["params"][0][40:] * float(torch.tensor(1 - HYPER["lr"] * HYPER["weight_decay"]))
    step(native, columns, options)
    assert bool(columns["params"][0][:20].isnan().all())
    assert bool((columns["exp_avg_sqs"][0][20:40] == math.inf).all())
    assert same_bits(columns["params"][0][40:], expected), "0 / √0 + eps moves nothing"


@cases
def test_found_inf_changes_nothing(case):
    columns = formed(case, sizes_of(case))
    before = copied(columns)
    statistics = step(native, columns, case.options, found_inf=1.0)
    assert_same_columns(columns, before)
    assert bool(statistics.isnan().all())


def test_step_without_parameters():
    native.step_(Operands([], [], [], []), numbers_of({"params": []}, []), Options())


def test_autograd_knows_what_was_written():
    columns = formed(SMALLEST._replace(record=True), ((3, 128),))
    step(native, columns, SMALLEST.options)
    written = {name for name in COLUMNS if columns[name] and columns[name][0]._version > 1}  # 1: guarded()
    assert written == set(COLUMNS) - {"grads", "importances", "anchors", "importance_scales"}


@pytest.mark.parametrize("name", COLUMNS)
def test_sizes_are_checked(name):
    columns = formed(SMALLEST._replace(record=True), ((3, 128), (2, 128)))
    columns[name][1] = guarded(columns[name][1].flatten()[:-1])
    with pytest.raises(ValueError, match=r"bytes|multiples"):
        step(native, columns, SMALLEST.options)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("params", F64), ("grads", torch.int16), ("exp_avgs", torch.float16), ("exp_avg_sqs", BF16), ("anchors", F64)],
)
def test_dtypes_are_checked(name, dtype):
    columns = formed(Case(), ((3, 128), (2, 128)))
    columns[name][1] = columns[name][1].to(dtype)
    with pytest.raises(TypeError, match=name):
        step(native, columns, Options())


def test_codes_need_whole_blocks():
    columns = formed(SMALLEST, ((1, 128),))
    for name, tensors in columns.items():
        tensors[:] = [tensor.flatten()[: tensor.numel() // 2] for tensor in tensors] if "scale" not in name else tensors
    with pytest.raises(ValueError, match=r"scales|multiples of 128"):
        step(native, columns, SMALLEST.options)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(0, 128), (128,), (3, 256), (2, 5, 384), (257, 256)])
def test_importance_codes_are_the_references(shape, bits, dtype, capability):
    generator = torch.Generator().manual_seed(bits)
    omega = torch.exp(torch.randn(shape, generator=generator) * 6)
    omega[torch.rand(shape, generator=generator) < 0.1] = 0.0
    odd = torch.tensor([0.0, -0.0, 1e-45, 1e-38, math.inf, math.nan, 3.4e38])
    for row, value in zip(omega.view(-1, 128)[1:], odd, strict=False):
        row[5] = value
    omega.view(-1, 128)[8:9] = 0.0
    omega.view(-1, 128)[9:10] = 1e-40
    omega = omega.to(dtype)
    codes, scales = encoded(omega, bits, importance_native.merge)
    expected = codec_reference.encode_importance(omega, bits)
    assert same_bits(scales, expected[1])
    assert codes.shape == expected[0].shape
    assert torch.equal(codes, expected[0])
    decoded_importance = codec.decode_importance(codes, scales, bits)
    assert same_bits(decoded_importance, codec_reference.decode_importance(codes, scales, bits))


def test_codec_refuses_scales_of_another_size():
    codes, scales = encoded(torch.ones(2, 256), 8, importance_native.merge)
    with pytest.raises(ValueError, match="scales: expected 4"):
        codec.decode_importance(codes, scales[:1], 8)


def test_codec_writes_nothing_else(capability):
    omega = guarded(torch.rand(3, 128))
    storage = torch.empty(0).set_(omega.untyped_storage()).clone()
    codes, scales = encoded(omega, 4, importance_native.merge)
    assert codes.shape == (3, 64)
    assert scales.shape == (3, 1)
    assert same_bits(torch.empty(0).set_(omega.untyped_storage())[GUARD:-GUARD], storage[GUARD:-GUARD])
