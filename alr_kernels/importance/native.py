"""Accumulating and finalising importance in C++ (CPU) and CUDA (NVIDIA); see reference.py for the formulas."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..step.native import _C, WIDTHS, addresses, available, dtype_codes, mutated
from .reference import STATISTICS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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


def _rows_by_device(params: Sequence[Tensor]) -> Iterator[tuple[torch.device, list[int]]]:
    """Yield each device with the rows on it; native code sorts out the dtypes itself."""
    groups: dict[torch.device, list[int]] = {}
    for i, param in enumerate(params):
        groups.setdefault(param.device, []).append(i)
    for device in groups:
        if reason := unavailable_reason(device.type):
            raise RuntimeError(f"native importance cannot run on {device}: {reason}")
    yield from groups.items()


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

    Operands with the same index are dense in the same layout and on one device; ``_ops`` sees to it.
    """
    for device, rows in _rows_by_device(params):
        omega, grad, param, before = ([column[i] for i in rows] for column in (path_integrals, grads, params, previous))
        numels = [tensor.numel() for tensor in param]
        param_codes, grad_codes = dtype_codes("params", param), dtype_codes("grads", grad)
        param_bytes = [n * WIDTHS[code] for n, code in zip(numels, param_codes, strict=True)]
        operands = (
            addresses("path_integrals", omega, [n * 4 for n in numels]),
            addresses("grads", grad, [n * WIDTHS[code] for n, code in zip(numels, grad_codes, strict=True)]),
            addresses("params", param, param_bytes),
            addresses("previous", before, param_bytes),
            numels,
            param_codes,
            grad_codes,
            maximize,
        )
        if device.type == "cpu":
            _C.accumulate_(*operands, torch.get_num_threads())
        else:
            _C.accumulate_cuda(*operands, device.index, torch.cuda.current_stream(device).cuda_stream)
        mutated(omega, before)


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

    Operands with the same index are dense in the same layout and on one device; ``_ops`` sees to it.
    """
    importances = [torch.empty_like(tensor) for tensor in path_integrals]
    statistics = torch.empty(len(importances), len(STATISTICS), dtype=torch.float64)
    for device, rows in _rows_by_device(params):
        omega, param, start, out = (
            [column[i] for i in rows] for column in (path_integrals, params, starts, importances)
        )
        numels = [tensor.numel() for tensor in param]
        param_codes = dtype_codes("params", param)
        param_bytes = [n * WIDTHS[code] for n, code in zip(numels, param_codes, strict=True)]
        single = [n * 4 for n in numels]
        table = torch.empty(len(rows), len(STATISTICS), dtype=torch.float64, device=device)
        operands = (
            addresses("path_integrals", omega, single),
            addresses("params", param, param_bytes),
            addresses("starts", start, param_bytes),
            addresses("importances", out, single),
            numels,
            param_codes,
            xi,
            relative,
        )
        if device.type == "cpu":
            _C.finalise(*operands, table.data_ptr(), torch.get_num_threads())
        else:
            scratch = torch.empty(_C.finalise_cuda_scratch(numels), dtype=torch.float64, device=device)
            stream = torch.cuda.current_stream(device).cuda_stream
            _C.finalise_cuda(*operands, scratch.data_ptr(), scratch.numel(), table.data_ptr(), device.index, stream)
        statistics[rows] = table.cpu()
    return importances, statistics
