"""Triton without a GPU: through the interpreter, or not there at all, in a process of its own; and what ptxas made."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


class Launches:
    """Stands in for a kernel and keeps the grids it was launched with."""

    def __init__(self, kernel):
        self.kernel, self.grids = kernel, []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return self.kernel[grid]


def run_interpreted(file):
    """Run a file's tests in a process of its own: the variable must be set before a kernel's module is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "--import-mode=importlib"]
    command += ["-p", "no:cacheprovider", file]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"(\d+) passed", result.stdout), f"no test ran:\n{result.stdout}"


def check_missing_triton(module, question):
    """See that ``question`` of ``triton_kernel`` of ``module`` is answered for every device where Triton is missing."""
    script = (
        "import sys; sys.modules['triton'] = None\n"
        f"from alr_kernels.{module} import triton_kernel\n"
        f"for device in ('cpu', 'cuda', 'xpu'): print(triton_kernel.{question}(device))"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Triton cannot be imported") == 3, result.stdout


def resource_usage(kernel, tmp_path):
    """Return {"REG": n, "STACK": bytes, "LOCAL": bytes, ...} of a compiled kernel from its cubin."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not cuobjdump.exists():
        pytest.skip("this Triton build carries no cuobjdump")
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    result = subprocess.run([cuobjdump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    assert kernel.metadata.name in result.stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", result.stdout)}
