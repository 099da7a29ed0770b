"""The step on CPU tensors in C++ (csrc/step_cpu.cpp): the reference's arithmetic in one pass over memory."""

from __future__ import annotations

import importlib
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch  # before _C: torch's OpenMP runtime is then the one that _C binds to, and both share its threads

from .._environment import extension_error
from .plan import MODES, step_scalars

_WHY_NOT = extension_error() or ""
_C: Any = None if _WHY_NOT else importlib.import_module("alr_kernels._C")

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

# Codes of csrc/common.h. float64 is served by the reference.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_dtype = attrgetter("dtype")
_numel = torch.Tensor.numel
_address = torch.Tensor.data_ptr


def available() -> tuple[bool, str]:
    """Return whether the extension is there, and if not, why."""
    return not _WHY_NOT, _WHY_NOT


def dtype_codes(name: str, tensors: Sequence[Tensor]) -> list[int]:
    """Return the code of each tensor's dtype."""
    try:
        return list(map(DTYPE_CODES.__getitem__, map(_dtype, tensors)))
    except KeyError as error:
        raise TypeError(f"{name}: expected float32, bfloat16 or float16 for native code, got {error.args[0]}") from None


def addresses(name: str, tensors: Sequence[Tensor], numels: list[int], dtypes: list[Any] | None = None) -> list[int]:
    """Return data pointers, once the element counts (and dtypes, when given) are known to match."""
    if list(map(_numel, tensors)) != numels:
        raise ValueError(f"{name}: expected element counts {numels}, got {list(map(_numel, tensors))}")
    if dtypes is not None and list(map(_dtype, tensors)) != dtypes:
        raise TypeError(f"{name}: expected dtypes {dtypes}, got {list(map(_dtype, tensors))}")
    return list(map(_address, tensors))


def mutated(*columns: Iterable[Tensor]) -> None:
    """Tell autograd that native code wrote into these tensors."""
    torch.autograd.graph.increment_version([tensor for column in columns for tensor in column])


def step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    importances: Sequence[Tensor],
    anchors: Sequence[Tensor],
    path_integrals: Sequence[Tensor],
    curvature_scales: Sequence[float],
    steps: Sequence[float],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    mode: str,
    maximize: bool,
) -> None:
    """Update ``params``, moments and ``path_integrals`` in place; see ``_ops.step_`` for the arguments.

    Operands with the same index are dense in the same layout; ``_ops.step_`` sees to it.
    """
    numels = list(map(_numel, params))
    dtypes = list(map(_dtype, params))
    single = [torch.float32] * len(numels)
    table = {step: i for i, step in enumerate(dict.fromkeys(steps))}
    _C.step_(
        addresses("params", params, numels),
        addresses("grads", grads, numels),
        addresses("exp_avgs", exp_avgs, numels, single),
        addresses("exp_avg_sqs", exp_avg_sqs, numels, single),
        addresses("importances", importances, numels, single) if importances else [],
        addresses("anchors", anchors, numels, dtypes) if importances else [],
        addresses("path_integrals", path_integrals, numels, single) if path_integrals else [],
        numels,
        dtype_codes("params", params),
        dtype_codes("grads", grads),
        list(curvature_scales) if importances else [],
        [step_scalars(step, lr, beta1, beta2, eps, weight_decay) for step in table],
        list(map(table.__getitem__, steps)),
        MODES.index(mode),
        maximize,
        torch.get_num_threads(),
    )
    mutated(params, exp_avgs, exp_avg_sqs, path_integrals)
