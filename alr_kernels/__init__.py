"""Fused regularized optimization: learn a domain without forgetting what the model knew.

record:  grad ── importance/ ──▶ Importance ── coefficients.py ──▶ coeffs
tune:    param, grad, state ──── step/ (penalty inside) ────────▶ param'
"""

from ._ops import BackendUnavailableError
from ._version import __version__
from .coefficients import LayerCoefficients, layer_coefficients
from .importance import Importance, ImportanceFileError, ImportanceRecorder
from .optim import AlrAdamW

__all__ = [
    "AlrAdamW",
    "BackendUnavailableError",
    "Importance",
    "ImportanceFileError",
    "ImportanceRecorder",
    "LayerCoefficients",
    "__version__",
    "layer_coefficients",
]
