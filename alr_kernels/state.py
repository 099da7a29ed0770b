"""What the optimizer keeps for each parameter, and how it is saved and loaded.

``state[p]`` holds ``step``, ``exp_avg``, ``exp_avg_sq`` (names of torch.optim.AdamW), ``anchor`` where there is
importance, and ``start`` and ``path_integral`` while recording. Moments are kept as ``state_dtype`` says (int8 with
``exp_avg_scale`` and ``exp_avg_sq_scale``), ω in float32 whatever the parameter's dtype (float64 for float64); a split
bf16 parameter has its ``remainder``. Anchor and start share one buffer while equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from . import _ops, _validate, _validate_importance, _validate_lora
from .codecs import reference as codecs
from .codecs import rounding
from .codecs.encoded import Encoded
from .codecs.storage import CODES, DTYPES, Storage, scale_shape
from .coefficients import DynamicCoeffs, LayerCoefficients, resolve
from .importance.artifact import Importance
from .importance.statistics import Summary
from .names import LayerBy, layer_of, unwrap

if TYPE_CHECKING:
    from torch import Tensor

    from .lora.space import Bound, Space

MOMENTS = ("exp_avg", "exp_avg_sq")
EFFECTIVE = "effective_path_integral"  # ω of the LoRA pair whose B it is, shaped as the base weight
MOMENT_KEYS = (*MOMENTS, "exp_avg_scale", "exp_avg_sq_scale")
OPTIONS = ("lr", "betas", "eps", "weight_decay", "reg_lambda", "maximize")  # of a param group
# Flags of torch's own AdamW groups that have no meaning here; dropped when its state_dict is loaded.
TORCH_ONLY = frozenset({"amsgrad", "foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay"})

# Keys that state_dict() adds to each saved group: what a resumed run needs besides tensors.
SAVED_KEYS = frozenset(
    {"importance_fingerprint", "penalty_form", "coeffs", "coeffs_rule", "recorded_steps", "balance", "lora_form"}
)


@dataclass
class Slot:
    """What belongs to one (group, index) before and beside the tensors in ``state``."""

    name: str
    index: int = 0  # position in the optimizer: the random generator's key
    importance: Encoded | None = None  # as given; in ``form``, where the parameter is, once bound
    unit_scale: float = 0.0  # curvature_scale at reg_lambda = 1: 2·α / normaliser
    largest: float = 0.0  # max Ω
    dtype: torch.dtype | None = None  # of the parameter when it was bound
    form: tuple[Any, ...] = ()  # how everything of it is kept, and
    place: int = 0  # the number of that combination: parameters of one place can share a call of the step
    bound: Bound | None = None  # the LoRA pair of which it is a factor: importance is the pair's then
    left: bool = False  # whether it is the factor on the left
    offset: int = 0  # global index of the local shard's first element: the generator's

    @property
    def penalised(self) -> bool:
        """Whether it, or the pair of which it is a factor, has importance."""
        return (self.bound or self).importance is not None

    @property
    def layer_name(self) -> str:
        """The name by which it belongs to a layer: a factor's is that of its base weight."""
        return self.bound.name if self.bound else self.name


@dataclass
class Penalty:
    """The importance in use: its tensors' sums and identity, and the coefficients that weigh it."""

    summary: Summary
    fingerprint: str
    sums: dict[str, float]  # name → Σ Ω, float64, before encoding
    largest: dict[str, float]  # name → max Ω
    coeffs: LayerCoefficients = field(default_factory=lambda: LayerCoefficients({}))

    @classmethod
    def of(cls, importance: Importance) -> Penalty:
        """Check values: a pass over each tensor, of codes over the scales, which are their blocks' largest values.

        The largest product of rank1's factors is that of their largest.
        """
        summary, largest = Summary(importance.stats), {}
        for name in summary:
            values, scales, kept = importance.encoded(name)
            largest[name] = _validate_importance.importance_values(name, values if scales is None else scales)
            if kept == "rank1":
                largest[name] *= _validate_importance.importance_values(name, values)
        sums = {name: row.mean * row.numel for name, row in summary.items()}
        _validate_importance.some_importance(sums)
        return cls(summary, importance.content_fingerprint, sums, largest)

    def weigh(
        self, coeffs: str | Mapping[str, float] | DynamicCoeffs, normalize: bool, by: LayerBy
    ) -> dict[str, float]:
        """Take new coefficients and return name → 2·α/normaliser; when it raises, the old ones stay.

        The normaliser is mean(α·Ω) over all entries, or 1 without ``normalize``.
        """
        resolved = resolve(coeffs.rule if isinstance(coeffs, DynamicCoeffs) else coeffs, self.summary, by)
        alpha = {name: resolved[layer_of(name, resolved.by)] for name in self.summary}
        normalizer = 1.0
        if normalize:
            weighted = sum(alpha[name] * total for name, total in self.sums.items())
            _validate_importance.some_importance({"coeffs · importance": weighted})
            normalizer = weighted / self.numel
        self.coeffs = resolved
        return {name: 2.0 * value / normalizer for name, value in alpha.items()}

    @property
    def numel(self) -> int:
        """Elements of all entries."""
        return sum(row.numel for row in self.summary.values())

    def describe(self, covered: int, parameters: int) -> str:
        """Say how many of the optimizer's parameters are penalised, and how many layers share the weight."""
        return (
            f"importance: {covered} of {parameters} parameters, {parameters - covered} without importance take the "
            f"plain step; {len(self.coeffs)} layers, {self.coeffs.effective_layers:.1f} effective ({self.coeffs.rule})"
        )


