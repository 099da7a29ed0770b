"""What the optimizer keeps for each parameter, and how it is saved and loaded.

``state[p]`` holds ``step``, ``exp_avg``, ``exp_avg_sq`` (names of torch.optim.AdamW), ``anchor`` where there is
importance, and ``start`` and ``path_integral`` while recording. Moments and ω are float32 whatever the parameter's
dtype (float64 for float64); anchor and start have the parameter's dtype and share one buffer while equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from . import _validate
from .coefficients import LayerCoefficients, resolve
from .importance.artifact import Importance, content_fingerprint
from .names import layer_of, unwrap

if TYPE_CHECKING:
    from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
OPTIONS = ("lr", "betas", "eps", "weight_decay", "reg_lambda", "maximize")  # of a param group
# Flags of torch's own AdamW groups that have no meaning here; dropped when its state_dict is loaded.
TORCH_ONLY = frozenset({"amsgrad", "foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay"})

# Keys that state_dict() adds to each saved group: what a resumed run needs besides tensors.
SAVED_KEYS = frozenset({"importance_fingerprint", "penalty_form", "coeffs", "coeffs_rule", "recorded_steps"})


@dataclass
class Slot:
    """What belongs to one (group, index) before and beside the tensors in ``state``."""

    name: str
    importance: Tensor | None = None
    unit_scale: float = 0.0  # curvature_scale at reg_lambda = 1: 2·α / normaliser
    largest: float = 0.0  # max Ω
    dtype: torch.dtype | None = None  # of the parameter when it was bound


@dataclass
class Penalty:
    """The importance in use: its tensors' sums and identity, and the coefficients that weigh it."""

    importance: Mapping[str, Tensor]
    fingerprint: str
    sums: dict[str, float]  # name → Σ Ω, float64
    largest: dict[str, float]  # name → max Ω
    numels: dict[str, int]
    coeffs: LayerCoefficients = field(default_factory=lambda: LayerCoefficients({}))

    @classmethod
    def of(cls, importance: Mapping[str, Tensor]) -> Penalty:
        """Check values and take sums: two passes over each tensor."""
        largest = {name: _validate.importance_values(name, tensor) for name, tensor in importance.items()}
        sums = {name: float(tensor.detach().sum(dtype=torch.float64)) for name, tensor in importance.items()}
        _validate.some_importance(sums)
        return cls(
            importance,
            content_fingerprint(importance),
            sums,
            largest,
            {name: tensor.numel() for name, tensor in importance.items()},
        )

    def weigh(self, coeffs: str | Mapping[str, float], normalize: bool) -> dict[str, float]:
        """Take new coefficients and return name → 2·α/normaliser; when it raises, the old ones stay.

        The normaliser is mean(α·Ω) over all entries, or 1 without ``normalize``.
        """
        resolved = resolve(coeffs, self.importance)
        alpha = {name: resolved[layer_of(name, resolved.by)] for name in self.importance}
        normalizer = 1.0
        if normalize:
            weighted = sum(alpha[name] * total for name, total in self.sums.items())
            _validate.some_importance({"coeffs · importance": weighted})
            normalizer = weighted / sum(self.numels.values())
        self.coeffs = resolved
        return {name: 2.0 * value / normalizer for name, value in alpha.items()}

    def describe(self, parameters: int) -> str:
        """Say how many of the optimizer's parameters are penalised, and how many layers share the weight."""
        plain = parameters - len(self.importance)
        return (
            f"importance: {len(self.importance)} of {parameters} parameters, {plain} without importance take the plain "
            f"step; {len(self.coeffs)} layers, {self.coeffs.effective_layers:.1f} effective ({self.coeffs.rule})"
        )


def named_importance(
    importance: Any, names: Sequence[str], params: Sequence[Tensor], are_named: bool
) -> Mapping[str, Tensor] | None:
    """Turn the user's importance (artifact, mapping or aligned sequence) into unwrapped name → tensor, matched."""
    if importance is None:
        return None
    _validate.importance_form(importance)
    if isinstance(importance, Mapping):
        if not are_named:
            _validate.named_for_mapping("importance")
        entries = importance if isinstance(importance, Importance) else Importance(importance)
    else:
        _validate.sequence_length("importance", len(importance), len(params))
        entries = Importance({name: t for name, t in zip(names, importance, strict=True) if t is not None})
    _validate.importance_names(entries, names)
    by_name = dict(zip(names, params, strict=True))
    for name, tensor in entries.items():
        _validate.importance_shape(name, tensor, by_name[name])
    return entries


