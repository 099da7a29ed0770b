"""LoRA in effective space in C++."""

from __future__ import annotations

from .reference import pulls, record

__all__ = ["pulls", "record", "unavailable_reason"]


def unavailable_reason(device_type: str) -> str:
    """Return '' when tensors on such a device are served, else why not."""
    return "not there yet"