def named_importance(
    importance: Any, members: Sequence[tuple[Slot, Tensor]], are_named: bool, space: Space | None = None
) -> Importance | None:
    """Turn the user's importance (artifact, mapping or aligned sequence) into one that fits parameters and pairs."""
    if importance is None:
        return None
    _validate_importance.importance_form(importance)
    if isinstance(importance, Mapping):
        if not are_named:
            _validate.named_for_mapping("importance")
        entries = importance if isinstance(importance, Importance) else Importance(importance)
    else:
        _validate.sequence_length("importance", len(importance), len(members))
        pairs = zip(members, importance, strict=True)
        entries = Importance({slot.name: tensor for (slot, _), tensor in pairs if tensor is not None})
    shapes = {slot.name: param.shape for slot, param in members if slot.bound is None}
    if space is not None:
        _validate_lora.no_factors(entries, {slot.name: slot.bound.name for slot, _ in members if slot.bound})
        shapes = {bound.name: bound.geometry.shape for bound in space} | shapes
    given = {name: entries.encoded(name).shape for name in entries}
    _validate_importance.importance_fits(given, shapes, space is not None)
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


def bind(
    slot: Slot, param: Tensor, state: dict[str, Any], storage: Storage, anchor: Tensor | None, record: bool
) -> None:
    """Tie what was given at construction to the parameter as it is now; called from the first step on.

    Launchers may move, shard or replace parameters between construction and the first step, so nothing is cloned
    before. Adds only what is missing, so that a loaded state is left alone.
    """
    if storage.is_split(param) and "remainder" not in state:
        state["remainder"] = dense_like(param, torch.int16).zero_()
    weights = whole(param, state)
    exact = "remainder" not in state or not bool(state["remainder"].any())
    kept = encode(slot, param, storage) if slot.importance is not None else None
    if kept is not None and "anchor" not in state:
        dtype = storage.anchor_dtype(param, exact)
        state["anchor"] = _in_layout_of(param, weights if anchor is None else anchor, dtype, copy=True)
    if record and "path_integral" not in state:
        shared = slot.importance is not None and anchor is None and torch.equal(state["anchor"].to(weights), weights)
        start = param.dtype if exact else torch.float32
        state["start"] = state["anchor"] if shared else _in_layout_of(param, weights, start, copy=True)
        state["path_integral"] = dense_like(param, compute_dtype(param)).zero_()
    slot.form = (
        storage.state_format(param),
        kept,
        state["anchor"].dtype if "anchor" in state else None,
        "remainder" in state,
        slot.bound is not None,
    )


def encode(slot: Slot, param: Tensor, storage: Storage) -> str:
    """Bring the slot's importance into the form and place in which steps read it, once; return the form."""
    assert slot.importance is not None
    given = slot.importance.to(param.device)
    kept = storage.importance_format(param, given.format)
    if kept in CODES or (given.format in CODES and kept != given.format):
        values = given._replace(values=given.values.contiguous())
        slot.importance = _ops.merge([values], [None], [kept], (1.0, 0.0))[0][0] if kept != given.format else values
    else:
        slot.importance = Encoded(_in_layout_of(param, _ops.decoded(given), DTYPES[kept]), None, kept)
    return kept


def decoded_importance(slot: Slot, param: Tensor) -> Tensor:
    """Return Ω on the parameter's device, as the steps see it."""
    assert slot.importance is not None
    return _ops.decoded(slot.importance.to(param.device))


def whole(param: Tensor, state: Mapping[str, Any]) -> Tensor:
    """Return θ as it is known: the float32 master of a split parameter (a new tensor), else the parameter."""
    return rounding.join(param.detach(), state["remainder"]) if "remainder" in state else param.detach()


def _in_layout_of(param: Tensor, values: Tensor, dtype: torch.dtype, copy: bool = False) -> Tensor:
    values = values.detach().resolve_neg()
    fits = values.dtype == dtype and values.device == param.device and values.stride() == param.stride()
    return values if fits and not copy else dense_like(param, dtype).copy_(values)


