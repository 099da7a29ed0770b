"""What one step is called with: operands, numbers, options; and the scalars that follow from them.

Scalars are computed in float64 and rounded to the precision of the arithmetic (float32, or float64 for float64
parameters), here and in the kernels in the same order, so that all backends start from the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

MODES = ("coupled", "proximal")
MASTERS = ("none", "split", "stochastic")
HYPER = ("lr", "beta1", "beta2", "eps", "weight_decay", "reg_lambda", "inverse_scale", "clip", "found_inf")
STATISTICS = ("penalty", "grad_sq", "pull_sq", "grad_dot_pull", "stiffness", "drift_sq")


class Operands(NamedTuple):
    """Tensors of one step, a list per role with an entry per parameter; a role that is not used is empty.

    What the dtypes say: ``exp_avgs`` int8 and ``exp_avg_sqs`` uint8 are codes and need their scales; ``importances``
    uint8 are codes of 8 bits when shaped as the parameter and of 4 when half as long. All entries of a role have one
    dtype.
    """

    params: Sequence[Tensor]  # θ, mutated
    grads: Sequence[Tensor]  # of the task loss, times the loss scale
    exp_avgs: Sequence[Tensor]  # mutated
    exp_avg_sqs: Sequence[Tensor]  # mutated
    importances: Sequence[Tensor] = ()  # Ω
    anchors: Sequence[Tensor] = ()  # θ*
    path_integrals: Sequence[Tensor] = ()  # ω, mutated
    remainders: Sequence[Tensor] = ()  # int16, mutated: with the bf16 θ the float32 master
    exp_avg_scales: Sequence[Tensor] = ()  # float32, mutated
    exp_avg_sq_scales: Sequence[Tensor] = ()  # float32, mutated
    importance_scales: Sequence[Tensor] = ()  # bf16


MUTATED = ("params", "exp_avgs", "exp_avg_sqs", "path_integrals", "remainders", "exp_avg_scales", "exp_avg_sq_scales")


class Numbers(NamedTuple):
    """Numbers of one step, on the parameters' device: the host need not know them."""

    hyper: Tensor  # [len(HYPER)] float64; found_inf ≠ 0 skips the step, statistics included
    steps: Sequence[Tensor]  # n 0-dim float32: step counts, this step included
    unit_scales: Tensor  # [n] float64: curvature / (λ·Ω) of each tensor
    keys: Sequence[int]  # n: number of each parameter, for the random generator
    offsets: Sequence[int] = ()  # n: global index of each tensor's first element, for the same; empty: 0 for all


class Options(NamedTuple):
    """What a kernel is compiled for."""

    mode: str = "proximal"
    maximize: bool = False
    precise: bool = True  # IEEE division and square root, else approximate ones
    master: str = "none"  # how bf16 parameters are stored
    seed: int = 0


class StepScalars(NamedTuple):
    """Scalars of one step for tensors that share a step count.

    ``decay = 1 − lr·weight_decay``, ``step_size = lr/(1 − β1^step)`` and
    ``rsqrt_bias2 = 1/√(1 − β2^step)``: Adam's bias corrections, folded.
    """

    lr: float
    decay: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    eps: float
    step_size: float
    rsqrt_bias2: float


def power(base: float, exponent: int) -> float:
    """Return base^exponent by squaring: products alone, the same bits on every device."""
    result = 1.0
    while exponent > 0:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def step_scalars(step: float, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> StepScalars:
    """Return the scalars for the ``step``-th update (``step`` ≥ 1, already incremented)."""
    count = int(step)
    return StepScalars(
        lr=lr,
        decay=1.0 - lr * weight_decay,
        one_minus_beta1=1.0 - beta1,
        beta2=beta2,
        one_minus_beta2=1.0 - beta2,
        eps=eps,
        step_size=lr / (1.0 - power(beta1, count)),
        rsqrt_bias2=1.0 / math.sqrt(1.0 - power(beta2, count)),
    )
