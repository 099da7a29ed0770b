"""One step of an optimizer's pairs: what AdamW is called with, and what is recorded around it.

Pairs of one shape are stacked, so that the work on r × r matrices and thin factors is a few operations for all of them.
The pull reaches AdamW through the operands that it has: as a gradient that is added (coupled), or, proximal, as an
importance κ and an anchor θ − q/κ of the factor, whose pull κ·(θ − anchor) is q: see docs/lora.md. The factor on the
right moves first, then the one on the left, for whose pull U is formed anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import _ops_lora, _validate_lora
from .. import state as _state
from .gradients import factored, tangent
from .reference import Product, Pull, move
from .space import OMEGA, Bound, Space, as_matrix, factors_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..stepping import Stepping

PLAIN, FIRST, SECOND = range(3)  # waves of calls: everything else, right factors (coupled: both), left factors


class Operand(NamedTuple):
    """What a factor's step is called with instead of its gradient, importance and anchor."""

    grad: Tensor | None
    importance: Tensor | None = None
    anchor: Tensor | None = None


class Numbers(NamedTuple):
    """Factors of the gradients, as the step has them, and whether the step is skipped."""

    inverse: float | Tensor
    clip: float | Tensor
    found_inf: float | Tensor


class Stack:
    """Pairs of one shape, rank, scaling and group, which have gradients on the same sides."""

    def __init__(self, bounds: list[Bound], optimizer: Stepping, sides: tuple[bool, bool], penalised: bool) -> None:
        self.bounds = bounds
        self.group = optimizer.param_groups[bounds[0].group]
        self.params = [bound.params(optimizer.param_groups) for bound in bounds]
        self.states = [tuple(optimizer.state[param] for param in pair) for pair in self.params]
        self.scaling = bounds[0].geometry.scaling
        self.up, self.down = sides  # whether B and A have gradients
        transposed = bounds[0].geometry.transposed
        self.left, self.right = (self.down, self.up) if transposed else sides
        self.penalised = penalised
        self.before: Product | None = None
        self.gradient: list[Product | Tensor] = []
        self.pulls: list[tuple[str, list[Pull]]] = []
        self.grads: tuple[Tensor | None, Tensor | None] = (None, None)

    def stacked(self, pairs: Sequence[Sequence[Tensor]]) -> Product:
        """Return (B-like, A-like) tensors of every pair as factors [P, m, r], [P, r, n]."""
        products = [factors_of(bound, pair) for bound, pair in zip(self.bounds, pairs, strict=True)]
        return Product(*(torch.stack(side) for side in zip(*products, strict=True)))

    def factors(self) -> Product:
        """Return the factors as they are now."""
        rows = zip(self.params, self.states, strict=True)
        return self.stacked([[_state.whole(*each) for each in zip(*row, strict=True)] for row in rows])

    def task_gradients(self, numbers: Numbers) -> tuple[Tensor | None, Tensor | None]:
        """Return the task's gradients by left and right factor, unscaled and unclipped; None where there is none."""
        zeros = [torch.zeros_like(param) for param in self.params[0]]
        grads = [[z if p.grad is None else p.grad for p, z in zip(pair, zeros, strict=True)] for pair in self.params]
        left, right = self.stacked(grads)
        scale = -numbers.inverse if self.group["maximize"] else numbers.inverse
        left, right = (side * (scale.to(side) if isinstance(scale, torch.Tensor) else scale) for side in (left, right))
        if isinstance(numbers.found_inf, torch.Tensor):
            skip = numbers.found_inf.to(left.device) != 0
            left, right = (torch.where(skip, 0.0, side) for side in (left, right))
        return left if self.left else None, right if self.right else None

    def pull(self, sides: str, curvature: bool, scales: Tensor, backend: str) -> list[Pull]:
        """Return the penalty's pull at the present factors, at λ = 1."""
        now = self.factors()
        anchor = self.stacked([[state["anchor"] for state in pair] for pair in self.states])
        drift = move(anchor, now, self.scaling)
        scaled = unstacked(Product(now.left * self.scaling, now.right * self.scaling))
        importances = [bound.importance for bound in self.bounds]
        found = _ops_lora.lora_pull(importances, scales, unstacked(drift), scaled, sides, curvature, backend)
        self.pulls.append((sides, found))
        if len(self.pulls) == 1:
            grams = (drift.left.double().mT @ drift.left.double()) * (drift.right.double() @ drift.right.double().mT)
            self.drift_sq = grams.flatten(1).sum(1)  # Σ (L·R)² = Σ (LᵀL) ⊙ (RRᵀ)
        return found

    def denominators(self, index: int) -> tuple[Tensor, Tensor]:
        """Return D = √(v/bias correction) + eps of a pair after the step, float64, by left and right factor."""
        found = []
        for state, param in zip(self.states[index], self.params[index], strict=True):
            if "exp_avg_sq" not in state:
                found.append(torch.ones_like(param, dtype=torch.float64))
                continue
            v = _state.wide_moments(state, param.device)[1].double()
            bias = 1 - self.group["betas"][1] ** state["step"].double()
            found.append((v / bias).sqrt() + self.group["eps"])
        return self.bounds[index].geometry.factors(*found)


