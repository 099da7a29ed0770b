"""The two ops of LoRA in effective space on every backend that the CPU has, against dense float64."""

from __future__ import annotations

import pytest
import torch
from cases import F32, F64
from lora_cases import CODED, FORMATS, SHAPES, case, check_pull, check_record, dense

from alr_kernels import _ops_lora
from alr_kernels.lora.penalty import SIDES

REASONS = _ops_lora.lora_backends("cpu", F32)
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(REASONS[name]), reason=f"backend {name}: {REASONS[name]}"))
    for name in ("reference", "native")  # Triton: test_lora_triton.py
]
backends = pytest.mark.parametrize("backend", BACKENDS)


@backends
@pytest.mark.parametrize("clamp", [False, True])
def test_recording_equals_the_dense_formula(backend, clamp):
    cases = [case(shape) for shape in SHAPES]
    omegas = [c.path_integral.clone() for c in cases]
    _ops_lora.lora_record_(omegas, [c.gradient for c in cases], [c.move for c in cases], clamp, backend)
    for omega, c in zip(omegas, cases, strict=True):
        check_record(omega, c, clamp=clamp)


@backends
def test_recording_takes_a_dense_gradient(backend):
    cases = [case(shape) for shape in SHAPES]
    omegas, gradients = [c.path_integral.clone() for c in cases], [dense(c.gradient).float() for c in cases]
    _ops_lora.lora_record_(omegas, gradients, [c.move for c in cases], False, backend)
    for omega, gradient, c in zip(omegas, gradients, cases, strict=True):
        check_record(omega, c, gradient)


@backends
@pytest.mark.parametrize("curvature", [False, True])
@pytest.mark.parametrize("sides", SIDES)
def test_the_pull_equals_the_dense_formula(backend, sides, curvature):
    cases = [case(shape) for shape in SHAPES] + [case(shape, kept) for shape in CODED for kept in FORMATS]
    lists = ([c.importance for c in cases], torch.tensor([c.scale for c in cases], dtype=F64))
    lists += ([c.drift for c in cases], [c.factors for c in cases])
    for got, c in zip(_ops_lora.lora_pull(*lists, sides, curvature, backend), cases, strict=True):
        check_pull(got, c, sides, curvature)


def test_float64_goes_through_the_reference():
    c = case((33, 40, 3), dtype=F64)
    omega = c.path_integral.clone()
    _ops_lora.lora_record_([omega], [c.gradient], [c.move])
    check_record(omega, c, limit=1e-14)
    scales = torch.tensor([c.scale], dtype=F64)
    (got,) = _ops_lora.lora_pull([c.importance], scales, [c.drift], [c.factors], curvature=True)
    check_pull(got, c, curvature=True, limit=1e-13)
