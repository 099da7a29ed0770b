"""What the compilers make of the Triton step, with no GPU: vector accesses, IEEE arithmetic, registers, recompiles.

Triton compiles ahead of time for any target and its wheel carries ptxas and cuobjdump.
"""

from __future__ import annotations

import functools
import re
from collections import Counter

import pytest
import torch
from interpreted import resource_usage
from test_step_formats import pairwise

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from alr_kernels.step import plan, tables, triton_kernel, triton_tile  # noqa: E402
from alr_kernels.step.triton_math import Build  # noqa: E402

pytestmark = pytest.mark.skipif(
    bool(triton.knobs.runtime.interpret), reason="TRITON_INTERPRET=1 is set: nothing compiles under the interpreter"
)

CUDA = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)}
GFX942 = GPUTarget("hip", "gfx942", 64)
FLOATS = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16} if triton else {}
CHOICES = {
    "param": ("fp32", "bf16", "fp16", "split", "stochastic"),
    "grad": ("fp32", "bf16", "fp16"),
    "moments": ("fp32", "bf16", "int8"),
    "importance": ("fp32", "none", "bf16", "int8", "int4"),
    "anchor": ("fp32", "bf16", "fp16"),
    "mode": plan.MODES,
    "record": (True, False),
    "precise": (True, False),
    "statistics": (False, True),
    "maximize": (False, True),
}
PLAIN = {name: values[0] for name, values in CHOICES.items()} | {"record": False, "mode": "proximal"}
BF16 = {"param": "bf16", "grad": "bf16", "anchor": "bf16"}
FEW_BYTES = BF16 | {"param": "split", "moments": "int8", "importance": "int4"}
USUAL = {
    "fp32": PLAIN,
    "bf16": PLAIN | BF16,
    "few bytes": PLAIN | FEW_BYTES,
    "few bytes, fast": PLAIN | FEW_BYTES | {"precise": False},
    "most": PLAIN | FEW_BYTES | {"importance": "int8", "record": True, "statistics": True},
}


def build_of(param, grad, moments, importance, anchor, **flags):
    """Return what the launcher would compile for operands of these forms."""
    moment = (tl.int8, tl.uint8) if moments == "int8" else (FLOATS[moments],) * 2
    master = param if param in plan.MASTERS else "none"
    codes = {"int8": 8, "int4": 4}
    penalty = {"importance": FLOATS.get(importance, tl.uint8), "bits": codes.get(importance, 0)}
    penalty["anchor"] = FLOATS[anchor]
    if importance == "none":
        penalty, flags = {}, flags | {"mode": "none"}
    return Build(FLOATS.get(param, tl.bfloat16), FLOATS[grad], *moment, master=master, **penalty, **flags)


# Every pair of choices on sm_90, the usual ones everywhere.
BUILDS = sorted(
    {("sm_90", build_of(**row)) for row in pairwise(CHOICES)}
    | {(target, build_of(**row)) for target in CUDA for row in USUAL.values()},
    key=str,
)


def name_of(case):
    target, build = case
    fields = (str(value).replace("triton.language.", "") for value in build[:-2] if value not in (False, 0, None))
    return "-".join((target, *fields))


