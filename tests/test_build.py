"""The extension itself: what it needs to load, what it reports, how it converts, and what it refuses."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alr_kernels.importance import native as importance_native
from alr_kernels.step import native
from alr_kernels.step.plan import Numbers, Operands, Options

if not native.available()[0]:
    pytest.skip(native.available()[1], allow_module_level=True)

from alr_kernels import _C

ROOT = Path(__file__).resolve().parent.parent
CAPABILITIES = _C.build_info()["cpu_capabilities_detected"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def bits(tensor):
    """Integers that are equal where floats are the same bits, every NaN counting as one value."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return torch.where(tensor.isnan(), torch.full_like(tensor.view(integers), -1), tensor.view(integers))


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    assert torch.equal(bits(actual), bits(expected))


# ---- what it is


def test_loads_without_torch():
    path = importlib.util.find_spec("alr_kernels._C").origin
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_C', {path!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert module.build_info()['compiler'] and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_build_info():
    info = _C.build_info()
    assert info["cplusplus"] >= 201703
    assert set(info["cpu_capabilities_detected"]) <= set(info["cpu_capabilities_compiled"])
    assert info["cpu_capability"] in info["cpu_capabilities_detected"]
    if info["cuda"]:
        assert info["cuda_missing_reason"] is None
        assert info["cuda_toolkit"]
        assert "sm_80" in info["cuda_architectures"]
    else:
        assert info["cuda_missing_reason"]
        assert not hasattr(_C, "finalise_cuda")
        assert not hasattr(_C, "merge_cuda")


def test_shares_openmp_threads_with_torch():
    if not sys.platform.startswith("linux") or _C.build_info()["openmp"] is None:
        pytest.skip("reads /proc, needs OpenMP")
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    assert len(loaded) <= 1, f"two OpenMP runtimes would run two thread pools: {loaded}"


# ---- conversions


def to_float(narrow):
    wide = torch.empty(narrow.shape, dtype=torch.float32)
    _C._to_float(narrow.data_ptr(), native.DTYPE_CODES[narrow.dtype], wide.data_ptr(), narrow.numel())
    return wide


def from_float(wide, dtype):
    narrow = torch.empty(wide.shape, dtype=dtype)
    _C._from_float(wide.data_ptr(), narrow.data_ptr(), native.DTYPE_CODES[dtype], wide.numel())
    return narrow


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_every_narrow_value_widens_and_returns(capability, dtype):
    narrow = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    assert_same_bits(to_float(narrow), narrow.float())
    assert_same_bits(from_float(narrow.float(), dtype), narrow)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_to_nearest_even(capability, dtype):
    narrow = torch.arange(0, 2**15, dtype=torch.int32).to(torch.int16)
    low = narrow.view(torch.float16 if dtype == torch.float32 else dtype).float()
    ties = (low[:-1].double() / 2 + low[1:].double() / 2).float()  # halfway between neighbours
    ties = ties[ties.isfinite()]
    around = torch.cat([ties, ties.nextafter(torch.tensor(0.0)), ties.nextafter(torch.tensor(float("inf")))])
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31 - 1, (1 << 20,), generator=generator, dtype=torch.int64)
    special = torch.tensor([0.0, float("inf"), float("nan"), 65519.996, 65520.0, 65504.0, 3.4e38, 2.0**-24, 2.0**-25])
    special = torch.cat([special, torch.tensor([2.98023241e-08, 6.1e-05, 6.103515625e-05, 1e-45, 1.17549435e-38])])
    wide = torch.cat([around, special, patterns.to(torch.int32).view(torch.float32)])
    wide = torch.cat([wide, -wide])
    assert_same_bits(from_float(wide, dtype), wide.to(dtype))


def test_conversions_ignore_flush_to_zero(capability):
    narrow = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    expected = narrow.float()
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU has no flush-to-zero mode")
    try:
        wide = to_float(narrow)
        back = from_float(wide, torch.float16)
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(wide, expected)
    assert_same_bits(back, narrow)


# ---- capabilities and threads


def step_operands(dtype, grad_dtype, sizes=(0, 1, 17, 1025, 70001)):
    generator = torch.Generator().manual_seed(1)

    def column(scale, to=torch.float32, sign=True):
        draw = torch.randn if sign else torch.rand
        return [(draw(n, generator=generator) * scale).to(to) for n in sizes]

    params, grads = column(0.02, dtype), column(1e-3, grad_dtype)
    importances = [torch.where(t < 300, 0.0, t) for t in column(1e3, sign=False)]
    return [params, grads, column(1e-3), column(1e-6, sign=False), importances, column(0.02, dtype), column(1e-5)]


def numbers_of(counts):
    values = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "reg_lambda": 1.0}
    hyper = torch.tensor([*values.values(), 1.0, 1.0, 0.0], dtype=torch.float64)
    units = torch.full((len(counts),), 0.5, dtype=torch.float64)
    return Numbers(hyper, [torch.tensor(count) for count in counts], units, list(range(len(counts))))


