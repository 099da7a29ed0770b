"""The step against what users would write without it, pairwise in one run.

    make bench                               this machine's CPU
    make gpu RESULTS=folder                  a CUDA machine

Rivals: ``torch.optim.AdamW(fused=True)`` without any penalty (the floor), the penalty's gradient added by hand with
``torch._foreach`` before it, and the penalty added to the loss for autograd to differentiate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from shapes import FEW_LARGE, TINY, elements
from timing import copy_bandwidth, side_by_side

from alr_kernels import AlrAdamW

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run `make gpu` on one")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])]
BASELINE = "torch AdamW fused"
# Bytes per element that a pass must read and write at least: θ m v twice, g, and what is added.
BYTES = {
    BASELINE: 28,
    "AlrAdamW, no penalty": 28,
    "AlrAdamW, penalty": 36,
    "AlrAdamW, penalty + recording": 44,
}


class Case:
    """Parameters with gradients, importance and anchors, cloned for each candidate."""

    def __init__(self, shapes: list[tuple[int, ...]], device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.initial = [(torch.randn(shape, generator=generator) * 0.02).to(device) for shape in shapes]
        self.grads = [(torch.randn(shape, generator=generator) * 1e-3).to(device) for shape in shapes]
        self.importance = [torch.rand(shape, generator=generator).to(device) for shape in shapes]
        self.anchors = [tensor.clone() for tensor in self.initial]

    def params(self) -> list[torch.nn.Parameter]:
        params = [torch.nn.Parameter(tensor.clone()) for tensor in self.initial]
        for param, grad in zip(params, self.grads, strict=True):
            param.grad = grad.clone()
        return params

    def torch_fused(self) -> Callable[[], Any]:
        return torch.optim.AdamW(self.params(), fused=True).step

    def ours(self, **options: Any) -> Callable[[], Any]:
        return AlrAdamW(self.params(), **options).step

    def by_hand(self) -> Callable[[], Any]:
        params = self.params()
        optimizer = torch.optim.AdamW(params, fused=True)

        @torch.no_grad()
        def run() -> None:
            grads = [param.grad for param in params]
            pull = torch._foreach_sub([param.detach() for param in params], self.anchors)
            torch._foreach_mul_(pull, self.importance)
            torch._foreach_add_(grads, pull, alpha=2.0)
            optimizer.step()

        return run

    def autograd(self) -> Callable[[], Any]:
        params = self.params()
        optimizer = torch.optim.AdamW(params, fused=True)

        def run() -> None:
            penalty = sum(
                (omega * (param - anchor).square()).sum()
                for param, omega, anchor in zip(params, self.importance, self.anchors, strict=True)
            )
            penalty.backward()  # adds to the gradients that the task left, as a user's training loop would
            optimizer.step()

        return run


@pytest.mark.parametrize("device", DEVICES)
def bench_step(benchmark: Any, device: str) -> None:
    """One optimizer step on 40 M fp32 elements in ten tensors."""
    full = not benchmark.disabled
    shapes = FEW_LARGE if full else TINY
    case = Case(shapes, device)
    candidates = {
        BASELINE: case.torch_fused(),
        "AlrAdamW, no penalty": case.ours(),
        "AlrAdamW, penalty": case.ours(importance=case.importance),
        "AlrAdamW, penalty + recording": case.ours(importance=case.importance, record=True),
        "AlrAdamW coupled, penalty": case.ours(importance=case.importance, mode="coupled"),
        "foreach penalty gradient + torch AdamW fused": case.by_hand(),
        "autograd penalty + torch AdamW fused": case.autograd(),
    }
    rows = side_by_side(candidates, BASELINE, rounds=15 if full else 1, device=device, warmup=2 if full else 1)
    count = elements(shapes)
    for name, row in rows.items():
        if name in BYTES:
            row["bytes_per_element"] = BYTES[name]
            row["bytes_per_s"] = BYTES[name] * count / row["median_s"]
    benchmark.extra_info.update(
        {
            "elements": count,
            "tensors": len(shapes),
            "device": device,
            "copy_bytes_per_s": copy_bandwidth(device, 256 if full else 1),
            "rows": rows,
            "autograd_over_ours": rows["autograd penalty + torch AdamW fused"]["median_s"]
            / rows["AlrAdamW, penalty"]["median_s"],
        }
    )
    benchmark.pedantic(candidates["AlrAdamW, penalty"], rounds=15 if full else 1, warmup_rounds=1)
    if full:
        print(f"\n{'':46s} {'ms':>8s} {'ratio':>6s}")
        for name, row in rows.items():
            print(f"{name:46s} {row['median_s'] * 1e3:8.1f} {row['ratio']:6.2f}")


@pytest.mark.parametrize("device", DEVICES)
def bench_small_tensors(benchmark: Any, device: str) -> None:
    """Host time: 300 tensors of 1024 elements, where launching costs more than arithmetic."""
    shapes = [(1024,)] * (300 if not benchmark.disabled else 3)
    case = Case(shapes, device)
    candidates = {BASELINE: case.torch_fused(), "AlrAdamW, penalty": case.ours(importance=case.importance)}
    rows = side_by_side(candidates, BASELINE, rounds=15 if not benchmark.disabled else 1, device=device)
    benchmark.extra_info.update({"tensors": len(shapes), "device": device, "rows": rows})
    benchmark.pedantic(candidates["AlrAdamW, penalty"], rounds=15 if not benchmark.disabled else 1, warmup_rounds=1)
