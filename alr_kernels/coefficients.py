"""Layer coefficients α: one number per layer from the norms of its importance.

    softmax       α_l = softmax over layers of ‖Ω_l‖₂ / T       (arXiv 2501.13669, eq. 6, with T made explicit)
    proportional  α_l = ‖Ω_l‖₂ / Σ_m ‖Ω_m‖₂
    uniform       α_l = 1 / L

Every rule sums to 1, so that comparisons between rules compare equal total weight. ``DynamicCoeffs`` re-balances them
while tuning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from . import _validate, _validate_importance
from .names import LayerBy, layer_of

if TYPE_CHECKING:
    from torch import Tensor

RULES = ("softmax", "uniform", "proportional")


class LayerCoefficients(dict[str, float]):
    """Coefficients by layer, with what they were made from.

    Attributes: ``rule``; ``by`` (``"block"`` or ``"module"``); ``temperature`` (float, in units of the
    norm; None for rules without one); ``norms`` (‖Ω_l‖₂ by layer).
    """

    def __init__(
        self,
        values: Mapping[str, float],
        *,
        rule: str = "user",
        by: LayerBy = "block",
        temperature: float | None = None,
        norms: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(values)
        self.rule = rule
        self.by = by
        self.temperature = temperature
        self.norms = dict(norms or {})

    @property
    def effective_layers(self) -> float:
        """exp(entropy of α): L for uniform coefficients, 1 when a single layer takes all the weight."""
        total = sum(self.values())
        if total <= 0:
            return 0.0
        shares = (value / total for value in self.values() if value > 0)
        return math.exp(-sum(share * math.log(share) for share in shares))

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (dict(self), self.rule, self.by, self.temperature, self.norms))


def _rebuild(
    values: dict[str, float], rule: str, by: LayerBy, temperature: float | None, norms: dict[str, float]
) -> LayerCoefficients:
    return LayerCoefficients(values, rule=rule, by=by, temperature=temperature, norms=norms)


def layer_norms(importance: Mapping[str, Tensor], by: LayerBy = "block") -> dict[str, float]:
    """Return ‖Ω_l‖₂ over all elements of each layer, summed in float64; recorded statistics are used where present."""
    stats = getattr(importance, "stats", None)
    squares: dict[str, float] = {}
    for name in importance:
        if not stats:
            _validate_importance.importance_values(name, importance[name])
        norm = stats[name].l2 if stats else float(importance[name].double().norm())
        layer = layer_of(name, by)
        squares[layer] = squares.get(layer, 0.0) + norm * norm
    for layer, square in squares.items():
        _validate_importance.finite_norm(layer, square)
    return {layer: math.sqrt(square) for layer, square in squares.items()}


def layer_coefficients(
    importance: Mapping[str, Tensor],
    rule: str = "softmax",
    temperature: float | Literal["auto"] = "auto",
    *,
    by: LayerBy = "block",
) -> LayerCoefficients:
    """Weigh layers by the norm of their importance.

    Args:
        importance: name → Ω, float tensors ≥ 0 of any shape (an :class:`Importance` or a plain mapping).
        rule: ``"softmax"``, ``"proportional"`` or ``"uniform"``; see the module's formulas.
        temperature: T > 0 of the softmax, in units of the norm; ``"auto"`` is the mean norm over layers,
            so that the result does not change when the importance is rescaled.
        by: what a layer is: ``"block"`` (``model.layers.3``) or ``"module"`` (``model.layers.3.mlp.up_proj``).

    Returns:
        layer → α ≥ 0, sum 1, with ``.effective_layers`` = exp(entropy).

    Raises:
        ValueError: unknown rule, temperature ≤ 0, or an importance that is zero everywhere.

    Source: arXiv 2501.13669, eq. 6. Without a temperature the softmax degenerates: norms near 1e3 give
    one layer all the weight.

    >>> import torch
    >>> coeffs = layer_coefficients({"layers.0.w": torch.ones(4), "layers.1.w": 3 * torch.ones(4)}, "proportional")
    >>> {layer: round(alpha, 3) for layer, alpha in coeffs.items()}
    {'layers.0': 0.25, 'layers.1': 0.75}
    """
    _validate.choice("rule", rule, RULES)
    _validate.choice("by", by, ("block", "module"))
    norms = layer_norms(importance, by)
    _validate_importance.some_importance(norms)
    used: float | None = None
    if rule == "uniform":
        values = dict.fromkeys(norms, 1.0 / len(norms))
    elif rule == "proportional":
        total = math.fsum(norms.values())
        values = {layer: norm / total for layer, norm in norms.items()}
    else:
        used = math.fsum(norms.values()) / len(norms) if temperature == "auto" else _validate.temperature(temperature)
        top = max(norms.values())
        weights = {layer: math.exp((norm - top) / used) for layer, norm in norms.items()}
        total = math.fsum(weights.values())
        values = {layer: weight / total for layer, weight in weights.items()}
    return LayerCoefficients(values, rule=rule, by=by, temperature=used, norms=norms)


def resolve(
    coeffs: str | Mapping[str, float], importance: Mapping[str, Tensor], by: LayerBy = "block"
) -> LayerCoefficients:
    """Turn what the user gave (a rule's name or layer → α) into coefficients for ``importance``.

    Mappings are taken as they are; they may be keyed by block or by module, and must name every layer once. ``by``:
    what a rule weighs.
    """
    if isinstance(coeffs, str):
        return layer_coefficients(importance, coeffs, by=by)
    by = getattr(coeffs, "by", None) or (
        "module" if set(coeffs) == {layer_of(name, "module") for name in importance} else "block"
    )
    _validate.coefficient_mapping(coeffs, {layer_of(name, by) for name in importance})
    if isinstance(coeffs, LayerCoefficients):
        return coeffs
    return LayerCoefficients({layer: float(value) for layer, value in coeffs.items()}, by=by)


@dataclass(frozen=True)
class DynamicCoeffs:
    """Coefficients that follow the two objectives: every ``every`` steps each layer's α moves towards equal balance.

    With the layer's sums since the last re-balancing, p = Σ‖k(θ − θ*)‖² of the pull and q = Σ‖g‖² of the task:

        r_l = √(p_l/q_l),   r̄ = geometric mean of the r_l,   α_l ← α_l · clip((r̄/r_l)^rate, 1/√c, √c),   α ← α/Σα

    so a layer whose pull is weak against its task gradient is held more firmly, and no α changes by more than a factor
    c = ``max_change`` at a time. Layers whose pull or gradient is zero keep their share. λ is untouched.

    Args:
        rule: the coefficients to begin with, as ``coeffs``: a rule's name or a mapping layer → number.
        every: steps between two changes, ≥ 1.
        rate: 0 < rate ≤ 1; 1 would balance the layers at once if the pull answered at once.
        max_change: c > 1.

    Raises:
        ValueError, TypeError: a number outside its range.

    Everything is computed where the parameters are, without waiting for the device.

    >>> DynamicCoeffs("uniform", every=10).max_change
    2.0
    """

    rule: str | Mapping[str, float] = "softmax"
    every: int = 100
    rate: float = 0.5
    max_change: float = 2.0

    def __post_init__(self) -> None:
        _validate.count("every", self.every)
        _validate.number("rate", self.rate, high=1.0, closed=True, open_low=True)
        _validate.number("max_change", self.max_change, low=1.0, open_low=True)


def rebalanced(alpha: Tensor, pull_sq: Tensor, grad_sq: Tensor, rate: float, max_change: float) -> Tensor:
    """Return the next α [L] float64 of :class:`DynamicCoeffs`, sum 1, from Σ‖k(θ − θ*)‖² and Σ‖g‖² by layer."""
    live = (pull_sq > 0) & (grad_sq > 0) & torch.isfinite(pull_sq) & torch.isfinite(grad_sq)
    logs = torch.where(live, 0.5 * (torch.log(pull_sq) - torch.log(grad_sq)), 0.0)
    mean = logs.sum() / live.sum().clamp(min=1)
    bound = 0.5 * math.log(max_change)
    factor = torch.where(live, torch.exp((rate * (mean - logs)).clamp(-bound, bound)), 1.0)
    moved = alpha * factor
    return moved / moved.sum()
