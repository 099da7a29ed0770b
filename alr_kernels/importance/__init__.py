"""Element-wise importance: recorded along training, finalised once, kept in one file."""

from .artifact import Importance
from .estimators import fisher_importance, magnitude_gradient_importance, mas_importance
from .files import ImportanceFileError, ImportanceWriter
from .recorder import ImportanceRecorder
from .statistics import TensorStats

__all__ = [
    "Importance",
    "ImportanceFileError",
    "ImportanceRecorder",
    "ImportanceWriter",
    "TensorStats",
    "fisher_importance",
    "magnitude_gradient_importance",
    "mas_importance",
]
