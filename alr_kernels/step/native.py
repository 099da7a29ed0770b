"""The step on CPU tensors in C++ (csrc/step_cpu.cpp): the reference's arithmetic in one pass over memory."""

from __future__ import annotations

import importlib
from operator import attrgetter, mul
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
WIDTHS = (4, 2, 2)  # bytes an element, by code

_dtype = attrgetter("dtype")
_bytes = attrgetter("nbytes")
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


def addresses(name: str, tensors: Sequence[Tensor], nbytes: list[int]) -> list[int]:
    """Return data pointers, once the sizes are known to match: one cheap look that covers shape and dtype."""
    if list(map(_bytes, tensors)) != nbytes:
        raise ValueError(f"{name}: expected tensors of {nbytes} bytes, got {list(map(_bytes, tensors))}")
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
    param_codes, grad_codes = dtype_codes("params", params), dtype_codes("grads", grads)
    param_bytes, single = [*map(mul, numels, map(WIDTHS.__getitem__, param_codes))], [n * 4 for n in numels]
    table = {step: i for i, step in enumerate(dict.fromkeys(steps))}
    _C.step_(
        list(map(_address, params)),
        addresses("grads", grads, [*map(mul, numels, map(WIDTHS.__getitem__, grad_codes))]),
        addresses("exp_avgs", exp_avgs, single),
        addresses("exp_avg_sqs", exp_avg_sqs, single),
        addresses("importances", importances, single) if importances else [],
        addresses("anchors", anchors, param_bytes) if importances else [],
        addresses("path_integrals", path_integrals, single) if path_integrals else [],
        numels,
        param_codes,
        grad_codes,
        list(curvature_scales) if importances else [],
        [step_scalars(step, lr, beta1, beta2, eps, weight_decay) for step in table],
        list(map(table.__getitem__, steps)),
        MODES.index(mode),
        maximize,
        torch.get_num_threads(),
    )
    mutated(params, exp_avgs, exp_avg_sqs, path_integrals)
