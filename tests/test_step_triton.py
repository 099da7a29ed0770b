"""The Triton step against the reference, bit for bit, through Triton's interpreter.

The interpreter has to be chosen before the kernel module is imported, so plain ``pytest`` runs this file once more in
a process with TRITON_INTERPRET=1; what lies in ``TestInterpreted`` runs there.
"""

# ruff: noqa: N803
from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402

from alr_kernels.step import reference, triton_kernel  # noqa: E402

INTERPRETED = bool(triton.knobs.runtime.interpret)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

SHAPES = ((0,), (1,), (17,), (1023,), (1024,), (1025,), (3, 5, 7), (2, 700))
STEPS = (1.0, 1.0, 2.0, 15.0, 16.0, 17.0, 1.0, 1000.0)  # of each shape, before the first of two calls
DTYPES = ((F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F32, BF16), (F16, F32))  # parameter, gradient
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
OPERANDS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "importances", "anchors", "path_integrals")
GUARD = 16  # elements before and after every operand
POISON = torch.tensor([float("nan"), 777.0])  # NaN swallows a stray update, a number shows it


def guarded(values, offset=0):
    """Return a view equal to ``values`` inside a larger poisoned storage."""
    storage = POISON.repeat(GUARD + values.numel()).to(values.dtype)[: 2 * GUARD + values.numel() + offset]
    view = storage.narrow(0, GUARD + offset, values.numel()).view(values.shape)
    view.copy_(values)
    return view


def whole(tensor):
    """Return all bits of the storage under a view, poison included."""
    flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return flat.view(torch.int32 if flat.element_size() == 4 else torch.int16)


