"""Element-wise importance: recorded along training, finalised once, kept in one file."""

from .artifact import Importance, ImportanceFileError, TensorStats
from .recorder import ImportanceRecorder

__all__ = ["Importance", "ImportanceFileError", "ImportanceRecorder", "TensorStats"]
