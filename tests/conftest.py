"""Shared setup: seeds, poisoned uninitialised memory, and a hypothesis profile that does the same every time."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported: threads that spin starve each other

import hypothesis
import pytest
import torch

from alr_kernels.step.native import _C

CAPABILITIES = _C.build_info()["cpu_capabilities_detected"] if _C else [None]

hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True, database=None, max_examples=60)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _seeded_and_poisoned():
    """Seed torch; fill torch.empty with NaN, so that reading what was never written shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=CAPABILITIES, ids=str)
def capability(request):
    """Every instruction set that this machine runs, in turn."""
    if _C is None:
        pytest.skip("the C++ extension is not built")
    before = _C.cpu_capability()
    _C.set_cpu_capability(request.param)
    yield request.param
    _C.set_cpu_capability(before)
