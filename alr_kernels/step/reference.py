"""One AdamW step with penalty, recording and encoded operands, in plain torch. Read this first.

Every other backend repeats these lines in this order, with the same roundings: IEEE float32
operations, no contraction into fused multiply-adds, so that all backends agree bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import penalty
from ..codecs.rounding import noise, noise_key
from .formats import load_importance, load_moments, load_param, needs_noise, store_moments, store_param
from .plan import Numbers, Operands, Options, step_scalars


@torch.no_grad()
def step_(o: Operands, numbers: Numbers, options: Options, statistics: Tensor | None = None) -> None:
    """Update what ``o`` says is mutated; ``statistics``: [n, len(STATISTICS)] float64, overwritten."""
    *hyper, reg_lambda, inverse_scale, clip, found_inf = numbers.hyper.tolist()
    for i, (param, grad) in enumerate(zip(o.params, o.grads, strict=True)):
        if found_inf:
            break
        count = float(numbers.steps[i])
        s = step_scalars(count, *hyper)
        compute = torch.promote_types(param.dtype, torch.float32)
        before = load_param(o, i, compute)
        exp_avg, exp_avg_sq = load_moments(o, i, compute)
        g = grad.to(compute) * (-inverse_scale if options.maximize else inverse_scale)  # the task gradient: ω's

        adam_grad = g * clip
        if o.importances:
            anchor = o.anchors[i].to(compute)
            k = penalty.curvature(load_importance(o, i, compute), reg_lambda * float(numbers.unit_scales[i]))
            if options.mode == "coupled":
                adam_grad = torch.where(k == 0, adam_grad, adam_grad + penalty.gradient(before, anchor, k))

        exp_avg = exp_avg + (adam_grad - exp_avg) * s.one_minus_beta1
        exp_avg_sq = exp_avg_sq * s.beta2 + adam_grad * adam_grad * s.one_minus_beta2
        # By way of float64: torch's float32 sqrt on the CPU is off by one ulp in a sixth of the cases (MKL).
        root = exp_avg_sq.double().sqrt().to(compute)
        denom = root * s.rsqrt_bias2 + s.eps
        decayed, move = before * s.decay, exp_avg * s.step_size
        if o.importances and options.mode == "proximal":
            after = penalty.proximal(decayed, move, anchor, k, s.lr, denom)
        else:
            after = decayed - move / denom

        key = noise_key(options.seed, numbers.keys[i], int(count))
        offset = numbers.offsets[i] if numbers.offsets else 0
        random = noise(key, param.shape, param.device, offset) if needs_noise(o, options) else None
        stored = store_param(o, i, after, random, options.master)
        store_moments(o, i, (exp_avg, exp_avg_sq, root), random, key, offset)
        if o.path_integrals:
            o.path_integrals[i].sub_(g * (stored - before))
        if statistics is not None:
            pull = (anchor, k) if o.importances else (before, torch.zeros_like(before))
            statistics[i] = penalty.statistics(before, g, *pull, s.lr, denom)
