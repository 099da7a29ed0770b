"""Element-wise importance: recorded along training, finalised once, kept in one file."""

from .artifact import Importance, ImportanceFileError, TensorStats
from .estimators import fisher_importance, magnitude_gradient_importance, mas_importance
from .recorder import ImportanceRecorder

__all__ = [
    "Importance",
    "ImportanceFileError",
    "ImportanceRecorder",
    "TensorStats",
    "fisher_importance",
    "magnitude_gradient_importance",
    "mas_importance",
]
