"""What the compilers make of the Triton step, with no GPU: vector accesses, IEEE arithmetic, registers, recompiles.

Triton compiles ahead of time for any target and its wheel carries ptxas and cuobjdump.
"""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from alr_kernels.step import triton_kernel  # noqa: E402
from alr_kernels.step.plan import StepScalars  # noqa: E402

pytestmark = pytest.mark.skipif(
    bool(triton.knobs.runtime.interpret), reason="TRITON_INTERPRET=1 is set: nothing compiles under the interpreter"
)

CUDA = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)}
GFX942 = GPUTarget("hip", "gfx942", 64)
PENALTY = {"none": (False, 0), "coupled": (True, 0), "proximal": (True, 1)}
DTYPES = (("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "fp32"))  # parameter, gradient
MAX_REGISTERS = 72  # 64 at most with Triton 3.9, 66 with 3.6 on sm_100

# Every flag combination on sm_90 in float32; every dtype with every mode, recording, on sm_90; the largest kernel
# of every dtype on the other targets.
BUILDS = sorted(
    {("sm_90", mode, record, maximize, "fp32", "fp32") for mode in PENALTY for record in (0, 1) for maximize in (0, 1)}
    | {("sm_90", mode, 1, 0, *dtypes) for mode in PENALTY for dtypes in DTYPES}
    | {(arch, "proximal", 1, 0, *dtypes) for arch in CUDA for dtypes in DTYPES}
)


@functools.cache
def build(target, mode, record, maximize, param, grad, aligned=True):
    """Compile the kernel as ``triton_kernel._launch`` would."""
    has_penalty, mode_index = PENALTY[mode]
    constants = {
        "HAS_PENALTY": has_penalty,
        "MODE": mode_index,
        "RECORD": bool(record),
        "MAXIMIZE": bool(maximize),
        "ALIGNED": aligned,
        "BLOCK": triton_kernel.BLOCK,
    }
    pointers = {
        "param_ptr": param,
        "grad_ptr": grad,
        "exp_avg_ptr": "fp32",
        "exp_avg_sq_ptr": "fp32",
        "importance_ptr": "fp32" if has_penalty else None,
        "anchor_ptr": param if has_penalty else None,
        "path_integral_ptr": "fp32" if record else None,
    }
    signature = {}
    for name in triton_kernel.step_kernel.arg_names:
        if pointers.get(name):
            signature[name] = "*" + pointers[name]
        elif name in pointers:
            constants[name] = None
            signature[name] = "constexpr"
        elif name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = "i64" if name == "numel" else "fp32"
    gpu = GFX942 if target == "gfx942" else CUDA[target]
    return triton.compile(
        ASTSource(triton_kernel.step_kernel, signature, constants, {}),
        target=gpu,
        options=triton_kernel.OPTIONS | {"num_warps": triton_kernel.THREADS // gpu.warp_size},
    )


def tensors(mode, record, *dtypes):
    """Return the bytes an element of every loaded and every stored tensor."""
    width = {"fp32": 4, "bf16": 2, "fp16": 2}
    param, grad = (width[dtype] for dtype in dtypes)
    loads = [param, grad, 4, 4] + ([param, 4] if mode != "none" else []) + [4] * record
    return loads, [param, 4, 4] + [4] * record


def accesses(ptx, kind):
    """Return {"v4.b32": n, "v2.b32": n, ...}: the vector accesses, all of them in the mask-free main body."""
    found: dict[str, int] = {}
    for line in ptx.splitlines():
        match = re.match(rf"\s*(@%p\d+\s+)?{kind}\.global\.((?:v\d\.)?b\d+)", line)
        if match and "v" in match[2]:
            found[match[2]] = found.get(match[2], 0) + 1
    return found


@pytest.mark.parametrize("case", BUILDS, ids=lambda case: "-".join(map(str, case)))
def test_cuda(case, tmp_path):
    kernel = build(*case)
    ptx = kernel.asm["ptx"]
    _, mode, record, _, *dtypes = case
    assert triton_kernel.BLOCK == 4 * triton_kernel.THREADS, "the widths below are those of 4 elements a thread"
    for kind, widths in zip(("ld", "st"), tensors(mode, record, *dtypes), strict=True):
        wanted = {"v4.b32": widths.count(4), "v2.b32": widths.count(2)}
        assert accesses(ptx, kind) == {width: count for width, count in wanted.items() if count}

    # One IEEE division and root an element, two in the proximal step; main body and tail.
    divisions = 2 * 4 * (2 if mode == "proximal" else 1)
    assert len(re.findall(r"div\.rn\.f32", ptx)) == divisions
    assert len(re.findall(r"sqrt\.rn\.f32", ptx)) == 2 * 4
    assert not re.findall(r"div\.(?!rn\.f32)\S*f32|sqrt\.approx\S*|rcp\.\S*|\.ftz\S*", ptx)
    assert not re.findall(r"\bfma\.\S*|\bmad\.\S*f32", ptx)
    contractible = re.findall(r"\b(?:add|sub|mul)\.f32", ptx)
    assert not contractible, "without .rn ptxas may contract them"

    # bfloat16 is rounded by integers, float16 by the one instruction that rounds to nearest even.
    conversions = {instruction for instruction in re.findall(r"\bcvt\.\S+", ptx) if "f16" in instruction}
    assert conversions == ({"cvt.rn.f16.f32", "cvt.f32.f16"} if "fp16" in dtypes else set())

    assert ".local" not in ptx
    usage = resource_usage(kernel, tmp_path)
    assert usage["LOCAL"] == 0
    assert usage["STACK"] <= 8  # 0 everywhere, but 8 bytes on sm_100 with the ptxas of Triton 3.6
    assert usage["REG"] <= MAX_REGISTERS
    assert kernel.metadata.shared == 0, "operands of one element meet in one thread"


def resource_usage(kernel, tmp_path):
    """Return {"REG": n, "STACK": bytes, "LOCAL": bytes, ...} from the cubin."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not cuobjdump.exists():
        pytest.skip("this Triton build carries no cuobjdump")
    cubin = tmp_path / "step.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    result = subprocess.run([cuobjdump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    assert "step_kernel" in result.stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", result.stdout)}


def test_unaligned_operands_are_not_read_in_vectors():
    ptx = build("sm_90", "proximal", 1, 0, "fp32", "fp32", aligned=False).asm["ptx"]
    assert accesses(ptx, "ld") == accesses(ptx, "st") == {}


@pytest.mark.parametrize(
    ("mode", "dtypes"), [*(("proximal", dtypes) for dtypes in DTYPES), ("none", DTYPES[0]), ("coupled", DTYPES[0])]
)
def test_rocm(mode, dtypes):
    kernel = build("gfx942", mode, 1, 0, *dtypes)
    assert kernel.asm["hsaco"][:4] == b"\x7fELF"
    assembly = kernel.asm["amdgcn"]
    loads, stores = tensors(mode, 1, *dtypes)
    assert len(re.findall(r"(?:global|buffer)_load_dwordx4", assembly)) == loads.count(4)
    assert len(re.findall(r"(?:global|buffer)_store_dwordx4", assembly)) == stores.count(4)
    assert re.search(r"\.private_segment_fixed_size:\s+0\b", assembly), "the kernel spills"


def test_offsets_are_64_bit():
    """Beyond 2^31 elements program_id · BLOCK needs 64 bits: widen first, multiply then."""
    ttir = build("sm_90", "proximal", 1, 0, "fp32", "fp32").asm["ttir"]
    program = re.search(r"(%\w+) = tt\.get_program_id x : i32", ttir)[1]
    uses = [line for line in ttir.splitlines() if re.search(rf"{re.escape(program)}\b", line)][1:]
    assert len(uses) == 1
    assert re.search(r"arith\.extsi .* i32 to i64", uses[0])
    assert "%numel: i64" in ttir


class Pointer:
    """What the launcher looks at in a tensor, with no device behind it."""

    dtype = torch.float32

    def __init__(self, address):
        self.address = address

    def data_ptr(self):
        return self.address


def cache_key(target, numel, scale, scalars, address=256):
    """Return what Triton looks a build up by."""
    kernel = triton_kernel.step_kernel
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(
        *[Pointer(address)] * 7, numel, scale, *scalars,
        HAS_PENALTY=True, MODE=1, RECORD=True, MAXIMIZE=False, ALIGNED=True, BLOCK=triton_kernel.BLOCK,
    )  # fmt: skip
    assert len(bound) == len(kernel.arg_names)
    return str(specialization)


@pytest.mark.parametrize("target", [CUDA["sm_90"], GFX942], ids=("cuda", "hip"))
def test_values_never_recompile(target):
    """A schedule, another tensor and another step share one build."""
    usual = StepScalars(1e-3, 0.9999, 0.1, 0.999, 0.001, 1e-8, 0.01, 31.6)
    key = cache_key(target, 1000, 0.5, usual)
    assert "fp32" in key
    for value in (0.0, 1.0, 16.0, 0, 1, 16):
        assert cache_key(target, 1000, value, usual) == key
        for name in StepScalars._fields:
            assert cache_key(target, 1000, 0.5, usual._replace(**{name: value})) == key, (name, value)
    for numel in (1, 16, 1024, 2**31 - 1, 2**31, 2**40):
        assert cache_key(target, numel, 0.5, usual) == key, numel
    assert cache_key(target, 1000, 0.5, usual, address=4) == key, "alignment is the ALIGNED flag's business"
