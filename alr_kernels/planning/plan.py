"""A plan: one column of bytes for each number of devices, and how many devices are needed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from typing import Any

from torch import nn

from .. import _validate_planning
from .counting import Column, Item, column, items_of
from .devices import Device
from .models import Model, read_model
from .setup import Setup

MOST = 4096  # devices that are tried

NOT_COUNTED = (
    "activations, buffers of the model, temporary buffers of the framework (all-gather and reduce-scatter staging, "
    "communication) and of the step's arithmetic, the allocator's rounding, the CUDA context, and whatever importance "
    "or checkpoint you still hold"
)


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` found.

    Attributes:
        model: its name.
        tensors, parameters: of the model as it is without LoRA.
        trained_tensors, trained_parameters: those that the optimizer steps, over all devices.
        setup, device: what was asked.
        columns: one for each number of devices.
        enough: the least number of devices (hsdp: of one replica) with which ``Column.peak`` fits; None: none up to
            4096, or the device's memory is not known.
    """

    model: str
    tensors: int
    parameters: int
    trained_tensors: int
    trained_parameters: int
    setup: Setup
    device: Device
    columns: tuple[Column, ...]
    enough: int | None

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain dicts, lists and numbers, for JSON."""
        found = asdict(self)
        for row, each in zip(found["columns"], self.columns, strict=True):
            row |= {"total": each.total, "peak": each.peak, "fits": each.fits}
        return {**found, "not_counted": NOT_COUNTED}


def plan(
    source: Model | str | PathLike[str] | Mapping[str, Any] | nn.Module,
    gpus: Sequence[int] = (1,),
    setup: Setup | None = None,
    device: Device | None = None,
) -> Plan:
    """Count what AlrAdamW's training of a model holds and moves on each of ``gpus`` devices.

    Args:
        source: a model, or what :func:`read_model` reads.
        gpus: numbers of devices, one column each.
        setup: strategy, LoRA, dtypes, phase.
        device: its memory and bandwidth; None: neither fit nor time is told.

    Raises:
        ValueError: numbers of devices, targets or dtypes that do not fit the model and setup.
        ImportError, OSError: see :func:`read_model`.

    >>> from alr_kernels.planning import Setup, plan
    >>> found = plan({"w.weight": [256, 256], "w.bias": [256]}, [1, 8], Setup(importance_dtype="int8"))
    >>> [column.kept["moments"] for column in found.columns]  # two float32 of 65,792 elements, and an eighth of that
    [526336, 65792]
    """
    setup, device = setup or Setup(), device or Device("unknown", None, None)
    model = source if isinstance(source, Model) else read_model(source)
    _validate_planning.gpus(gpus, setup.strategy, setup.shard)
    if setup.sharded:
        _validate_planning.no_scalars([weight.name for weight in model.weights if not weight.shape])
    items = items_of(model.weights, setup, _adapted(model, setup))
    trained = {item: count for item, count in items.items() if item.trained}
    _validate_planning.master(setup.master, {item.dtype for item in trained}, setup.lora is not None)

    def on(count: int, setup: Setup) -> Column:
        found = column(items, setup, count)
        seconds = None if device.bandwidth is None else found.moved / device.bandwidth
        return replace(found, seconds=seconds, memory=device.memory)

    return Plan(
        model.name,
        len(model.weights),
        sum(math.prod(weight.shape) for weight in model.weights),
        sum(trained.values()),
        _elements(trained),
        setup,
        device,
        tuple(on(count, setup) for count in gpus),
        None if device.memory is None else _enough(items, setup, device.memory),
    )


def _elements(items: Mapping[Item, int]) -> int:
    return sum(count * math.prod(item.shape) for item, count in items.items())


def _enough(items: Counter[Item], setup: Setup, memory: float) -> int | None:
    """Return the least number of devices that hold it; more devices never hold more each, so halving finds it."""

    def fits(count: int) -> bool:
        each = replace(setup, shard=count) if setup.strategy == "hsdp" else setup
        return column(items, each, count).peak <= memory

    if not setup.sharded:
        return 1 if fits(1) else None
    if not fits(MOST):
        return None
    low, high = 0, MOST  # low does not fit, high does
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _adapted(model: Model, setup: Setup) -> set[str]:
    """Return the names of the weights that LoRA adapts: a target is a module's path or its end, as for PEFT."""
    if setup.lora is None:
        return set()
    paths = {w.name: w.name.removesuffix(".weight") for w in model.weights if w.kind != "other"}
    found: set[str] = set()
    missing = []
    for target in setup.lora.targets:
        names = {name for name, path in paths.items() if path == target or path.endswith(f".{target}")}
        missing += [] if names else [target]
        found |= names
    _validate_planning.targets(setup.lora.targets, missing, list(paths))
    return found