def start_moments(param: Tensor, state: dict[str, Any], storage: Storage) -> None:
    """Create Adam's state at a parameter's first gradient."""
    state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
    name = storage.state_format(param)
    if name in CODES:
        scales = torch.zeros(scale_shape(param), dtype=torch.float32, device=param.device)
        state |= {"exp_avg": torch.zeros(param.shape, dtype=torch.int8, device=param.device), "exp_avg_scale": scales}
        state |= {"exp_avg_sq": torch.zeros(param.shape, dtype=torch.uint8, device=param.device)}
        state |= {"exp_avg_sq_scale": scales.clone()}
    else:
        state |= {moment: dense_like(param, DTYPES[name]).zero_() for moment in MOMENTS}


def in_format(name: str, exp_avg: Tensor, exp_avg_sq: Tensor) -> dict[str, Tensor]:
    """Return the moments, given wide, as they are kept."""
    if name not in CODES:
        return {"exp_avg": exp_avg.to(DTYPES[name]), "exp_avg_sq": exp_avg_sq.to(DTYPES[name])}
    m, v = exp_avg.float().contiguous(), exp_avg_sq.float().contiguous()
    values = (*codecs.encode_exp_avg(m), *codecs.encode_exp_avg_sq(v.double().sqrt().float(), v))
    return dict(zip(("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale"), values, strict=True))


def wide_moments(saved: Mapping[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return m and v of a saved state, decoded."""
    m, v = (saved[key].to(device) for key in MOMENTS)
    if m.dtype is not torch.int8:
        return m, v
    scales = (saved[f"{key}_scale"].to(device) for key in MOMENTS)
    return codecs.decode_exp_avg(m, next(scales)), codecs.decode_exp_avg_sq(v, next(scales))


def loaded(
    param: Tensor, saved: Mapping[str, Any], storage: Storage, has_importance: bool, record: bool, factor: bool = False
) -> dict[str, Any]:
    """Return a parameter's state from a saved one: own copies in our forms, on the parameter's device.

    Moments are decoded and encoded where the forms differ. Anchor, start and ω are taken only where this optimizer
    uses them.
    """
    state: dict[str, Any] = {}
    if "step" in saved:
        state["step"] = torch.tensor(float(saved["step"]), dtype=torch.float32).to(param.device)
    if "exp_avg" in saved:
        name = storage.state_format(param)
        if saved["exp_avg"].dtype is (torch.int8 if name in CODES else DTYPES[name]):
            kept = {key: saved[key].to(param.device) for key in MOMENT_KEYS if key in saved}
        else:
            kept = in_format(name, *wide_moments(saved, param.device))
        for key, value in kept.items():
            same = value.shape == param.shape and name not in CODES
            state[key] = _in_layout_of(param, value, value.dtype, copy=True) if same else value.clone()
    if storage.is_split(param) and "remainder" in saved:
        state["remainder"] = _in_layout_of(param, saved["remainder"].to(param.device), torch.int16, copy=True)
    if factor:  # of a LoRA pair: its anchor is small and stays exact
        storage = replace(storage, anchor=None)
    kinds = {"anchor": storage.anchor_dtype(param)} if has_importance else {}
    kinds |= {"start": param.dtype, "path_integral": compute_dtype(param)} if record else {}
    for key, dtype in kinds.items():
        if (value := saved.get(key)) is not None:
            inexact = storage.is_split(param) and value.dtype is torch.float32  # a split weight's own value
            wide = storage.anchor_dtype(param, exact=False) if key == "anchor" else value.dtype
            kept = wide if inexact else dtype
            state[key] = _in_layout_of(param, value.to(param.device), kept, copy=True)
    if record and EFFECTIVE in saved:
        state[EFFECTIVE] = saved[EFFECTIVE].to(param.device, compute_dtype(param), copy=True)
    start, anchor = state.get("start"), state.get("anchor")
    if start is not None and anchor is not None and start.dtype is anchor.dtype and torch.equal(start, anchor):
        state["start"] = anchor
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


def extras(
    penalty: Penalty | None, penalty_form: str, coeffs_choice: Any, recorded_steps: int, balance: dict[str, Any] | None,
    lora_form: str | None,
) -> dict[str, Any]:  # fmt: skip
    """Return what each saved group carries besides torch's keys: :data:`SAVED_KEYS`."""
    return {
        "importance_fingerprint": penalty.fingerprint if penalty else None,
        "penalty_form": penalty_form,
        "coeffs": dict(penalty.coeffs) if penalty else None,
        "coeffs_rule": coeffs_choice if isinstance(coeffs_choice, str) else None,
        "recorded_steps": recorded_steps,
        "balance": balance,
        "lora_form": lora_form,
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
