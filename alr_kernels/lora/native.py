"""LoRA in effective space on CPU tensors in C++ (csrc/lora_cpu.cpp); reference.py has the formulas."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..codecs.native import kept_addresses
from ..step.native import _C, available, mutated
from .penalty import Pull, empty_pulls
from .reference import Product

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..codecs.encoded import Encoded

LowRank = tuple[list[int], list[int], list[int]]  # addresses of left and right, and the dimension that both have


def unavailable_reason(device_type: str) -> str:
    """Return '' when tensors on such a device are served, else why not."""
    found, reason = available()
    return reason if not found or device_type == "cpu" else f"it serves CPU tensors, not {device_type}"


@torch.no_grad()
def record(
    path_integrals: Sequence[Tensor], gradients: Sequence[Product | Tensor], moves: Sequence[Product], clamp: bool
) -> None:
    """Add −Ĝ ⊙ (U_after − U_before) to ω of each pair; see ``_ops_lora.lora_record_``. All is float32, contiguous."""
    shapes = [(omega.shape[0], omega.shape[1]) for omega in path_integrals]
    nothing = Product(torch.empty(0, 0), torch.empty(0, 0))  # in place of a gradient that is dense
    omegas = [_address("path_integrals", omega, *shape) for omega, shape in zip(path_integrals, shapes, strict=True)]
    dense, factors, sizes = [], [], []
    for gradient, shape in zip(gradients, shapes, strict=True):
        low_rank = isinstance(gradient, Product)
        dense.append(0 if low_rank else _address("gradients", gradient, *shape))
        factors.append(gradient if low_rank else nothing)
        sizes.append(shape if low_rank else (0, 0))
    _C.lora_record_(
        omegas,
        dense,
        _low_ranks("gradients", factors, sizes),
        _low_ranks("moves", moves, shapes),
        [rows for rows, _ in shapes],
        [columns for _, columns in shapes],
        clamp,
        torch.get_num_threads(),
    )
    mutated(path_integrals)


@torch.no_grad()
def pulls(
    importances: Sequence[Encoded], scales: Tensor, drifts: Sequence[Product], factors: Sequence[Product],
    sides: str, curvature: bool,
) -> list[Pull]:  # fmt: skip
    """Return each pair's penalty with its derivatives; see ``_ops_lora.lora_pull``. All is contiguous."""
    shapes = [(up.shape[0], down.shape[1]) for up, down in factors]
    for importance, shape in zip(importances, shapes, strict=True):
        if importance.shape != shape or not importance.values.is_contiguous():
            raise ValueError(f"importances: expected contiguous {list(shape)}, got {list(importance.shape)}")
    numels = [rows * columns for rows, columns in shapes]
    found = empty_pulls(factors, sides, curvature)
    _C.lora_pull(
        kept_addresses("importances", importances, numels),
        scales.tolist(),
        _low_ranks("drifts", drifts, shapes),
        _low_ranks("factors", factors, shapes),
        [rows for rows, _ in shapes],
        [columns for _, columns in shapes],
        tuple(_wanted([getattr(pull, field) for pull in found]) for field in Pull._fields),
        torch.get_num_threads(),
    )
    return found


def _wanted(results: Sequence[Tensor | None]) -> list[int]:
    return [result.data_ptr() for result in results if result is not None]


def _address(name: str, tensor: Tensor, rows: int, columns: int) -> int:
    if tensor.shape != (rows, columns) or tensor.dtype is not torch.float32 or not tensor.is_contiguous():
        got = f"{list(tensor.shape)} of {tensor.dtype} with strides {tensor.stride()}"
        raise ValueError(f"{name}: expected contiguous [{rows}, {columns}] of float32, got {got}")
    return tensor.data_ptr()


def _low_ranks(name: str, products: Sequence[Product], shapes: Sequence[tuple[int, int]]) -> LowRank:
    lefts, rights, depths = [], [], []
    for (left, right), (rows, columns) in zip(products, shapes, strict=True):
        depth = left.shape[-1]
        lefts.append(_address(name, left, rows, depth))
        rights.append(_address(name, right, depth, columns))
        depths.append(depth)
    return lefts, rights, depths
