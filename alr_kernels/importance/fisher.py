"""Importance of a linear layer from per-sample gradients, in C++ (CPU) and CUDA (NVIDIA); formula: reference.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..step.native import _C, DTYPE_CODES, mutated

if TYPE_CHECKING:
    from torch import Tensor


@torch.no_grad()
def fisher_linear_(importance: Tensor, deltas: Tensor, inputs: Tensor, scale: float, power: int = 2) -> None:
    """Add scale · Σ_n |δ_nᵀ x_n|^power to Ω; see ``_ops.fisher_linear_``, which checks shapes and dtypes.

    All three are contiguous and on one device, δ and x of one dtype, Ω float32.
    """
    samples, tokens, rows = deltas.shape
    operands = (
        importance.data_ptr(),
        deltas.data_ptr(),
        inputs.data_ptr(),
        samples,
        tokens,
        rows,
        inputs.shape[2],
        scale,
        DTYPE_CODES[deltas.dtype],
        power,
    )
    if importance.device.type == "cpu":
        _C.fisher_linear_(*operands, torch.get_num_threads())
    else:
        stream = torch.cuda.current_stream(importance.device).cuda_stream
        _C.fisher_linear_cuda(*operands, importance.device.index, stream)
    mutated([importance])
