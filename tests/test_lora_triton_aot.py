"""What the compilers make of LoRA's Triton kernels, with no GPU: vectors, tensor cores, registers, recompiles."""

from __future__ import annotations

import functools
import re
from collections import Counter

import pytest
import torch
from interpreted import resource_usage

triton = pytest.importorskip("triton", reason="Triton is not installed")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from alr_kernels.lora import triton_kernel  # noqa: E402
from alr_kernels.lora.triton_kernel import Kind, pull_build, record_build  # noqa: E402
from alr_kernels.lora.triton_tile import pull_kernel, record_kernel  # noqa: E402

pytestmark = pytest.mark.skipif(
    bool(triton.knobs.runtime.interpret), reason="TRITON_INTERPRET=1 is set: nothing compiles under the interpreter"
)

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
NVIDIA = [name for name in TARGETS if name != "gfx942"]
TENSOR_CORES = {"sm_80": r"mma\.sync\S+tf32", "sm_90": r"wgmma\.mma_async\S+tf32", "sm_100": r"tcgen05\.mma\S+tf32"}
RANKS = (1, 8, 16, 32, 64)
THREADS = 128
CUDA = torch.device("cuda")


def record_of(rank, aligned=True, dense=False, clamp=False):
    """Return what the launcher compiles for a pair of this rank."""
    return record_build(Kind(CUDA, 4096, 4096, 0 if dense else 2 * rank, 2 * rank, "", aligned), clamp)


def pull_of(rank, kept="int8", sides="both", curvature=False, aligned=True):
    return pull_build(Kind(CUDA, 4096, 4096, 2 * rank, rank, kept, aligned), sides, curvature)


RECORDS = {f"r={rank}": record_of(rank, clamp=rank == 16) for rank in RANKS}
RECORDS |= {f"r={rank} dense": record_of(rank, dense=True) for rank in RANKS}
PULLS = {f"r={rank}{' curvature' * c}": pull_of(rank, curvature=c) for rank in RANKS for c in (False, True)}
PULLS |= {f"r=8 {kept}": pull_of(8, kept) for kept in ("fp32", "bf16", "fp16", "int4")}
PULLS |= {f"r=8 {sides}": pull_of(8, sides=sides, curvature=True) for sides in ("up", "down", "none")}
CASES = {f"record {name}": (record_kernel, *row) for name, row in RECORDS.items()}
CASES |= {f"pull {name}": (pull_kernel, *row) for name, row in PULLS.items()}
on_nvidia = pytest.mark.parametrize("target", NVIDIA)
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
INTEGERS = ("m", "units", "grad_blocks", "move_blocks", "drift_blocks", "rank_blocks", "rank", "tiles")


def absent(build):
    """Return the pointers that the launcher passes as None."""
    none = {"grad_left_ptr", "grad_right_ptr"} if not build.first else set()
    none |= set() if build.up else {"grad_up_ptr", "curvature_up_ptr"}
    none |= set() if build.down else {"grad_down_ptr", "curvature_down_ptr"}
    none |= set() if build.curvature else {"curvature_up_ptr", "curvature_down_ptr", "bound_up_ptr", "bound_down_ptr"}
    return none


@functools.cache
def compiled(target, kernel, build, columns):
    """Compile a kernel as the launcher would."""
    if target == "gfx942":
        build = build._replace(precision="ieee")
    constants = {"BUILD": build, "ROWS": triton_kernel.ROWS, "COLUMNS": columns}
    constants |= {name: None for name in absent(build) if name in kernel.arg_names}
    types = {"table_ptr": "*i64", "scale_ptr": "*fp64", "value_ptr": "*fp64"} | dict.fromkeys(INTEGERS, "i32")
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, {})
    return triton.compile(source, target=TARGETS[target], options=dict(triton_kernel.OPTIONS))


def accesses(kernel, kind):
    """Return how often each width is loaded from (``ld``) or stored to (``st``) global memory."""
    return Counter(re.findall(rf"\b{kind}\.global\.(?:\w+::\w+\.)*((?:v\d\.)?b\d+)", kernel.asm["ptx"]))


@on_nvidia
@cases
def test_nothing_spills(target, case, tmp_path):
    kernel = compiled(target, *case)
    usage = resource_usage(kernel, tmp_path)
    assert usage["LOCAL"] == 0
    # Without wgmma a thread holds operands too: Triton 3.9 puts 40 bytes on the stack for sm_80, 3.6 none.
    assert usage["STACK"] <= (48 if target == "sm_80" and case[1].curvature else 0)
    assert not re.search(r"\b(?:ld|st)\.local|\.local\b", kernel.asm["ptx"])
    assert kernel.metadata.shared <= 96 * 1024, "two programs a multiprocessor of an H100, at least"


