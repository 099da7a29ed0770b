"""From param groups to calls of the step: which parameters go together, and with which numbers. No maths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import _dtensor, _validate, _validate_distributed, _validate_importance
from . import state as _state
from .balance import Balance
from .codecs.storage import Storage
from .lora.passing import FIRST, PLAIN, SECOND, Latest, Operand, Pass, known_strength
from .lora.space import Space
from .step.call import Call, upload
from .step.plan import Options

if TYPE_CHECKING:
    from .in_backward import Attachment
    from .lora.space import Bound


Buckets = dict[tuple[Any, ...], list[tuple[_state.Slot, Tensor]]]


class Stepping(Optimizer):
    """The stepping half of :class:`AlrAdamW`, and the attributes that both halves share."""

    mode: str
    normalize: bool
    record: bool
    backend: str
    precise: bool
    capturable: bool
    max_grad_norm: float | None
    _grad_norm: Tensor | None
    _handle: str
    _attached: Attachment | None
    _slots: list[list[_state.Slot]]
    _penalty: _state.Penalty | None
    _balance: Balance | None
    _anchor: dict[str, Tensor] | None
    _space: Space | None
    _storage: Storage
    _seed: int
    _bound: bool
    _version: int
    _gathers_stats: bool
    _coeffs_choice: Any
    _recorded_steps: int
    _device_steps: Tensor | None
    _calls: dict[Any, Call]
    _latest: list[Any]  # calls, and what stands for them: names and statistics
    _curvature_checked: dict[int, Any]  # group → (λ, version) for which every curvature was checked

    def _members(self) -> list[tuple[dict[str, Any], _state.Slot, Tensor]]:
        """Return (group, slot, parameter) for every parameter, as it is now."""
        return [
            (group, slot, param)
            for group, slots in zip(self.param_groups, self._slots, strict=False)
            for slot, param in zip(slots, group["params"], strict=True)
        ]

    def _bind(self) -> None:
        """Take anchors and starts, all of them or, when a parameter is refused, none."""
        for group, slots in zip(self.param_groups, self._slots, strict=True):
            _validate_distributed.same_parameters({slot.name: slot.shape for slot in slots}, group["params"])
        members = self._members()
        for _, slot, param in members:
            _validate_distributed.in_memory(slot.name, _dtensor.local(param))
            _validate.steppable(slot.name, _dtensor.local(param))
            if self.capturable:
                _validate.capturable(slot.name, param)
            if slot.importance is not None and not slot.placed:
                _validate_importance.importance_fits({slot.name: slot.importance.shape}, {slot.name: param.shape})
            _state.place(slot, param, self._storage, self._anchor)
        if self._space is not None:
            self._space.place(self.param_groups)
        if not self.state and all(param.grad is None for _, _, param in members):
            _validate_distributed.no_gradient([slot.name for _, slot, _ in members])
        if self._space is not None:
            names = [[slot.name for slot in slots] for slots in self._slots]
            self._space.bind(self.param_groups, self.state, self._storage, self._anchor, self.record, names)
        for _, slot, param in members:
            slot.dtype = param.dtype
            record = self.record and param.requires_grad and slot.bound is None
            split = self._storage.is_split(param) and param.requires_grad
            needed = slot.importance is not None or record or split
            anchor = self._anchor.get(slot.name) if self._anchor else None
            _state.bind(slot, param, self.state[param] if needed else {}, self._storage, anchor, record)
        if self._balance is not None:
            self._balance.to(next(param.device for _, slot, param in members if slot.penalised))
        places: dict[Any, int] = {}
        for _, slot, _ in members:
            slot.place = places.setdefault((slot.dtype, slot.form), len(places))
        self._anchor = None
        self._bound = True
        self._calls.clear()
        self._curvature_checked = {}

    def _buckets(self, only: tuple[int, Sequence[int]] | None = None) -> Buckets:
        """Group what has a gradient by group, device and every format, checking every gradient first.

        ``only`` these positions of a group: each becomes a bucket of its own, whose call is kept from step to step.
        """
        buckets: Buckets = {}
        for group_index in range(len(self.param_groups)) if only is None else only[:1]:
            group, slots = self.param_groups[group_index], self._slots[group_index]
            places = range(len(slots)) if only is None else only[1]
            reg_lambda = known_strength(group["reg_lambda"])
            penalising = reg_lambda > 0
            checked = self._curvature_checked.get(group_index) == (reg_lambda, self._version)
            for position in places:
                slot, param = slots[position], group["params"][position]
                grad = param.grad
                if grad is None:
                    continue
                if grad.layout is not torch.strided or grad.shape != param.shape:
                    _validate.gradient(slot.name, param, grad)
                if slot.sharding is not None or type(grad) is not Tensor:
                    _dtensor.place_gradient(slot.name, param, slot.sharding)
                if slot.dtype is not param.dtype:
                    _validate.same_dtype(slot.name, param.dtype, slot.dtype)
                source = slot.bound or slot
                penalised = penalising and source.unit_scale > 0
                if penalised and not checked:
                    _validate.curvature(source.name, reg_lambda * source.unit_scale, source.largest)
                wave = PLAIN
                if penalised and slot.bound is not None:
                    wave = SECOND if slot.left and self.mode == "proximal" else FIRST
                alone = -1 if only is None else slot.index
                key = (group_index, param.device, slot.place, grad.dtype, penalised, alone, wave)
                row = buckets.get(key)
                if row is None:
                    row = buckets[key] = []
                row.append((slot, param))
            whole = only is None and all(param.grad is not None for param in group["params"])
            self._curvature_checked[group_index] = (reg_lambda, self._version) if checked or whole else None
        return buckets

    def _clip(self, buckets: Mapping[Any, list[tuple[_state.Slot, Tensor]]], inverse: float | Tensor) -> Tensor:
        """Return min(1, max_grad_norm / ‖g‖), as torch's clip_grad_norm_ computes it; one read of the gradients."""
        norms: dict[int, Tensor] = {}
        for rows in buckets.values():
            grads = [_dtensor.local(param.grad) for _, param in rows]
            found = torch._foreach_norm(grads, 2, dtype=torch.promote_types(grads[0].dtype, torch.float32))
            sharding = rows[0][0].sharding
            if sharding is not None:
                squares = _dtensor.all_reduce(torch.stack(found).double().square(), sharding)
                found = squares.sqrt().to(found[0].dtype).unbind()
            norms |= zip((slot.index for slot, _ in rows), found, strict=True)
        ordered = [norms[index] for index in sorted(norms)]  # the sum of squares depends on the order
        home = ordered[0].device
        total = torch.linalg.vector_norm(torch.stack([norm.to(home, torch.float32) for norm in ordered]))
        self._grad_norm = (total * (inverse.to(home) if isinstance(inverse, Tensor) else inverse)).float()
        return (self.max_grad_norm / (self._grad_norm + 1e-6)).clamp(max=1.0)

    @property
    def gathers(self) -> bool:
        """Whether statistics are gathered in the steps."""
        return self._gathers_stats or self._balance is not None

    def _step_buckets(
        self, buckets: Buckets, shared: tuple[Any, Any, Any], bounds: Sequence[Bound] | None = None
    ) -> list[Any]:
        """Step everything, wave after wave: the second factors of LoRA pairs see where the first ones went.

        ``bounds``: of all pairs only these. Returns what :attr:`_latest` holds.
        """
        bounds = self._space.bounds if bounds is None and self._space is not None else bounds
        pairs = Pass(self._space, self, shared, bounds) if self._space is not None and bounds else None
        before = {tuple(latest.names): latest.statistics for latest in self._latest if isinstance(latest, Latest)}
        found: list[Any] = []
        for wave in sorted({key[-1] for key in buckets}):
            operands = pairs.operands(wave) if pairs is not None and wave != PLAIN else None
            for key, rows in buckets.items():
                if key[-1] == wave:
                    found.append(self._step_bucket(key, rows, shared, operands))
        self._gather(found, shared[2])
        if pairs is not None:
            found += pairs.finish(before)
        return found

    def _gather(self, calls: Sequence[Call], found_inf: Any) -> None:
        """Sum the calls' statistics over the ranks, and show them to the balance."""
        calls = [call for call in calls if call.partial is not None]
        tables = _dtensor.statistics([call.partial for call in calls], [call.sharding for call in calls])
        for call, table in zip(calls, tables, strict=True):
            call.statistics = table
            if call.penalised and self._balance is not None and self._attached is None:
                inf = found_inf.to(table.device).reshape(()) if isinstance(found_inf, torch.Tensor) else None
                self._balance.observe(call.names, table, inf)

    def _step_bucket(
        self, key: tuple[Any, ...], rows: list[tuple[_state.Slot, Tensor]], shared: tuple[Any, Any, Any],
        operands: Mapping[Tensor, Operand] | None,
    ) -> Call:  # fmt: skip
        group, device, penalised = self.param_groups[key[0]], key[1], key[4]
        record = self.record and rows[0][0].bound is None
        maximize = bool(group["maximize"])
        if operands is not None and self.mode == "coupled":  # what is stepped with is finished, penalty included
            penalised, maximize, shared = False, False, (1.0, 1.0, shared[2])
        states = [self.state[param] for _, param in rows]
        split = self._storage.is_split(rows[0][1])
        for (slot, param), state in zip(rows, states, strict=True):
            if "exp_avg" not in state:
                _state.start_moments(param, state, self._storage)
            if (record and "path_integral" not in state) or (split and "remainder" not in state):
                _state.bind(slot, param, state, self._storage, None, record)  # frozen when all others were bound
        call = self._calls.get(key)
        if call is None or call.keys != [slot.index for slot, _ in rows]:
            call = self._calls[key] = Call([slot for slot, _ in rows], device, self.gathers and operands is None)
            call.unit_scales.fill_(1.0)  # as the operands of LoRA factors want it
        if penalised and operands is None and call.version != self._version:
            if self._balance is not None:
                call.unit_scales.copy_(self._balance.unit_scales(call.names, device))
            else:
                upload([slot.unit_scale for slot, _ in rows], call.unit_scales)
            call.version = self._version
        call.set_hyper(
            (group["lr"], *group["betas"], group["eps"], group["weight_decay"], group["reg_lambda"], *shared)
        )
        call.adopt_steps(states)
        call.steps += 1.0
        options = Options(self.mode, maximize, self.precise, self._storage.master, self._seed)
        call.run(rows, states, options, operands, penalised=penalised, record=record, backend=self.backend)
        found_inf = shared[2].to(device).reshape(()) if isinstance(shared[2], Tensor) else None
        if found_inf is not None:
            call.steps -= found_inf
        call.penalised = penalised and operands is None
        return call

    def _count_step(self, found_inf: Tensor | None) -> None:
        if self._balance is not None and self._balance.advance():
            self._version += 1
        if self.record:
            self._count_recorded(found_inf)

    def _count_recorded(self, found_inf: Tensor | None) -> None:
        if found_inf is None and not self.capturable:
            self._recorded_steps += 1
            return
        device = next(param.device for _, _, param in self._members() if param.grad is not None)
        if self._device_steps is None:
            self._device_steps = torch.zeros((), dtype=torch.float64, device=device)
        self._device_steps += 1.0 if found_inf is None else 1.0 - found_inf.to(device).reshape(())

    @property
    def recorded_steps(self) -> int:
        """Steps that the recording has integrated, skipped ones left out."""
        return self._recorded_steps + (0 if self._device_steps is None else int(self._device_steps))
