"""Stamp every benchmark result with package, machine, build and commit."""

from __future__ import annotations

from typing import Any

from alr_kernels.benchmark.stamp import stamp


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Add what is needed to repeat the run."""
    output_json["alr_kernels"] = stamp()
    output_json["machine_info"].pop("node", None)
