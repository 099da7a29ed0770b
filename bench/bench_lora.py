"""LoRA in effective space: recording and the pull beside eager torch, a model's step, the host's part; `alr-kernels
bench --lora` through pytest-benchmark.

    make bench                               this machine's CPU
    make gpu RESULTS=folder                  a CUDA machine

All figures are in the benchmark's ``extra_info`` (alr_kernels/benchmark/lora.py and lora_model.py say what they are).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rich.console import Console

from alr_kernels.benchmark import lora, lora_table
from alr_kernels.benchmark.table import WIDTH

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run `make gpu`")]
TINY = (32, 128)  # when benchmarks are collected by the tests, only to see that they run


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def bench_lora(benchmark: Any, device: str) -> None:
    """Everything at once, so that the bars stand beside what they are computed from."""
    full = not benchmark.disabled
    shape = lora.SHAPE if full else TINY
    options: dict[str, Any] = {"rounds": 15, "budget_s": 5.0} if full else {"rounds": 1, "ranks": (8,)}
    result = benchmark.pedantic(lora.run, (shape, device), options, rounds=1)
    benchmark.extra_info.update(result)
    if full:
        print()
        lora_table.show(result, Console(width=WIDTH))
    assert all(row["share"] is None or row["share"][0] > 0 for entry in result["passes"] for row in entry["rows"])
