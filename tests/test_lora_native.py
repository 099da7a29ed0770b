"""LoRA in effective space in C++: every instruction set, number of threads, NaN, empty shapes, and what is refused."""

from __future__ import annotations

import pytest
import torch
from cases import F16, F32, F64, same_bits
from lora_cases import CODED, FORMATS, SHAPES, case, check_pull, check_record, dense

from alr_kernels import _ops_lora
from alr_kernels.codecs.encoded import Encoded
from alr_kernels.lora import native, penalty, reference
from alr_kernels.lora.penalty import SIDES
from alr_kernels.lora.reference import Product

if native.unavailable_reason("cpu"):
    pytest.skip(native.unavailable_reason("cpu"), allow_module_level=True)

from alr_kernels import _C

# Several chunks of rows and of packed columns, with edges of both; a rank whose sums allow two chunks only.
LARGE = [(300, 640, 8), (1001, 1400, 2), (333, 1300, 24), (150, 520, 80)]


def record(cases, clamp=False, gradients=None):
    omegas = [c.path_integral.clone() for c in cases]
    native.record(omegas, gradients or [c.gradient for c in cases], [c.move for c in cases], clamp)
    return omegas


def pull(cases, sides="both", curvature=False, backend=native):
    scales = torch.tensor([c.scale for c in cases], dtype=F64)
    rows = [c.importance for c in cases], scales, [c.drift for c in cases], [c.factors for c in cases]
    return backend.pulls(*rows, sides, curvature)


def tensors(pulls):
    return [tensor for found in pulls for tensor in found if tensor is not None]


# ---- numbers


@pytest.mark.parametrize("clamp", [False, True])
def test_recording(capability, clamp):
    cases = [case(shape) for shape in SHAPES + LARGE]
    for omega, c in zip(record(cases, clamp), cases, strict=True):
        check_record(omega, c, clamp=clamp)


@pytest.mark.parametrize("clamp", [False, True])
def test_recording_of_dense_and_low_rank_gradients_in_one_list(capability, clamp):
    cases = [case(shape) for shape in SHAPES + LARGE]
    gradients = [dense(c.gradient).float() if i % 2 else c.gradient for i, c in enumerate(cases)]
    for omega, c, gradient in zip(record(cases, clamp, gradients), cases, gradients, strict=True):
        check_record(omega, c, gradient, clamp)


@pytest.mark.parametrize("curvature", [False, True])
@pytest.mark.parametrize("sides", SIDES)
def test_pulls_of_every_shape_and_format(capability, sides, curvature):
    cases = [case(shape, kept) for shape in SHAPES + LARGE for kept in ("fp32", "bf16", "fp16")]
    cases += [case(shape, kept) for shape in [*CODED, LARGE[0]] for kept in FORMATS[2:]]
    for got, c in zip(pull(cases, sides, curvature), cases, strict=True):
        check_pull(got, c, sides, curvature)


def test_one_pair_gives_the_bits_that_it_gives_in_a_list(capability):
    cases = [case(shape, seed=i) for i, shape in enumerate(SHAPES + LARGE)]
    together = tensors(pull(cases, curvature=True)) + record(cases)
    alone = [pull([c], curvature=True)[0] for c in cases]
    assert all(map(same_bits, together, tensors(alone) + [record([c])[0] for c in cases]))


def test_pairs_whose_sums_are_in_memory_one_after_the_other():
    """Each holds more than half of what the sums of a group may."""
    cases = [case((96, 16_400, 80), seed=seed) for seed in range(3)]
    for got, c in zip(pull(cases, curvature=True), cases, strict=True):
        check_pull(got, c, curvature=True)


def test_bits_do_not_depend_on_threads(capability):
    cases = [case(shape) for shape in LARGE] + [case(LARGE[0], "int8"), case(SHAPES[0])]
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(tensors(pull(cases, curvature=True)) + record(cases))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(same_bits, result, results[0]))


def test_nothing_beyond_the_path_integral_is_written(capability):
    for shape in ((13, 17, 3), (49, 33, 2), (97, 1100, 4)):
        c = case(shape)
        around = torch.full((c.path_integral.numel() + 128,), 7.0)
        inside = around[64:-64].view(c.path_integral.shape).copy_(c.path_integral)
        native.record([inside], [c.gradient], [c.move], False)
        check_record(inside, c)
        assert bool((around[:64] == 7).all())
        assert bool((around[-64:] == 7).all())


# ---- what is not finite