def step_everywhere(dtype, grad_dtype, mode):
    """Step, accumulate and finalise; return all results."""
    columns = step_operands(dtype, grad_dtype)
    n = len(columns[0])
    starts = [param.clone() for param in columns[0]]
    native.step_(Operands(*columns), numbers_of([1.0, 2.0, 1.0, 10.0, 2.0][:n]), Options(mode, maximize=True))
    previous = [start.clone() for start in starts]
    importance_native.accumulate_(columns[6], columns[1], columns[0], previous, maximize=True)
    formats = ["fp32", "bf16", "fp16", "fp32", "bf16"][:n]
    importances, *rest = importance_native.finalise(columns[6], columns[0], starts, formats, 1e-3, relative=True)
    return [tensor for column in (*columns, previous, [x.values for x in importances], rest) for tensor in column]


@pytest.mark.parametrize("mode", ["coupled", "proximal"])
@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_capabilities_and_threads_agree_bit_for_bit(dtype, grad_dtype, mode):
    before, threads = _C.cpu_capability(), torch.get_num_threads()
    try:
        results = []
        for capability, count in [(name, 1) for name in CAPABILITIES] + [(before, 2), (before, 3)]:
            _C.set_cpu_capability(capability)
            torch.set_num_threads(count)
            results.append(step_everywhere(dtype, grad_dtype, mode))
    finally:
        _C.set_cpu_capability(before)
        torch.set_num_threads(threads)
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            assert_same_bits(actual, expected)


def test_in_place_writes_are_seen_by_autograd():
    columns = step_operands(torch.float32, torch.float32, sizes=(5,))
    versions = [column[0]._version for column in columns]
    native.step_(Operands(*columns), numbers_of([1.0]), Options("coupled"))
    changed = [column[0]._version > version for column, version in zip(columns, versions, strict=True)]
    assert changed == [True, False, True, True, False, False, True]


# ---- refusals


def raw_step(role=None, addresses=None, **changes):
    """Call _C.step_ for one tensor of four elements, with some arguments replaced."""
    buffer = torch.zeros(7, 4)
    operands = {name: [row.data_ptr()] for name, row in zip(Operands._fields, buffer, strict=False)}
    operands |= {name: [] for name in Operands._fields[7:]}
    if role:
        operands[role] = addresses
    arguments = {"operands": list(operands.values()), "numels": [4], "formats": [0] * 5, "curvature_scales": [1.0]}
    arguments |= {"keys": [0], "offsets": [0], "scalars": [(1e-3, 1.0, 0.1, 0.9, 0.1, 1e-8, 1e-3, 1.0, 1.0, 1.0)]}
    arguments |= {"scalar_indices": [0], "mode": 0, "precise": True, "statistics": 0, "num_threads": 1}
    _C.step_(**(arguments | changes))
    return buffer


def test_raw_step_accepts_good_arguments():
    assert raw_step().isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"role": "grads", "addresses": []}, "expected grads to hold 1 values, got 0"),
        ({"role": "anchors", "addresses": []}, "expected anchors to hold 1 values, got 0"),
        ({"curvature_scales": [1.0, 2.0]}, "expected curvature_scales to hold 1 values, got 2"),
        ({"role": "exp_avgs", "addresses": [0]}, r"expected exp_avgs\[0\] to be an address, got 0 for 4 elements"),
        ({"numels": [-1]}, "expected numels of 0 or more, got -1"),
        ({"formats": [9, 0, 0, 0, 0]}, "got 9"),
        ({"formats": [0, -1, 0, 0, 0]}, "got -1"),
        ({"formats": [0, 0, 5, 0, 0]}, "128"),
        ({"keys": []}, "expected keys to hold 1 values, got 0"),
        ({"offsets": []}, "expected offsets to hold 1 values, got 0"),
        ({"offsets": [-1]}, r"expected offsets in \[0, 2\^63 - numel\), got -1 for 4 elements"),
        ({"offsets": [2**63 - 4]}, rf"expected offsets in \[0, 2\^63 - numel\), got {2**63 - 4} for 4 elements"),
        ({"offsets": [64], "numels": [0], "formats": [0, 0, 5, 0, 0]}, "multiples of 128 .* codes, got 64"),
        ({"scalar_indices": [1]}, r"expected scalar_indices in \[0, 1\), got 1"),
        ({"mode": 3}, r"expected mode in \[0, 3\), got 3"),
        ({"num_threads": 0}, "expected num_threads of 1 or more, got 0"),
    ],
)
def test_raw_step_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        raw_step(**changes)


def test_unknown_capability_is_refused():
    with pytest.raises(ValueError, match=r"expected one of default.*got 'sse9'"):
        _C.set_cpu_capability("sse9")


def test_launchers_refuse_other_sizes_and_dtypes():
    params, *rest = step_operands(torch.float32, torch.float32, sizes=(5,))
    numbers = numbers_of([1.0])
    with pytest.raises(ValueError, match="grads: expected tensors of"):
        native.step_(Operands(params, [torch.zeros(4)], *rest[1:]), numbers, Options("coupled"))
    with pytest.raises(TypeError, match="params"):
        native.step_(Operands([params[0].double()], *rest), numbers, Options("coupled"))
    with pytest.raises(ValueError, match="starts: expected tensors of"):
        importance_native.finalise(rest[-1], params, [params[0].half()], ["fp32"], 1e-3)


