"""Stamp every benchmark result with package, machine, build and commit."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from alr_kernels import _environment


def _commit() -> str:
    root = Path(__file__).parent
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or "unknown"


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Add what is needed to repeat the run."""
    output_json["alr_kernels"] = {
        "versions": _environment.versions(),
        "machine": _environment.machine(),
        "build": _environment.build_facts(),
        "commit": _commit(),
    }
    output_json["machine_info"].pop("node", None)
