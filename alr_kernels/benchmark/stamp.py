"""What is needed to repeat a run, for every results file."""

from __future__ import annotations

import importlib.metadata
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .. import _environment

RIVALS = ("torchao", "bitsandbytes", "flashoptim")


def stamp() -> dict[str, Any]:
    """Return versions (rivals' too), machine, build, commit and UTC time."""
    versions = _environment.versions()
    for package in RIVALS:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "machine": _environment.machine(),
        "build": _environment.build_facts(),
        "commit": commit(),
        "datetime": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """Return the checkout's commit, "-dirty" where files differ from it; "unknown" outside a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return "unknown"
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
        )
    except OSError:
        return "unknown"
    return described.stdout.strip() or "unknown"
