"""What is kept in which form: the dtype options of the optimizer, resolved for each parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _validate
from .reference import BLOCK

SMALL = 4096  # elements; below, and for vectors, everything stays fp32: nothing to gain, and norms are sensitive
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
NAMES = {str(dtype): name for name, dtype in DTYPES.items()} | {"torch.int8": "int8", "torch.int4": "int4"}
FORMATS = {
    "dtype": ("fp32", "bf16", "int8", "int4", "rank1"),  # of an importance that is kept
    "importance_dtype": ("fp32", "bf16", "int8", "int4"),  # of one whose elements steps read
    "anchor_dtype": ("fp32", "bf16"),
    "state_dtype": ("fp32", "bf16", "int8"),
}
CODES = {"int8": 8, "int4": 4}  # bits
IN_TWO = (*CODES, "rank1")  # kept as values and scales


def parse(option: str, value: object) -> str:
    """Return the name of a format given as a string or a torch dtype; ``option``: one of FORMATS."""
    name = NAMES.get(str(value)) if isinstance(value, torch.dtype) else value
    _validate.storage_format(option, value, name, FORMATS[option])
    return str(name)


@dataclass(frozen=True)
class Storage:
    """The optimizer's dtype options. ``importance`` None keeps what is given, ``anchor`` None the parameter's dtype."""

    importance: str | None = None
    anchor: str | None = None
    state: str = "fp32"
    master: str = "none"

    @classmethod
    def of(cls, importance_dtype: object, anchor_dtype: object, state_dtype: object, master: str) -> Storage:
        """Check the options and return them."""
        return cls(
            None if importance_dtype is None else parse("importance_dtype", importance_dtype),
            None if anchor_dtype is None else parse("anchor_dtype", anchor_dtype),
            parse("state_dtype", state_dtype),
            master,
        )

    def importance_format(self, param: Tensor, given: str = "fp32") -> str:
        """Return how the importance of ``param``, given in some form, is kept: one of ``DTYPES`` or ``CODES``."""
        if self.importance is not None or param.dtype is torch.float64:
            return fitting(self.importance or "fp32", param.shape, param.dtype)
        return given if given in FORMATS["importance_dtype"] else "fp32"

    def state_format(self, param: Tensor) -> str:
        """Return how the moments of ``param`` are kept."""
        return fitting(self.state, param.shape, param.dtype)

    def anchor_dtype(self, param: Tensor, exact: bool = True) -> torch.dtype:
        """Return the dtype of the anchor; ``exact``: whether the parameter's own dtype holds its value."""
        if param.dtype is torch.float64:
            return param.dtype
        if self.anchor is None or is_small(param):
            return param.dtype if exact else torch.float32
        return DTYPES[self.anchor]

    def is_split(self, param: Tensor) -> bool:
        """Whether ``param`` has an int16 remainder, with which it is a float32 number."""
        return self.master == "split" and param.dtype is torch.bfloat16

    def describe(self, params: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> str:
        """Say what is kept how, and how many tensors stay wide."""
        parts = [
            f"importance {self.importance or 'as given'}",
            f"anchor {self.anchor or 'as param'}",
            f"moments {self.state}",
        ]
        parts += [f"master {self.master}"] if self.master != "none" else []
        wanted = self.importance or "fp32"
        wider = {
            "moments": [self.state_format(param) != self.state for param in params],
            "importances": [fitting(wanted, shape) != wanted for shape in shapes],
        }
        for what, rows in wider.items():
            parts += [f"{sum(rows)} of {len(rows)} {what} stay wider (small or odd shapes)"] if any(rows) else []
        return ", ".join(parts)


def is_small(param: Tensor) -> bool:
    """Whether a parameter is a vector or has too few elements to be worth encoding."""
    return _is_small(param.shape)


def _is_small(shape: Sequence[int]) -> bool:
    return len(shape) < 2 or math.prod(shape) < SMALL


def fitting(name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> str:
    """Return how a tensor of this shape is kept where ``name`` is wanted; ``dtype``: of the parameter."""
    if dtype is torch.float64:
        return "fp64"
    if _is_small(shape) or (name in CODES and shape[-1] % BLOCK):
        return "fp32"
    return name


def why_wide(name: str, shape: Sequence[int]) -> str | None:
    """Say in words why a tensor stays fp32 where ``name`` is wanted; None where it is kept as wanted."""
    if fitting(name, shape) == name:
        return None
    if len(shape) < 2:
        return "vectors or scalars"
    return f"under {SMALL} elements" if _is_small(shape) else f"with rows no multiple of {BLOCK}"


def scale_shape(param: Tensor) -> tuple[int, ...]:
    """Return the shape of block scales: rows as the parameter, so that they shard with it."""
    return (*param.shape[:-1], param.shape[-1] // BLOCK)
