"""The Triton kernels of LoRA in effective space against dense float64, through Triton's interpreter.

The interpreter has to be chosen before the kernel module is imported, so plain ``pytest`` runs this file once more in
a process with TRITON_INTERPRET=1; what lies in ``TestInterpreted`` runs there.
"""

from __future__ import annotations

import pytest
import torch
from cases import F32, F64
from interpreted import Launches, check_missing_triton, run_interpreted
from lora_cases import CODED, FORMATS, SHAPES, case, check_pull, check_record, dense

triton = pytest.importorskip("triton", reason="Triton is not installed")
import numpy as np  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle  # noqa: E402

from alr_kernels import _ops_lora  # noqa: E402
from alr_kernels.codecs.encoded import Encoded  # noqa: E402
from alr_kernels.lora import triton_kernel  # noqa: E402
from alr_kernels.lora.penalty import SIDES  # noqa: E402
from alr_kernels.lora.reference import Product  # noqa: E402

INTERPRETED = bool(triton.knobs.runtime.interpret)
# Several tiles in both directions, aligned rows that end within a tile, ranks of two and four blocks.
FEW = [(65, 129, 8), (130, 128, 5), (70, 144, 16), (3, 48, 40)]
GUARDED = [(65, 129, 8), (70, 144, 16), (65, 128, 8)]  # inner sizes of whole blocks: nothing is copied


def record(cases, clamp=False, gradients=None):
    """Record copies of ω and return them."""
    omegas = [c.path_integral.clone() for c in cases]
    gradients = [c.gradient for c in cases] if gradients is None else gradients
    _ops_lora.lora_record_(omegas, gradients, [c.move for c in cases], clamp, "triton")
    return omegas


def pull(cases, sides="both", curvature=False):
    scales = torch.tensor([c.scale for c in cases], dtype=F64)
    lists = ([c.importance for c in cases], scales, [c.drift for c in cases], [c.factors for c in cases])
    return _ops_lora.lora_pull(*lists, sides, curvature, "triton")


def guarded(tensor, guard, skip=16):
    """Return a copy between elements that must be neither read nor written; ``skip`` of them before it."""
    storage = torch.full((tensor.numel() + 2 * skip,), guard, dtype=tensor.dtype)
    return storage[skip:-skip].view(tensor.shape).copy_(tensor)


def inside(c, kept):
    """Return the case with every operand between NaN, or codes of 255."""
    values, scales, _ = c.importance
    values = guarded(values, 255 if kept in ("int8", "int4") else torch.nan)
    importance = Encoded(values, None if scales is None else guarded(scales, torch.nan), kept)
    products = [Product(*(guarded(side, torch.nan) for side in p)) for p in (c.gradient, c.move, c.drift, c.factors)]
    return c._replace(
        path_integral=guarded(c.path_integral, 7.0), gradient=products[0], move=products[1], importance=importance,
        drift=products[2], factors=products[3],
    )  # fmt: skip


@pytest.mark.slow
def test_triton_through_interpreter():
    """Run TestInterpreted in a process of its own."""
    run_interpreted(__file__)


def test_missing_triton_is_explained():
    check_missing_triton("lora", "unavailable_reason")


def test_unavailable_devices_are_explained():
    assert "TRITON_INTERPRET=1" in triton_kernel.unavailable_reason("cpu")
    assert "not 'mps'" in triton_kernel.unavailable_reason("mps")
    assert bool(triton_kernel.unavailable_reason("cuda")) != torch.cuda.is_available()