def unstacked(product: Product) -> list[Product]:
    """Return the pairs' products, views."""
    return [Product(*sides) for sides in zip(product.left.unbind(), product.right.unbind(), strict=True)]


class Pass:
    """One step: made before any factor moves."""

    def __init__(self, space: Space, optimizer: Stepping, shared: tuple[Any, Any, Any]) -> None:
        self.space, self.optimizer, self.numbers = space, optimizer, Numbers(*shared)
        self.backend = optimizer.backend
        groups: dict[Any, list[Bound]] = {}
        for bound in space:
            up, down = bound.params(optimizer.param_groups)
            sides = (up.grad is not None, down.grad is not None)
            if any(sides):
                strength = optimizer.param_groups[bound.group]["reg_lambda"]
                off = not isinstance(strength, torch.Tensor) and float(strength) == 0
                penalised = bound.unit_scale > 0 and not off
                shape = (up.shape, down.shape, bound.geometry.transposed, bound.geometry.scaling)
                key = (bound.group, up.device, up.dtype, shape, sides, penalised)
                groups.setdefault(key, []).append(bound)
        self.stacks = [Stack(bounds, optimizer, key[-2], key[-1]) for key, bounds in groups.items()]
        if optimizer.record or optimizer.gathers:
            for stack in self.stacks:
                stack.grads = stack.task_gradients(self.numbers)
        if optimizer.record:
            for stack in self.stacks:
                self._estimate(stack)

    def _estimate(self, stack: Stack) -> None:
        stack.before = stack.factors()
        if self.space.estimator == "exact":
            stack.gradient = [self._exact(bound) for bound in stack.bounds]
            return
        left, right = stack.grads
        if self.space.estimator == "tangent":
            stack.gradient = [*unstacked(tangent(stack.before, left, right, stack.scaling))]
        else:
            left = torch.zeros_like(stack.before.left) if left is None else left
            right = torch.zeros_like(stack.before.right) if right is None else right
            stack.gradient = [*unstacked(factored(stack.before, left, right, stack.scaling, stack.group["lr"]))]

    def _exact(self, bound: Bound) -> Tensor:
        gatherer = self.space.gatherers[self.space.bounds.index(bound)]
        dense = gatherer.take() if gatherer is not None else None
        if dense is None:
            _validate_lora.nothing_gathered(bound.name)
        up = bound.params(self.optimizer.param_groups)[0]
        group = self.optimizer.param_groups[bound.group]
        scale = -self.numbers.inverse if group["maximize"] else self.numbers.inverse
        dense = dense * (scale.to(dense) if isinstance(scale, torch.Tensor) else scale)
        if isinstance(self.numbers.found_inf, torch.Tensor):
            dense = torch.where(self.numbers.found_inf.to(dense.device) != 0, 0.0, dense)
        return dense.to(_state.compute_dtype(up))

    def _scales(self, stack: Stack) -> Tensor:
        device = stack.params[0][0].device
        names = [bound.name for bound in stack.bounds]
        if self.optimizer._balance is not None:
            return self.optimizer._balance.unit_scales(names, device)
        return self.space.scales([bound.unit_scale for bound in stack.bounds], device)

    def operands(self, wave: int) -> dict[Tensor, Operand]:
        """Return what the steps of this wave's factors are called with; the factors before it have moved."""
        found: dict[Tensor, Operand] = {}
        for stack in self.stacks:
            if not stack.penalised:
                continue
            if self.optimizer.mode == "coupled":
                if wave == FIRST:
                    self._coupled(stack, found)
            elif (wave == FIRST and stack.right) or (wave == SECOND and stack.left):
                self._proximal(stack, wave == SECOND, found)
        return found

    def _coupled(self, stack: Stack, found: dict[Tensor, Operand]) -> None:
        sides = "both" if stack.left and stack.right else "up" if stack.left else "down"
        pulls = stack.pull(sides, self.optimizer.gathers, self._scales(stack), self.backend)
        reg_lambda, clip = stack.group["reg_lambda"], self.numbers.clip
        task = stack.task_gradients(self.numbers)
        for index, result in enumerate(pulls):
            total: list[Tensor | None] = []
            for side, force in zip(task, (result.grad_up, result.grad_down), strict=True):
                if side is None or force is None:
                    total.append(None)
                    continue
                strength = reg_lambda.to(force) if isinstance(reg_lambda, torch.Tensor) else reg_lambda
                factor = clip.to(force) if isinstance(clip, torch.Tensor) else clip
                total.append(side[index] * factor + force * strength)
            kept = stack.bounds[index].geometry.as_kept(*total)
            for param, grad in zip(stack.params[index], kept, strict=True):
                if grad is not None:
                    found[param] = Operand(grad)

    def _proximal(self, stack: Stack, left: bool, found: dict[Tensor, Operand]) -> None:
        pulls = stack.pull("up" if left else "down", True, self._scales(stack), self.backend)
        now = stack.factors()[0 if left else 1]
        force = torch.stack([p.grad_up if left else p.grad_down for p in pulls])
        curvature = torch.stack([p.curvature_up if left else p.curvature_down for p in pulls])
        anchor = torch.where(curvature > 0, now - force / curvature, now)
        for index, bound in enumerate(stack.bounds):
            pair = [(side[index], None) if left else (None, side[index]) for side in (curvature, anchor)]
            kept = [bound.geometry.as_kept(*each) for each in pair]
            for param, k, towards in zip(stack.params[index], *kept, strict=True):
                if k is not None:
                    found[param] = Operand(param.grad, k, towards)

    def finish(self) -> list[Latest]:
        """Record what the step did, and return its statistics."""
        if self.optimizer.record:
            for stack in self.stacks:
                assert stack.before is not None
                moves = unstacked(move(stack.before, stack.factors(), stack.scaling))
                kept = zip(stack.states, stack.bounds, strict=True)
                omegas = [up[OMEGA].view(bound.geometry.matrix_shape) for (up, _), bound in kept]
                _ops_lora.lora_record_(omegas, stack.gradient, moves, self.space.clamp, self.backend)
        if not self.optimizer.gathers:
            return []
        found = [Latest([b.name for b in s.bounds], statistics(s)) for s in self.stacks if s.penalised]
        for latest in found if self.optimizer._balance is not None else ():
            inf = self.numbers.found_inf
            self.optimizer._balance.observe(*latest, inf if isinstance(inf, torch.Tensor) else None)  # type: ignore[union-attr]
        return found


