"""The dispatch table: which implementation serves which device.

:func:`step_`, :func:`accumulate_`, :func:`finalise`, :func:`merge` and :func:`fisher_linear_` pick a backend and call
its launcher; under ``torch.compile`` they are the ops of the same names that ``_registration.py`` makes of them. Who
serves what is decided here and nowhere else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from . import _validate, _validate_estimators
from ._layout import in_layout, is_contiguous, same_dense_layout
from .codecs import native as codecs_native
from .codecs import reference as codecs_reference
from .codecs.encoded import Encoded
from .codecs.storage import CODES
from .importance import native as importance_native
from .importance import reference as importance_reference
from .importance.estimators import reference as estimators_reference
from .importance.flat import unflattened
from .step import native as step_native
from .step import reference as step_reference
from .step import triton_kernel as step_triton
from .step.formats import needs_noise
from .step.plan import MUTATED, Numbers, Operands, Options

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from .importance.reference import Result

F64 = torch.float64
BACKENDS = ("auto", "reference", "native", "triton")
Key = tuple[torch.device, torch.dtype, int]  # rows with equal ones go together; what is rank1 has a number of its own


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot serve this device or dtype."""


def step_backends(device_type: str, dtype: torch.dtype) -> dict[str, str]:
    """Return backend → '' when it can step such parameters, else the reason why not; best first."""
    narrow = "" if dtype != torch.float64 else "float64 parameters go through the reference"
    triton = narrow or ("" if (found := step_triton.available(device_type))[0] else found[1])
    native = narrow or ("" if (found := step_native.available())[0] else found[1])
    if device_type != "cpu":
        native = f"it serves CPU parameters, not {device_type}"
    if device_type == "cpu":  # Triton reaches CPU tensors only through its interpreter: never the default
        return {"native": native, "reference": "", "triton": triton}
    return {"triton": triton, "reference": "", "native": native}


def importance_backends(device_type: str, dtype: torch.dtype) -> dict[str, str]:
    """Return backend → '' or the reason, for accumulate, finalise, merge and encode."""
    reason = "" if dtype != torch.float64 else "float64 parameters go through the reference"
    if not reason:
        reason = importance_native.unavailable_reason(device_type)
    return {"native": reason, "reference": ""}


