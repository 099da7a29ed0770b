"""Steps within backward: each parameter moves as soon as its gradient is there, and the gradient is freed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from threading import RLock
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from . import _validate_backward
from .lora.passing import SECOND, Latest

if TYPE_CHECKING:
    from .lora.space import Bound
    from .stepping import Buckets, Stepping

UNSCALED = (1.0, 1.0, 0.0)  # inverse scale, clip factor, found_inf
PAIRS = SECOND + 1  # statistics of pairs come after those of all waves


class Row(NamedTuple):
    """One parameter's statistics, and where they stand in a step that is taken at once."""

    bucket: tuple[Any, ...]  # those of one bucket are added up together
    wave: int
    place: int
    penalised: bool
    name: str
    statistics: Tensor


class Attachment:
    """What :meth:`AlrAdamW.attach_to_backward` returns: :meth:`remove` it, or use it as a context manager."""

    def __init__(self, optimizer: Stepping) -> None:
        self._optimizer = optimizer
        self._hooks: dict[Tensor, Any] = {}
        self._stepped: dict[int, bool] = {}  # slots whose gradient has come since step(): False while a factor waits
        self._rows: list[Row] = []
        self._lock = RLock()  # backward has a thread for each device
        self.extend()

    def extend(self) -> None:
        """Hook what requires a gradient and is not hooked yet: added or unfrozen since."""
        for group_index, group in enumerate(self._optimizer.param_groups):
            for position, param in enumerate(group["params"]):
                if param.requires_grad and param not in self._hooks:
                    hook = partial(_ready, ref(self), group_index, position)
                    self._hooks[param] = param.register_post_accumulate_grad_hook(hook)

    def remove(self) -> None:
        """Detach: :meth:`AlrAdamW.step` takes whole steps again. Finishes a step that has begun."""
        if self._optimizer._attached is self:
            try:
                self.finish()
            finally:
                self._detach()

    def _detach(self) -> None:
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()
        if self._optimizer._attached is self:
            self._optimizer._attached = None

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.remove()
        else:
            self._detach()

    @torch.no_grad()
    def ready(self, group: int, position: int) -> None:
        """Step a parameter, or a LoRA pair once the gradients of both factors are there."""
        with self._lock:
            optimizer = self._optimizer
            slot = optimizer._slots[group][position]
            if slot.index in self._stepped:
                _validate_backward.second_gradient(slot.name)
            if not self._stepped:
                _validate_backward.attachable(optimizer)
            self._stepped[slot.index] = False
            positions, bounds = [position], []
            if slot.bound is not None:
                positions, bounds = [slot.bound.up, slot.bound.down], [slot.bound]
                others = zip(positions, slot.bound.params(optimizer.param_groups), strict=True)
                slots = optimizer._slots[group]
                if any(param.requires_grad and slots[i].index not in self._stepped for i, param in others):
                    return
            if not optimizer._bound:
                optimizer._bind()
            self._step(optimizer._buckets((group, positions)), bounds)

    def _step(self, buckets: Buckets, bounds: Sequence[Bound] | None) -> None:
        """Step with these gradients and free them."""
        optimizer = self._optimizer
        found = optimizer._step_buckets(buckets, UNSCALED, bounds)
        if optimizer.gathers:
            for key, call in zip(sorted(buckets, key=lambda key: key[-1]), found, strict=False):
                if call.statistics is not None:
                    self._keep((*key[:5], key[-1]), key[-1], key[4], call.keys, call)
            for latest in found[len(buckets) :]:
                self._keep_pairs(latest)
        for rows in buckets.values():
            for slot, param in rows:
                self._stepped[slot.index] = True
                param.grad = None

    def _keep(self, bucket: tuple[Any, ...], wave: int, penalised: bool, keys: Sequence[int], found: Any) -> None:
        columns = zip(keys, found.names, found.statistics.unbind(), strict=True)
        self._rows += [Row(bucket, wave, key, penalised, name, row) for key, name, row in columns]

    def _keep_pairs(self, latest: Latest) -> None:
        order = {bound.name: i for i, bound in enumerate(self._optimizer._space or ())}
        keys = [order[name] for name in latest.names]
        bound = self._optimizer._space.bounds[keys[0]]  # type: ignore[union-attr]
        params = bound.params(self._optimizer.param_groups)
        sides = tuple(param.grad is not None for param in params)
        self._keep((bound.group, params[0].device, params[0].dtype, bound.kind, sides), PAIRS, True, keys, latest)

    @torch.no_grad()
    def finish(self) -> None:
        """Do what is left of the step that backward took: :meth:`AlrAdamW.step` while attached."""
        optimizer = self._optimizer
        scaling = [optimizer.__dict__.pop(name, None) for name in ("grad_scale", "found_inf")]
        if any(value is not None for value in scaling):
            _validate_backward.scaled()
        if not optimizer._bound:
            optimizer._bind()
        rest = optimizer._buckets()  # a factor whose partner took no part, a gradient that came another way
        for rows in rest.values():
            for slot, _ in rows:
                if self._stepped.get(slot.index):
                    _validate_backward.second_gradient(slot.name)
        if rest:
            self._step(rest, None)
        if self._stepped:
            optimizer._latest = self._regrouped()
            optimizer._count_step(None)
        self._stepped, self._rows = {}, []
        self.extend()

    def _regrouped(self) -> list[Latest]:
        """Return the statistics as a whole step has them, sums in the same order; dynamic coefficients see them too."""
        buckets: dict[Any, list[Row]] = {}
        for row in sorted(self._rows, key=lambda row: row.place):
            buckets.setdefault(row.bucket, []).append(row)
        result = []
        for rows in sorted(buckets.values(), key=lambda rows: rows[0].wave):
            latest = Latest([row.name for row in rows], torch.stack([row.statistics for row in rows]))
            result.append(latest)
            if self._optimizer._balance is not None and rows[0].penalised:
                self._optimizer._balance.observe(latest.names, latest.statistics)
        return result


@torch.compiler.disable
def _ready(attachment: ref[Attachment], group: int, position: int, _: Tensor) -> None:
    found = attachment()
    if found is not None:  # else the optimizer is gone
        found.ready(group, position)
