"""One tensor of importance in the form in which it is kept: floats, block codes with their scales, or two factors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .reference import BLOCK, decode_importance, decode_rank1
from .storage import CODES, DTYPES, NAMES


class Encoded(NamedTuple):
    """Ω of one parameter.

    ``format``: ``"fp32"``, ``"bf16"``, ``"fp16"``, ``"fp64"``, codes ``"int8"`` or ``"int4"``, or ``"rank1"``:
    float32 sums of the rows of [shape[0], the rest] as values, and of its columns, over their total, as scales.
    """

    values: Tensor  # [*shape] floats or uint8 codes; 4-bit codes lie two to a byte, [..., n/2]; rank1: [shape[0]]
    scales: Tensor | None  # [..., n/128] bf16 with codes; rank1: [*shape[1:]], of sum 1; else None
    format: str

    def __repr__(self) -> str:
        return f"Encoded({self.format}, {tuple(self.shape)}, {self.nbytes:,} bytes)"

    @classmethod
    def dense(cls, importance: Tensor) -> Encoded:
        """Wrap floats as they are."""
        return cls(importance, None, NAMES[str(importance.dtype)])

    @property
    def shape(self) -> torch.Size:
        """The parameter's shape."""
        if self.format == "rank1":
            assert self.scales is not None
            return torch.Size((*self.values.shape, *self.scales.shape))
        if self.format == "int4":
            return torch.Size((*self.values.shape[:-1], self.values.shape[-1] * 2))
        return self.values.shape

    @property
    def numel(self) -> int:
        """Elements of Ω."""
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, of both factors, or of the floats."""
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def decoded(self) -> Tensor:
        """Return Ω: the floats themselves, or float32 decoded in plain torch; ``_ops.decoded`` is faster of codes."""
        if self.scales is None:
            return self.values
        if self.format == "rank1":
            return decode_rank1(self.values, self.scales)
        return decode_importance(self.values, self.scales, CODES[self.format])

    def to(self, device: torch.device | str) -> Encoded:
        """Return it on another device."""
        scales = None if self.scales is None else self.scales.to(device)
        return Encoded(self.values.to(device), scales, self.format)

    def rows(self, rows: slice) -> Encoded:
        """Return the importance of some rows of a matrix, without a copy; of rank1 only to be decoded."""
        scales = self.scales if self.scales is None or self.format == "rank1" else self.scales[rows]
        return Encoded(self.values[rows], scales, self.format)

    @classmethod
    def empty(cls, shape: torch.Size, format: str, device: torch.device) -> Encoded:
        """Return uninitialised memory for Ω of this shape; its last dimension is whole blocks where it is codes."""
        if format == "rank1":
            values, scales = (torch.empty(part, device=device, dtype=torch.float32) for part in (shape[:1], shape[1:]))
            return cls(values, scales, format)
        if format not in CODES:
            return cls(torch.empty(shape, dtype=DTYPES[format], device=device), None, format)
        *rows, columns = shape
        codes = torch.empty(*rows, columns * CODES[format] // 8, dtype=torch.uint8, device=device)
        return cls(codes, torch.empty(*rows, columns // BLOCK, dtype=torch.bfloat16, device=device), format)
