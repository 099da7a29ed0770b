"""Encoding and decoding importance on the CPU in C++ (csrc/codec_cpu.cpp); see reference.py for the formulas."""

from __future__ import annotations

import torch
from torch import Tensor

from ..step.native import _C, DTYPE_CODES, available
from .reference import BLOCK

__all__ = ["available", "decode_importance", "encode_importance"]


@torch.no_grad()
def encode_importance(importance: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return (codes uint8, two to a byte for 4 bits; scales bf16 [..., n/128]) of contiguous float32 or bf16 Ω."""
    importance = importance.contiguous()
    shape = importance.shape[:-1]
    codes = torch.empty(*shape, importance.shape[-1] * bits // 8, dtype=torch.uint8)
    scales = torch.empty(*shape, importance.shape[-1] // BLOCK, dtype=torch.bfloat16)
    _C.encode_importance(
        importance.data_ptr(),
        DTYPE_CODES[importance.dtype],
        codes.data_ptr(),
        scales.data_ptr(),
        importance.numel(),
        bits,
        torch.get_num_threads(),
    )
    return codes, scales


@torch.no_grad()
def decode_importance(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Return Ω as float32, shaped as it was encoded; ``codes`` and ``scales`` contiguous."""
    codes, scales = codes.contiguous(), scales.contiguous()
    importance = torch.empty(*codes.shape[:-1], codes.shape[-1] * 8 // bits)
    if scales.numel() * BLOCK != importance.numel() or scales.dtype is not torch.bfloat16:
        expected = importance.numel() // BLOCK
        raise ValueError(f"scales: expected {expected} bfloat16 numbers, got {scales.numel()} of {scales.dtype}")
    _C.decode_importance(
        codes.data_ptr(),
        scales.data_ptr(),
        importance.data_ptr(),
        importance.numel(),
        bits,
        torch.get_num_threads(),
    )
    return importance
