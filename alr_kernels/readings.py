"""What can be read from the optimizer at any time, without changing it: penalty, statistics, recorded importance."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

import torch

from . import _dtensor, _validate, _validate_importance, penalty
from . import state as _state
from .importance.recorder import Recording
from .lora.gradients import CUT
from .lora.passing import value_of
from .names import layer_of
from .step.plan import STATISTICS
from .stepping import Stepping

if TYPE_CHECKING:
    from torch import Tensor

    from .importance.artifact import Importance
    from .lora.space import Bound


class Readings(Stepping):
    """The readable half of :class:`AlrAdamW`."""

    @property
    def grad_norm(self) -> Tensor | None:
        """The last step's ‖g‖ before clipping, a 0-dim tensor; None without ``max_grad_norm``."""
        return self._grad_norm

    @torch.no_grad()
    def penalty_by_layer(self) -> dict[str, Tensor]:
        """Return layer → λ α_l Σ_i Ω_i (θ_i − θ*_i)² (normalised as in the step): 0-dim float64 tensors, no host sync.

        Before the first step the anchors are the weights themselves (or the mapping that was given). With sharded
        parameters every rank must call it, and gets the whole sum.
        """
        values: list[Tensor] = []
        layers: list[str] = []
        shardings: list[_dtensor.Sharding | None] = []
        by = self._penalty.coeffs.by if self._penalty else "block"
        for group, slot, param in self._members():
            source = slot.bound or slot
            if source.importance is None or (slot.bound is not None and not slot.left):
                continue
            unit = source.unit_scale
            if self._balance is not None:
                unit = self._balance.unit_scales([source.name], param.device)[0]
            strength = group["reg_lambda"]
            scale = (strength.double() if isinstance(strength, torch.Tensor) else strength) * unit
            if slot.bound is not None:
                value, sharding = value_of(slot.bound, self, scale), slot.bound.sharding(param)
            else:
                state = self.state.get(param, {})
                weights = _state.whole(param, state)
                sharding = _dtensor.Sharding.of(slot.name, param)
                anchor = state.get("anchor")
                if anchor is None and self._anchor:
                    anchor = _dtensor.part_of(slot.name, self._anchor[slot.name], sharding).to(param.device)
                anchor = weights if anchor is None else anchor
                value = penalty.value(weights, anchor, _state.decoded_importance(slot, param), scale)
            values.append(value)
            shardings.append(sharding)
            layers.append(layer_of(source.name, by))
        result: dict[str, Tensor] = {}
        for layer, value in zip(layers, _dtensor.totals(values, shardings), strict=True):
            result[layer] = result[layer] + value.to(result[layer].device) if layer in result else value
        return result

    def penalty(self) -> Tensor:
        """Return the penalty that the steps act on, a 0-dim float64 tensor; see :meth:`penalty_by_layer`."""
        values = list(self.penalty_by_layer().values()) or [torch.zeros((), dtype=torch.float64)]
        return torch.stack([value.to(values[0].device) for value in values]).sum()

    def importance_tensors(self) -> list[Tensor]:
        """Return the tensors in which the steps hold Ω, codes and scales included: what importance costs."""
        sources = [*(slot for _, slot, _ in self._members()), *(self._space or ())]
        pairs = (source.importance[:2] for source in sources if source.importance is not None)
        return [tensor for pair in pairs for tensor in pair if tensor is not None]

    @torch.no_grad()
    def stats(self) -> dict[str, dict[str, Tensor]]:
        """Return layer → statistic → 0-dim float64 tensor of the last step, without waiting for the device.

        With k = 2·λ·α·Ω/normaliser, θ before the step and g the task gradient, unscaled and unclipped, over the layer:

        ==============  ===================================================================
        penalty         Σ ½ k (θ − θ*)²
        grad_sq         Σ g²
        pull_sq         Σ (k(θ − θ*))²
        grad_dot_pull   Σ g·k(θ − θ*); negative where the penalty works against the task
        stiffness       max lr·k/D: above 2 an explicit step would diverge
        drift_sq        Σ (θ − θ*)² over parameters with importance
        ==============  ===================================================================

        Of a LoRA pair ``penalty`` and ``drift_sq`` are those of U; gradients, pull and stiffness are those of the
        factors, the pull as it acted: in proximal mode that on the second factor once the first had moved.

        Raises:
            RuntimeError: not constructed with ``stats=True``, or no step yet.
        """
        calls = [call for call in self._latest if call.statistics is not None]
        if not calls:
            _validate.stats_off()
        by = self._penalty.coeffs.by if self._penalty else "block" if self._space is None else "module"
        result: dict[str, dict[str, Tensor]] = {}
        for call in calls:
            for name, row in zip(call.names, call.statistics.unbind(), strict=True):
                values = dict(zip(STATISTICS, row.clone().unbind(), strict=True))
                known = result.setdefault(layer_of(name, by), {})
                for key, value in values.items():
                    if key not in known:
                        known[key] = value
                    else:
                        pair = torch.stack([known[key], value.to(known[key].device)])
                        known[key] = pair.amax() if key == "stiffness" else pair.sum()
        return result

    def recorded_importance(
        self,
        xi: float = 1e-6,
        *,
        relative: bool = False,
        allow_nonfinite: bool = False,
        dtype: str | torch.dtype = "fp32",
    ) -> Importance:
        """Return Ω = max(ω, 0) / ((θ − θ_start)² + ξ) of the recording so far; a pure read, in one pass.

        Args:
            xi: ξ > 0, in units of θ². It decides how weights that hardly moved rank.
            relative: ξ in units of each tensor's mean((θ − θ_start)²).
            allow_nonfinite: give elements whose ω is NaN or inf the importance 0 instead of raising.
            dtype: how Ω is kept: ``"fp32"``, ``"bf16"``, ``"int8"`` or ``"int4"`` (block codes, written at once: Ω is
                never held in float32), or ``"rank1"`` (row and column sums, see ``Importance.astype``; one tensor's Ω
                at a time is held in float32). Vectors, tensors under 4096 elements and, for codes, rows of no multiple
                of 128 stay fp32.

        Raises:
            RuntimeError: not constructed with ``record=True``, or no step yet.
            ValueError: ξ ≤ 0, or non-finite ω.

        Source: arXiv 2501.13669, eq. 4-5, clamped once at the end.
        """
        return self._recording().finalised(xi, relative, allow_nonfinite, dtype)

    def save_importance(
        self,
        path: str | PathLike[str],
        xi: float = 1e-6,
        *,
        relative: bool = False,
        allow_nonfinite: bool = False,
        dtype: str | torch.dtype = "fp32",
    ) -> None:
        """Finalise the recording into a file, tensor by tensor: no second copy of the model's size is made.

        Args, Raises: as :meth:`recorded_importance` and ``Importance.save``. A file that was there stays whole until
        the new one is.
        """
        self._recording().save(path, xi, relative, allow_nonfinite, dtype)

    def _recording(self) -> Recording:
        steps = self.recorded_steps
        _validate_importance.recording(self.record, steps > 0)
        members = [(slot, param, self.state.get(param, {})) for _, slot, param in self._members()]
        rows = [row for row in members if "path_integral" in row[2]]
        pairs = [bound for bound in self._space or () if _state.EFFECTIVE in self.state.get(self._up(bound), {})]
        names = [slot.name for slot, _, _ in rows] + [bound.name for bound in pairs]
        omegas = [state["path_integral"] for _, _, state in rows]
        omegas += [self.state[self._up(bound)][_state.EFFECTIVE] for bound in pairs]

        def end(i: int) -> torch.Tensor:
            if i >= len(rows):
                assert self._space is not None
                return self._space.moved(pairs[i - len(rows)], self.param_groups, self.state)
            return _state.whole(*rows[i][1:])

        def start(i: int) -> torch.Tensor:
            if i >= len(rows):
                return torch.zeros_like(omegas[i])
            _, param, state = rows[i]
            return state["start"].to(torch.float32 if "remainder" in state else param.dtype)

        placed: list[_dtensor.Sharding | None] = [_dtensor.Sharding.of(slot.name, param) for slot, param, _ in rows]
        placed += [bound.sharding(self._up(bound)) for bound in pairs]
        placed = placed if any(placed) else []
        if self._space is None:
            return Recording(names, omegas, end, start, steps, shardings=placed)
        about = (f"path_integral_{self._space.estimator}", CUT if self._space.estimator == "tangent" else None)
        return Recording(names, omegas, end, start, steps, *about, whole=not pairs, shardings=placed)

    def _up(self, bound: Bound) -> Tensor:
        return bound.params(self.param_groups)[0]
