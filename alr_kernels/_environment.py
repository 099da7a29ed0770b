"""Facts about this machine and this build, for dispatch, ``doctor`` and result files."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from functools import cache
from typing import Any

from ._version import __version__

# Extra of pyproject.toml → package → the oldest version that serves: what a core install lacks.
EXTRAS = {
    "train": {"transformers": "5.2", "accelerate": "1.1", "datasets": "4.7", "pyyaml": "6.0"},
    "peft": {"peft": "0.21"},
    "report": {"matplotlib": "3.8"},
    "quantize": {"bitsandbytes": "0.46"},
    "tensorboard": {"tensorboard": "2.15"},
    "demo": {"transformers": "4.50", "matplotlib": "3.8", "peft": "0.21"},
}
# Command → extras without which it does nothing, and those that one of its options needs.
COMMANDS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "doctor": ((), {}),
    "plan": ((), {"a model's config.json": "train"}),
    "bench": ((), {"--plot": "report"}),
    "demo": (("demo",), {}),
    "record": (("train",), {"--lora": "peft", "--quantize": "quantize", "--tensorboard": "tensorboard"}),
    "tune": (
        ("train",),
        {"--lora": "peft", "--quantize": "quantize", "--tensorboard": "tensorboard", "--report": "report"},
    ),
    "run": (("train", "report"), {"--lora": "peft", "--quantize": "quantize", "--tensorboard": "tensorboard"}),
    "eval": (("train",), {"an adapter": "peft", "--quantize": "quantize"}),
    "inspect": ((), {"--plot": "report", "--html": "report"}),
    "compare": ((), {}),
    "convert": ((), {}),
    "report": (("report",), {}),
}
PACKAGES = (
    *("torch", "triton", "numpy", "safetensors", "typer", "rich", "pybind11", "ninja"),
    *("tokenizers", *dict.fromkeys(package for extra in EXTRAS.values() for package in extra)),
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
    import torch  # noqa: F401 - before _C, which then binds to the OpenMP runtime that torch has loaded: one pool

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


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", re.split(r"[^0-9.]", version)[0])))


def lacking(extra: str) -> list[str]:
    """Return what of an extra is missing or too old (``transformers>=5.2 (4.57.1 is installed)``); empty if nothing."""
    found = []
    for package, oldest in EXTRAS[extra].items():
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package}>={oldest}")
            continue
        if _release(installed) < _release(oldest):
            found.append(f"{package}>={oldest} ({installed} is installed)")
    return found


def commands() -> dict[str, dict[str, Any]]:
    """Return command → ``works``, ``lacks`` (packages that it needs) and ``install`` (what brings them, or ''), and
    ``without`` (option → the same of what only that option needs)."""
    result: dict[str, dict[str, Any]] = {}
    for command, (needed, optional) in COMMANDS.items():
        short = [extra for extra in needed if lacking(extra)]
        lacks = sorted({package for extra in short for package in lacking(extra)})
        without = {option: _pip([extra]) for option, extra in optional.items() if lacking(extra)}
        result[command] = {"works": not lacks, "lacks": lacks, "install": _pip(short), "without": without}
    return result


def _pip(extras: list[str]) -> str:
    return f'pip install "alr-kernels[{",".join(extras)}]"' if extras else ""


def openmp_runtimes() -> list[str] | None:
    """Return the files of the OpenMP runtimes in this process, each with threads of its own; None if unknown."""
    try:
        with open("/proc/self/maps", encoding="utf-8") as lines:
            files = {line.split(maxsplit=5)[5].strip() for line in lines if len(line.split(maxsplit=5)) == 6}
    except OSError:
        return None
    return sorted(file for file in files if re.match(r"lib(gomp|iomp5|omp)[-.\w]*\.so", os.path.basename(file)))


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