@on_nvidia
@cases
def test_tensor_cores_multiply(target, case):
    """Three TF32 products for each of float32, and nothing else multiplies matrices."""
    kernel, (_, build, columns) = compiled(target, *case), case
    assert build.precision == "tf32x3"
    found = re.findall(TENSOR_CORES[target], kernel.asm["ptx"])
    if build.importance is None and not build.first_loops and not build.second_loops:
        steps = (build.first + build.second) // 8 * 3
        assert len(found) == steps * (columns // 8 if target == "sm_80" else 1)
    assert found
    assert len(found) % 3 == 0
    elements = triton_kernel.ROWS * columns // THREADS
    assert len(re.findall(r"fma\.rn\.f32", kernel.asm["ptx"])) <= 4 * elements, (
        "but for what is not a product of matrices"
    )
    assert not re.search(r"\batom|\bred\.global", kernel.asm["ptx"]), "sums must not depend on an order"


@on_nvidia
@pytest.mark.parametrize("build", RECORDS.values(), ids=RECORDS)
def test_omega_in_vectors(target, build):
    kernel, (_, columns) = compiled(target, record_kernel, *build), build
    assert accesses(kernel, "st") == {"v4.b32": triton_kernel.ROWS * columns // THREADS // 4}
    loads = accesses(kernel, "ld")
    assert set(loads) == {"b64", "v4.b32"}, "addresses and vectors"
    assert loads["b64"] <= 2


@on_nvidia
@pytest.mark.parametrize("kept", ["fp32", "bf16", "fp16", "int8", "int4"])
def test_importance_in_vectors(target, kept):
    kernel = compiled(target, pull_kernel, *pull_of(8, kept))
    loads = accesses(kernel, "ld")
    factors = (2 * 64 * 16 + 2 * 16 * 32) // THREADS // 4  # of the drift, up and down
    elements = triton_kernel.ROWS * triton_kernel.PULL_COLUMNS // THREADS
    wide = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "int4": 4}[kept] * elements // 128
    assert loads["v4.b32"] == factors + wide
    assert loads["v2.b32"] == (kept == "int4"), "64 bits are all that a thread has"
    assert loads["b32"] == loads["b8"] == 0
    assert accesses(kernel, "st")["v4.b32"] == 16 * triton_kernel.PULL_COLUMNS // THREADS // 4, "parts of down"


def test_unaligned_operands_fail_the_check():
    """The checks above find narrow accesses where there are some."""
    kernel = compiled("sm_90", record_kernel, *record_of(8, aligned=False))
    assert accesses(kernel, "st") == {"b32": triton_kernel.ROWS * 32 // THREADS}
    assert accesses(compiled("sm_90", pull_kernel, *pull_of(8, "fp32", aligned=False)), "ld")["b32"] >= 16


@pytest.mark.parametrize(
    ("case", "programs"),
    [("record r=8", 2), ("record r=16", 4), ("record r=64", 2), ("pull r=8", 4), ("pull r=16", 3), ("pull r=64", 2)],
)
def test_occupancy(case, programs, tmp_path):
    """So many programs fit the 65,536 registers and 227 KiB of shared memory of a multiprocessor of an H100."""
    if triton.__version__.startswith("3.6."):
        programs += case == "record r=8"  # 164 registers, of Triton 3.9 198
    kernel = compiled("sm_90", *CASES[case])
    registers = resource_usage(kernel, tmp_path)["REG"]
    assert 65536 // (THREADS * (-(-registers // 8) * 8)) >= programs
    assert 227 * 1024 // (kernel.metadata.shared + 1024) >= programs


@pytest.mark.parametrize("case", ["record r=8", "record r=64", "pull r=8", "pull r=16 curvature", "pull r=8 int4"])
def test_rocm(case):
    kernel = compiled("gfx942", *CASES[case])
    assert kernel.asm["hsaco"][:4] == b"\x7fELF"
    assembly = kernel.asm["amdgcn"]
    assert "v_mfma_f32" in assembly
    assert re.search(r"(?:global|buffer)_load_dwordx4", assembly)
    assert re.search(r"\.private_segment_fixed_size:\s+0\b", assembly), "the kernel spills"


@pytest.mark.parametrize("case", ["record r=8", "record r=64 dense", "pull r=8", "pull r=64 curvature"])
def test_offsets_are_64_bit(case):
    """What varies by pair and program, to the start of a tile."""
    ttir = re.sub(r" loc\(.*?\)$", "", compiled("sm_90", *CASES[case]).asm["ttir"], flags=re.MULTILINE)
    offsets = re.findall(r"tt\.addptr %\w+, %\w+ (?:\{.*?\} )?: !tt\.ptr<(?:i8|bf16|f32|f64)>, (i\d+)", ttir)
    assert len(offsets) >= 4
    assert set(offsets) == {"i64"}


class Pointer:
    """What the launcher looks at in a tensor, with no device behind it."""

    def __init__(self, address, dtype):
        self.address, self.dtype = address, dtype

    def data_ptr(self):
        return self.address


def cache_key(kernel, build, columns, number=1000, address=256):
    """Return what Triton looks a build up by."""
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(TARGETS["sm_90"]))
    dtypes = {"table_ptr": torch.int64, "scale_ptr": torch.float64, "value_ptr": torch.float64}
    none = absent(build)
    pointers = [name for name in kernel.arg_names if name.endswith("_ptr")]
    args = [None if name in none else Pointer(address, dtypes.get(name, torch.float32)) for name in pointers]
    numbers = [number] * (len(kernel.arg_names) - len(args) - 3)
    bound, specialization, _ = bind(*args, *numbers, build, triton_kernel.ROWS, columns)
    assert len(bound) == len(kernel.arg_names)
    return str(specialization)


@pytest.mark.parametrize("case", ["record r=8", "pull r=8", "pull r=64 curvature"])
def test_sizes_never_recompile(case):
    key = cache_key(*CASES[case])
    for number in (0, 1, 16, 4096, 2**31 - 1):
        assert cache_key(*CASES[case], number=number) == key, number
    assert cache_key(*CASES[case], address=8) == key, "alignment is the build's business"
    kernel, build, columns = CASES[case]
    assert cache_key(kernel, build._replace(aligned=False), columns) != key


def test_ranks_share_builds():
    assert record_of(1) == record_of(8)
    assert record_of(9) == record_of(16)
    assert record_of(17) == record_of(256)
    assert pull_of(1) == pull_of(8)
    assert pull_of(33) == pull_of(64)
    shapes = [Kind(CUDA, m, n, 16, 8, "int8", True) for m, n in ((1, 128), (4096, 1024), (50257, 1536))]
    assert len({pull_build(kind, "both", False) for kind in shapes}) == 1