@functools.cache
def compiled(target, build):
    """Compile the kernel as the launcher would."""
    gpu = GFX942 if target == "gfx942" else CUDA[target]
    options = dict(triton_kernel.launch_options(build, nvidia=target != "gfx942"))
    constants = {"BUILD": build} | {name: options.pop(name) for name in ("CHUNK", "TILE", "TAIL")}
    if not build.statistics:
        constants["partial_ptr"] = None
    types = {"table_ptr": "*i64", "chunk_ptr": "*i64", "stride": "i64", "first_program": "i64"}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*fp64")
        for name in triton_kernel.step_kernel.arg_names
    }
    return triton.compile(
        ASTSource(triton_kernel.step_kernel, signature, constants, {}),
        target=gpu,
        options=options | {"num_warps": triton_kernel.THREADS // gpu.warp_size},
    )


def operands(build):
    """Return (bits an element of what is loaded, of what is stored); and the same of block scales."""
    width = {role: getattr(build, role).primitive_bitwidth for role in ("param", "grad", "exp_avg", "exp_avg_sq")}
    loads, stores = list(width.values()), [width["param"], width["exp_avg"], width["exp_avg_sq"]]
    scales, stored_scales = [], []
    if build.importance is not None:
        loads += [build.bits or build.importance.primitive_bitwidth, build.anchor.primitive_bitwidth]
        scales += [16] if build.bits else []
    if build.exp_avg == tl.int8:
        scales, stored_scales = [*scales, 32, 32], [32, 32]
    extra = [32] * build.record + [16] * (build.master == "split")
    return (loads + extra, scales), (stores + extra, stored_scales)


def elements_of(build):
    """Return how many elements of a tile a thread has."""
    return triton_kernel.launch_options(build, nvidia=True)["TILE"] // triton_kernel.THREADS


def expected_accesses(build, scale_loads=1):
    """Return the accesses of a tile: 128 bits for operands of 2 and 4 bytes, all of a thread's codes at once."""
    elements, found = elements_of(build), []
    for (widths, scales), times in zip(operands(build), (scale_loads, 1), strict=True):
        count = Counter({f"b{bits}": n * times for bits, n in Counter(scales).items()})
        for bits in widths:
            if bits >= 16:
                count["v4.b32"] += elements * bits // 128
            else:
                count[{64: "v2.b32", 32: "b32"}[elements * bits]] += 1
        found.append(count)
    return found


def loops(ptx):
    """Return the text of each loop: from a label to the branch back to it."""
    lines, labels, found = ptx.splitlines(), {}, []
    for number, line in enumerate(lines):
        if match := re.match(r"(\$L\w+):", line):
            labels[match[1]] = number
        elif (match := re.search(r"\bbra(?:\.uni)?\s+(\$L\w+);", line)) and match[1] in labels:
            found.append("\n".join(lines[labels[match[1]] : number + 1]))
    return found


def accesses(text):
    """Return how often each width is loaded from and stored to global memory."""
    return [Counter(re.findall(rf"\b{kind}\.global\.(?:\w+::\w+\.)*((?:v\d\.)?b\d+)", text)) for kind in ("ld", "st")]


def main_loop_accesses(kernel):
    """Return the accesses of the loop over whole tiles; the other ones are the tail's and that of the powers."""
    found = [accesses(text) for text in loops(kernel.asm["ptx"]) if ".global." in text]
    assert len(found) == 2, "a loop over whole tiles and one over what is left"
    return found[0]


@pytest.mark.parametrize("case", BUILDS, ids=name_of)
def test_memory_accesses(case):
    kernel, (_, build) = compiled(*case), case
    found, wanted = main_loop_accesses(kernel), expected_accesses(build)
    if triton.__version__.startswith("3.6.") and found != wanted:  # one load an element, of which ptxas keeps one
        wanted = expected_accesses(build, scale_loads=elements_of(build))
    assert found == wanted
    assert not re.findall(r"\b(?:ld|st)\.local|\.local\b", kernel.asm["ptx"])


def test_unaligned_operands_fail_the_check():
    """The check above finds narrow accesses where there are some."""
    build = build_of(**PLAIN | FEW_BYTES)
    found = main_loop_accesses(compiled("sm_90", build._replace(aligned=False)))
    assert found != expected_accesses(build)
    assert not any("v" in width for count in found for width in count), "nothing is known of their addresses"
    assert found[0]["b16"] >= 8 * 4


@pytest.mark.parametrize("case", BUILDS, ids=name_of)
def test_arithmetic(case):
    ptx, (_, build) = compiled(*case).asm["ptx"], case
    # Contraction: ptxas may fuse what does not say .rn.
    assert not re.findall(r"\bfma\.\S*|\bmad\.\S*f\d+", ptx)
    assert not re.findall(r"\b(?:add|sub|mul)\.f(?:32|64)", ptx)
    # Storage and scalars round to nearest even.
    narrowing = re.findall(r"\bcvt\.\S*(?:f16|f16x2)\.f32|\bcvt\.\S*f32\.f64", ptx)
    assert narrowing
    assert all(instruction.startswith("cvt.rn.") for instruction in narrowing)
    # The scalars' division and root, as on the host.
    assert not re.findall(r"\b(?:div|sqrt|rcp|rsqrt)\.(?!rn)\S*f64", ptx)
    approximate = re.findall(r"\b(?:div|sqrt|rcp|rsqrt)\.(?!rn\.f32)\S*f32", ptx)
    if build.precise:
        elements = elements_of(build) + 1  # and the tail
        stiffness = elements if build.statistics and build.importance is not None else 0
        assert Counter(approximate) == Counter({"rsqrt.approx.ftz.f32": stiffness} if stiffness else {})
        rows = 1 if build.exp_avg == tl.int8 else 0  # a thread's elements lie in one block
        assert len(re.findall(r"\bdiv\.rn\.f32", ptx)) == elements + 2 * 2 * rows
        assert len(re.findall(r"\bsqrt\.rn\.f32", ptx)) == elements + 2 * rows
    else:
        assert not re.findall(r"\b(?:div|sqrt)\.rn\.f32", ptx)
        assert set(approximate) == {"rsqrt.approx.ftz.f32", "sqrt.approx.ftz.f32"}


@pytest.mark.parametrize("case", BUILDS, ids=name_of)
def test_registers(case, tmp_path):
    kernel, (target, build) = compiled(*case), case
    usage = resource_usage(kernel, tmp_path)
    assert usage["LOCAL"] == 0
    # 0 everywhere, but 8 bytes in one build in twenty with one ptxas or the other
    assert usage["STACK"] <= (0 if target == "sm_90" else 8)
    assert usage["REG"] <= triton_kernel.launch_options(build, nvidia=True).get("maxnreg", 128)
    assert kernel.metadata.shared <= 4096, "one tile of one float32 operand"


@pytest.mark.parametrize(("form", "programs"), [("fp32", 6), ("bf16", 4), ("few bytes", 4), ("few bytes, fast", 4)])
def test_occupancy(form, programs, tmp_path):
    """So many programs of 128 threads fit the 65,536 registers of a multiprocessor."""
    registers = resource_usage(compiled("sm_90", build_of(**USUAL[form])), tmp_path)["REG"]
    assert 65536 // (128 * (-(-registers // 8) * 8)) >= programs


@pytest.mark.parametrize("form", USUAL)
def test_rocm(form):
    build = build_of(**USUAL[form])
    kernel = compiled("gfx942", build)
    assert kernel.asm["hsaco"][:4] == b"\x7fELF"
    assembly = kernel.asm["amdgcn"]
    for kind, count in zip(("load", "store"), expected_accesses(build), strict=True):
        assert len(re.findall(rf"(?:global|buffer)_{kind}_dwordx4", assembly)) >= count["v4.b32"]
    assert re.search(r"\.private_segment_fixed_size:\s+0\b", assembly), "the kernel spills"


def test_offsets_are_64_bit():
    """Chunk times its size, and every offset from an operand's address that varies by program, in 64 bits."""
    build = build_of(**PLAIN | FEW_BYTES)
    ttir = re.sub(r" loc\(.*?\)$", "", compiled("sm_90", build).asm["ttir"], flags=re.MULTILINE)
    assert re.search(rf"arith\.muli %\w+, %c{triton_kernel.CHUNK}_i64 : i64", ttir)
    offsets = re.findall(r"tt\.addptr %\w+, %\w+ (?:\{.*?\} )?: !tt\.ptr<(?:bf16|i8|i16|f32)>, (i\d+)", ttir)
    assert len(offsets) == 2 * 10, "ten operands, in whole tiles and in what is left"
    assert set(offsets) == {"i64"}


def test_roles_are_in_the_order_of_the_table():
    singular = [re.sub(r"_sqs", "_sq", name).removesuffix("s") for name in plan.Operands._fields]
    assert list(triton_tile.Pointers._fields) == singular
    assert len(tables.COLUMNS) == 17
    named = (tables.STEP, tables.NUMEL, tables.KEY, tables.FIRST_PROGRAM, tables.PROGRAMS, tables.OFFSET)
    assert named == (11, 12, 13, 14, 15, 16)
    first = ("lr", "beta1", "beta2", "eps", "weight_decay", "reg_lambda", "inverse_scale", "clip", "found_inf")
    assert first == plan.HYPER
    assert plan.STATISTICS == ("penalty", "grad_sq", "pull_sq", "grad_dot_pull", "stiffness", "drift_sq")


class Pointer:
    """What the launcher looks at in a tensor, with no device behind it."""

    def __init__(self, address, dtype=torch.float64):
        self.address, self.dtype = address, dtype

    def data_ptr(self):
        return self.address


def cache_key(target, build, address=256, stride=1000, first_program=0):
    """Return what Triton looks a build up by."""
    kernel = triton_kernel.step_kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(target))
    integers, numbers = Pointer(address, torch.int64), Pointer(address)
    options = dict(triton_kernel.launch_options(build, nvidia=True))
    constants = {name: options.pop(name) for name in ("CHUNK", "TILE", "TAIL")}
    bound, specialization, _ = bind(
        integers, integers, numbers, numbers, numbers if build.statistics else None, stride, first_program, build,
        **constants,
    )  # fmt: skip
    assert len(bound) == len(kernel.arg_names)
    return str(specialization)


@pytest.mark.parametrize("target", [CUDA["sm_90"], GFX942], ids=("cuda", "hip"))
@pytest.mark.parametrize("form", ["fp32", "most"])
def test_values_never_recompile(target, form):
    """Numbers are in device memory; what is left are addresses and counts, on which nothing is specialised."""
    build = build_of(**USUAL[form])
    key = cache_key(target, build)
    for number in (0, 1, 16, 1024, 2**31 - 1, 2**31, 2**40):
        assert cache_key(target, build, stride=number) == key, number
        assert cache_key(target, build, first_program=number) == key, number
    assert cache_key(target, build, address=8) == key, "alignment is the build's business"
    assert cache_key(target, build._replace(record=not build.record)) != key
    assert cache_key(target, build._replace(grad=tl.float16)) != key


def test_builds_are_few():
    assert len(BUILDS) + len(USUAL) + 1 <= 60