class Latest(NamedTuple):
    """Statistics of pairs, where those of a call of the step would be."""

    names: list[str]
    statistics: Tensor  # [P, len(STATISTICS)] float64


def squares(tensor: Tensor) -> Tensor:
    """Return the sum of squares of each pair, [P] float64."""
    return tensor.double().square().flatten(1).sum(1)


def statistics(stack: Stack) -> Tensor:
    """Return [P, len(STATISTICS)] float64 of the step that was taken; see ``penalty.statistics``."""
    strength = stack.group["reg_lambda"]
    reg_lambda = strength.double() if isinstance(strength, torch.Tensor) else strength
    pulls = stack.pulls
    penalty = torch.stack([pull.value for pull in pulls[0][1]]) * reg_lambda
    zero = torch.zeros_like(penalty)
    grad_sq, pull_sq, dot, stiffness = zero, zero, zero, zero
    for side, (gradient, left) in enumerate(zip(stack.grads, (True, False), strict=True)):
        if gradient is None:
            continue
        grad_sq = grad_sq + squares(gradient)
        found = [
            [(p.grad_up, p.curvature_up) if left else (p.grad_down, p.curvature_down) for p in ps] for _, ps in pulls
        ]
        rows = next(rows for rows in found if rows[0][0] is not None)
        force, curvature = (torch.stack(column).double() * reg_lambda for column in zip(*rows, strict=True))
        pull_sq = pull_sq + squares(force)
        dot = dot + (force * gradient).flatten(1).sum(1)
        denominators = torch.stack([stack.denominators(index)[side] for index in range(len(stack.bounds))])
        stiffness = torch.maximum(stiffness, (curvature * stack.group["lr"] / denominators).flatten(1).amax(1))
    return torch.stack([penalty, grad_sq, pull_sq, dot, stiffness, stack.drift_sq], 1)


def value_of(bound: Bound, optimizer: Any, scale: float | Tensor) -> Tensor:
    """Return the penalty of a pair at the present weights, 0-dim float64."""
    params = bound.params(optimizer.param_groups)
    states = [optimizer.state.get(param, {}) for param in params]
    weights = [_state.whole(*each) for each in zip(params, states, strict=True)]
    anchors = [state.get("anchor", now) for state, now in zip(states, weights, strict=True)]
    if optimizer._anchor and "anchor" not in states[0]:
        slots = optimizer._slots[bound.group]
        anchors = [
            optimizer._anchor[slots[i].name].to(now) for i, now in zip((bound.up, bound.down), weights, strict=True)
        ]
    now, scaling = factors_of(bound, weights), bound.geometry.scaling
    drift = move(factors_of(bound, anchors), now, scaling)
    importance = as_matrix(bound.importance.to(params[0].device), bound.geometry)  # type: ignore[union-attr]
    scales = torch.as_tensor(scale, dtype=torch.float64, device=params[0].device).reshape(1)
    scaled = Product(now.left * scaling, now.right * scaling)
    return _ops_lora.lora_pull([importance], scales, [drift], [scaled], "none")[0].value
