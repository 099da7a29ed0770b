"""One step of an optimizer's pairs: what AdamW is called with, and what is recorded around it.

Pairs of one shape are stacked, so that the work on r × r matrices and thin factors is a few operations for all of them.
The pull reaches AdamW through the operands that it has: as a gradient that is added (coupled), or, proximal, as an
importance κ and an anchor θ − q/κ of the factor, whose pull κ·(θ − anchor) is q: see docs/lora.md. The factor on the
right moves first, then the one on the left, for whose pull U is formed anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import _dtensor, _ops_lora, _validate_lora
from .. import state as _state
from .._dtensor import local
from .gradients import factored, tangent
from .penalty import Pull
from .reference import Product, move
from .space import OMEGA, Bound, Space, as_kept, as_matrix, compute, factors_of, kept_importance, matrices

if TYPE_CHECKING:
    from torch import Tensor

    from .._dtensor import Sharding
    from ..stepping import Stepping

MOST_APART = 0.1  # of a gradient in bf16 from what its dense one implies; 0.01 is usual
PLAIN, FIRST, SECOND = range(3)  # waves of calls: everything else, right factors (coupled: both), left factors


class Operand(NamedTuple):
    """What a factor's step is called with instead of its gradient, importance and anchor."""

    grad: Tensor | None
    importance: Tensor | None = None
    anchor: Tensor | None = None


def known_strength(reg_lambda: float | Tensor) -> float:
    """Return λ where the host knows it, else 1: a device's λ is not read, and with 0 the step is AdamW's anyway."""
    return 1.0 if isinstance(reg_lambda, torch.Tensor) and reg_lambda.device.type != "cpu" else float(reg_lambda)


class Numbers(NamedTuple):
    """Factors of the gradients, as the step has them, and whether the step is skipped."""

    inverse: float | Tensor
    clip: float | Tensor
    found_inf: float | Tensor

    def unscaled(self, grads: Tensor, maximize: bool) -> Tensor:
        """Return gradients of the loss that is minimised; 0 where the step is skipped."""
        scale = -self.inverse if maximize else self.inverse
        grads = grads * (scale.to(grads) if isinstance(scale, torch.Tensor) else scale)
        if isinstance(self.found_inf, torch.Tensor):
            grads = torch.where(self.found_inf.to(grads.device) != 0, 0.0, grads)
        return grads


