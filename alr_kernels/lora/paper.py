"""The settings of the published implementation of arXiv 2501.13669, so that its runs can be repeated.

``lora_pairs(model, preset="paper")`` records as it does: the factored estimate, ω ← max(ω, 0) after every step, U² as
denominator. At the end of every epoch of the general phase its importance is added up:

    Ω ← Ω + ω / (U² + ξ),   ω ← 0

and the domain is tuned on task loss + λ Σ_l α_l Σ Ω_l (U_l − U*_l)² with α = softmax(‖Ω_l‖₂ / T) over modules, coupled.
The defaults of this package are others, for the reasons in docs/lora.md.

>>> import torch
>>> A, B = torch.nn.Parameter(torch.randn(2, 8)), torch.nn.Parameter(torch.zeros(4, 2))
>>> pairs = lora_pairs([("layers.0.weight", A, B, 4.0)], preset="paper")
>>> optimizer = AlrAdamW([("A", A), ("B", B)], lora=pairs, record=True, **OPTIONS)
>>> total = None
>>> for epoch in range(2):
...     (B @ A).sum().backward()
...     optimizer.step()
...     total = add_epoch(optimizer, total)
>>> optimizer.start_phase(total, coefficients(total))
>>> optimizer.coeffs
{'layers.0': 1.0}
"""

from __future__ import annotations

from typing import Any

from .. import _validate_lora
from ..coefficients import LayerCoefficients, layer_coefficients
from ..importance import Importance
from ..optim import AlrAdamW
from .pairs import lora_pairs

__all__ = ["EPOCHS", "LORA", "OPTIONS", "TEMPERATURE", "XI", "AlrAdamW", "add_epoch", "coefficients", "lora_pairs"]

LORA: dict[str, Any] = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}
OPTIONS: dict[str, Any] = {"lr": 8e-4, "mode": "coupled", "normalize": False, "reg_lambda": 1e-3}  # lr decays linearly
EPOCHS = 5
XI = 1e-9
TEMPERATURE = 1e8  # the published code multiplies norms by its inverse


def add_epoch(optimizer: AlrAdamW, total: Importance | None = None, xi: float = XI) -> Importance:
    """Return the importance so far and the epoch's, and let ω start from zero for the next one.

    Args:
        optimizer: of ``lora_pairs(..., preset="paper")`` and ``record=True``.
        total: what the call after the epoch before returned; None after the first.
        xi: ξ.

    What is trained besides pairs (``modules_to_save``) is recorded as ever: not clamped, by its move.

    Raises:
        ValueError: the optimizer does not record as the preset says. RuntimeError: nothing was recorded since the last
            call.

    Source: the published code's ``calculate_importance``.
    """
    _validate_lora.paper_optimizer(optimizer._lora_form)
    epoch = optimizer.recorded_importance(xi)
    optimizer.restart_recording()
    return epoch if total is None else total.merged(epoch)


def coefficients(importance: Importance) -> LayerCoefficients:
    """Return α = softmax(‖Ω_l‖₂ / T) over modules with the published T: uniform but for norms near 1e8 and above."""
    return layer_coefficients(importance, "softmax", TEMPERATURE, by="module")
