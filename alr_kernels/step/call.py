"""One call of the step: parameters of a group that share every format, and their numbers on the device.

Kept from step to step, so that nothing is uploaded that has not changed, and a captured graph finds its tensors where
they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import TYPE_CHECKING, Any

import torch

from .. import _ops
from .._dtensor import local
from .plan import HYPER, STATISTICS, Numbers, Operands, Options

if TYPE_CHECKING:
    from torch import Tensor

    from ..lora.passing import Operand
    from ..state import Slot

INVERSE_SCALE, CLIP, FOUND_INF = (HYPER.index(name) for name in ("inverse_scale", "clip", "found_inf"))


def upload(values: Sequence[float], target: Tensor) -> None:
    """Copy host numbers into ``target``: from pinned memory and without waiting where that means something."""
    source = torch.tensor(values, dtype=target.dtype)
    if target.device.type == "cuda":
        source = source.pin_memory()
    target.copy_(source, non_blocking=True)


class Call:
    """The numbers of one call, where its parameters are."""

    def __init__(self, slots: Sequence[Slot], device: torch.device, stats: bool) -> None:
        self.names = [slot.layer_name for slot in slots]
        self.sharding = slots[0].sharding  # all are split over the same ranks
        self.keys = [slot.index for slot in slots]
        offsets = [slot.offset for slot in slots]
        self.offsets = offsets if any(offsets) else ()
        self.hyper = torch.zeros(len(HYPER), dtype=torch.float64, device=device)
        self.unit_scales = torch.zeros(len(slots), dtype=torch.float64, device=device)
        self.version = -1  # of the coefficients in unit_scales
        shape = (len(slots), len(STATISTICS))
        self.partial = torch.zeros(shape, dtype=torch.float64, device=device) if stats else None  # of what is here
        self.statistics = self.partial  # over all ranks
        self.penalised = False
        self.steps = torch.zeros(len(slots), dtype=torch.float32, device=device)
        self._views = list(self.steps.unbind())
        self._host: tuple[float, ...] = ()

    def adopt_steps(self, states: Sequence[dict[str, Any]]) -> None:
        """Make every state's step count a view of one tensor, so that counting is one operation, not one a tensor."""
        present = [state["step"] for state in states]
        if not all(map(is_, present, self._views)):
            self.steps.copy_(torch.stack([step.to(self.steps.device) for step in present]))
            for state, view in zip(states, self._views, strict=True):
                state["step"] = view

    def set_hyper(self, values: Sequence[Any]) -> None:
        """Bring hyper up to date; tensors on the device are copied there, everything else only when it changed."""
        on_device = [i for i, v in enumerate(values) if isinstance(v, torch.Tensor) and v.device.type != "cpu"]
        host = tuple(0.0 if i in on_device else float(value) for i, value in enumerate(values))
        if host != self._host:
            upload(host, self.hyper)
            self._host = host
        for i in on_device:
            self.hyper[i].copy_(values[i].reshape(()))

    def run(
        self, rows: Sequence[tuple[Slot, Tensor]], states: Sequence[dict[str, Any]], options: Options,
        operands: Mapping[Tensor, Operand] | None, *, penalised: bool, record: bool, backend: str,
    ) -> None:  # fmt: skip
        """Step the rows with what their states hold, factors of LoRA pairs with ``operands``."""

        def column(key: str) -> list[Tensor]:
            return [state[key] for state in states]

        coded = "exp_avg_scale" in states[0]
        params: Any = [param for _, param in rows]
        grads: Any = [param.grad for param in params]
        if self.sharding is not None:
            params, grads = list(map(local, params)), list(map(local, grads))
        importances: Sequence[Any] = ()
        anchors: Sequence[Any] = ()
        scales: Sequence[Any] = ()
        if operands is not None:
            found = [operands[param] for _, param in rows]
            grads = [operand.grad for operand in found]
            if penalised:
                importances, anchors = [x.importance for x in found], [x.anchor for x in found]
        elif penalised:
            kept: list[Any] = [slot.importance for slot, _ in rows]
            importances, anchors = [x.values for x in kept], column("anchor")
            scales = [x.scales for x in kept] if kept[0].scales is not None else ()
        columns = Operands(
            params=params,
            grads=grads,
            exp_avgs=column("exp_avg"),
            exp_avg_sqs=column("exp_avg_sq"),
            importances=importances,
            anchors=anchors,
            path_integrals=column("path_integral") if record else (),
            remainders=column("remainder") if "remainder" in states[0] else (),
            exp_avg_scales=column("exp_avg_scale") if coded else (),
            exp_avg_sq_scales=column("exp_avg_sq_scale") if coded else (),
            importance_scales=scales,
        )
        numbers = Numbers(self.hyper, column("step"), self.unit_scales, self.keys, self.offsets)
        _ops.step_(columns, numbers, options, self.partial, backend)