# ---- CUDA code, without a GPU


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize(
    ("source", "contraction", "kernels"),
    [
        ("importance_cuda.cu", "false", 9),
        ("finalise_cuda.cu", "false", 3 * 5 + 5 + 3 + 2),
        ("fisher_cuda.cu", "true", 3 * 2),
    ],
)
def test_cuda_kernels_neither_spill_nor_use_stack(tmp_path, source, contraction, kernels):
    command = ["nvcc", "-O3", f"--fmad={contraction}", "-std=c++17", "-arch=sm_90", "-Xptxas", "-v", "-cubin"]
    result = subprocess.run(
        [*command, str(ROOT / "csrc" / source), "-o", str(tmp_path / "kernels.cubin")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert len(frames) >= kernels
    assert set(frames) == {("0", "0", "0")}


def cuobjdump():
    """Return the tool's path: the toolkit's, or the one in Triton's wheel."""
    wheel = importlib.util.find_spec("triton")
    folders = [str(Path(wheel.origin).parent / "backends" / "nvidia" / "bin")] if wheel and wheel.origin else []
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(folders))


NO_CUDA_BUILD = _C.build_info()["cuda_missing_reason"] or ("" if cuobjdump() else "cuobjdump is not here")
built_for_cuda = pytest.mark.skipif(bool(NO_CUDA_BUILD), reason=f"no CUDA code to look at: {NO_CUDA_BUILD}")


def dumped(*options):
    command = [cuobjdump(), *options, _C.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@built_for_cuda
def test_no_cuda_kernel_of_any_architecture_spills():
    text = dumped("--dump-resource-usage")
    kernels = re.findall(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    architectures = _C.build_info()["cuda_architectures"]
    assert set(re.findall(r"arch = (sm_\d+)", text)) >= set(architectures)
    assert len(kernels) == len(architectures) * (9 + 3 * 5 + 5 + 3 + 2 + 3 * 2)
    assert {(stack, local) for _, _, stack, local in kernels} == {("0", "0")}


@built_for_cuda
def test_cuda_kernels_move_16_bytes_at_a_time():
    """Of sm_90: what a thread loads at once, of each operand, and what it stores where that is 16 bytes or more."""
    functions = dumped("-sass", "-arch", "sm_90").split("Function : ")[1:]
    found = {text.split()[0]: text for text in functions}
    for name, text in found.items():
        loads, stores = (len(re.findall(rf"{op}\.E[.A-Z]*\.128", text)) for op in ("LDG", "STG"))
        if "accumulate_kernel" in name:
            assert loads >= 4, name  # ω, g, θ, θ before
            assert stores >= 2, name
        elif "finalise_kernel" in name:
            assert loads >= (6 if "finalise_kernelIf" in name else 4), name  # two for eight floats, one for halves
            assert stores >= {"Li0E": 2, "Li1E": 1, "Li2E": 1}.get(name[name.index("Li") :][:4], 0), name
        elif "move_sq_kernel" in name:
            assert loads >= 2, name
        elif "merge_kernel" in name or "fisher_kernel" in name:
            assert loads >= 4, name


def expected_place(numels, chunk, pass_, thread):
    """The same in Python's integers, counting chunks of 8 rounds of 256 threads with 8 elements each."""
    for tensor, numel in enumerate(numels):
        chunks = -(-numel // 16384)
        if chunk < chunks:
            element = chunk * 16384 + pass_ * 2048 + thread * 8
            count = max(0, min(8, numel - element, 16384 - pass_ * 2048 - thread * 8))
            return tensor, element, count, element // 128, element, element // 2
        chunk -= chunks
    raise AssertionError


@pytest.mark.parametrize("numel", [1, 127, 2**31 - 128, 2**31 + 128, 2**32 + 5, 2**33 + 2**7, 2**40 + 77])
def test_cuda_indices_are_of_64_bits(numel):
    """No memory is touched: the functions that the kernels call say where a thread works."""
    numels = [numel, 0, 300, numel]
    chunks = -(-numel // 16384)
    for chunk in sorted({0, chunks // 2, chunks - 1, chunks, chunks + 1, 2 * chunks}):
        covered = 0
        for pass_ in range(8):
            for thread in (0, 1, 15, 16, 255):
                place = _C._cuda_place(numels, chunk, pass_, thread)
                assert place == expected_place(numels, chunk, pass_, thread)
            covered += sum(_C._cuda_place(numels, chunk, pass_, thread)[2] for thread in range(256))
        first = _C._cuda_place(numels, chunk, 0, 0)
        assert covered == min(16384, numels[first[0]] - first[1])
    with pytest.raises(ValueError, match="no such chunk"):
        _C._cuda_place(numels, 2 * chunks + 1, 0, 0)
