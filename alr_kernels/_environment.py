"""Facts about this machine and this build, for dispatch, ``doctor`` and result files."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from functools import cache
from typing import Any

from ._version import __version__

PACKAGES = (
    *("torch", "triton", "transformers", "safetensors", "numpy", "pybind11", "ninja", "accelerate", "peft"),
    *("datasets", "tokenizers", "bitsandbytes"),
)


def triton_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter (the variable must be set before triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def launched() -> tuple[int, int]:
    """Return this process's rank and how many there are, as torchrun and accelerate launch say it; (0, 1) alone."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def first_on_machine() -> bool:
    """Return whether this is the first of the processes that were launched on this machine, or the only one."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@cache
def extension_error() -> str | None:
    """Return why the C++ extension cannot be used, or None when it can."""
    try:
        from . import _C  # noqa: F401
    except ImportError as error:
        return (
            f"the C++ extension alr_kernels._C cannot be imported ({error}); build it with `pip install .` "
            "(needs a C++17 compiler), then run `alr-kernels doctor`"
        )
    return None


def build_facts() -> dict[str, Any]:
    """Return what the extension was built with, or why it is missing."""
    problem = extension_error()
    if problem is not None:
        return {"extension": False, "reason": problem}
    from . import _C

    return {"extension": True, **_C.build_info()}


def versions() -> dict[str, str]:
    """Return the versions of this package, Python and what it works with; missing ones are left out."""
    found = {"alr_kernels": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Return processor, cores, threads, memory and accelerators."""
    import torch

    facts: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        facts["accelerators"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