BAD = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("bad", BAD, ids=str)
def test_what_is_not_finite_is_recorded(capability, bad, clamp):
    """In ω, and in every factor, at a whole micro-tile and at an edge: as the reference, element by element."""
    for where in range(5):
        for place in ((2, 1), (-1, -1)):
            c = case((70, 140, 3))
            operands = [c.path_integral, *c.gradient, *c.move]
            operands[where][place] = bad
            expected = c.path_integral.clone()
            reference.record([expected], [c.gradient], [c.move], clamp)
            (got,) = record([c], clamp)
            assert not expected.isfinite().all() or (clamp and where == 0 and bad < 0)
            assert_alike(got, expected)


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_what_is_not_finite_pulls(capability, bad):
    for where in range(5):
        for place in ((2, 1), (-1, -1)):
            c = case((70, 140, 3))
            c.importance.values[c.importance.values == 0] = 0.5  # 0 · inf: which sum it enters is the order's choice
            operands = [c.importance.values, *c.drift, *c.factors]
            operands[where][place] = bad
            (got,), (expected,) = (pull([c], curvature=True, backend=backend) for backend in (native, penalty))
            assert not all(tensor.isfinite().all() for tensor in expected)
            for actual, wanted in zip(got, expected, strict=True):
                assert_alike(actual, wanted)


def test_columns_beyond_the_last_do_not_turn_infinity_into_nan(capability):
    """An infinite factor times what a tile has there, zeros, would."""
    left, right = torch.ones(9, 2), torch.ones(2, 33)
    left[4, 0] = float("inf")
    importance, scales = Encoded.dense(torch.ones(9, 33)), torch.ones(1, dtype=F64)
    factors = Product(torch.ones(9, 2), torch.ones(2, 33))
    (found,) = native.pulls([importance], scales, [Product(left, right)], [factors], "both", True)
    assert found.value.isposinf()
    assert torch.equal(found.grad_up, torch.where(torch.arange(9)[:, None] == 4, float("inf"), 66.0).expand(9, 2))
    assert bool(found.grad_down.isposinf().all())
    assert bool(found.curvature_up.isfinite().all())


def assert_alike(actual, expected):
    """NaN and infinities alike, the rest up to rounding."""
    assert torch.equal(actual.isnan(), expected.isnan())
    infinite = expected.isinf()
    assert torch.equal(actual.isinf(), infinite)
    assert torch.equal(actual[infinite], expected[infinite])
    finite = expected.isfinite()
    torch.testing.assert_close(actual[finite], expected[finite], rtol=1e-4, atol=1e-4)


# ---- shapes and refusals


@pytest.mark.parametrize("shape", [(0, 5, 2), (5, 0, 2), (0, 0, 1), (0, 128, 3)], ids=str)
def test_nothing_at_all(capability, shape):
    c, other = case(shape), case((9, 20, 2))
    for found, of in zip(pull([c, other], curvature=True), (c, other), strict=True):
        check_pull(found, of, curvature=True)
    omegas = record([c, other])
    assert omegas[0].shape == c.path_integral.shape
    check_record(omegas[1], other)
    assert pull([]) == []
    record([])


def test_nothing_pulls_in_codes(capability):
    importance = Encoded.empty(torch.Size((0, 128)), "int8", torch.device("cpu"))
    c = case((0, 128, 3))._replace(importance=importance)
    (found,) = pull([c], curvature=True)
    check_pull(found, c, curvature=True)


def test_depth_zero_is_a_product_of_zeros(capability):
    c = case((9, 20, 2))
    empty = Product(torch.empty(9, 0), torch.empty(0, 20))
    c = c._replace(move=empty, drift=empty)
    assert same_bits(record([c])[0], c.path_integral)
    (found,) = pull([c], curvature=True)
    check_pull(found, c, curvature=True)
    assert found.value.item() == 0


def test_autograd_sees_the_write():
    c = case((9, 20, 2))
    version = c.path_integral._version
    native.record([c.path_integral], [c.gradient], [c.move], False)
    assert c.path_integral._version > version


