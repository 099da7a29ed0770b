"""Accumulating and finalising importance in C++ (CPU) and CUDA (NVIDIA); see reference.py for the formulas."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..step.native import _C, WIDTHS, addresses, available, dtype_codes, mutated
from .reference import STATISTICS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def unavailable_reason(device_type: str) -> str:
    """Return '' when tensors on such a device are served, else why not."""
    found, reason = available()
    if not found or device_type == "cpu":
        return reason
    if device_type != "cuda" or torch.version.hip is not None:
        return f"it serves CPU and NVIDIA tensors, not {'ROCm' if device_type == 'cuda' else device_type}"
    missing = _C.build_info()["cuda_missing_reason"]
    return f"alr_kernels._C was built without CUDA ({missing}); run `alr-kernels doctor`" if missing else ""


@torch.no_grad()
def accumulate_(
    path_integrals: Sequence[Tensor],
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    previous: Sequence[Tensor],
    *,
    maximize: bool = False,
) -> None:
    """Add −g · (θ − θ_previous) to ω and refresh the copy θ_previous ← θ; see ``_ops.accumulate_``.

    All tensors are on one device, and those with the same index dense in the same layout; ``_ops`` sees to it.
    """
    if not params:
        return
    numels = [tensor.numel() for tensor in params]
    param_codes, grad_codes = dtype_codes("params", params), dtype_codes("grads", grads)
    param_bytes = [n * WIDTHS[code] for n, code in zip(numels, param_codes, strict=True)]
    operands = (
        addresses("path_integrals", path_integrals, [n * 4 for n in numels]),
        addresses("grads", grads, [n * WIDTHS[code] for n, code in zip(numels, grad_codes, strict=True)]),
        addresses("params", params, param_bytes),
        addresses("previous", previous, param_bytes),
        numels,
        param_codes,
        grad_codes,
        maximize,
    )
    device = params[0].device
    if device.type == "cpu":
        _C.accumulate_(*operands, torch.get_num_threads())
    else:
        _C.accumulate_cuda(*operands, device.index, torch.cuda.current_stream(device).cuda_stream)
    mutated(path_integrals, previous)


@torch.no_grad()
def finalise(
    path_integrals: Sequence[Tensor],
    params: Sequence[Tensor],
    starts: Sequence[Tensor],
    xi: float,
    *,
    relative: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """Return (Ω per tensor, statistics [n, 7] float64); see ``_ops.finalise``.

    All tensors are on one device, and those with the same index dense in the same layout; ``_ops`` sees to it.
    """
    device = params[0].device if params else torch.device("cpu")
    statistics = torch.empty(len(params), len(STATISTICS), dtype=torch.float64, device=device)
    importances = [torch.empty_like(tensor) for tensor in path_integrals]
    numels = [tensor.numel() for tensor in params]
    param_codes = dtype_codes("params", params)
    param_bytes = [n * WIDTHS[code] for n, code in zip(numels, param_codes, strict=True)]
    single = [n * 4 for n in numels]
    operands = (
        addresses("path_integrals", path_integrals, single),
        addresses("params", params, param_bytes),
        addresses("starts", starts, param_bytes),
        addresses("importances", importances, single),
        numels,
        param_codes,
        xi,
        relative,
    )
    if device.type == "cpu":
        _C.finalise(*operands, statistics.data_ptr(), torch.get_num_threads())
    else:
        scratch = torch.empty(_C.finalise_cuda_scratch(numels), dtype=torch.float64, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
        _C.finalise_cuda(*operands, scratch.data_ptr(), scratch.numel(), statistics.data_ptr(), device.index, stream)
    return importances, statistics.cpu()
