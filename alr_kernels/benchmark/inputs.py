"""The tensors of one candidate: the same numbers for each, and its own memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .shapes import Shape, elements

LR = 1e-3


class Source:
    """What all candidates of a set are copied from: θ ~ N(0, 0.02), g ~ N(0, 1e-3), Ω uniform on [0, 1); float32."""

    def __init__(self, shapes: Sequence[Shape], device: str) -> None:
        self.shapes = list(shapes)
        self.device = device
        self.elements = elements(shapes)
        generator = torch.Generator(device).manual_seed(0)
        empty = [[torch.empty(shape, device=device) for shape in shapes] for _ in range(3)]
        self.initial = [tensor.normal_(0.0, 0.02, generator=generator) for tensor in empty[0]]
        self.grads = [tensor.normal_(0.0, 1e-3, generator=generator) for tensor in empty[1]]
        self.importance = [tensor.uniform_(generator=generator) for tensor in empty[2]]
        self.mean = sum(float(tensor.sum(dtype=torch.float64)) for tensor in self.importance) / self.elements


class Inputs:
    """Makes parameters, gradients and importance for one candidate, anew at each call.

    Parameters and gradients made so far are remembered in ``made``, in turn, so that they can be told from what an
    optimizer keeps.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.shapes, self.device = source.shapes, source.device
        self.made: list[Tensor] = []

    def params(self, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
        """Return parameters with their gradients in ``.grad``."""
        params = [torch.nn.Parameter(tensor.to(dtype, copy=True)) for tensor in self.source.initial]
        for param, grad in zip(params, self.source.grads, strict=True):
            param.grad = grad.to(dtype, copy=True)
            self.made += [param, param.grad]
        return params

    def importance(self) -> list[Tensor]:
        """Return Ω, float32."""
        return [tensor.clone() for tensor in self.source.importance]

    def curvature(self) -> list[Tensor]:
        """Return k = 2·Ω/mean(Ω), float32: what AlrAdamW derives from the importance at λ = 1, uniform α."""
        return [tensor * (2.0 / self.source.mean) for tensor in self.source.importance]

    def anchors(self) -> list[Tensor]:
        """Return θ*, the parameters' first values, float32."""
        return [tensor.clone() for tensor in self.source.initial]