for outside in (
    test_triton_through_interpreter,
    test_missing_triton_is_explained,
    test_unavailable_devices_are_explained,
):
    outside.__test__ = not INTERPRETED


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, where numbers are not finite
class TestInterpreted:
    __test__ = INTERPRETED

    def test_available(self):
        assert triton_kernel.unavailable_reason("cpu") == ""

    @pytest.mark.parametrize("clamp", [False, True])
    def test_recording_equals_the_dense_formula(self, clamp):
        cases = [case(shape) for shape in SHAPES]
        for omega, c in zip(record(cases, clamp), cases, strict=True):
            check_record(omega, c, clamp=clamp)

    @pytest.mark.parametrize("clamp", [False, True])
    def test_recording_takes_a_dense_gradient(self, clamp):
        cases = [case(shape) for shape in SHAPES]
        gradients = [dense(c.gradient).float() for c in cases]
        for omega, gradient, c in zip(record(cases, clamp, gradients), gradients, cases, strict=True):
            check_record(omega, c, gradient, clamp)

    @pytest.mark.parametrize("curvature", [False, True])
    def test_the_pull_equals_the_dense_formula(self, curvature):
        cases = [case(shape) for shape in SHAPES]
        cases += [case(shape, kept) for shape in CODED for kept in (*FORMATS[1:], "fp16")]
        for got, c in zip(pull(cases, curvature=curvature), cases, strict=True):
            check_pull(got, c, curvature=curvature)

    @pytest.mark.parametrize("curvature", [False, True])
    @pytest.mark.parametrize("sides", SIDES)
    def test_sides(self, sides, curvature):
        cases = [case(shape) for shape in FEW] + [case(FEW[1], "int8")]
        for got, c in zip(pull(cases, sides, curvature), cases, strict=True):
            check_pull(got, c, sides, curvature)

    @pytest.mark.parametrize(("enough", "rows", "chunks"), [(1, 1, 1), (18, 2, 6)])
    def test_a_program_takes_several_tiles(self, enough, rows, chunks, monkeypatch):
        """As large matrices make it, here with few programs: all of the 3 x 12 tiles, or two."""
        launches = {op: Launches(getattr(triton_kernel, f"{op}_kernel")) for op in ("record", "pull")}
        for op, stand_in in launches.items():
            monkeypatch.setattr(triton_kernel, f"{op}_kernel", stand_in)
        monkeypatch.setattr(triton_kernel, "ENOUGH", enough)
        for kept in ("fp32", "int4"):
            c = case((130, 384, 20), kept)
            check_record(*record([c]), c)
            check_pull(*pull([c], curvature=True), c, curvature=True)
        assert set(launches["record"].grids) == {(12, rows, 1)}
        assert set(launches["pull"].grids) == {(2 * chunks, 3, 1)}, "two blocks of the rank"

    @pytest.mark.parametrize(("shape", "kept"), [*((s, "fp32") for s in GUARDED), *((GUARDED[2], f) for f in FORMATS)])
    def test_nothing_beyond_an_operand_is_touched(self, shape, kept):
        c = inside(case(shape, kept), kept)
        omega = c.path_integral
        expected = omega.clone()
        _ops_lora.lora_record_([omega], [c.gradient], [c.move], backend="triton")
        check_record(omega, c._replace(path_integral=expected))
        storage = torch.empty(0).set_(omega.untyped_storage())
        assert bool((storage[:16] == 7).all())
        assert bool((storage[-16:] == 7).all())
        check_pull(*pull([c], curvature=True), c, curvature=True)

    @pytest.mark.parametrize("kept", FORMATS)
    def test_operands_off_alignment(self, kept, monkeypatch):
        """They take a launch of their own, without vectors."""
        kinds = []
        for name in ("record_build", "pull_build"):
            build_of = getattr(triton_kernel, name)
            monkeypatch.setattr(triton_kernel, name, lambda kind, *a, f=build_of: kinds.append(kind) or f(kind, *a))
        plain, c = case((33, 128, 8)), case((33, 128, 8), kept)
        skip = 3 if kept in ("int8", "int4") else 17
        c = c._replace(
            path_integral=guarded(c.path_integral, 7.0, 17),
            importance=c.importance._replace(values=guarded(c.importance.values, 0, skip)),
            factors=Product(*(guarded(side, 7.0, 17) for side in c.factors)),
        )
        assert c.path_integral.data_ptr() % 16
        assert c.importance.values.data_ptr() % 16
        omegas = [plain.path_integral.clone(), c.path_integral]
        gradients, moves = [plain.gradient, guarded(dense(c.gradient).float(), 7.0, 17)], [plain.move, c.move]
        before = c.path_integral.clone()
        _ops_lora.lora_record_(omegas, gradients, moves, backend="triton")
        check_record(omegas[0], plain)
        check_record(omegas[1], c._replace(path_integral=before), gradients[1])
        check_pull(*pull([c], curvature=True), c, curvature=True)
        assert [kind.aligned for kind in kinds] == [True, False, False]

    def test_one_launch_a_class(self, monkeypatch):
        launches = {op: Launches(getattr(triton_kernel, f"{op}_kernel")) for op in ("record", "pull")}
        for op, stand_in in launches.items():
            monkeypatch.setattr(triton_kernel, f"{op}_kernel", stand_in)
        first, second = ((65, 128, 3), "int8"), ((20, 48, 4), "fp32")
        cases = [case(*kind, seed=seed) for seed, kind in enumerate((first, second, first, second, first))]
        for omega, c in zip(record(cases), cases, strict=True):
            check_record(omega, c)
        for got, c in zip(pull(cases), cases, strict=True):
            check_pull(got, c)
        assert [grid[2] for grid in launches["record"].grids] == [3, 2]
        assert [grid[2] for grid in launches["pull"].grids] == [3, 2]
        assert launches["pull"].grids == [(4, 2, 3), (2, 1, 2)]
        monkeypatch.setattr(triton_kernel, "SCRATCH", 1)  # parts of one pair at a time
        again = pull(cases)
        assert [grid[2] for grid in launches["pull"].grids[2:]] == [1] * 5
        for got, c in zip(again, cases, strict=True):
            check_pull(got, c)

    def test_two_runs_and_other_company_give_the_same_bits(self):
        cases = [case((130, 128, 5), "int8", seed=seed) for seed in range(3)] + [case((65, 129, 8))]
        for first, second in ((record(cases), record(cases)), (record(cases)[1:2], record(cases[1:2]))):
            assert all(map(torch.equal, first, second))
        runs = [pull(cases, curvature=True), pull(cases, curvature=True)]
        for first, second in [*zip(*runs, strict=True), (runs[0][1], pull(cases[1:2], curvature=True)[0])]:
            assert all(map(torch.equal, first, second))

    def test_values_that_are_not_numbers_stay_where_they_are(self):
        c = case((33, 40, 3))
        c.gradient.left[2, 0], c.path_integral[5, 7] = torch.nan, torch.nan
        (omega,) = record([c], clamp=True)
        wrong = torch.zeros(33, 40, dtype=torch.bool)
        wrong[2], wrong[5, 7] = True, True
        assert torch.equal(omega.isnan(), wrong)

    def test_high_ranks_and_float64_importance_go_through_the_reference(self, monkeypatch):
        monkeypatch.setattr(triton_kernel, "pull_kernel", None)
        c, d = case((24, 100, 256)), case((13, 17, 3))
        d = d._replace(importance=Encoded.dense(d.importance.values.double()))
        first, second = pull([c, d])
        check_pull(first, c)
        check_pull(second, d)

    def test_empty_matrices(self):
        for shape in ((0, 5, 2), (5, 0, 2)):
            c = case(shape)
            assert record([c])[0].shape == shape[:2]
            (got,) = pull([c], curvature=True)
            assert float(got.value) == 0.0
            assert bool((got.grad_up == 0).all() and (got.curvature_down == 0).all())

    def test_tables_are_uploaded_when_something_moved(self, monkeypatch):
        monkeypatch.setattr(triton_kernel, "ADDRESSES", triton_kernel.Addresses())
        cases = [case((20, 48, 4), seed=seed) for seed in range(2)]
        upload = triton_kernel.ADDRESSES.upload
        for importance, expected in ((cases[0], 1), (cases[0], 1), (cases[1], 2), (cases[0], 2)):
            pull([importance])
            assert upload.count == expected
        table = triton_kernel.ADDRESSES.find([(cases[0].path_integral, None)], torch.device("cpu"))
        assert table.tolist() == [[cases[0].path_integral.data_ptr(), 0]]

    def test_versions_count_up(self):
        c = case((5, 4, 1))
        before = c.path_integral._version
        _ops_lora.lora_record_([c.path_integral], [c.gradient], [c.move], backend="triton")
        assert c.path_integral._version > before

    @pytest.mark.parametrize(("precision", "holds"), [("tf32x3", True), ("tf32", False)])
    def test_three_tf32_products_are_float32_and_one_is_not(self, precision, holds, monkeypatch):
        """Tensor cores' products, made by hand; but for their sums, which are float32's here."""
        asked = set()

        def rounded(x):  # 11 significant bits
            return ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)

        def create_dot(self, a, b, d, input_precision, *_):
            asked.add(input_precision)
            x, y = np.ascontiguousarray(a.data), np.ascontiguousarray(b.data)
            big = rounded(x), rounded(y)
            total = big[0] @ big[1] + d.data
            if precision == "tf32x3":
                total = (rounded(x - big[0]) @ big[1] + big[0] @ rounded(y - big[1])) + total
            return TensorHandle(total, d.dtype.scalar)

        monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
        monkeypatch.setattr(triton_kernel, "precision", lambda device: precision)
        for c in (case((65, 129, 8)), case((64, 384, 16), "int8"), case((40, 256, 64))):
            for check in (
                lambda c: check_record(*record([c]), c),
                lambda c: check_pull(*pull([c], curvature=True), c, curvature=True),
            ):
                if holds:
                    check(c)
                else:
                    with pytest.raises(AssertionError, match="of the terms"):
                        check(c)
        assert len(asked) == 1


def test_float32_is_what_it_serves():
    reasons = _ops_lora.lora_backends("cpu", F64)
    assert "reference" in reasons["triton"]
    assert (_ops_lora.lora_backends("cpu", F32)["triton"] == "") == INTERPRETED
