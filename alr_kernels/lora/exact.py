"""The ``exact`` estimator: G = dL/dU itself, gathered in backward from a LoRA layer's inputs and output gradients."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


class _Tap(torch.autograd.Function):
    """The identity on ``output``; in backward it hands ``x`` and the output's gradient to a gatherer.

    ``x`` is saved as autograd saves what it needs itself: checkpointing drops and recomputes it, offloading moves it.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, gatherer: Gatherer) -> Tensor:
        ctx.save_for_backward(x)
        ctx.gatherer = gatherer
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.gatherer.add(grad, *ctx.saved_tensors)
        return grad, None, None


_ACTIVE: WeakKeyDictionary[nn.Module, Gatherer] = WeakKeyDictionary()  # by lora_A


def close_earlier(modules: tuple[nn.Module, ...]) -> None:
    """Close what an earlier call hung on these modules: its optimizer is gone, or gathers with the new one."""
    for module in modules:
        if (earlier := _ACTIVE.pop(module, None)) is not None:
            earlier.close()


class Gatherer:
    """Gathers G = δᵀ·x of one pair over every backward pass, from its modules ``lora_A`` and ``lora_B``.

    ``x`` [..., in] is what ``lora_A`` is given, after dropout, and s·δ [..., out] the gradient of what ``lora_B``
    returns. G is [out, in], transposed where the weight is, float32 (float64 for such factors); it is scaled as
    ``p.grad`` is right after backward: what is done to that later, the optimizer infers.
    """

    def __init__(self, lora_a: nn.Module, lora_b: nn.Module, scaling: float, transposed: bool) -> None:
        _ACTIVE[lora_a] = self
        self._scaling, self._transposed = scaling, transposed
        self._input: Tensor | None = None
        self._gradient: Tensor | None = None
        self._handles = [
            lora_a.register_forward_pre_hook(self._before_down),
            lora_b.register_forward_hook(self._after_up),
        ]

    @torch.compiler.disable
    def _before_down(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._input = args[0]

    @torch.compiler.disable
    def _after_up(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        x, self._input = self._input, None
        if x is None or not output.requires_grad:  # evaluation, or the first pass of reentrant checkpointing
            return None
        return _Tap.apply(output, x, self)

    @torch.no_grad()
    def add(self, grad: Tensor, x: Tensor) -> None:
        """Add (grad/s)ᵀ·x, summed over all leading dimensions."""
        dtype = torch.promote_types(grad.dtype, torch.float32)
        grad, x = grad.flatten(0, -2).to(dtype), x.flatten(0, -2).to(dtype)
        left, right = (x, grad) if self._transposed else (grad, x)
        if self._gradient is None:
            self._gradient = grad.new_zeros(left.shape[1], right.shape[1])
        self._gradient.addmm_(left.T, right, alpha=1 / self._scaling)  # in place: autocast leaves it alone

    def take(self) -> Tensor | None:
        """Return G and forget it; None when no backward pass came by."""
        gradient, self._gradient = self._gradient, None
        return gradient

    def close(self) -> None:
        """Remove the hooks and forget what was gathered."""
        for handle in self._handles:
            handle.remove()
        self._input = self._gradient = None