def operands(shapes, dtype, grad_dtype, penalty=True, record=True, offset=0, seed=0):
    """Make the tensors of a step: a third of Ω is 0, the rest spans both branches of the proximal step."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape, scale):
        return torch.randn(shape, generator=generator) * scale

    columns = {name: [] for name in OPERANDS}
    for shape in shapes:
        param = normal(shape, 1.0).to(dtype)
        importance = torch.exp(normal(shape, 4.0)) * (torch.rand(shape, generator=generator) > 1 / 3)
        columns["params"].append(param)
        columns["grads"].append(normal(shape, 0.1).to(grad_dtype))
        columns["exp_avgs"].append(normal(shape, 0.1))
        columns["exp_avg_sqs"].append(normal(shape, 0.1).square())
        columns["importances"].append(importance)
        columns["anchors"].append((param.float() + normal(shape, 0.1)).to(dtype))
        columns["path_integrals"].append(normal(shape, 1e-3))
    if not penalty:
        columns["importances"], columns["anchors"] = [], []
    if not record:
        columns["path_integrals"] = []
    return {name: [guarded(t, offset) for t in tensors] for name, tensors in columns.items()}


def copies(columns):
    """Copy operands together with their guards."""
    return {
        name: [torch.empty(0, dtype=t.dtype).set_(t.untyped_storage().clone(), t.storage_offset(), t.shape) for t in ts]
        for name, ts in columns.items()
    }


def take_step(module, columns, steps, **overrides):
    keywords = HYPER | {"mode": "coupled", "maximize": False} | overrides
    scales = [0.7 + 0.1 * i for i in range(len(columns["params"]))]
    module.step_(*columns.values(), scales, steps, **keywords)


def assert_same_bits(columns, expected):
    for name, tensors in columns.items():
        for tensor, other in zip(tensors, expected[name], strict=True):
            unequal = int((whole(tensor) != whole(other)).sum())
            assert unequal == 0, f"{name} {tuple(tensor.shape)} {tensor.dtype}: {unequal} elements or guards differ"


def test_triton_through_interpreter():
    """Run TestInterpreted in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    root = Path(__file__).parent.parent
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    passed = re.search(r"(\d+) passed", result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert passed, f"no test ran:\n{result.stdout}"


def test_missing_triton_is_explained():
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "from alr_kernels.step import triton_kernel\n"
        "for device in ('cpu', 'cuda', 'xpu'): print(triton_kernel.available(device))"
    )
    root = Path(__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("(False, 'Triton cannot be imported") == 3, result.stdout


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


class TestInterpreted:
    __test__ = INTERPRETED

    def test_available(self):
        assert triton_kernel.available("cpu") == (True, "")

    @pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: "/".join(str(d)[6:] for d in pair))
    @pytest.mark.parametrize("maximize", [False, True], ids=("min", "max"))
    @pytest.mark.parametrize("record", [False, True], ids=("", "record"))
    @pytest.mark.parametrize("mode", ["none", "coupled", "proximal"])
    def test_equals_the_reference_bit_for_bit(self, mode, record, maximize, dtypes):
        ours = operands(SHAPES, *dtypes, penalty=mode != "none", record=record)
        theirs = copies(ours)
        keywords = {"mode": "coupled" if mode == "none" else mode, "maximize": maximize}
        for call in range(2):
            steps = [step + call for step in STEPS]
            take_step(triton_kernel, ours, steps, **keywords)
            take_step(reference, theirs, steps, **keywords)
        assert_same_bits(ours, theirs)

    @pytest.mark.parametrize(("mode", "dtypes"), list(zip(("none", "coupled", "proximal"), DTYPES, strict=False)))
    def test_many_blocks(self, mode, dtypes):
        ours = operands([(65537,)], *dtypes, penalty=mode != "none")
        theirs = copies(ours)
        for module, columns in ((triton_kernel, ours), (reference, theirs)):
            take_step(module, columns, [3.0], mode="coupled" if mode == "none" else mode)
        assert_same_bits(ours, theirs)

    def test_unaligned_operands(self):
        ours = operands([(1500,), (1024,)], BF16, F32, offset=1)
        assert all(t.data_ptr() % triton_kernel.ALIGNMENT for tensors in ours.values() for t in tensors)
        theirs = copies(ours)
        for module, columns in ((triton_kernel, ours), (reference, theirs)):
            take_step(module, columns, [3.0, 4.0], mode="proximal")
        assert_same_bits(ours, theirs)

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, at the non-finite values asked for
    @pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
    @pytest.mark.parametrize("mode", ["coupled", "proximal"])
    def test_zero_importance_steps_as_without_a_penalty(self, mode, dtype):
        penalised = operands([(1500,)], dtype, dtype)
        plain = copies(penalised)
        free = penalised["importances"][0] == 0
        assert 400 < int(free.sum()) < 600
        penalised["anchors"][0][free] = float("inf")  # must not be read into the result
        plain["importances"], plain["anchors"] = [], []
        take_step(triton_kernel, penalised, [3.0], mode=mode)
        take_step(triton_kernel, plain, [3.0], mode=mode)
        for name in ("params", "exp_avgs", "exp_avg_sqs", "path_integrals"):
            assert torch.equal(penalised[name][0][free], plain[name][0][free]), name
        changed = penalised["params"][0][~free] != plain["params"][0][~free]
        assert changed.float().mean() > 0.3, "the penalty should act elsewhere"

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, at the non-finite values asked for
    @pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
    def test_non_finite_gradients(self, dtype):
        ours = operands([(1030,)], dtype, dtype)
        ours["grads"][0][:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
        theirs = copies(ours)
        for module, columns in ((triton_kernel, ours), (reference, theirs)):
            take_step(module, columns, [3.0])
        for name in OPERANDS:
            assert torch.equal(ours[name][0].isnan(), theirs[name][0].isnan()), name
            assert torch.equal(ours[name][0][3:], theirs[name][0][3:]), name
        assert ours["params"][0][0].isnan()

    def test_versions_count_up(self):
        columns = operands([(4,), (0,)], F32, F32)
        before = {name: [t._version for t in tensors] for name, tensors in columns.items()}
        take_step(triton_kernel, columns, [1.0, 1.0])
        for name, tensors in columns.items():
            mutated = name in ("params", "exp_avgs", "exp_avg_sqs", "path_integrals")
            assert (tensors[0]._version > before[name][0]) == mutated, name
            assert tensors[1]._version == before[name][1], f"{name}: empty tensors stay untouched"

    def test_parameters_that_require_grad(self):
        columns = operands([(5,)], F32, F32)
        expected = copies(columns)
        columns["params"][0].requires_grad_()
        take_step(triton_kernel, columns, [1.0])
        take_step(reference, expected, [1.0])
        assert torch.equal(columns["params"][0].detach(), expected["params"][0])

    def test_integer_hyperparameters(self):
        ours = operands([(5,)], F32, F32)
        theirs = copies(ours)
        for module, columns in ((triton_kernel, ours), (reference, theirs)):
            take_step(module, columns, [1], lr=1, weight_decay=0, eps=1)
        assert_same_bits(ours, theirs)

    def test_float64_parameters_are_refused(self):
        columns = {name: [t.double() for t in tensors] for name, tensors in operands([(5,)], F32, F32).items()}
        with pytest.raises(Exception, match="computes in float32"):
            take_step(triton_kernel, columns, [1.0])

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, at the non-finite values asked for
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


to_float32, to_storage = triton_kernel.to_float32, triton_kernel.to_storage


@triton.jit
def convert(source_ptr, target_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = to_float32(tl.load(source_ptr + offsets))
    tl.store(target_ptr + offsets, to_storage(value, target_ptr.dtype.element_ty))
