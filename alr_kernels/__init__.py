"""Fused regularized optimization: learn a domain without forgetting what the model knew.

record:  grad ── importance/ ──▶ Importance ── coefficients.py ──▶ coeffs
tune:    param, grad, state ──── step/ (penalty inside) ────────▶ param'

Names are imported on first use, so that the command line answers before torch is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from ._ops import BackendUnavailableError
    from .coefficients import DynamicCoeffs, LayerCoefficients, layer_coefficients
    from .importance import (
        Importance,
        ImportanceFileError,
        ImportanceRecorder,
        fisher_importance,
        magnitude_gradient_importance,
        mas_importance,
    )
    from .lora import lora_pairs
    from .optim import AlrAdamW

_HOME = {
    "AlrAdamW": "optim",
    "BackendUnavailableError": "_ops",
    "DynamicCoeffs": "coefficients",
    "Importance": "importance",
    "ImportanceFileError": "importance",
    "ImportanceRecorder": "importance",
    "LayerCoefficients": "coefficients",
    "fisher_importance": "importance",
    "layer_coefficients": "coefficients",
    "lora_pairs": "lora",
    "magnitude_gradient_importance": "importance",
    "mas_importance": "importance",
}

__all__ = [
    "AlrAdamW",
    "BackendUnavailableError",
    "DynamicCoeffs",
    "Importance",
    "ImportanceFileError",
    "ImportanceRecorder",
    "LayerCoefficients",
    "__version__",
    "fisher_importance",
    "layer_coefficients",
    "lora_pairs",
    "magnitude_gradient_importance",
    "mas_importance",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'alr_kernels' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
