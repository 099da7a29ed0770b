"""Bringing operands into one layout, so that a kernel may walk over memory in one line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

is_contiguous = torch.Tensor.is_contiguous


def same_dense_layout(tensors: Sequence[Tensor]) -> bool:
    """Whether one linear walk over memory visits the same element of every tensor."""
    if all(map(is_contiguous, tensors)):
        return True
    first = tensors[0]
    return all(tensor.stride() == first.stride() for tensor in tensors[1:]) and _is_dense(first)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory without holes or overlaps."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def in_layout(
    columns: dict[str, Sequence[Tensor]], mutated: Iterable[str], contiguous: bool | Sequence[bool] = False
) -> tuple[dict[str, Sequence[Tensor]], list[tuple[Tensor, Tensor]]]:
    """Make every row of operands share one dense layout.

    ``columns``: argument → one tensor per parameter (or empty). Rows that differ in layout are replaced by contiguous
    copies; so are rows that are not contiguous and hold codes, whose blocks run along the last dimension, and with
    ``contiguous`` all that are not, or those rows for which it says so: random bits are numbered in order, and codes
    may be what is written. The second result lists (original, copy) pairs to write back after the kernel.
    """
    if all(all(map(is_contiguous, tensors)) for tensors in columns.values()):
        return columns, []
    result: dict[str, Any] = {name: list(tensors) for name, tensors in columns.items()}
    write_back: list[tuple[Tensor, Tensor]] = []
    present = [name for name, tensors in result.items() if tensors]
    for i in range(len(result[present[0]]) if present else 0):
        row = [result[name][i] for name in present]
        in_order = contiguous if isinstance(contiguous, bool) else contiguous[i]
        in_order = in_order or any(tensor.shape != row[0].shape for tensor in row)
        if all(map(is_contiguous, row)) if in_order else same_dense_layout(row):
            continue
        for name in present:
            original = result[name][i]
            copy = original.contiguous()
            if name in mutated and copy is not original:
                write_back.append((original, copy))
            result[name][i] = copy
    return result, write_back
