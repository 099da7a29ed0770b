"""The step against what users would write without it: `alr-kernels bench`'s sets, every row, through pytest-benchmark.

    make bench                               this machine's CPU
    make gpu RESULTS=folder                  a CUDA machine

All figures are in each benchmark's ``extra_info`` (alr_kernels/benchmark/suite.py says what they are); what
pytest-benchmark itself times is AlrAdamW with a penalty. `alr-kernels bench --plot FILE PICTURE` draws the JSON.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rich.console import Console

from alr_kernels.benchmark.candidates import ours
from alr_kernels.benchmark.inputs import Inputs, Source
from alr_kernels.benchmark.shapes import shapes_of
from alr_kernels.benchmark.suite import failures, run_set
from alr_kernels.benchmark.table import WIDTH, show

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run `make gpu` on one")
GPU = [pytest.mark.gpu, NO_CUDA]
TINY, FEW = 1e-4, 12  # share and tensors when benchmarks are collected by the tests, only to see that they run
CASES = [  # set, share of its elements, device
    pytest.param("square", 1.0, "cpu", id="square-cpu"),
    pytest.param("llama-layer", 0.25, "cpu", id="llama-layer-cpu"),  # 55 M of 218 M: several copies must fit
    pytest.param("lora", 1.0, "cpu", id="lora-cpu"),
    pytest.param("resnet101", 1.0, "cpu", id="resnet101-cpu"),
    pytest.param("billion", 1.0, "cuda", id="billion-cuda", marks=GPU),
    pytest.param("lora", 1.0, "cuda", id="lora-cuda", marks=GPU),
    pytest.param("resnet101", 1.0, "cuda", id="resnet101-cuda", marks=GPU),
    pytest.param("llama-layer", 1.0, "cuda", id="llama-layer-cuda", marks=GPU),
]


@pytest.mark.parametrize(("name", "share", "device"), CASES)
def bench_step(benchmark: Any, name: str, share: float, device: str) -> None:
    """Every row of one set."""
    full = not benchmark.disabled
    shapes = shapes_of(name, share) if full else shapes_of(name, TINY)[:FEW]
    rounds = 15 if full else 1
    result = run_set(name, shapes, device, full=full, compile="few" if full else "none", rounds=rounds, budget_s=10.0)
    benchmark.extra_info.update({**result, "scale": share})
    benchmark.pedantic(ours(Inputs(Source(shapes, device))), rounds=rounds, warmup_rounds=1)
    if full:
        print()
        show(result, Console(width=WIDTH))
    assert not failures(result)
