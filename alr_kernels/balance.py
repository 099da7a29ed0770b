"""DynamicCoeffs at work: α on the device, the sums since the last change, and when to change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .coefficients import DynamicCoeffs, LayerCoefficients, rebalanced
from .names import layer_of
from .step.plan import STATISTICS

if TYPE_CHECKING:
    from torch import Tensor

PULL, GRAD = STATISTICS.index("pull_sq"), STATISTICS.index("grad_sq")


class Balance:
    """Coefficients that are re-balanced from the step's statistics, without waiting for the device."""

    def __init__(
        self, rule: DynamicCoeffs, start: LayerCoefficients, sums: Mapping[str, float], numel: int, normalize: bool
    ) -> None:
        self.rule = rule
        self.by = start.by
        self.layers = list(start)
        self.alpha = torch.tensor(list(start.values()), dtype=torch.float64)
        self.window = torch.zeros(2, len(self.layers), dtype=torch.float64)  # Σ pull², Σ g² since the last change
        self.steps = 0
        layer_sums = dict.fromkeys(self.layers, 0.0)
        for name, total in sums.items():
            layer_sums[layer_of(name, self.by)] += total
        self._sums = torch.tensor(list(layer_sums.values()), dtype=torch.float64) / numel if normalize else None
        self._index: dict[tuple[str, ...], Tensor] = {}

    def to(self, device: torch.device) -> None:
        """Move the coefficients to where the parameters are."""
        if self.alpha.device != device:
            self.alpha, self.window = self.alpha.to(device), self.window.to(device)
            self._sums = None if self._sums is None else self._sums.to(device)

    def index(self, names: Sequence[str], device: torch.device) -> Tensor:
        """Return the layer's number of each name."""
        key = (str(device), *names)
        if key not in self._index:
            numbers = {layer: i for i, layer in enumerate(self.layers)}
            self._index[key] = torch.tensor([numbers[layer_of(name, self.by)] for name in names], device=device)
        return self._index[key]

    def unit_scales(self, names: Sequence[str], device: torch.device) -> Tensor:
        """Return 2·α/normaliser of each parameter, [n] float64."""
        normalizer = 1.0 if self._sums is None else (self.alpha * self._sums).sum()
        return (2.0 * self.alpha / normalizer).to(device)[self.index(names, device)]

    def observe(self, names: Sequence[str], statistics: Tensor, found_inf: Tensor | None = None) -> None:
        """Add one call's statistics [n, 6] to the window, unless its step was skipped: they are an earlier step's."""
        rows = self.index(names, statistics.device)
        if found_inf is not None:
            statistics = torch.where(found_inf == 0, statistics, 0.0)
        for row, column in enumerate((PULL, GRAD)):
            partial = torch.zeros(len(self.layers), dtype=torch.float64, device=statistics.device)
            self.window[row] += partial.index_add_(0, rows, statistics[:, column]).to(self.window.device)

    def advance(self) -> bool:
        """Count a step; every ``rule.every`` of them change α. Return whether it changed."""
        self.steps += 1
        if self.steps % self.rule.every:
            return False
        self.alpha = rebalanced(self.alpha, self.window[0], self.window[1], self.rule.rate, self.rule.max_change)
        self.window = torch.zeros_like(self.window)
        return True

    def coeffs(self) -> LayerCoefficients:
        """Return the present α (waits for the device)."""
        return LayerCoefficients(dict(zip(self.layers, self.alpha.tolist(), strict=True)), rule="dynamic", by=self.by)

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        tensors = {"alpha": self.alpha.tolist(), "window": self.window.tolist()}
        return {"layers": list(self.layers), **tensors, "steps": self.steps}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Take up where :meth:`state` was called."""
        order = [saved["layers"].index(layer) for layer in self.layers]
        self.alpha = self.alpha.new_tensor(saved["alpha"])[order]
        self.window = self.window.new_tensor(saved["window"])[:, order]
        self.steps = int(saved["steps"])
