"""The ops of :mod:`_ops` as ``torch.ops.alr_kernels.*``: schemas and fakes, for ``torch.compile``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _ops
from .codecs.encoded import Encoded
from .importance.flat import Flat, fake_outputs, flattened, unflattened
from .step.plan import Numbers, Operands, Options


def _step_flat(*args: Any, backend: str = "auto") -> None:
    """Take the registered op's flat arguments apart."""
    lists, rest = args[: len(Operands._fields)], args[len(Operands._fields) :]
    (steps, hyper, unit_scales, keys, offsets, statistics), options = rest[:6], list(rest[6:])
    if len(options) > len(Options._fields):
        backend = options.pop()
    numbers = Numbers(hyper, steps, unit_scales, keys, offsets)
    _ops.step_eager(Operands(*lists), numbers, Options(*options), statistics, backend)


def _accumulate_flat(*args: Any, **kwargs: Any) -> None:
    _ops.accumulate_eager(*args, **kwargs)


def _fisher_linear_flat(*args: Any, **kwargs: Any) -> None:
    _ops.fisher_linear_eager(*args, **kwargs)


def _finalise_flat(*args: Any, **kwargs: Any) -> Flat:
    return flattened(_ops.finalise_eager(*args, **kwargs))


def _merge_flat(*args: Any) -> Flat:
    """Take the registered op's flat arguments apart."""
    formats, weights = args[6:]
    return flattened(
        _ops.merge_eager(unflattened(*args[:3]), unflattened(*args[3:6]), formats, weights and tuple(weights))
    )


_LIBRARY = torch.library.Library("alr_kernels", "DEF")
_LIBRARY.define(
    "step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor[] importances, Tensor[] anchors, Tensor(d!)[] path_integrals, Tensor(e!)[] remainders, "
    "Tensor(f!)[] exp_avg_scales, Tensor(g!)[] exp_avg_sq_scales, Tensor[] importance_scales, "
    "Tensor[] steps, Tensor hyper, Tensor unit_scales, int[] keys, int[] offsets, Tensor(h!)? statistics, "
    "str penalty_mode, bool maximize, bool precise, str master, int seed, "
    'str backend="auto") -> ()'
)
_LIBRARY.define(
    "accumulate_(Tensor(a!)[] path_integrals, Tensor[] grads, Tensor[] params, Tensor(b!)[] previous, "
    "bool maximize=False) -> ()"
)
_LIBRARY.define(
    "finalise(Tensor[] path_integrals, Tensor[] params, Tensor[] starts, str[] formats, float xi, "
    "bool relative=False) -> (Tensor[] values, Tensor[] scales, Tensor statistics, Tensor histograms)"
)
_LIBRARY.define(
    "merge(Tensor[] first, Tensor[] first_scales, str[] first_formats, Tensor[] second, Tensor[] second_scales, "
    "str[] second_formats, str[] formats, float[]? weights) "
    "-> (Tensor[] values, Tensor[] scales, Tensor statistics, Tensor histograms)"
)
_LIBRARY.define("fisher_linear_(Tensor(a!) importance, Tensor deltas, Tensor inputs, float scale, int power=2) -> ()")
_LIBRARY.impl("step_", _step_flat, "CompositeExplicitAutograd")
_LIBRARY.impl("accumulate_", _accumulate_flat, "CompositeExplicitAutograd")
_LIBRARY.impl("finalise", _finalise_flat, "CompositeExplicitAutograd")
_LIBRARY.impl("merge", _merge_flat, "CompositeExplicitAutograd")
_LIBRARY.impl("fisher_linear_", _fisher_linear_flat, "CompositeExplicitAutograd")


@torch.library.register_fake("alr_kernels::step_", lib=_LIBRARY)
def _step_fake(*_: Any, **__: Any) -> None:
    return None


@torch.library.register_fake("alr_kernels::accumulate_", lib=_LIBRARY)
def _accumulate_fake(*_: Any, **__: Any) -> None:
    return None


@torch.library.register_fake("alr_kernels::fisher_linear_", lib=_LIBRARY)
def _fisher_linear_fake(*_: Any, **__: Any) -> None:
    return None


@torch.library.register_fake("alr_kernels::finalise", lib=_LIBRARY)
def _finalise_fake(
    path_integrals: Sequence[Tensor],
    params: Sequence[Tensor],
    starts: Sequence[Tensor],
    formats: Sequence[str],
    *_: Any,
    **__: Any,
) -> Flat:
    return fake_outputs([Encoded.dense(omega) for omega in path_integrals], formats)


@torch.library.register_fake("alr_kernels::merge", lib=_LIBRARY)
def _merge_fake(*args: Any) -> Flat:
    pairs = zip(unflattened(*args[:3]), unflattened(*args[3:6]), strict=True)
    return fake_outputs([a or b for a, b in pairs], args[6])  # type: ignore[misc]
