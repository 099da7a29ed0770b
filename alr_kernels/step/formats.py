"""Loading and storing the operands of one parameter in whatever form they are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from ..codecs import reference as codecs
from ..codecs import rounding
from .plan import Operands, Options


def needs_noise(o: Operands, options: Options) -> bool:
    """Whether anything is rounded at random: bf16 parameters without a master, or a bf16 v."""
    stochastic = options.master == "stochastic" and o.params[0].dtype is torch.bfloat16
    return stochastic or o.exp_avg_sqs[0].dtype is torch.bfloat16


def load_param(o: Operands, i: int, compute: torch.dtype) -> Tensor:
    """Return a copy of θ, or the float32 master of a split one."""
    return rounding.join(o.params[i], o.remainders[i]) if o.remainders else o.params[i].to(compute, copy=True)


def load_importance(o: Operands, i: int, compute: torch.dtype) -> Tensor:
    """Return Ω, decoded."""
    if o.importances[i].dtype is not torch.uint8:
        return o.importances[i].to(compute)
    bits = 8 if o.importances[i].shape == o.params[i].shape else 4
    return codecs.decode_importance(o.importances[i], o.importance_scales[i], bits)


def load_moments(o: Operands, i: int, compute: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return m and v, decoded."""
    if o.exp_avgs[i].dtype is not torch.int8:
        return o.exp_avgs[i].to(compute), o.exp_avg_sqs[i].to(compute)
    exp_avg = codecs.decode_exp_avg(o.exp_avgs[i], o.exp_avg_scales[i])
    return exp_avg, codecs.decode_exp_avg_sq(o.exp_avg_sqs[i], o.exp_avg_sq_scales[i])


def store_moments(
    o: Operands, i: int, values: tuple[Tensor, Tensor, Tensor], noise: Tensor | None, key: int, offset: int
) -> None:
    """Store (m, v, √v).

    ``noise``: 32 random bits an element, the upper 16 round a bf16 v. ``key``, ``offset``: of the codes' u, and the
    global index of the first element.
    """
    exp_avg, exp_avg_sq, root = values
    if o.exp_avgs[i].dtype is torch.int8:
        u = rounding.dither(key, exp_avg.numel() // codecs.BLOCK, codecs.BLOCK, exp_avg.device, offset // codecs.BLOCK)
        coded = (*codecs.encode_exp_avg(exp_avg, u), *codecs.encode_exp_avg_sq(root, exp_avg_sq, u))
        targets = (o.exp_avgs, o.exp_avg_scales, o.exp_avg_sqs, o.exp_avg_sq_scales)
        for target, value in zip(targets, coded, strict=True):
            target[i].copy_(value)
    elif noise is not None and o.exp_avgs[i].dtype is torch.bfloat16:
        # v at random: 0.999·v would round to v for ever
        o.exp_avgs[i].copy_(exp_avg)
        o.exp_avg_sqs[i].copy_(rounding.round_stochastic(exp_avg_sq, noise >> 16))
    else:
        o.exp_avgs[i].copy_(exp_avg)
        o.exp_avg_sqs[i].copy_(exp_avg_sq)


def store_param(o: Operands, i: int, after: Tensor, noise: Tensor | None, master: str) -> Tensor:
    """Store θ and return it as it was stored."""
    if o.remainders:
        param, remainder = rounding.split(after)
        o.remainders[i].copy_(remainder)
    elif noise is not None and master == "stochastic" and o.params[i].dtype is torch.bfloat16:
        param = rounding.round_stochastic(after, noise & 0xFFFF)
    else:
        param = after.to(o.params[i].dtype)
    o.params[i].copy_(param)
    return after if o.remainders else param.to(after.dtype)
