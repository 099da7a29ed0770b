"""One AdamW step with penalty and recording, in plain torch. Read this first.

Every other backend repeats these lines in this order, with the same roundings: IEEE float32
operations, no contraction into fused multiply-adds, so that all backends agree bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .. import penalty
from .plan import step_scalars

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@torch.no_grad()
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
    """Update ``params``, moments and ``path_integrals`` in place; see ``_ops.step_`` for the arguments."""
    for i, (param, grad, exp_avg, exp_avg_sq) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        s = step_scalars(steps[i], lr, beta1, beta2, eps, weight_decay)
        compute = torch.promote_types(param.dtype, torch.float32)
        before, g = param.to(compute), grad.to(compute)
        if maximize:
            g = -g

        adam_grad = g
        if importances:
            anchor = anchors[i].to(compute)
            k = penalty.curvature(importances[i].to(compute), curvature_scales[i])
            if mode == "coupled":
                adam_grad = torch.where(k == 0, g, g + penalty.gradient(before, anchor, k))

        exp_avg.copy_(exp_avg + (adam_grad - exp_avg) * s.one_minus_beta1)
        exp_avg_sq.copy_(exp_avg_sq * s.beta2 + adam_grad * adam_grad * s.one_minus_beta2)
        # By way of float64: torch's float32 sqrt on the CPU is off by one ulp in a sixth of the cases (MKL).
        denom = exp_avg_sq.double().sqrt().to(compute) * s.rsqrt_bias2 + s.eps
        after = before * s.decay - exp_avg * s.step_size / denom

        if importances and mode == "proximal":
            after = penalty.proximal(after, anchor, k, s.lr, denom)

        stored = after.to(param.dtype)
        if path_integrals:
            path_integrals[i].sub_(g * (stored.to(compute) - before))
        param.copy_(stored)