class Stack:
    """Pairs of one shape, rank, scaling and group, which have gradients on the same sides.

    ``params`` and ``states`` are (of the Bs, of the As). What is read of them is stacked at once: an operation for each
    pair would cost the host more than the arithmetic.
    """

    def __init__(self, bounds: list[Bound], optimizer: Stepping, sides: tuple[bool, bool], penalised: bool) -> None:
        self.bounds = bounds
        self.group = optimizer.param_groups[bounds[0].group]
        pairs = [bound.params(optimizer.param_groups) for bound in bounds]
        self.params = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        self.states = tuple([optimizer.state[param] for param in side] for side in self.params)
        self.scaling, self.rows = bounds[0].geometry.scaling, bounds[0].rows
        self.transposed = bounds[0].geometry.transposed
        self.sides = sides  # whether the Bs and the As have gradients
        self.left, self.right = reversed(sides) if self.transposed else sides
        self.penalised = penalised
        self.before: Product | None = None  # the factors before the step, once something has asked for them
        self.anchors: Product | None = None
        self.gradient: list[Product | Tensor] = []
        self.pulls: list[list[Pull]] = []
        self.grads: tuple[Tensor | None, Tensor | None] = (None, None)

    def matrices(self, up: Tensor | None, down: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return stacked tensors like B and A as left [P, m, r] and right [P, r, n]; see ``space.matrices``."""
        left, right = matrices(self.bounds[0], up, down)
        return _contiguous(left), _contiguous(right)

    def as_kept(self, left: Tensor | None, right: Tensor | None) -> dict[Tensor, Tensor]:
        """Return what left [P, m, r] and right [P, r, n] are for each B and A, shaped as what is here of these."""
        found: dict[Tensor, Tensor] = {}
        for params, side in zip(self.params, as_kept(self.bounds[0], left, right), strict=True):
            if side is not None:
                found |= zip(params, side.unbind(), strict=True)
        return found

    def factors(self) -> Product:
        """Return the factors as they are now."""
        stacked = []
        for params, states in zip(self.params, self.states, strict=True):
            split = any("remainder" in state for state in states)
            stacked.append(torch.stack([*(map(_state.whole, params, states) if split else map(local, params))]))
        return Product(*self.matrices(*stacked))

    def first(self) -> Product:
        """Return the factors as they were before the step; first called before any of them moves."""
        if self.before is None:
            self.before = self.factors()
        return self.before

    def task_gradients(self, numbers: Numbers) -> tuple[Tensor | None, Tensor | None]:
        """Return the task's gradients by left and right factor, unscaled and unclipped; None where there is none."""
        found: list[Tensor | None] = []
        for params, present in zip(self.params, self.sides, strict=True):
            grads = compute(torch.stack([local(param.grad) for param in params])) if present else None
            found.append(None if grads is None else numbers.unscaled(grads, self.group["maximize"]))
        return self.matrices(*found)

    def pull(self, sides: str, curvature: bool, scales: Tensor, backend: str) -> tuple[Product, list[Pull]]:
        """Return the present factors and the penalty's pull there, at λ = 1."""
        now = self.factors() if self.pulls else self.first()
        if self.anchors is None:  # sharded ones are gathered once for both waves
            anchors = (torch.stack([state["anchor"] for state in states]) for states in self.states)
            self.anchors = Product(*self.matrices(*anchors))
        drift = move(self.anchors, now, self.scaling)
        if not self.pulls:
            self.drift = drift
        scaled = unstacked(now.scaled(self.scaling))
        importances = [bound.importance for bound in self.bounds]
        found = _ops_lora.lora_pull(importances, scales, unstacked(drift), scaled, sides, curvature, backend)
        if self.rows is not None:
            found = summed_pulls(found, self.rows)
        self.pulls.append(found)
        return now, found

    def summed(self, values: Tensor) -> Tensor:
        """Return what was summed over the rows that are here, summed over all."""
        return values if self.rows is None else _dtensor.all_reduce(values, self.rows)

    @property
    def counts_right(self) -> float:
        """Return 1 on the rank that counts what every rank has, the right factors; 0 on the others."""
        return 1.0 if self.rows is None or self.rows.is_first else 0.0

    def drift_sq(self) -> Tensor:
        """Return Σ (U − U*)² of each pair before the step, [P] float64: Σ (L·R)² = Σ (LᵀL) ⊙ (RRᵀ)."""
        left, right = (side.double() for side in self.drift)
        return ((left.mT @ left) * (right @ right.mT)).flatten(1).sum(1)

    def denominators(self) -> tuple[Tensor | None, Tensor | None]:
        """Return D = √(v/bias correction) + eps after the step, float64, of left and right factors with a gradient."""
        found: list[Tensor | None] = []
        for states, present in zip(self.states, self.sides, strict=True):
            if not present:
                found.append(None)
                continue
            v = torch.stack([_state.wide_moments(state, state["exp_avg_sq"].device)[1] for state in states]).double()
            steps = torch.stack([state["step"] for state in states]).to(v).view(-1, *[1] * (v.ndim - 1))
            found.append((v / (1 - self.group["betas"][1] ** steps)).sqrt() + self.group["eps"])
        return self.matrices(*found)


def summed_pulls(pulls: list[Pull], rows: Sharding) -> list[Pull]:
    """Return pulls whose sums over rows, the derivatives by the right factor, are over the rows of all ranks."""
    fields = [field for field in ("grad_down", "curvature_down") if getattr(pulls[0], field) is not None]
    if not fields:
        return pulls
    found = _dtensor.all_reduce(torch.stack([getattr(pull, field) for pull in pulls for field in fields]), rows)
    parts = iter(found.unbind())
    return [pull._replace(**{field: next(parts) for field in fields}) for pull in pulls]


def _contiguous(matrices: Tensor | None) -> Tensor | None:
    return None if matrices is None else matrices.contiguous()


def unstacked(product: Product) -> list[Product]:
    """Return the pairs' products, views."""
    return [Product(*sides) for sides in zip(product.left.unbind(), product.right.unbind(), strict=True)]


class Pass:
    """One step: made before any factor moves."""

    def __init__(
        self, space: Space, optimizer: Stepping, shared: tuple[Any, Any, Any], bounds: Sequence[Bound]
    ) -> None:
        self.space, self.optimizer, self.numbers = space, optimizer, Numbers(*shared)
        self.backend = optimizer.backend
        groups: dict[Any, list[Bound]] = {}
        strengths = [group["reg_lambda"] for group in optimizer.param_groups]
        off = [known_strength(strength) == 0 for strength in strengths]
        for bound in bounds:
            up, down = bound.params(optimizer.param_groups)
            sides = (up.grad is not None, down.grad is not None)
            if any(sides):
                penalised = bound.unit_scale > 0 and not off[bound.group]
                split = bound.rows and bound.rows.group
                key = (bound.group, up.device, up.dtype, bound.kind, split, sides, penalised)
                groups.setdefault(key, []).append(bound)
        self.stacks = [Stack(bounds, optimizer, key[-2], key[-1]) for key, bounds in groups.items()]
        if optimizer.record or optimizer.gathers:
            for stack in self.stacks:
                stack.grads = stack.task_gradients(self.numbers)
        if optimizer.record:
            for stack in self.stacks:
                self._estimate(stack)

    def _estimate(self, stack: Stack) -> None:
        before = stack.first()
        if self.space.estimator == "exact":
            stack.gradient = [self._exact(bound, stack) for bound in stack.bounds]
            return
        left, right = stack.grads
        if self.space.estimator == "tangent":
            stack.gradient = [*unstacked(tangent(before, left, right, stack.scaling, stack.summed))]
        else:
            left = torch.zeros_like(before.left) if left is None else left
            right = torch.zeros_like(before.right) if right is None else right
            stack.gradient = [*unstacked(factored(before, left, right, stack.scaling, stack.group["lr"]))]

    def _exact(self, bound: Bound, stack: Stack) -> Tensor:
        gatherer = self.space.gatherers[bound.name]
        dense = gatherer.take() if gatherer is not None else None
        params = [_dtensor.whole(param) for param in bound.params(self.optimizer.param_groups)]
        grads = [_dtensor.whole(p.grad) for p in bound.params(self.optimizer.param_groups) if p.grad is not None]
        dtype, device = _state.compute_dtype(params[0]), params[0].device
        if dense is None:
            dense = torch.zeros(bound.geometry.matrix_shape, dtype=dtype, device=device)
        dense = _dtensor.summed_over_job(dense.to(dtype))
        here = slice(None) if bound.rows is None else bound.rows.rows
        if not bool(dense.any()):
            if any(bool(grad.any()) for grad in grads):
                _validate_lora.nothing_gathered(bound.name)
            return dense[here]
        maximize = self.optimizer.param_groups[bound.group]["maximize"]
        sides = iter(grads)
        present = [next(sides) if has else None for has in stack.sides]
        return self.numbers.unscaled(dense * share_of(dense, bound, params, present), maximize)[here]

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
        _, pulls = stack.pull(sides, self.optimizer.gathers, self._scales(stack), self.backend)
        reg_lambda, clip = stack.group["reg_lambda"], self.numbers.clip
        task = stack.task_gradients(self.numbers) if stack.grads == (None, None) else stack.grads
        total: list[Tensor | None] = []
        for grads, left in zip(task, (True, False), strict=True):
            if grads is None:
                total.append(None)
                continue
            force = column(pulls, "grad", left)
            strength = reg_lambda.to(force) if isinstance(reg_lambda, torch.Tensor) else reg_lambda
            factor = clip.to(force) if isinstance(clip, torch.Tensor) else clip
            total.append(grads * factor + force * strength)
        found |= {param: Operand(grad) for param, grad in stack.as_kept(*total).items()}

    def _proximal(self, stack: Stack, left: bool, found: dict[Tensor, Operand]) -> None:
        factors, pulls = stack.pull("up" if left else "down", True, self._scales(stack), self.backend)
        now, force, curvature = factors[0 if left else 1], column(pulls, "grad", left), column(pulls, "curvature", left)
        anchor = torch.where(curvature > 0, now - force / curvature, now)
        anchors, curvatures = (stack.as_kept(*((x, None) if left else (None, x))) for x in (anchor, curvature))
        found |= {param: Operand(local(param.grad), k, anchors[param]) for param, k in curvatures.items()}

    def finish(self, before: Mapping[tuple[str, ...], Tensor]) -> list[Latest]:
        """Record what the step did, and return its statistics; ``before``: those that stay where it was skipped."""
        if self.optimizer.record:
            for stack in self.stacks:
                moves = unstacked(move(stack.first(), stack.factors(), stack.scaling))
                kept = zip(stack.states[0], stack.bounds, strict=True)
                omegas = [state[OMEGA].flatten(1) for state, bound in kept]
                _ops_lora.lora_record_(omegas, stack.gradient, moves, self.space.clamp, self.backend)
        if not self.optimizer.gathers:
            return []
        inf = self.numbers.found_inf if isinstance(self.numbers.found_inf, torch.Tensor) else None
        found = []
        pulled = [stack for stack in self.stacks if stack.pulls]
        tables = _dtensor.statistics(list(map(statistics, pulled)), [stack.rows for stack in pulled])
        for stack, rows in zip(pulled, tables, strict=True):
            names = [bound.name for bound in stack.bounds]
            if inf is not None:
                rows = torch.where(inf.to(rows.device) != 0, before.get(tuple(names), torch.zeros_like(rows)), rows)
            found.append(Latest(names, rows))
            if self.optimizer._balance is not None and self.optimizer._attached is None:
                self.optimizer._balance.observe(names, rows, inf)
        return found


def share_of(dense: Tensor, bound: Bound, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Tensor:
    """Return c, where the factors' gradients are c · (s·G·Aᵀ, s·Bᵀ·G), which G implies: what was done to ``p.grad``.

    Unscaling, clipping from outside and the mean over the processes of a job are such factors. Anything else, as a
    backward pass whose gradients were thrown away without ``optimizer.zero_grad()``, is refused. Waits for the device.
    """
    left, right = bound.geometry.factors(*map(compute, params))
    pairs = zip(bound.geometry.factors(*grads), (dense @ right.mT, left.mT @ dense), strict=True)
    rows = [
        (grad.double().flatten(), side.double().flatten() * bound.geometry.scaling)
        for grad, side in pairs
        if grad is not None
    ]
    got, implied = (torch.cat(column) for column in zip(*rows, strict=True))
    c = (got @ implied) / (implied @ implied)
    apart = float((got - c * implied).norm() / got.norm())
    if apart > MOST_APART:
        _validate_lora.another_gradient(bound.name, apart)
    return torch.where(torch.isfinite(c), c, 1.0).to(dense)


class Latest(NamedTuple):
    """Statistics of pairs, where those of a call of the step would be."""

    names: list[str]
    statistics: Tensor  # [P, len(STATISTICS)] float64


def squares(tensor: Tensor) -> Tensor:
    """Return the sum of squares of each pair, [P] float64."""
    return tensor.double().square().flatten(1).sum(1)


def column(pulls: Sequence[Pull], what: str, left: bool) -> Tensor:
    """Return the pulls' ``grad`` or ``curvature`` by left or right factor, [P, m, r] or [P, r, n]."""
    return torch.stack([getattr(pull, f"{what}_{'up' if left else 'down'}") for pull in pulls])


def statistics(stack: Stack) -> Tensor:
    """Return [P, len(STATISTICS)] float64 of the step that was taken, of what is here; see ``penalty.statistics``."""
    strength = stack.group["reg_lambda"]
    reg_lambda = strength.double() if isinstance(strength, torch.Tensor) else strength
    penalty = torch.stack([pull.value for pull in stack.pulls[0]]) * reg_lambda
    zero = torch.zeros_like(penalty)
    grad_sq, pull_sq, dot, stiffness = zero, zero, zero, zero
    for gradient, denominators, left in zip(stack.grads, stack.denominators(), (True, False), strict=True):
        if gradient is None or denominators is None:
            continue
        field = "grad_up" if left else "grad_down"
        pulls = next(pulls for pulls in stack.pulls if getattr(pulls[0], field) is not None)
        force, curvature = (column(pulls, what, left).double() * reg_lambda for what in ("grad", "curvature"))
        share = 1.0 if left else stack.counts_right
        grad_sq = grad_sq + share * squares(gradient)
        pull_sq = pull_sq + share * squares(force)
        dot = dot + share * (force * gradient).flatten(1).sum(1)
        if force.numel():
            stiffness = torch.maximum(stiffness, (curvature * stack.group["lr"] / denominators).flatten(1).amax(1))
    return torch.stack([penalty, grad_sq, pull_sq, dot, stiffness, stack.drift_sq()], 1)


def value_of(bound: Bound, optimizer: Any, scale: float | Tensor) -> Tensor:
    """Return the penalty of a pair at the present weights, 0-dim float64: of the rows that are here."""
    params = bound.params(optimizer.param_groups)
    states = [optimizer.state.get(param, {}) for param in params]
    weights = [_state.whole(*each) for each in zip(params, states, strict=True)]
    bound.shard(params)
    anchors = [state.get("anchor", now) for state, now in zip(states, weights, strict=True)]
    if optimizer._anchor and "anchor" not in states[0]:
        slots = optimizer._slots[bound.group]
        anchors = [
            _dtensor.part_of(slots[i].name, optimizer._anchor[slots[i].name], sharding).to(now)
            for i, now, sharding in zip((bound.up, bound.down), weights, bound.of_factors, strict=True)
        ]
    now, scaling = factors_of(bound, weights), bound.geometry.scaling
    drift = move(factors_of(bound, anchors), now, scaling)
    importance = as_matrix(kept_importance(bound, params[0], optimizer._storage))
    scales = torch.as_tensor(scale, dtype=torch.float64, device=params[0].device).reshape(1)
    scaled = now.scaled(scaling)
    return _ops_lora.lora_pull([importance], scales, [drift], [scaled], "none", backend=optimizer.backend)[0].value
