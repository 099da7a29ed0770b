"""The step as one Triton kernel, for CUDA, ROCm and XPU devices (and the CPU through Triton's interpreter).

The formulas repeat ``reference.py``, ``penalty.py`` and ``csrc/step_math.h``: same names, same order. Division and
square root are the IEEE ones and contraction into fused multiply-adds is off, so that results agree bit for bit.
"""

# mypy: allow-untyped-defs
# ruff: noqa: N803 - compile-time flags are capitals, as in Triton's own code
from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from .plan import MODES, StepScalars, step_scalars

try:
    import triton
    import triton.language as tl
except ImportError as error:  # available() explains; everything below stays importable
    triton, tl, _missing = None, None, str(error)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# 4 elements a thread: 128-bit accesses for float32, 64-bit for 2-byte operands, 39-64 registers on sm_80 to sm_100,
# no stack. 8 a thread make 2-byte operands 128-bit too, but then operands of different width meet in shared memory and
# registers rise to 112-164 (ptxas of Triton 3.6.0 and 3.9.0; tests/test_step_triton_aot.py asserts the former).
BLOCK = 1024
THREADS = 256
OPTIONS = {"num_warps": THREADS // (64 if torch.version.hip else 32), "enable_fp_fusion": False}
OLDEST_TRITON = (3, 6)  # what the kernel was tested with from
ALIGNMENT = 16  # bytes, of every operand, for 128-bit accesses


def _jit(fn=None, **options):
    """Return ``fn`` as ``triton.jit(**options)`` does, or as it is where Triton is missing."""
    if fn is None:
        return lambda fn: _jit(fn, **options)
    return fn if triton is None else triton.jit(fn, **options)


@_jit
def to_float32(x):
    # By hand for bfloat16: Triton's interpreter gets subnormals wrong.
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@_jit
def to_storage(x, dtype: tl.constexpr):
    # Round to nearest even; by hand for bfloat16: Triton's interpreter truncates. NaN stays NaN (torch's 0x7FC0).
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@_jit
def curvature(importance, curvature_scale):
    # k = curvature_scale * importance, the second derivative of the penalty.
    return importance * curvature_scale


@_jit
def penalty_gradient(param, anchor, k):
    # dpenalty/dparam = k (param - anchor).
    return k * (param - anchor)


@_jit
def proximal(adam_point, anchor, k, lr, denom):
    # argmin |x - adam_point|^2_denom / (2 lr) + k (x - anchor)^2 / 2, evaluated from the nearer end.
    t = k * lr
    near_adam = t <= denom
    weight = tl.math.div_rn(tl.where(near_adam, t, denom), denom + t)
    near = tl.where(near_adam, adam_point, anchor)
    far = tl.where(near_adam, anchor, adam_point)
    return tl.where(k == 0.0, adam_point, near + weight * (far - near))


@_jit
def step_element(
    before, g, exp_avg, exp_avg_sq, importance, anchor, curvature_scale, s,
    HAS_PENALTY: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    # Return the new parameter before it is rounded to storage, and the moments. `g` has maximize's sign.
    adam_grad = g
    if HAS_PENALTY:
        k = curvature(importance, curvature_scale)
        if MODE == 0:  # coupled
            adam_grad = tl.where(k == 0.0, g, g + penalty_gradient(before, anchor, k))
    exp_avg = exp_avg + (adam_grad - exp_avg) * s.one_minus_beta1
    exp_avg_sq = exp_avg_sq * s.beta2 + adam_grad * adam_grad * s.one_minus_beta2
    denom = tl.math.sqrt_rn(exp_avg_sq) * s.rsqrt_bias2 + s.eps
    after = before * s.decay - tl.math.div_rn(exp_avg * s.step_size, denom)
    if HAS_PENALTY and MODE == 1:  # proximal
        after = proximal(after, anchor, k, s.lr, denom)
    return after, exp_avg, exp_avg_sq


@_jit
def record_element(path_integral, g, stored_after, before):
    # path_integral += -g (stored_after - before)
    return path_integral - g * (stored_after - before)


@_jit
def block_pointer(ptr, start, offsets, ALIGNED: tl.constexpr):
    # The block's elements. `start` is a multiple of BLOCK, so the blocks of an aligned tensor are aligned; the hint
    # has to sit on a computed pointer, on an argument it is lost when the function is inlined.
    first = ptr + start
    if ALIGNED:
        first = tl.multiple_of(first, 16)
    return first + offsets


@_jit
def step_block(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, importance_ptr, anchor_ptr, path_integral_ptr, mask, start,
    curvature_scale, s,
    HAS_PENALTY: tl.constexpr, MODE: tl.constexpr, RECORD: tl.constexpr, MAXIMIZE: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Step the BLOCK elements of one tensor from `start` on; a `mask` of None promises that all of them exist, and
    # only without a mask does Triton load 128 bits at a time.
    offsets = tl.arange(0, BLOCK)
    params = block_pointer(param_ptr, start, offsets, ALIGNED)
    exp_avgs = block_pointer(exp_avg_ptr, start, offsets, ALIGNED)
    exp_avg_sqs = block_pointer(exp_avg_sq_ptr, start, offsets, ALIGNED)

    # All loads before all stores: nothing moves a load over a store that might alias it.
    before = to_float32(tl.load(params, mask=mask))
    g = to_float32(tl.load(block_pointer(grad_ptr, start, offsets, ALIGNED), mask=mask))
    exp_avg = tl.load(exp_avgs, mask=mask)
    exp_avg_sq = tl.load(exp_avg_sqs, mask=mask)
    importance = 0.0
    anchor = 0.0
    if HAS_PENALTY:
        importance = tl.load(block_pointer(importance_ptr, start, offsets, ALIGNED), mask=mask)
        anchor = to_float32(tl.load(block_pointer(anchor_ptr, start, offsets, ALIGNED), mask=mask))
    if RECORD:
        path_integrals = block_pointer(path_integral_ptr, start, offsets, ALIGNED)
        path_integral = tl.load(path_integrals, mask=mask)

    if MAXIMIZE:
        g = -g
    after, exp_avg, exp_avg_sq = step_element(
        before, g, exp_avg, exp_avg_sq, importance, anchor, curvature_scale, s, HAS_PENALTY, MODE
    )
    stored_after = to_storage(after, param_ptr.dtype.element_ty)
    tl.store(exp_avgs, exp_avg, mask=mask)
    tl.store(exp_avg_sqs, exp_avg_sq, mask=mask)
    tl.store(params, stored_after, mask=mask)
    if RECORD:
        path_integral = record_element(path_integral, g, to_float32(stored_after), before)
        tl.store(path_integrals, path_integral, mask=mask)


_RUN_TIME = (
    "param_ptr", "grad_ptr", "exp_avg_ptr", "exp_avg_sq_ptr", "importance_ptr", "anchor_ptr", "path_integral_ptr",
    "numel", "curvature_scale", *StepScalars._fields,
)  # fmt: skip


# One program a block. Nothing is specialised on a value: alignment is the caller's flag, so that two builds serve
# all tensors of a dtype, and numbers are run-time values, so that a schedule never recompiles.
@_jit(do_not_specialize=_RUN_TIME)
def step_kernel(
    param_ptr,  # parameters, fp32/bf16/fp16, mutated
    grad_ptr,  # task gradients, fp32/bf16/fp16, read
    exp_avg_ptr,  # first moments, fp32, mutated
    exp_avg_sq_ptr,  # second moments, fp32, mutated
    importance_ptr,  # importance, fp32, read; None without a penalty
    anchor_ptr,  # anchors, the parameter's dtype, read; None without a penalty
    path_integral_ptr,  # path integrals, fp32, mutated; None without recording
    numel: tl.int64,  # elements of every operand, int64
    curvature_scale: tl.float32,  # k / importance of this tensor, fp32
    lr: tl.float32,  # learning rate, fp32
    decay: tl.float32,  # 1 - lr * weight_decay, fp32
    one_minus_beta1: tl.float32,  # fp32
    beta2: tl.float32,  # fp32
    one_minus_beta2: tl.float32,  # fp32
    eps: tl.float32,  # fp32
    step_size: tl.float32,  # lr / (1 - beta1^step), fp32
    rsqrt_bias2: tl.float32,  # 1 / sqrt(1 - beta2^step), fp32
    HAS_PENALTY: tl.constexpr,  # bool: read importance and anchor
    MODE: tl.constexpr,  # index into plan.MODES: 0 coupled, 1 proximal
    RECORD: tl.constexpr,  # bool: update the path integral
    MAXIMIZE: tl.constexpr,  # bool: ascend
    ALIGNED: tl.constexpr,  # bool: every pointer is a multiple of 16 bytes
    BLOCK: tl.constexpr,  # elements a program, a power of two
):
    tl.static_assert(param_ptr.dtype.element_ty.primitive_bitwidth <= 32, "the Triton step computes in float32")
    # tl.cast, for the interpreter passes Python floats and torch.compile may pass fp64.
    s = StepScalars(
        tl.cast(lr, tl.float32), tl.cast(decay, tl.float32), tl.cast(one_minus_beta1, tl.float32),
        tl.cast(beta2, tl.float32), tl.cast(one_minus_beta2, tl.float32), tl.cast(eps, tl.float32),
        tl.cast(step_size, tl.float32), tl.cast(rsqrt_bias2, tl.float32),
    )  # fmt: skip
    scale = tl.cast(curvature_scale, tl.float32)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if start + BLOCK <= numel:
        step_block(
            param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, importance_ptr, anchor_ptr, path_integral_ptr,
            None, start, scale, s, HAS_PENALTY, MODE, RECORD, MAXIMIZE, ALIGNED, BLOCK,
        )  # fmt: skip
    else:
        step_block(
            param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, importance_ptr, anchor_ptr, path_integral_ptr,
            start + tl.arange(0, BLOCK) < numel, start, scale, s, HAS_PENALTY, MODE, RECORD, MAXIMIZE, ALIGNED, BLOCK,
        )  # fmt: skip


def available(device_type: str) -> tuple[bool, str]:
    """Tell whether ``step_`` can run on devices of this type, and if not, why and what to do."""
    if triton is not None and tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
        return False, f"Triton {triton.__version__} is older than 3.6, which the step needs"
    if triton is None:
        return False, f"Triton cannot be imported ({_missing}); install triton to use the fused step"
    if device_type == "cpu":
        if not isinstance(step_kernel, triton.JITFunction):  # Triton's knob, as it stood at import
            return True, ""
        return False, "Triton has no CPU backend here; set TRITON_INTERPRET=1 before import to run its interpreter"
    if device_type not in ("cuda", "xpu"):
        return False, f"the Triton step serves cuda (NVIDIA and ROCm) and xpu devices, not {device_type!r}"
    if not getattr(torch, device_type).is_available():
        return False, f"torch {torch.__version__} finds no {device_type} device"
    return True, ""


def step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    importances: Sequence[Tensor],
    anchors: Sequence[Tensor],
    path_integrals: Sequence[Tensor],
    curvature_scales: Sequence[float],
    steps: Sequence[float],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    mode: str,
    maximize: bool,
) -> None:
    """Update ``params``, moments and ``path_integrals`` in place; see ``_ops.step_`` for the arguments.

    The operands of one parameter are dense, have the same strides and lie on one device: the caller sees to it.
    """
    flags = {
        "HAS_PENALTY": bool(importances),
        "MODE": MODES.index(mode) if importances else 0,
        "RECORD": bool(path_integrals),
        "MAXIMIZE": maximize,
    }
    scalars = {step: step_scalars(step, lr, beta1, beta2, eps, weight_decay) for step in set(steps)}
    mutated: list[Tensor] = []
    for i, (param, grad, exp_avg, exp_avg_sq) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        importance, anchor, scale = (
            (importances[i], anchors[i], float(curvature_scales[i])) if importances else (None, None, 0.0)
        )
        path_integral = path_integrals[i] if path_integrals else None
        others = (grad, exp_avg, exp_avg_sq, importance, anchor, path_integral)
        if param.numel() > 0:
            _launch(param, others, scale, scalars[steps[i]], flags)
            mutated += [t for t in (param, exp_avg, exp_avg_sq, path_integral) if t is not None]
    torch.autograd.graph.increment_version(mutated)


def _launch(
    param: Tensor, others: tuple[Tensor | None, ...], scale: float, s: StepScalars, flags: dict[str, int]
) -> None:
    """Step one tensor on its own device."""
    aligned = all(t is None or t.data_ptr() % ALIGNMENT == 0 for t in (param, *others))
    with _device_of(param):
        step_kernel[(triton.cdiv(param.numel(), BLOCK),)](
            param, *others, param.numel(), scale, *map(float, s), **flags,
            ALIGNED=aligned, BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Return a guard that makes the tensor's device the current one: Triton launches on the current device."""
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)
