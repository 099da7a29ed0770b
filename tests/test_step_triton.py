"""The Triton step against the reference, bit for bit, through Triton's interpreter.

The interpreter has to be chosen before the kernel module is imported, so plain ``pytest`` runs this file once more in
a process with TRITON_INTERPRET=1; what lies in ``TestInterpreted`` runs there.
"""

# ruff: noqa: N803
from __future__ import annotations

import pytest
import torch
from cases import (
    BF16,
    F16,
    F32,
    F64,
    GUARD,
    MODES,
    Case,
    assert_same_columns,
    copied,
    counts_of,
    formed,
    guards_are_untouched,
    numbers_of,
    same_bits,
)
from interpreted import Launches, check_missing_triton, run_interpreted
from test_step_formats import PAIRWISE, name_of
from test_step_offsets import RANDOM, check_shards, starts_of

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402

from alr_kernels.codecs import rounding  # noqa: E402
from alr_kernels.step import plan, reference, tables, triton_kernel  # noqa: E402
from alr_kernels.step import triton_math as f  # noqa: E402

INTERPRETED = bool(triton.knobs.runtime.interpret)

# Nothing, less than a tail's 128, whole tiles alone, odd dimensions, and tiles with a tail; in blocks, the same.
SHAPES = ((0,), (17,), (1024,), (3, 5, 7), (1300,))
CODED_SHAPES = ((1, 128), (9, 256), (2, 3, 128))
FEW_BYTES = Case("split", "bf16", "int8", "int4", "bf16")
FORMS = {"fp32": Case(), "few bytes": FEW_BYTES, "stochastic": Case("stochastic", "bf16", "bf16", "int8", "bf16")}
forms = pytest.mark.parametrize("case", FORMS.values(), ids=FORMS)


def shapes_of(case):
    return CODED_SHAPES if case.coded else SHAPES


def step(module, columns, case, rotation=0, statistics=None, **hyper):
    numbers = numbers_of(columns, counts_of(columns, rotation), clip=case.clip, inverse_scale=case.inverse_scale)
    for name, value in hyper.items():
        numbers.hyper[plan.HYPER.index(name)] = value
    module.step_(plan.Operands(**columns), numbers, case.options, statistics)


def step_both(columns, case, calls=1, **hyper):
    """Step copies with Triton and the reference; require the same bits and untouched guards, return both."""
    ours, theirs = columns, copied(columns)
    for call in range(calls):
        step(triton_kernel, ours, case, call, **hyper)
        step(reference, theirs, case, call, **hyper)
    assert_same_columns(ours, theirs)
    for name, tensors in ours.items():
        assert all(map(guards_are_untouched, tensors)), name
    return ours, theirs


def moved(tensor):
    """Return a copy that is not aligned to 16 bytes, with guards."""
    storage = torch.empty(tensor.numel() + 2 * GUARD + 1, dtype=tensor.dtype)
    storage[:] = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())[0]
    return storage.narrow(0, GUARD + 1, tensor.numel()).view(tensor.shape).copy_(tensor)


@pytest.mark.slow
def test_triton_through_interpreter():
    """Run TestInterpreted in a process of its own."""
    run_interpreted(__file__)


def test_missing_triton_is_explained():
    check_missing_triton("step", "available")


def test_unavailable_devices_are_explained():
    assert triton_kernel.available("cpu")[0] is False
    assert "TRITON_INTERPRET=1" in triton_kernel.available("cpu")[1]
    assert "not 'mps'" in triton_kernel.available("mps")[1]
    for device in ("cuda", "xpu"):
        there, reason = triton_kernel.available(device)
        assert there == getattr(torch, device).is_available()
        assert there or f"no {device} device" in reason


