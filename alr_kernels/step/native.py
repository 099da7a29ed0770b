"""The step on CPU tensors in C++ (csrc/step_cpu.cpp): the reference's arithmetic in one pass over memory."""

from __future__ import annotations

import importlib
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch  # before _C: torch's OpenMP runtime is then the one that _C binds to, and both share its threads

from .._environment import extension_error
from ..codecs.reference import BLOCK
from ..codecs.rounding import noise_key
from .formats import needs_noise
from .plan import MODES, Numbers, Operands, Options, step_scalars

_WHY_NOT = extension_error() or ""
_C: Any = None if _WHY_NOT else importlib.import_module("alr_kernels._C")

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

# Codes of csrc/common.h and csrc/cpu.h, and bytes an element. float64 is served by the reference.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
WIDTHS = (4, 2, 2)  # by code
SPLIT, STOCHASTIC, CODES8, CODES4 = 3, 4, 5, 6
PLAIN = len(MODES)  # the mode without a penalty

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


def _only_dtype(name: str, tensors: Sequence[Tensor], *expected: torch.dtype) -> torch.dtype:
    """Return the dtype that all of ``tensors`` have."""
    found = set(map(_dtype, tensors))
    if len(found) != 1 or not found <= set(expected):
        allowed = " or ".join(map(str, expected))
        raise TypeError(f"{name}: expected one dtype, {allowed}, for native code, got {sorted(map(str, found))}")
    return found.pop()


def _formats(o: Operands, options: Options) -> list[int]:
    """Return the formats of parameters, gradients, moments, importance and anchors."""
    floats = tuple(DTYPE_CODES)
    param = DTYPE_CODES[_only_dtype("params", o.params, *((torch.bfloat16,) if o.remainders else floats))]
    if o.remainders:
        param = SPLIT
    elif options.master == "stochastic" and param == DTYPE_CODES[torch.bfloat16]:
        param = STOCHASTIC
    exp_avg = _only_dtype("exp_avgs", o.exp_avgs, torch.float32, torch.bfloat16, torch.int8)
    _only_dtype("exp_avg_sqs", o.exp_avg_sqs, torch.uint8 if exp_avg is torch.int8 else exp_avg)
    importance = anchor = 0
    if o.importances:
        dtype = _only_dtype("importances", o.importances, *floats, torch.uint8)
        whole = dtype is not torch.uint8 or o.importances[0].shape == o.params[0].shape
        importance = DTYPE_CODES.get(dtype, CODES8 if whole else CODES4)
        anchor = DTYPE_CODES[_only_dtype("anchors", o.anchors, *floats)]
    grad = DTYPE_CODES[_only_dtype("grads", o.grads, *floats)]
    return [param, grad, DTYPE_CODES.get(exp_avg, CODES8), importance, anchor]


def _operands(o: Operands, formats: list[int], numels: list[int]) -> list[list[int]]:
    """Return the addresses of every role, having checked sizes: all that memory safety needs."""

    def sized(width: int) -> list[int]:
        return [n * width for n in numels]

    def floats(code: int) -> list[int]:
        return sized(4 if code == 0 else 2)

    param, grad, moments, importance, anchor = formats
    moment = numels if moments == CODES8 else floats(moments)
    blocks = [n // BLOCK for n in numels]
    expected = {
        "params": floats(param),
        "grads": floats(grad),
        "exp_avgs": moment,
        "exp_avg_sqs": moment,
        "importances": {CODES8: numels, CODES4: [n // 2 for n in numels]}.get(importance) or floats(importance),
        "anchors": floats(anchor),
        "path_integrals": sized(4),
        "remainders": sized(2),
        "exp_avg_scales": [n * 4 for n in blocks],
        "exp_avg_sq_scales": [n * 4 for n in blocks],
        "importance_scales": [n * 2 for n in blocks],
    }
    return [
        addresses(name, tensors, expected[name]) if tensors else []
        for name, tensors in zip(Operands._fields, o, strict=True)
    ]


def step_(o: Operands, numbers: Numbers, options: Options, statistics: Tensor | None = None) -> None:
    """Update what ``o`` says is mutated, as ``reference.step_`` does; ``statistics``: as there, overwritten.

    Operands with the same index are dense in the same layout, codes and what goes with them contiguous; ``_ops`` sees
    to it.
    """
    *hyper, reg_lambda, inverse_scale, clip, found_inf = numbers.hyper.tolist()
    if found_inf or not o.params:
        return
    counts = torch.stack(list(numbers.steps)).tolist()
    numels = list(map(_numel, o.params))
    formats = _formats(o, options)
    keys = [0] * len(numels)
    if formats[2] == CODES8 or needs_noise(o, options):
        keys = [noise_key(options.seed, key, int(count)) for key, count in zip(numbers.keys, counts, strict=True)]
    table = {count: i for i, count in enumerate(dict.fromkeys(counts))}
    grad_scale = -inverse_scale if options.maximize else inverse_scale
    _C.step_(
        _operands(o, formats, numels),
        numels,
        formats,
        (numbers.unit_scales * reg_lambda).tolist() if o.importances else [],
        keys,
        list(numbers.offsets) or [0] * len(numels),
        [(*step_scalars(count, *hyper), grad_scale, clip) for count in table],
        list(map(table.__getitem__, counts)),
        MODES.index(options.mode) if o.importances else PLAIN,
        options.precise,
        0 if statistics is None else statistics.data_ptr(),
        torch.get_num_threads(),
    )
    mutated(
        o.params, o.exp_avgs, o.exp_avg_sqs, o.path_integrals, o.remainders, o.exp_avg_scales, o.exp_avg_sq_scales,
        () if statistics is None else (statistics,),
    )  # fmt: skip
