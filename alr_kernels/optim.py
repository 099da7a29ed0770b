"""AlrAdamW: AdamW with the element-wise, layer-weighted pull towards an anchor inside the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import _ops, _validate, penalty
from . import state as _state
from .coefficients import RULES, LayerCoefficients
from .importance.artifact import Importance
from .importance.recorder import finalised
from .names import layer_of, unwrap
from .step.plan import MODES

OWN_ATTRIBUTES = (  # what pickle and deepcopy must keep besides torch's own
    *("mode", "normalize", "record", "backend"),
    *("_slots", "_penalty", "_anchor", "_bound", "_recorded_steps", "_coeffs_choice"),
)


class AlrAdamW(Optimizer):
    r"""AdamW that learns a domain while pulling important weights towards their anchor.

    Minimises ``task loss + λ Σ_l α_l Σ_i Ω_i (θ_i − θ*_i)²``; the penalty and its gradient live inside the step,
    in one pass over memory, and never appear in ``p.grad``. With ``k_i = 2·λ·α_l·Ω_i / normaliser``:

    * ``mode="proximal"`` (default): AdamW on the task gradient, then the penalty implicitly in Adam's own metric,
      ``θ ← h + lr·k/(D + lr·k) · (θ* − h)``, ``D = √(v/bc2) + eps``: stable for any λ·Ω, and with
      ``weight_decay=0`` it rests where the paper's loss is stationary.
    * ``mode="coupled"`` (the paper): ``g ← g + k(θ − θ*)``, then AdamW; equals autograd of the whole loss.

    With ``importance=None`` or ``reg_lambda=0`` it is AdamW.

    Args:
        params: tensors, (name, tensor) pairs as ``model.named_parameters()`` gives, or param groups, each of which may
            set ``lr``, ``betas``, ``eps``, ``weight_decay``, ``reg_lambda``, ``maximize``. float32, bfloat16, float16
            (moments and arithmetic float32) or float64 (by the reference).
        importance: Ω ≥ 0 shaped as the parameters: an :class:`Importance`, a mapping name → tensor (both need named
            parameters), a sequence aligned with ``params`` (None for no entry), or None. Parameters without an
            entry take the plain step. Its tensors are used, not copied: do not write into them.
        coeffs: α by layer: ``"softmax"``, ``"proportional"``, ``"uniform"``, a mapping layer → number, or what
            :func:`layer_coefficients` returned.
        lr, betas, eps, weight_decay: as torch.optim.AdamW.
        reg_lambda: λ ≥ 0. With ``normalize`` the mean curvature k is 2λ for every model.
        mode: ``"proximal"`` or ``"coupled"``.
        normalize: divide by the mean of α·Ω over all entries of the importance (``select`` those of the trained
            parameters when others are frozen); ``False`` is the paper's raw form.
        anchor: θ* by name, for the parameters with importance; None takes their values at the first step.
        record: integrate ω += −g·Δθ in the same pass (works with and without a penalty).
        maximize: ascend.
        backend: ``"auto"``, ``"native"`` (C++, CPU), ``"triton"`` (GPU), ``"reference"`` (torch, anywhere).

    Raises:
        ValueError, TypeError: names, shapes, values or options that do not fit; the message says what to do.
        BackendUnavailableError: an explicit backend that cannot serve.

    Construction clones nothing; anchors are taken at the first step. A torch.optim.AdamW state_dict loads here.

    Source: arXiv 2501.13669, eq. 3-7.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
    >>> importance = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    >>> optimizer = AlrAdamW(model.named_parameters(), importance, lr=1e-2, reg_lambda=0.1)
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> optimizer.step()
    >>> float(optimizer.penalty()) > 0
    True
    """

    def __init__(
        self,
        params: Iterable[Any],
        importance: Mapping[str, Tensor] | Sequence[Tensor | None] | None = None,
        coeffs: str | Mapping[str, float] = "softmax",
        *,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        reg_lambda: float = 1.0,
        mode: Literal["proximal", "coupled"] = "proximal",
        normalize: bool = True,
        anchor: Mapping[str, Tensor] | None = None,
        record: bool = False,
        maximize: bool = False,
        backend: Literal["auto", "reference", "native", "triton"] = "auto",
        **unsupported: Any,
    ) -> None:
        _validate.unsupported_flags(unsupported)
        _validate.choice("mode", mode, MODES)
        _validate.choice("backend", backend, _ops.BACKENDS)
        self.mode = mode
        self.normalize = normalize
        self.record = record
        self.backend = backend
        self._slots: list[list[_state.Slot]] = []
        self._penalty: _state.Penalty | None = None
        self._anchor: dict[str, Tensor] | None = None
        self._bound = False
        self._recorded_steps = 0
        self._coeffs_choice: str | Mapping[str, float] = coeffs
        values = (lr, betas, eps, weight_decay, reg_lambda, maximize)
        super().__init__(params, dict(zip(_state.OPTIONS, values, strict=True)))
        self._use(importance, coeffs)
        if anchor is not None:
            if self._penalty is None:
                _validate.needs_importance("anchor")
            named = {slot.name: param for _, slot, param in self._members()}
            self._anchor = _state.named_anchor(anchor, {n: named[n] for n in self._penalty.importance})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters take the plain step until :meth:`start_phase` brings importance for them."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _validate.group_options(group, _state.OPTIONS)
            offset = sum(len(slots) for slots in self._slots)
            names = group.get("param_names") or [f"params.{offset + i}" for i in range(len(group["params"]))]
            slots = [_state.Slot(unwrap(name)) for name in names]
            for slot, param in zip(slots, group["params"], strict=True):
                _validate.parameter(slot.name, param)
                if self.backend != "auto" and not param.is_meta:
                    _ops.choose_step_backend(self.backend, param.device, param.dtype)
            members = [(slot.name, param) for _, slot, param in self._members()]
            members += [(slot.name, param) for slot, param in zip(slots, group["params"], strict=True)]
            _validate.no_duplicates(members)
            _validate.distinct_names(name for name, _ in members)
        except Exception:
            self.param_groups.pop()  # a refused group leaves the optimizer as it was
            raise
        self._slots.append(slots)
        self._bound = False

    def _members(self) -> list[tuple[dict[str, Any], _state.Slot, Tensor]]:
        """Return (group, slot, parameter) for every parameter, as it is now."""
        return [
            (group, slot, param)
            for group, slots in zip(self.param_groups, self._slots, strict=False)
            for slot, param in zip(slots, group["params"], strict=True)
        ]

    def _use(self, importance: Any, coeffs: str | Mapping[str, float]) -> None:
        """Match importance with the parameters and weigh its layers; changes nothing when it raises."""
        members = self._members()
        names = [slot.name for _, slot, _ in members]
        named = all(group.get("param_names") is not None for group in self.param_groups)
        entries = _state.named_importance(importance, names, [param for _, _, param in members], named)
        if entries is None:
            if not isinstance(coeffs, str):
                _validate.needs_importance("coeffs")
            _validate.choice("coeffs", coeffs, RULES)
            self._penalty, scales = None, {}
        else:
            chosen = _state.Penalty.of(entries)
            scales = chosen.weigh(coeffs, self.normalize)
            self._penalty = chosen
        self._coeffs_choice = coeffs
        for _, slot, _ in members:
            slot.importance = entries.get(slot.name) if entries is not None else None
            slot.unit_scale = scales.get(slot.name, 0.0)
            slot.largest = self._penalty.largest.get(slot.name, 0.0) if self._penalty else 0.0
        self._bound = False

    @property
    def coeffs(self) -> LayerCoefficients | None:
        """The coefficients in use, layer → α; None without importance."""
        return self._penalty.coeffs if self._penalty else None

    def set_coeffs(self, coeffs: str | Mapping[str, float]) -> None:
        """Change α from the next step on: a rule's name or a mapping layer → number.

        Raises:
            ValueError: there is no importance, or the layers do not fit.
        """
        if self._penalty is None:
            _validate.needs_importance("set_coeffs")
        scales = self._penalty.weigh(coeffs, self.normalize)
        for _, slot, _ in self._members():
            slot.unit_scale = scales.get(slot.name, 0.0)
        self._coeffs_choice = coeffs

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step with the gradients in ``p.grad``: those of the task loss alone.

        ``closure``, if given, evaluates the model again and returns the loss.

        Raises:
            RuntimeError: a sparse gradient, or a parameter whose elements share memory. Nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._bound:
            self._bind()
        buckets = self._buckets()
        for (group_index, *_), rows in buckets.items():
            self._step_bucket(self.param_groups[group_index], rows)
        if self.record and buckets:
            self._recorded_steps += 1
        return loss

    def _bind(self) -> None:
        """Take anchors and starts, all of them or, when a parameter is refused, none."""
        members = self._members()
        for _, slot, param in members:
            _validate.steppable(slot.name, param)
            if slot.importance is not None:
                _validate.importance_shape(slot.name, slot.importance, param)
        for _, slot, param in members:
            slot.dtype = param.dtype
            record = self.record and param.requires_grad
            if slot.importance is not None or record:
                anchor = self._anchor.get(slot.name) if self._anchor else None
                _state.bind(slot, param, self.state[param], anchor, record)
        self._anchor = None
        self._bound = True

    def _buckets(self) -> dict[tuple[Any, ...], list[tuple[_state.Slot, Tensor]]]:
        """Group what has a gradient by (group, device, dtype, penalised?), checking every gradient first."""
        buckets: dict[tuple[Any, ...], list[tuple[_state.Slot, Tensor]]] = {}
        for group_index, (group, slots) in enumerate(zip(self.param_groups, self._slots, strict=True)):
            reg_lambda = float(group["reg_lambda"])
            for slot, param in zip(slots, group["params"], strict=True):
                if param.grad is None:
                    continue
                _validate.gradient(slot.name, param, param.grad)
                if slot.dtype is not param.dtype:
                    _validate.same_dtype(slot.name, param.dtype, slot.dtype)
                penalised = reg_lambda > 0 and slot.unit_scale > 0
                if penalised:
                    _validate.curvature(slot.name, reg_lambda * slot.unit_scale, slot.largest)
                key = (group_index, param.device, param.dtype, penalised)
                buckets.setdefault(key, []).append((slot, param))
        return buckets

    def _step_bucket(self, group: dict[str, Any], rows: list[tuple[_state.Slot, Tensor]]) -> None:
        states = [self.state[param] for _, param in rows]
        for (slot, param), state in zip(rows, states, strict=True):
            if "exp_avg" not in state:
                _state.start_moments(param, state)
            if self.record and "path_integral" not in state:  # frozen when the recording began
                _state.bind(slot, param, state, None, True)
        torch._foreach_add_([state["step"] for state in states], 1.0)
        reg_lambda = float(group["reg_lambda"])
        penalised = reg_lambda > 0 and rows[0][0].unit_scale > 0
        _ops.step_(
            [param for _, param in rows],
            [param.grad for _, param in rows],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [slot.importance for slot, _ in rows] if penalised else [],
            [state["anchor"] for state in states] if penalised else [],
            [state["path_integral"] for state in states] if self.record else [],
            [reg_lambda * slot.unit_scale for slot, _ in rows] if penalised else [],
            [float(state["step"]) for state in states],
            lr=float(group["lr"]),
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            penalty_mode=self.mode,
            maximize=bool(group["maximize"]),
            backend=self.backend,
        )

    @torch.no_grad()
    def penalty_by_layer(self) -> dict[str, Tensor]:
        """Return layer → λ α_l Σ_i Ω_i (θ_i − θ*_i)² (normalised as in the step): 0-dim float64 tensors, no host sync.

        Before the first step the anchors are the weights themselves (or the mapping that was given).
        """
        result: dict[str, Tensor] = {}
        by = self._penalty.coeffs.by if self._penalty else "block"
        for group, slot, param in self._members():
            if slot.importance is None:
                continue
            given = self._anchor[slot.name].to(param.device) if self._anchor else param
            anchor = self.state.get(param, {}).get("anchor", given)
            scale = float(group["reg_lambda"]) * slot.unit_scale
            value = penalty.value(param, anchor, slot.importance.to(param.device), scale)
            layer = layer_of(slot.name, by)
            result[layer] = result[layer] + value.to(result[layer].device) if layer in result else value
        return result

    def penalty(self) -> Tensor:
        """Return the penalty that the steps act on, a 0-dim float64 tensor; see :meth:`penalty_by_layer`."""
        values = list(self.penalty_by_layer().values()) or [torch.zeros((), dtype=torch.float64)]
        return torch.stack([value.to(values[0].device) for value in values]).sum()

    def recorded_importance(
        self, xi: float = 1e-6, *, relative: bool = False, allow_nonfinite: bool = False
    ) -> Importance:
        """Return Ω = max(ω, 0) / ((θ − θ_start)² + ξ) of the recording so far; a pure read.

        Args:
            xi: ξ > 0, in units of θ². It decides how weights that hardly moved rank.
            relative: ξ in units of each tensor's mean((θ − θ_start)²).
            allow_nonfinite: give elements whose ω is NaN or inf the importance 0 instead of raising.

        Raises:
            RuntimeError: not constructed with ``record=True``, or no step yet.
            ValueError: ξ ≤ 0, or non-finite ω.

        Source: arXiv 2501.13669, eq. 4-5, clamped once at the end.
        """
        _validate.recording(self.record, self._recorded_steps > 0)
        members = [(slot.name, param, self.state.get(param, {})) for _, slot, param in self._members()]
        names, params, states = zip(*(row for row in members if "path_integral" in row[2]), strict=True)
        return finalised(
            list(names),
            [state["path_integral"] for state in states],
            list(params),
            [state["start"] for state in states],
            xi=xi,
            relative=relative,
            steps=self._recorded_steps,
            allow_nonfinite=allow_nonfinite,
        )

    def start_phase(
        self,
        importance: Mapping[str, Tensor] | Sequence[Tensor | None] | None = None,
        coeffs: str | Mapping[str, float] | None = None,
    ) -> None:
        """Begin the next domain here: the anchor becomes the present weights and ω starts from zero.

        Moments and step counts go on; take ``recorded_importance()`` first. A refused importance changes nothing.

        Args:
            importance: the next phase's importance, as in the constructor; None keeps the present one.
            coeffs: the next phase's coefficients; None keeps what was given last: a rule's name is evaluated anew, a
                mapping (``layer_coefficients``' result included) is taken as it is.
        """
        if importance is not None:
            self._use(importance, self._coeffs_choice if coeffs is None else coeffs)
        elif coeffs is not None:
            self.set_coeffs(coeffs)
        for _, _, param in self._members():
            for key in ("anchor", "start", "path_integral"):
                self.state.get(param, {}).pop(key, None)
        self._anchor = None
        self._bound = False
        self._recorded_steps = 0

    @property
    def _penalty_form(self) -> str:
        return f"mode={self.mode!r}, normalize={self.normalize}"

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs besides the importance file: moments, anchor, start, ω, α, a fingerprint."""
        saved = super().state_dict()
        extra = _state.extras(self._penalty, self._penalty_form, self._coeffs_choice, self._recorded_steps)
        saved["param_groups"] = [{**group, **extra} for group in saved["param_groups"]]
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of torch.optim.AdamW; everything is checked before anything is changed.

        Dtypes survive. Anchors and ω are taken where this optimizer has importance, or records; saved α is used.

        Raises:
            ValueError: other groups, shapes or importance, or a state saved with amsgrad.
        """
        fingerprint = self._penalty.fingerprint if self._penalty else None
        state_dict = _state.after_pre_hooks(self, state_dict)
        _validate.state_dict(state_dict, self.param_groups, fingerprint, self._penalty_form)
        saved_groups = state_dict["param_groups"]
        groups = list(map(_state.loaded_group, self.param_groups, saved_groups))
        coeffs = saved_groups[0].get("coeffs")
        if coeffs is not None and self._penalty is not None and coeffs != dict(self._penalty.coeffs):
            self.set_coeffs(coeffs)
        self._coeffs_choice = saved_groups[0].get("coeffs_rule") or self._coeffs_choice
        anchors = {param: state["anchor"] for param, state in self.state.items() if "anchor" in state}
        _state.load_groups(self, super().load_state_dict, groups)
        keys = [key for group in saved_groups for key in group["params"]]
        for key, (_, slot, param) in zip(keys, self._members(), strict=True):
            saved, penalised = state_dict["state"].get(key, {}), slot.importance is not None
            state = _state.loaded(param, saved, penalised, self.record)
            if penalised and param in anchors:  # a plain AdamW's state has none: keep ours
                state.setdefault("anchor", anchors[param])
            if state:
                self.state[param] = state
        self._recorded_steps = int(saved_groups[0].get("recorded_steps", 0)) if self.record else 0
        self._bound = False

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in OWN_ATTRIBUTES}}

    def __repr__(self) -> str:
        plain = "importance: none, every parameter takes the plain AdamW step"
        covered = self._penalty.describe(len(self._members())) if self._penalty else plain
        return f"{super().__repr__()}\nmode: {self.mode}, backend: {self.backend}, record: {self.record}\n{covered}"
