"""Checkpoints that another number of ranks saved."""

from __future__ import annotations

from distributed_file_cases import LOADS as CASES

__all__ = ["CASES"]