def named_anchor(anchor: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Check the user's θ* and return it by unwrapped name."""
    entries = {unwrap(name): tensor for name, tensor in anchor.items()}
    _validate.anchor_mapping(entries, wanted)
    return entries


def dense_like(param: Tensor, dtype: torch.dtype) -> Tensor:
    """Return uninitialised state in the parameter's memory layout (contiguous where that has holes)."""
    return torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format)


def compute_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype of moments and ω: float32, or float64 for float64 parameters."""
    return torch.promote_types(param.dtype, torch.float32)


def bind(slot: Slot, param: Tensor, state: dict[str, Any], anchor: Tensor | None, record: bool) -> None:
    """Tie what was given at construction to the parameter as it is now; called from the first step on.

    Launchers may move, shard or replace parameters between construction and the first step, so nothing is cloned
    before. Adds only what is missing, so that a loaded state is left alone.
    """
    if slot.importance is not None:
        slot.importance = _in_layout_of(param, slot.importance, compute_dtype(param))
        if "anchor" not in state:
            state["anchor"] = _in_layout_of(param, param if anchor is None else anchor, param.dtype, copy=True)
    if record and "path_integral" not in state:
        shared = slot.importance is not None and anchor is None and torch.equal(state["anchor"], param)
        state["start"] = state["anchor"] if shared else _in_layout_of(param, param, param.dtype, copy=True)
        state["path_integral"] = dense_like(param, compute_dtype(param)).zero_()


def _in_layout_of(param: Tensor, values: Tensor, dtype: torch.dtype, copy: bool = False) -> Tensor:
    values = values.detach().resolve_neg()
    fits = values.dtype == dtype and values.device == param.device and values.stride() == param.stride()
    return values if fits and not copy else dense_like(param, dtype).copy_(values)


def start_moments(param: Tensor, state: dict[str, Any]) -> None:
    """Create Adam's state at a parameter's first gradient."""
    state["step"] = torch.tensor(0.0, dtype=torch.float32)
    for moment in MOMENTS:
        state[moment] = dense_like(param, compute_dtype(param)).zero_()


def loaded(param: Tensor, saved: Mapping[str, Any], has_importance: bool, record: bool) -> dict[str, Any]:
    """Return a parameter's state from a saved one: own copies, our dtypes, on the parameter's device.

    Anchor, start and ω are taken only where this optimizer uses them.
    """
    wanted = {"step": torch.float32, **dict.fromkeys(MOMENTS, compute_dtype(param))}
    if has_importance:
        wanted["anchor"] = param.dtype
    if record:
        wanted |= {"start": param.dtype, "path_integral": compute_dtype(param)}
    state: dict[str, Any] = {}
    for key, dtype in wanted.items():
        value = saved.get(key)
        if value is None:
            continue
        if key == "step":
            state[key] = torch.tensor(float(value), dtype=torch.float32)
        else:
            state[key] = _in_layout_of(param, value.to(param.device), dtype, copy=True)
    if "start" in state and "anchor" in state and torch.equal(state["start"], state["anchor"]):
        state["start"] = state["anchor"]
    return state


def loaded_group(group: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a param group's options: the saved ones, ours where it (a plain AdamW's) has none."""
    ignored = TORCH_ONLY | SAVED_KEYS
    if saved.get("importance_fingerprint") is None:
        ignored |= {"reg_lambda"}  # it was saved without a penalty, where λ means nothing
    options = {key: value for key, value in saved.items() if key not in ignored}
    merged = {**{key: value for key, value in group.items() if key != "params"}, **options}
    _validate.group_options(merged, OPTIONS)
    return merged


def extras(penalty: Penalty | None, penalty_form: str, coeffs_choice: Any, recorded_steps: int) -> dict[str, Any]:
    """Return what each saved group carries besides torch's keys: :data:`SAVED_KEYS`."""
    return {
        "importance_fingerprint": penalty.fingerprint if penalty else None,
        "penalty_form": penalty_form,
        "coeffs": dict(penalty.coeffs) if penalty else None,
        "coeffs_rule": coeffs_choice if isinstance(coeffs_choice, str) else None,
        "recorded_steps": recorded_steps,
    }


def after_pre_hooks(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return the state as the hooks of ``register_load_state_dict_pre_hook`` leave it."""
    state_dict = state_dict.copy()
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        state_dict = hook(optimizer, state_dict) or state_dict
    return state_dict


def load_groups(optimizer: Any, load: Callable[[dict[str, Any]], None], groups: list[dict[str, Any]]) -> None:
    """Let torch load the groups alone, without running the hooks a second time."""
    hooks = optimizer._optimizer_load_state_dict_pre_hooks
    optimizer._optimizer_load_state_dict_pre_hooks = type(hooks)()
    try:
        load({"state": {}, "param_groups": groups})
    finally:
        optimizer._optimizer_load_state_dict_pre_hooks = hooks
