"""What importance costs: its passes over memory, and beside a Fisher; `alr-kernels bench --importance` through
pytest-benchmark.

    make bench                               this machine's CPU
    make gpu RESULTS=folder                  a CUDA machine

All figures are in each benchmark's ``extra_info`` (alr_kernels/benchmark/importance.py and claim.py say what they are).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rich.console import Console

from alr_kernels.benchmark import claim, importance_table
from alr_kernels.benchmark.importance import run_passes
from alr_kernels.benchmark.shapes import shapes_of
from alr_kernels.benchmark.table import WIDTH

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run `make gpu`")]
TINY, FEW = 1e-4, 12  # share and tensors when benchmarks are collected by the tests, only to see that they run


@pytest.mark.parametrize(
    ("name", "device"),
    [pytest.param("square", "cpu", id="square-cpu"), pytest.param("billion", "cuda", id="billion-cuda", marks=GPU)],
)
def bench_passes(benchmark: Any, name: str, device: str) -> None:
    """Every pass over one set; on a GPU a quarter of a billion elements, of which four optimizers fit."""
    full = not benchmark.disabled
    share = 0.25 if device == "cuda" else 1.0
    shapes = shapes_of(name, share) if full else shapes_of(name, TINY)[:FEW]
    result = benchmark.pedantic(run_passes, (shapes, device), {"rounds": 15 if full else 1}, rounds=1)
    benchmark.extra_info.update({"set": name, **result})
    if full:
        print()
        Console(width=WIDTH).print(importance_table.passes({"set": name, **result}))
    assert all(row["share"] is None or row["share"][0] > 0 for row in result["rows"])


@pytest.mark.parametrize(
    ("name", "device"),
    [
        *((name, "cpu") for name in claim.DEMO_MODELS),
        *(pytest.param(name, "cuda", marks=GPU) for name in claim.MODELS[:1]),
    ],
)
def bench_claim(benchmark: Any, name: str, device: str) -> None:
    """The path integral beside the Fisher, by sample and batched."""
    full = not benchmark.disabled
    sizes: dict[str, Any] = {"rounds": 7} if full else {"rounds": 1, "shapes": [(2, 8, 1)]}
    if full and device == "cuda":  # billions of parameters: seconds a pass
        sizes = {"rounds": 2, "shapes": claim.SHORT[:1]}
    result = benchmark.pedantic(claim.run_model, (name, device), sizes, rounds=1)
    benchmark.extra_info.update(result)
    if full and "skipped" not in result:
        print()
        Console(width=WIDTH).print(importance_table.claim([result]))
    assert "skipped" in result or result["loop_over_path_integral"] > 0