def test_auto_is_native():
    assert _ops_lora.choose_lora_backend("auto", torch.device("cpu"), F32) == "native"
    assert "not cuda" in native.unavailable_reason("cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path_integral": torch.zeros(20, 9).T}, r"path_integrals: expected contiguous \[9, 20\] of float32"),
        ({"path_integral": torch.zeros(9, 20, dtype=F64)}, r"path_integrals: .* got \[9, 20\] of torch.float64"),
        ({"path_integral": torch.zeros(9, 21)}, r"gradients: expected contiguous \[4, 21\]"),
        ({"gradient": torch.zeros(9, 19)}, r"gradients: expected contiguous \[9, 20\] of float32, got \[9, 19\]"),
        ({"gradient": Product(torch.zeros(9, 4), torch.zeros(3, 20))}, r"gradients: .*\[4, 20\].*got \[3, 20\]"),
        ({"move": Product(torch.zeros(8, 4), torch.zeros(4, 20))}, r"moves: .*\[9, 4\].*got \[8, 4\]"),
        ({"move": Product(torch.zeros(9, 4), torch.zeros(4, 20, dtype=F16))}, r"moves: .*of torch.float16"),
    ],
)  # fmt: skip
def test_recording_refuses(change, message):
    c = case((9, 20, 2))._replace(**change)
    with pytest.raises(ValueError, match=message):
        native.record([c.path_integral], [c.gradient], [c.move], False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"importance": Encoded.dense(torch.zeros(9, 19))}, r"importances: .*\[9, 20\], got \[9, 19\]"),
        ({"importance": Encoded.dense(torch.zeros(20, 9).T)}, r"importances: expected contiguous \[9, 20\]"),
        ({"drift": Product(torch.zeros(9, 4), torch.zeros(4, 19))}, r"drifts: .*\[4, 20\].*got \[4, 19\]"),
        ({"factors": Product(torch.zeros(9, 2), torch.zeros(3, 20))}, r"factors: .*\[2, 20\].*got \[3, 20\]"),
        ({"factors": Product(torch.zeros(2, 9).T, torch.zeros(2, 20))}, r"factors: expected contiguous \[9, 2\]"),
    ],
)  # fmt: skip
def test_pulls_refuse(change, message):
    c = case((9, 20, 2))._replace(**change)
    with pytest.raises(ValueError, match=message):
        pull([c])


def raw(op, **changes):
    """Call _C for one pair of [4, 128] at rank 1, with some arguments replaced."""
    address = torch.zeros(4, 128).data_ptr()
    arguments = {"rows": [4], "columns": [128], "factors": ([address], [address], [1]), "num_threads": 1}
    if op == "lora_record_":
        arguments |= {
            "path_integrals": [address],
            "gradients": [0],
            "moves": ([address], [address], [1]),
            "clamp": False,
        }
    else:
        arguments |= {"importances": ([address], [0], [0]), "scales": [1.0], "drifts": ([address], [address], [1])}
        arguments |= {"results": ([address], [], [], [], [])}
    getattr(_C, op)(**(arguments | changes))


@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [
        ("lora_record_", {"path_integrals": [0]}, r"path_integrals\[0\] to be an address, got 0 for 512 elements"),
        ("lora_record_", {"path_integrals": []}, "expected path_integrals to hold 1 values, got 0"),
        ("lora_record_", {"moves": ([8], [8], [-1])}, "expected depths of moves of 0 or more, got -1"),
        ("lora_record_", {"factors": ([0], [8], [1])}, r"factors\[0\] to be an address"),
        ("lora_record_", {"factors": ([8], [8], [])}, "expected factors to hold 1 values, got 0"),
        ("lora_record_", {"rows": [-1]}, "numels of 0 or more, got -1"),
        ("lora_record_", {"columns": [1, 2]}, "expected columns to hold 1 values, got 2"),
        ("lora_record_", {"rows": [2**40], "columns": [2**40]}, r"fewer than 2\^63 elements"),
        ("lora_record_", {"num_threads": 0}, "expected num_threads of 1 or more, got 0"),
        ("lora_pull", {"importances": ([0], [0], [0])}, r"importances\[0\] to be an address"),
        ("lora_pull", {"importances": ([8], [0], [5])}, r"scales of importances\[0\] to be an address"),
        ("lora_pull", {"importances": ([8], [0], [3])}, "got 3"),
        ("lora_pull", {"importances": ([8], [8], [5]), "rows": [128], "columns": [4]}, "multiples of 128 .* got 4"),
        ("lora_pull", {"scales": []}, "expected scales to hold 1 values, got 0"),
        ("lora_pull", {"drifts": ([8], [0], [1])}, r"drifts\[0\] to be an address"),
        ("lora_pull", {"results": ([0], [], [], [], [])}, r"values\[0\] to be an address"),
        ("lora_pull", {"results": ([8], [0], [], [], [])}, r"grad_ups\[0\] to be an address"),
        ("lora_pull", {"results": ([8], [8, 8], [], [], [])}, "expected grad_ups to hold 1 values, got 2"),
        ("lora_pull", {"results": ([8], [], [], [], [0])}, r"curvature_downs\[0\] to be an address"),
        ("lora_pull", {"num_threads": 0}, "expected num_threads of 1 or more, got 0"),
    ],
)
def test_raw_calls_refuse(op, changes, message):
    with pytest.raises(ValueError, match=message):
        raw(op, **changes)
