"""The scalars of one step, computed once in float64 and handed to every backend.

Each backend rounds them to the precision it computes in (float32, or float64 for float64
parameters), so that all backends start from the same numbers.
"""

from __future__ import annotations

from typing import NamedTuple

MODES = ("coupled", "proximal")


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


def step_scalars(step: float, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> StepScalars:
    """Return the scalars for the ``step``-th update (``step`` ≥ 1, already incremented)."""
    return StepScalars(
        lr=lr,
        decay=1.0 - lr * weight_decay,
        one_minus_beta1=1.0 - beta1,
        beta2=beta2,
        one_minus_beta2=1.0 - beta2,
        eps=eps,
        step_size=lr / (1.0 - beta1**step),
        rsqrt_bias2=(1.0 - beta2**step) ** -0.5,
    )