test_triton_through_interpreter.__test__ = not INTERPRETED
test_missing_triton_is_explained.__test__ = not INTERPRETED
test_unavailable_devices_are_explained.__test__ = not INTERPRETED


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, where numbers are not finite or wrap around
class TestInterpreted:
    __test__ = INTERPRETED

    def test_available(self):
        assert triton_kernel.available("cpu") == (True, "")

    @pytest.mark.parametrize("case", [case._replace(precise=True) for case in PAIRWISE], ids=name_of)
    def test_equals_the_reference_bit_for_bit(self, case):
        step_both(formed(case, shapes_of(case)), case, calls=2)

    @forms
    def test_more_than_a_chunk(self, case):
        shapes = ((triton_kernel.CHUNK + 1152,), (256,))
        step_both(formed(case._replace(record=False), shapes), case)

    @pytest.mark.parametrize("importance", ["fp32", "int4", "none"])
    def test_statistics(self, importance):
        case = Case("bf16", importance=importance, clip=0.3, inverse_scale=0.37)
        shapes = ((0,), (triton_kernel.CHUNK + 1152,), (17,)) if importance != "int4" else ((17, 1024), (3, 128))
        columns = formed(case, shapes)
        ours, theirs = torch.full((2, len(shapes), len(plan.STATISTICS)), 7.0, dtype=F64).unbind()
        for module, statistics in ((triton_kernel, ours), (reference, theirs)):
            step(module, copied(columns), case, statistics=statistics)
        size = theirs.abs()
        size[:, 3] = (theirs[:, 1] * theirs[:, 2]).sqrt()  # Σ g·pull cancels
        assert bool(((ours - theirs).abs() <= 1e-6 * size).all()), ours / theirs
        assert importance == "none" or bool((theirs[-1] != 0).all())

    @forms
    def test_found_inf_changes_nothing(self, case):
        columns = formed(case, shapes_of(case))
        before, statistics = copied(columns), torch.full((len(columns["params"]), len(plan.STATISTICS)), 7.0, dtype=F64)
        for value in (1.0, float("nan")):
            step(triton_kernel, columns, case, statistics=statistics, found_inf=value)
        assert_same_columns(columns, before)
        assert bool((statistics == 7.0).all())

    def test_unaligned_operands(self, monkeypatch):
        """Tensors whose operands all lie at a multiple of 16 bytes take one launch, the others a second one."""
        launches = Launches(triton_kernel.step_kernel)
        monkeypatch.setattr(triton_kernel, "step_kernel", launches)
        columns = formed(FEW_BYTES, ((9, 128), (9, 128), (9, 128)))
        step_both(copied(columns), FEW_BYTES)
        assert launches.grids == [(3,)]
        for tensors in filter(None, columns.values()):
            tensors[2] = moved(tensors[2])
            assert tensors[2].data_ptr() % 16
        columns["grads"][1] = moved(columns["grads"][1])
        step_both(columns, FEW_BYTES)
        assert launches.grids[1:] == [(1,), (2,)]

    @pytest.mark.parametrize("mode", MODES)
    @forms
    def test_zero_importance_steps_as_without_a_penalty(self, mode, case):
        case = case._replace(mode=mode)
        penalised = formed(case, [(2, 640)])
        plain = copied(penalised)
        decoded = reference.load_importance(plan.Operands(**plain), 0, F32)
        free = decoded.view(2, 640) == 0
        assert 300 < int(free.sum()) < 900
        penalised["anchors"][0][free] = float("inf")  # must not be read into the result
        plain |= {"importances": [], "anchors": [], "importance_scales": []}
        for columns in (penalised, plain):
            step(triton_kernel, columns, case)
        names = ["params", "path_integrals", *(["exp_avgs", "exp_avg_sqs"] if case.moments != "int8" else [])]
        for name in names:  # codes depend on the block's largest
            assert same_bits(penalised[name][0][free], plain[name][0][free]), name
        assert bool((penalised["params"][0][~free] != plain["params"][0][~free]).any()), "the penalty acts elsewhere"

    @pytest.mark.parametrize("mode", MODES)
    @forms
    def test_non_finite_gradients(self, mode, case):
        columns = formed(case, shapes_of(case))
        for grad in columns["grads"]:
            flat = grad.view(-1)
            flat[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])[: flat.numel()]
        ours, _ = step_both(columns, case._replace(mode=mode), calls=2)
        assert bool(ours["params"][1].view(-1)[0].isnan())

    @forms
    def test_first_step(self, case):
        """Moments of zero, some gradients zero or tiny: blocks without a largest."""
        columns = formed(case, shapes_of(case))
        for name in ("exp_avgs", "exp_avg_sqs", "exp_avg_scales", "exp_avg_sq_scales", "path_integrals"):
            for tensor in columns[name]:
                tensor.zero_()
        for grad in columns["grads"]:
            flat = grad.view(-1)
            flat[:130] = 0
            flat[200:400] *= 1e-22
        step_both(columns, case, calls=2)

    @pytest.mark.parametrize("mode", MODES)
    @forms
    def test_fast_is_close(self, mode, case):
        case = case._replace(mode=mode, precise=False)
        ours = formed(case, shapes_of(case))
        theirs = copied(ours)
        for module, columns in ((triton_kernel, ours), (reference, theirs)):
            step(module, columns, case)
        if case.options.master == "split":
            for columns in (ours, theirs):
                halves = zip(columns["params"], columns.pop("remainders"), strict=True)
                columns["params"] = [rounding.join(*pair) for pair in halves]
        for name, tensors in ours.items():
            for got, wanted in zip(tensors, theirs[name], strict=True):
                if got.dtype is F32:
                    torch.testing.assert_close(got, wanted, rtol=3e-6, atol=1e-7)
                elif got.numel():  # rounded: a number near a boundary may cross it
                    bits = [t.view(torch.int16) if t.dtype is BF16 else t for t in (got, wanted)]
                    assert int((bits[0].int() - bits[1].int()).abs().max()) <= 1, name

    def test_tables_are_uploaded_when_something_moved(self, monkeypatch):
        monkeypatch.setattr(tables, "CACHE", tables.Cache())
        columns = formed(FEW_BYTES, CODED_SHAPES)
        o, numbers = plan.Operands(**columns), numbers_of(columns, counts_of(columns))
        grad = o.grads[1].clone()
        for expected, grads in ((2, o.grads), (2, list(o.grads)), (3, [o.grads[0], grad, o.grads[2]]), (3, o.grads)):
            triton_kernel.step_(o._replace(grads=grads), numbers, FEW_BYTES.options)
            assert tables.CACHE.upload.count == expected

    def test_versions_count_up(self):
        columns = formed(Case(), [(4,), (3,)])
        before = {name: [t._version for t in tensors] for name, tensors in columns.items()}
        step(triton_kernel, columns, Case())
        for name, tensors in columns.items():
            for tensor, version in zip(tensors, before[name], strict=True):
                assert (tensor._version > version) == (name in plan.MUTATED), name

    def test_parameters_that_require_grad(self):
        columns = formed(Case(), [(5,)])
        expected = copied(columns)
        columns["params"][0].requires_grad_()
        step(triton_kernel, columns, Case())
        step(reference, expected, Case())
        assert torch.equal(columns["params"][0].detach(), expected["params"][0])

    def test_nothing_to_step(self):
        for shapes in ((), ((0,),)):
            step(triton_kernel, formed(Case(), shapes), Case())

    def test_what_it_cannot_step_is_refused(self):
        columns = formed(Case("fp64"), [(5,)])
        with pytest.raises(TypeError, match="computes in float32"):
            step(triton_kernel, columns, Case("fp64"))
        columns = formed(FEW_BYTES, [(1, 128)])
        columns["exp_avg_sqs"] = [torch.zeros(1, 128)]
        with pytest.raises(TypeError, match="codes int8 and uint8"):
            step(triton_kernel, columns, FEW_BYTES)

    def test_scalars_are_the_hosts(self):
        """The powers and quotients that the kernel makes in float64, at small and large step counts."""
        hyper = dict(zip(plan.HYPER, (1e-3, 0.9, 0.999, 1e-8, 0.1, 0.7, 0.37, 0.3, 0.0), strict=True))
        for count in (1, 2, 3, 1000, 123_457, 2**24):
            found = torch.zeros(11)
            scalars_of[(1,)](
                torch.tensor(list(hyper.values()), dtype=F64), torch.tensor(float(count)), torch.tensor(1.3, dtype=F64),
                found,
            )  # fmt: skip
            s = plan.step_scalars(count, *list(hyper.values())[:5])
            wanted = torch.tensor([*s, 0.7 * 1.3, -0.37, 0.3], dtype=F64).float()
            assert torch.equal(found, wanted), count

    @pytest.mark.parametrize("case", RANDOM, ids=name_of)
    def test_shards(self, case):
        for start in starts_of(case):
            check_shards(triton_kernel, case, start)

    @pytest.mark.parametrize("first", [0, 2**20, 2**32 - 1024, 2**32 - 5, 2**32, 5 * 2**32 + 2048, 2**40 - 77])
    def test_noise_beyond_32_bits(self, first):
        key, found = 0x89ABCDEF, torch.zeros(1024, dtype=torch.int64)
        draw[(1,)](torch.tensor([key, first]), found)
        index = first + torch.arange(1024)
        low = (index & rounding.MASK) ^ key
        assert torch.equal(found, rounding.mix((low + (index >> 32) * 0x9E3779B9) & rounding.MASK))

    @pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
    def test_storage_conversions_are_torchs(self, dtype):
        """Every 16-bit value and what lies half-way between: subnormals, ties, overflow, NaN."""
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        wide = torch.empty(every.numel())
        convert[(64,)](every, wide, 1024)
        assert torch.equal(wide.isnan(), every.isnan())
        numbers = ~every.isnan()
        assert torch.equal(wide[numbers].view(torch.int32), every[numbers].float().view(torch.int32))

        exact = every[numbers].float().view(torch.int32)
        half = 2**15 if dtype == BF16 else 2**12
        near = [exact + delta for delta in (0, 1, -1, half, half - 1, half + 1)]
        values = torch.cat([bits.view(F32) for bits in near])
        values = torch.cat((values, torch.tensor([1e-45, -1e-45, 3e38, -3e38, 65519.99, 65520.0, float("nan")])))
        values = torch.cat((values, torch.zeros(-values.numel() % 1024)))
        narrow = torch.empty(values.numel(), dtype=dtype)
        convert[(values.numel() // 1024,)](values, narrow, 1024)
        assert torch.equal(narrow.isnan(), values.isnan())
        numbers = ~values.isnan()
        assert torch.equal(narrow[numbers].view(torch.int16), values[numbers].to(dtype).view(torch.int16))


@triton.jit
def scalars_of(hyper_ptr, step_ptr, unit_scale_ptr, out_ptr):
    zero = tl.cast(0, tl.uint32), tl.cast(0, tl.int64)  # key and offset
    s = f.scalars(hyper_ptr, tl.load(step_ptr).to(tl.int32), tl.load(unit_scale_ptr), zero[0], zero[1], True)
    tl.store(out_ptr, s.lr)
    tl.store(out_ptr + 1, s.decay)
    tl.store(out_ptr + 2, s.one_minus_beta1)
    tl.store(out_ptr + 3, s.beta2)
    tl.store(out_ptr + 4, s.one_minus_beta2)
    tl.store(out_ptr + 5, s.eps)
    tl.store(out_ptr + 6, s.step_size)
    tl.store(out_ptr + 7, s.rsqrt_bias2)
    tl.store(out_ptr + 8, s.curvature_scale)
    tl.store(out_ptr + 9, s.grad_scale)
    tl.store(out_ptr + 10, s.clip)


@triton.jit
def draw(key_ptr, out_ptr):
    offsets = tl.arange(0, 1024)
    key = tl.load(key_ptr).to(tl.uint32)
    tl.store(out_ptr + offsets, f.noise(key, tl.load(key_ptr + 1), offsets).to(tl.int64))


@triton.jit
def convert(source_ptr, target_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = f.to_float32(tl.load(source_ptr + offsets))
    tl.store(target_ptr + offsets, f.to_storage(value, target_ptr.dtype.element_ty, True))
