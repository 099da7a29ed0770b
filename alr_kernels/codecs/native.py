"""Encoding and decoding importance in C++ (csrc/block_cpu.h) and CUDA; see reference.py for the formulas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..step.native import _C, CODES4, CODES8, DTYPE_CODES, addresses, available
from .encoded import Encoded
from .reference import BLOCK
from .storage import CODES, DTYPES

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["available", "decode_importance", "kept_addresses", "run"]

FORMAT_CODES = {name: DTYPE_CODES[dtype] for name, dtype in DTYPES.items() if dtype in DTYPE_CODES}
FORMAT_CODES |= {"int8": CODES8, "int4": CODES4}
BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "int4": 4}


def kept_addresses(
    name: str, kept: Sequence[Encoded | None], numels: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """Return addresses of values and of scales and the codes of formats; 0 where there is nothing."""
    if unknown := sorted({x.format for x in kept if x} - set(FORMAT_CODES)):
        raise TypeError(f"{name}: expected one of {', '.join(FORMAT_CODES)} for native code, got {', '.join(unknown)}")
    nothing = torch.empty(0)
    formats = ["fp32" if x is None else x.format for x in kept]
    sizes = [0 if x is None else n * BITS[x.format] // 8 for x, n in zip(kept, numels, strict=True)]
    values = addresses(name, [nothing if x is None else x.values for x in kept], sizes)
    blocks = [n // BLOCK * 2 if kind in CODES else 0 for n, kind in zip(numels, formats, strict=True)]
    scales = [nothing if x is None or x.scales is None else x.scales for x in kept]
    return values, addresses(f"scales of {name}", scales, blocks), [FORMAT_CODES[kind] for kind in formats]


def run(op: str, operands: tuple[Any, ...], numels: list[int], device: torch.device) -> None:
    """Call an op of ``_C`` that gathers statistics, on the CPU's threads or the device's current stream."""
    if device.type == "cpu":
        getattr(_C, op)(*operands, torch.get_num_threads())
        return
    scratch = torch.empty(_C.importance_cuda_scratch(numels), dtype=torch.float64, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream
    getattr(_C, f"{op}_cuda")(*operands, scratch.data_ptr(), scratch.numel(), device.index, stream)


@torch.no_grad()
def decode_importance(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Return Ω as float32, shaped as it was encoded."""
    scales = scales.contiguous()
    given = Encoded(codes.contiguous(), scales, f"int{bits}")
    if scales.numel() * BLOCK != given.numel or scales.dtype is not torch.bfloat16:
        expected = f"{given.numel // BLOCK} bfloat16 numbers"
        raise ValueError(f"scales: expected {expected}, got {scales.numel()} of {scales.dtype}")
    return _again(given, "fp32").values


def _again(importance: Encoded, kept: str) -> Encoded:
    """Return it in another format: 1·Ω + 0·nothing by the op that merges, whose statistics are dropped."""
    device, numels = importance.values.device, [importance.numel]
    found = Encoded.empty(importance.shape, kept, device)
    dropped = torch.empty(7 + 64, dtype=torch.float64, device=device)
    sides = (kept_addresses("importance", [importance], numels), kept_addresses("nothing", [None], numels))
    outputs = (*kept_addresses("result", [found], numels), dropped.data_ptr(), dropped[7:].data_ptr())
    run("merge", (*sides, numels, (1.0, 0.0), outputs), numels, device)
    return found
