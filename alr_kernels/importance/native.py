"""The ops of reference.py, which has their formulas, in C++ (CPU) and CUDA (NVIDIA)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..codecs.encoded import Encoded
from ..codecs.native import kept_addresses, run
from ..step.native import _C, DTYPE_CODES, WIDTHS, addresses, available, dtype_codes, mutated
from .statistics import BINS, STATISTICS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from .reference import Result


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
    formats: Sequence[str],
    xi: float,
    *,
    relative: bool = False,
) -> Result:
    """Return Ω in the given formats with its statistics; see ``_ops.finalise``.

    All tensors are on one device, and those with the same index dense in the same layout, contiguous where the format
    is codes; ``_ops`` sees to it.
    """
    device = params[0].device if params else torch.device("cpu")
    numels = [tensor.numel() for tensor in params]
    param_codes = dtype_codes("params", params)
    param_bytes = [n * WIDTHS[code] for n, code in zip(numels, param_codes, strict=True)]
    found = _Outputs(path_integrals, formats, device)
    operands = (
        addresses("path_integrals", path_integrals, [n * 4 for n in numels]),
        addresses("params", params, param_bytes),
        addresses("starts", starts, param_bytes),
        numels,
        param_codes,
        xi,
        relative,
        found.addresses(numels),
    )
    run("finalise", operands, numels, device)
    return found.result()


@torch.no_grad()
def merge(
    first: Sequence[Encoded | None],
    second: Sequence[Encoded | None],
    formats: Sequence[str],
    weights: tuple[float, float] | None,
) -> Result:
    """Return a·Ω_a + b·Ω_b, or without weights max(Ω_a, Ω_b), in the given formats; see ``_ops.merge``.

    All tensors are on one device; those with the same index are dense in the same layout, contiguous where one or the
    result is codes. ``_ops`` sees to it.
    """
    present: list[Encoded] = [a or b for a, b in zip(first, second, strict=True)]  # type: ignore[misc]
    device = present[0].values.device if present else torch.device("cpu")
    numels = [importance.numel for importance in present]
    found = _Outputs([p.values if p.scales is None else p for p in present], formats, device)
    sides = (kept_addresses("first", first, numels), kept_addresses("second", second, numels))
    run("merge", (*sides, numels, weights, found.addresses(numels)), numels, device)
    return found.result()


class _Outputs:
    """Memory for what finalise and merge return. ``like``: the shape, and of floats the layout, of each tensor."""

    def __init__(self, like: Sequence[Tensor | Encoded], formats: Sequence[str], device: torch.device) -> None:
        self.importances = [Encoded.empty(x.shape, kept, device) for x, kept in zip(like, formats, strict=True)]
        for i, (x, importance) in enumerate(zip(like, self.importances, strict=True)):
            if importance.scales is None and isinstance(x, torch.Tensor) and not x.is_contiguous():
                strided = torch.empty_like(x, dtype=importance.values.dtype)
                self.importances[i] = importance._replace(values=strided)
        self.statistics = torch.empty(len(formats), len(STATISTICS), dtype=torch.float64, device=device)
        self.histograms = torch.empty(len(formats), BINS, dtype=torch.int64, device=device)

    def addresses(self, numels: list[int]) -> tuple[list[int], list[int], list[int], int, int]:
        """Return what _C takes as its outputs."""
        kept = kept_addresses("importances", self.importances, numels)
        return (*kept, self.statistics.data_ptr(), self.histograms.data_ptr())

    def result(self) -> Result:
        """Return the importances, and statistics and histograms on the CPU."""
        return self.importances, self.statistics.cpu(), self.histograms.cpu()


@torch.no_grad()
def fisher_linear_(importance: Tensor, deltas: Tensor, inputs: Tensor, scale: float, power: int = 2) -> None:
    """Add scale · Σ_n |δ_nᵀ x_n|^power to Ω; see ``_ops.fisher_linear_``, which checks shapes and dtypes.

    All three are contiguous and on one device, δ and x of one dtype, Ω float32.
    """
    samples, tokens, rows = deltas.shape
    if tokens == 1 and power == 2:
        deltas, inputs = _balanced(deltas, inputs)
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


def _balanced(deltas: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Scale both by powers of two that cancel, so that their largest magnitudes are alike.

    With one token a sample the kernels square δ and x before they multiply: a small δ's square alone would underflow.
    """
    if not deltas.numel() or not inputs.numel() or deltas.dtype is torch.float16:
        return deltas, inputs
    peaks = [tensor.abs().amax().float().clamp(1e-30, 1e30) for tensor in (deltas, inputs)]
    factor = torch.exp2(torch.round((torch.log2(peaks[1]) - torch.log2(peaks[0])) / 2))
    return (deltas * factor).to(deltas.dtype), (inputs / factor).to(inputs.dtype)