def choose_step_backend(requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the backend that serves, honouring an explicit request.

    Raises:
        BackendUnavailableError: the requested backend cannot serve, with the reason.
    """
    _validate.choice("backend", requested, BACKENDS)
    table = step_backends(device.type, dtype)
    if requested == "auto":
        return next(name for name, reason in table.items() if not reason)
    if table[requested]:
        raise BackendUnavailableError(
            f"backend={requested!r} cannot step {dtype} parameters on {device.type}: {table[requested]}. "
            "Use backend='auto', or run `alr-kernels doctor`."
        )
    return requested


_STEP = {"reference": step_reference.step_, "native": step_native.step_, "triton": step_triton.step_}
_IMPORTANCE = {"reference": importance_reference, "native": importance_native}


@torch.no_grad()
def step_eager(
    operands: Operands,
    numbers: Numbers,
    options: Options = Options(),  # noqa: B008 - immutable
    statistics: Tensor | None = None,
    backend: str = "auto",
) -> None:
    if not operands.params:
        return
    chosen = choose_step_backend(backend, operands.params[0].device, operands.params[0].dtype)
    if numbers.offsets:
        coded = operands.exp_avgs[0].dtype is torch.int8
        _validate.offsets(numbers.offsets, len(operands.params), codecs_reference.BLOCK if coded else 1)
    # kernels read memory, where a lazy sign is not applied yet
    columns: Any = {**operands._asdict(), "grads": [grad.resolve_neg() for grad in operands.grads]}
    write_back: list[tuple[Tensor, Tensor]] = []
    if chosen != "reference":  # the reference indexes logically and takes any strides
        columns, write_back = in_layout(columns, MUTATED, needs_noise(operands, options))
    _STEP[chosen](Operands(**columns), numbers, options, statistics)
    for original, copy in write_back:
        original.copy_(copy)


@torch.no_grad()
def decode_importance(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Return Ω as float32; see ``codecs/reference.py``."""
    found = importance_backends(codes.device.type, torch.float32)["native"]
    return (codecs_reference if found else codecs_native).decode_importance(codes, scales, bits)


def decoded(importance: Encoded) -> Tensor:
    """Return Ω: the floats themselves, or float32 decoded from codes or factors (a new tensor)."""
    if importance.scales is None or importance.format == "rank1":
        return importance.decoded()
    return decode_importance(importance.values, importance.scales, CODES[importance.format])


@torch.no_grad()
def accumulate_eager(
    path_integrals: Sequence[Tensor],
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    previous: Sequence[Tensor],
    maximize: bool = False,
) -> None:
    grads = [grad.resolve_neg() for grad in grads]
    columns = {"path_integrals": path_integrals, "grads": grads, "params": params, "previous": previous}
    laid, write_back = in_layout(columns, {"path_integrals", "previous"})
    for rows, backend in _by_backend([(t.device, t.dtype, -1) for t in laid["params"]]):
        _IMPORTANCE[backend].accumulate_(*([column[i] for i in rows] for column in laid.values()), maximize=maximize)
    for original, copy in write_back:
        original.copy_(copy)


@torch.no_grad()
def finalise_eager(
    path_integrals: Sequence[Tensor],
    params: Sequence[Tensor],
    starts: Sequence[Tensor],
    formats: Sequence[str],
    xi: float,
    relative: bool = False,
) -> Result:
    columns = {"path_integrals": path_integrals, "params": params, "starts": starts}
    laid, _ = in_layout(columns, (), [kept in CODES for kept in formats])
    keys = [
        (param.device, F64 if kept == "fp64" else param.dtype, i if kept == "rank1" else -1)
        for i, (param, kept) in enumerate(zip(params, formats, strict=True))
    ]

    def run(backend: str, rows: list[int], kept: list[str]) -> Result:
        lists = ([column[i] for i in rows] for column in laid.values())
        return _IMPORTANCE[backend].finalise(*lists, kept, xi, relative=relative)

    return _collected(keys, formats, run)


@torch.no_grad()
def merge_eager(
    first: Sequence[Encoded | None],
    second: Sequence[Encoded | None],
    formats: Sequence[str],
    weights: tuple[float, float] | None = (1.0, 1.0),
) -> Result:
    sides: list[tuple[Encoded | None, Encoded | None]] = []
    keys: list[Key] = []
    for i, (a, b, kept) in enumerate(zip(first, second, formats, strict=True)):
        present = [x for x in (a, b) if x is not None]
        if not present or present[0].shape != present[-1].shape:
            shapes = ", ".join(str(tuple(x.shape)) for x in present) or "none"
            raise ValueError(f"merge: expected one or two importances of the same shape, got {shapes}")
        values = [x.values for x in present]
        coded = kept in CODES or any(x.scales is not None for x in present)
        in_place = all(map(is_contiguous, values)) if coded else same_dense_layout(values)
        sides.append((a, b) if in_place else (_contiguous(a), _contiguous(b)))
        forms = (kept, *(x.format for x in present))
        dtype = F64 if "fp64" in forms else values[0].dtype
        keys.append((values[0].device, dtype, i if "rank1" in forms else -1))

    def run(backend: str, rows: list[int], kept: list[str]) -> Result:
        first, second = ([_elementwise(sides[i][side]) for i in rows] for side in (0, 1))
        return _IMPORTANCE[backend].merge(first, second, kept, weights)

    return _collected(keys, formats, run)


def _elementwise(x: Encoded | None) -> Encoded | None:
    return Encoded.dense(x.decoded()) if x is not None and x.format == "rank1" else x


def _contiguous(x: Encoded | None) -> Encoded | None:
    return x and x._replace(values=x.values.contiguous(), scales=None if x.scales is None else x.scales.contiguous())


def _collected(keys: list[Key], formats: Sequence[str], run: Callable[[str, list[int], list[str]], Result]) -> Result:
    """Run each group of rows on the backend that serves it, rank1 in float32; put the results in the rows' order."""
    importances: list[Any] = [None] * len(keys)
    stats = torch.zeros(len(keys), len(importance_reference.STATISTICS), dtype=torch.float64)
    histograms = torch.zeros(len(keys), importance_reference.BINS, dtype=torch.int64)
    for rows, backend in _by_backend(keys):
        found, table, counts = run(backend, rows, ["fp32" if formats[i] == "rank1" else formats[i] for i in rows])
        for i, importance in zip(rows, found, strict=True):
            dense = formats[i] == "rank1"
            importances[i] = importance_reference.encoded(importance.values, "rank1") if dense else importance
        del found, importance  # before the next is made
        stats[rows], histograms[rows] = table, counts
    return importances, stats, histograms


def _by_backend(keys: Sequence[Key]) -> list[tuple[list[int], str]]:
    """Group row numbers by device, by the backend that serves them, and by the number of those that go alone."""
    groups: dict[tuple[str, str, int], list[int]] = {}
    for i, (device, dtype, alone) in enumerate(keys):
        table = importance_backends(device.type, dtype)
        backend = next(name for name, reason in table.items() if not reason)
        groups.setdefault((str(device), backend, alone), []).append(i)
    return [(rows, backend) for (_, backend, _), rows in groups.items()]


@torch.no_grad()
def fisher_linear_eager(importance: Tensor, deltas: Tensor, inputs: Tensor, scale: float, power: int = 2) -> None:
    _validate_estimators.fisher_operands(importance, deltas, inputs, power)
    found = importance_backends(importance.device.type, importance.dtype)["native"]
    if found or torch.float64 in (deltas.dtype, inputs.dtype):
        estimators_reference.fisher_linear_(importance, deltas, inputs, scale, power)
        return
    if deltas.dtype != inputs.dtype:  # as under autocast, where a module's input is wider than what it computes in
        deltas, inputs = deltas.float(), inputs.float()
    dense = importance.contiguous()
    deltas, inputs = (tensor.resolve_neg().contiguous() for tensor in (deltas, inputs))
    importance_native.fisher_linear_(dense, deltas, inputs, scale, power)
    if dense is not importance:
        importance.copy_(dense)


def step_(
    operands: Operands,
    numbers: Numbers,
    options: Options = Options(),  # noqa: B008 - immutable
    statistics: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Take one AdamW step with penalty and recording over lists of tensors, in place.

    Formula: ``alr_kernels/step/reference.py``. What the lists and numbers hold, with dtypes and units:
    ``alr_kernels/step/plan.py``. ``torch.ops.alr_kernels.step_`` is the same with flat arguments.

    Args:
        operands: θ, g, moments, and as needed Ω, θ*, ω, remainders, scales; one list entry per parameter, all on
            one device, all parameters of one dtype.
        numbers: hyper-parameters, step counts and curvature scales, as tensors on that device.
        options: mode, direction, rounding, how bf16 parameters are kept.
        statistics: [n, 6] float64 on that device, overwritten with ``plan.STATISTICS`` of each tensor, or None.
        backend: ``"auto"`` or one by name.

    Raises:
        BackendUnavailableError: an explicit backend cannot serve these tensors.

    Source: arXiv 2501.13669, eq. 7 (coupled); the proximal step is derived in docs/method.md.
    """
    if torch.compiler.is_compiling():
        flat = (numbers.steps, numbers.hyper, numbers.unit_scales, numbers.keys, numbers.offsets, statistics, *options)
        torch.ops.alr_kernels.step_(*operands, *flat, backend=backend)
    else:
        step_eager(operands, numbers, options, statistics, backend)


def accumulate_(*args: Any, **kwargs: Any) -> None:
    """Add −g · (θ − θ_previous) to ω and set θ_previous ← θ, over a list of tensors, in place.

    Args:
        path_integrals: [n tensors] float32 (float64 for float64 params): ω, mutated.
        grads: same shapes: gradient of the task loss, unscaled.
        params: same shapes: θ after the step.
        previous: same shapes and dtype as params: θ before the step, mutated.
        maximize: whether the step ascended.

    Source: arXiv 2501.13669, eq. 3.
    """
    if torch.compiler.is_compiling():
        torch.ops.alr_kernels.accumulate_(*args, **kwargs)
    else:
        accumulate_eager(*args, **kwargs)


def finalise(
    path_integrals: Sequence[Tensor],
    params: Sequence[Tensor],
    starts: Sequence[Tensor],
    formats: Sequence[str],
    xi: float,
    relative: bool = False,
) -> Result:
    """Return Ω = max(ω, 0) / ((θ_end − θ_start)² + ξ) in the given formats, its statistics and histograms; one pass.

    Args:
        path_integrals: [n tensors] float32 (float64 for float64 params): ω.
        params: same shapes: θ_end.
        starts: same shapes and dtypes as params: θ_start.
        formats: n of ``"fp32"``, ``"bf16"``, ``"fp16"``, ``"fp64"``, ``"int8"``, ``"int4"``, ``"rank1"``; codes
            need a last dimension of whole blocks of 128; rank1 makes a dense float32 temporary of one tensor.
        xi: ξ > 0, in units of θ²; with ``relative`` in units of each tensor's mean((θ_end − θ_start)²).

    Returns:
        list of Ω, 0 where ω is not finite; [n, 7] float64 on the CPU, columns ``importance.statistics.STATISTICS``, of
        Ω before it is encoded; [n, 64] int64 on the CPU, the histogram of the same.

    Source: arXiv 2501.13669, eq. 4-5, clamped once at the end.
    """
    if torch.compiler.is_compiling():
        values, scales, *rest = torch.ops.alr_kernels.finalise(path_integrals, params, starts, formats, xi, relative)
        return unflattened(values, scales, formats), *rest
    return finalise_eager(path_integrals, params, starts, formats, xi, relative)


def merge(
    first: Sequence[Encoded | None],
    second: Sequence[Encoded | None],
    formats: Sequence[str],
    weights: tuple[float, float] | None = (1.0, 1.0),
) -> Result:
    """Return a·Ω_a + b·Ω_b in the given formats, its statistics and histograms, in one pass over what is encoded.

    Args:
        first: [n] Ω_a in any format, or None for 0.
        second: [n] Ω_b likewise, of the same shape; one of the two is there.
        formats: n names as in :func:`finalise`.
        weights: (a, b), or None for max(Ω_a, Ω_b).

    Returns:
        As :func:`finalise`; the statistics of ω are 0.

    Source: a = γ, b = 1 is online EWC (Schwarz et al. 2018).
    """
    if torch.compiler.is_compiling():
        flat: list[Any] = []
        for side in (first, second):
            nothing = torch.empty(0)
            flat.append([nothing if x is None else x.values for x in side])
            flat.append([nothing if x is None or x.scales is None else x.scales for x in side])
            flat.append(["" if x is None else x.format for x in side])
        values, scales, *rest = torch.ops.alr_kernels.merge(*flat, formats, weights)
        return unflattened(values, scales, formats), *rest
    return merge_eager(first, second, formats, weights)


def fisher_linear_(*args: Any, **kwargs: Any) -> None:
    """Add scale · Σ_n |δ_nᵀ x_n|^power to Ω of a linear layer, in place, without per-sample gradients in memory.

    Args:
        importance: [rows, columns] float32 (float64 through the reference): Ω, mutated.
        deltas: [n, t, rows] float32, bfloat16, float16: gradient of each sample's loss by the layer's output.
        inputs: [n, t, columns] the same dtypes: the layer's input.
        scale: factor of the whole sum. power: 2 for the Fisher information, 1 for MAS.

    Raises:
        ValueError: shapes, devices or power that do not fit.

    Source: Kirkpatrick et al. 2017 (EWC), diagonal of the empirical Fisher; Aljundi et al. 2018 (MAS).

    >>> omega = torch.zeros(1, 2)
    >>> fisher_linear_(omega, torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[[1.0, 0.0]], [[1.0, 3.0]]]), 0.5)
    >>> omega
    tensor([[ 2.5000, 18.0000]])
    """
    if torch.compiler.is_compiling():
        torch.ops.alr_kernels.fisher_linear_(*args, **kwargs)
    else:
        fisher_linear_eager(*args, **kwargs)


def add_rows_(target: Tensor, rows: Tensor, values: Tensor) -> None:
    """Add values [k, d] to rows [k] of target [m, d], repeated rows in their order on every device."""
    if target.device.type == "cpu":
        target.index_add_(0, rows, values)  # one row after the other
    else:
        target.index_put_((rows,), values, accumulate=True)  # sorts; index_add_ would add atomically, in any order


def doctor_table(device_type: str) -> dict[str, dict[str, str]]:
    """Return op → backend → '' or why not, for ``alr-kernels doctor``."""
    return {
        "step": step_backends(device_type, torch.float32),
        "importance": importance_backends(device_type, torch.float32),
    }


from . import _registration  # noqa: E402,F401 - what is above becomes torch.ops.alr_kernels.*
