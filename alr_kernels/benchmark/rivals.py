"""What users have without this package, as someone who knows torch well would write it.

Each function takes :class:`Inputs` and returns one step. An installed package is imported when its row is built;
whatever it raises, here or at its first step, becomes the reason why its row is skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .inputs import LR, Inputs
from .timing import Step

BETA1, BETA2, EPS, WEIGHT_DECAY = 0.9, 0.999, 1e-8, 1e-2
DIVERSE = {"cpu": 4, "cuda": 16}  # distinct shapes for which torchao may compile: 5 took 108 s on a CPU


def torch_fused(inputs: Inputs) -> Step:
    """Build torch's fused AdamW without a penalty: the floor."""
    return torch.optim.AdamW(inputs.params(), lr=LR, fused=True).step


def torch_foreach(inputs: Inputs) -> Step:
    """Build torch's foreach AdamW without a penalty."""
    return torch.optim.AdamW(inputs.params(), lr=LR, foreach=True).step


def torch_bf16(inputs: Inputs) -> Step:
    """Build torch's fused AdamW with parameters and moments in bf16: few bytes, but small moves round away."""
    return torch.optim.AdamW(inputs.params(torch.bfloat16), lr=LR, fused=True).step


def by_hand(inputs: Inputs) -> Step:
    """Add the penalty's gradient in foreach passes, then take torch's fused AdamW step."""
    params, anchors, curvature = inputs.params(), inputs.anchors(), inputs.curvature()
    grads = [param.grad for param in params]
    optimizer = torch.optim.AdamW(params, lr=LR, fused=True)

    @torch.no_grad()
    def run() -> None:
        pull = torch._foreach_sub([param.detach() for param in params], anchors)
        torch._foreach_mul_(pull, curvature)
        torch._foreach_add_(grads, pull)
        optimizer.step()

    return run


def autograd(inputs: Inputs) -> Step:
    """Let autograd differentiate the penalty, then take torch's fused AdamW step."""
    params, anchors, curvature = inputs.params(), inputs.anchors(), inputs.curvature()
    optimizer = torch.optim.AdamW(params, lr=LR, fused=True)

    def run() -> None:
        terms = [(k * (p - a).square()).sum() for p, a, k in zip(params, anchors, curvature, strict=True)]
        (torch.stack(terms).sum() / 2).backward()  # adds to the task's gradients, as a training loop would
        optimizer.step()

    return run


def compiled(inputs: Inputs) -> Step:
    """Compile penalty gradient and AdamW, written out in one function, into one graph over all tensors.

    Of four forms tried on two cores (this, the proximal formula, torch's optimizer inside the compiled function, and
    other fusion options) it was the fastest. The learning rate and the step count are tensors: nothing recompiles.
    """
    params = [param.detach() for param in inputs.params()]
    grads = inputs.made[1::2]
    exp_avgs, exp_avg_sqs = ([torch.zeros_like(param) for param in params] for _ in range(2))
    lr, step = (torch.tensor(value, device=inputs.device) for value in (LR, 0.0))
    lists = (params, grads, exp_avgs, exp_avg_sqs, inputs.anchors(), inputs.curvature())
    update = torch.compile(penalised_adamw_, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def run() -> None:
        update(*lists, lr, step)

    return run


def penalised_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    anchors: Sequence[Tensor],
    curvature: Sequence[Tensor],
    lr: Tensor,
    step: Tensor,
) -> None:
    """Take one AdamW step on grad + k·(θ − θ*), in place; ``step`` is counted up."""
    step.add_(1.0)
    step_size, rsqrt_bias2 = lr / (1.0 - BETA1**step), (1.0 - BETA2**step).rsqrt()
    for p, g, m, v, anchor, k in zip(params, grads, exp_avgs, exp_avg_sqs, anchors, curvature, strict=True):
        whole = torch.addcmul(g, k, p - anchor)
        exp_avg = torch.lerp(m, whole, 1.0 - BETA1)
        exp_avg_sq = v * BETA2 + (1.0 - BETA2) * whole * whole
        p.copy_(p * (1.0 - lr * WEIGHT_DECAY) - step_size * exp_avg / (exp_avg_sq.sqrt() * rsqrt_bias2 + EPS))
        m.copy_(exp_avg)
        v.copy_(exp_avg_sq)


def compiled_optimizer(inputs: Inputs) -> Step:
    """Compile the foreach penalty gradient and torch's own AdamW.step together."""
    params, anchors, curvature = inputs.params(), inputs.anchors(), inputs.curvature()
    grads = [param.grad for param in params]
    optimizer = torch.optim.AdamW(
        params, lr=torch.tensor(LR, device=inputs.device), foreach=True, capturable=True
    )  # a float learning rate would recompile whenever it changes

    @torch.compile
    @torch.no_grad()
    def penalised() -> None:
        pull = torch._foreach_sub(params, anchors)
        torch._foreach_mul_(pull, curvature)
        torch._foreach_add_(pull, grads)
        for param, grad in zip(params, pull, strict=True):
            param.grad = grad
        optimizer.step()

    def run() -> None:
        penalised()
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad

    return run


def too_diverse(inputs: Inputs) -> str:
    """Say why torchao is not tried on sets of many different shapes."""
    count = len(set(inputs.shapes))
    return "" if count <= DIVERSE[inputs.device] else f"it compiles for each of {count} shapes, minutes in all"


def torchao(inputs: Inputs) -> Step:
    """Build torchao's AdamW with 8-bit states, which compiles itself."""
    from torchao.optim import AdamW8bit

    return _step(AdamW8bit(inputs.params(), lr=LR))


def bitsandbytes(inputs: Inputs) -> Step:
    """Build bitsandbytes' AdamW with 8-bit states."""
    from bitsandbytes.optim import AdamW8bit

    return _step(AdamW8bit(inputs.params(), lr=LR, weight_decay=WEIGHT_DECAY))


def flashoptim(inputs: Inputs) -> Step:
    """Build flashoptim's AdamW: 8-bit states, bf16 weights with an 8-bit correction."""
    from flashoptim import FlashAdamW

    return _step(FlashAdamW(inputs.params(torch.bfloat16), lr=LR, weight_decay=WEIGHT_DECAY))


def _step(optimizer: Any) -> Step:
    return optimizer.step
