"""What the optimizer keeps for each parameter, and how it is saved and loaded.

``state[p]`` holds ``step``, ``exp_avg``, ``exp_avg_sq`` (names of torch.optim.AdamW), ``anchor`` where there is
importance, and ``start`` and ``path_integral`` while recording. Moments are kept as ``state_dtype`` says (int8 with
``exp_avg_scale`` and ``exp_avg_sq_scale``), ω in float32 whatever the parameter's dtype (float64 for float64); a split
bf16 parameter has its ``remainder``. Anchor and start share one buffer while equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from . import _dtensor, _ops, _validate, _validate_distributed, _validate_importance, _validate_lora
from .codecs import reference as codecs
from .codecs import rounding
from .codecs.encoded import Encoded
from .codecs.storage import CODES, DTYPES, Storage, scale_shape
from .coefficients import DynamicCoeffs, LayerCoefficients, resolve
from .importance import sharded
from .importance.artifact import Importance
from .importance.statistics import Summary
from .names import LayerBy, layer_of, unwrap

if TYPE_CHECKING:
    from torch import Tensor

    from ._dtensor import Sharding
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
    shape: tuple[int, ...] = ()  # of the parameter when the optimizer was built
    sharding: Sharding | None = None  # of the parameter, once bound: what follows is of the part that is here
    importance: Encoded | None = None  # as given; in ``form``, where the parameter is, once placed
    placed: bool = False
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
        summary = Summary(importance.stats)
        found: list[Tensor] = []
        shardings = []
        for name in summary:
            entry = importance.encoded(name)
            shardings.append(_dtensor.Sharding.of(name, entry.values))
            values, scales, kept = sharded.encoded_part(entry, name, shardings[-1])
            largest_here = _validate_importance.importance_values(name, values if scales is None else scales)
            if kept == "rank1":
                largest_here *= _validate_importance.importance_values(name, values)
            found.append(torch.tensor(largest_here, dtype=torch.float64))
        largest = dict(zip(summary, map(float, _dtensor.totals(found, shardings, largest=True)), strict=True))
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
    """Return uninitialised state for what is here of a parameter, in its memory layout (contiguous if with holes)."""
    return torch.empty_like(_dtensor.local(param), dtype=dtype, memory_format=torch.preserve_format)


def compute_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype of moments and ω: float32, or float64 for float64 parameters."""
    return torch.promote_types(param.dtype, torch.float32)


def place(slot: Slot, param: Tensor, storage: Storage, anchors: Mapping[str, Tensor] | None) -> None:
    """Note which part of the parameter is here, and refuse what cannot be kept for it; nothing is taken yet."""
    slot.sharding = _dtensor.Sharding.of(slot.name, param)
    if anchors and slot.name in anchors:
        _dtensor.check_part(f"anchor of {slot.name}", anchors[slot.name], slot.sharding)
    if slot.importance is not None and not slot.placed:
        _dtensor.check_part(f"importance of {slot.name}", slot.importance.values, slot.sharding)
    if slot.sharding is None:
        return
    slot.offset = slot.sharding.first_element if slot.sharding.by_rows else 0
    kinds = {f"{storage.state_format(param)} state": storage.state_format(param) in (*CODES, "bf16")}
    kinds["stochastic rounding"] = storage.master == "stochastic" and param.dtype is torch.bfloat16
    if slot.importance is not None and not slot.placed:
        kept = storage.importance_format(param, slot.importance.format)
        kinds[f"{kept} importance"] = kept in CODES
    for what, found in kinds.items():
        if found:
            _validate_distributed.rows_alone(slot.name, what, slot.sharding.placements, slot.sharding.by_rows)


def bind(
    slot: Slot, param: Tensor, state: dict[str, Any], storage: Storage, anchor: Tensor | None, record: bool
) -> None:
    """Tie what was given at construction to the parameter as it is now; called from the first step on.

    Launchers may move, shard or replace parameters between construction and the first step, so nothing is cloned
    before. Adds only what is missing, so that a loaded state is left alone. Of a sharded parameter all of it is of the
    part that is here, and its dtypes are the same on every rank. :func:`place` goes before.
    """
    if anchor is not None:
        anchor = _dtensor.part_of(f"anchor of {slot.name}", anchor, slot.sharding)
    if storage.is_split(param) and "remainder" not in state:
        state["remainder"] = dense_like(param, torch.int16).zero_()
    weights = whole(param, state)
    exact = "remainder" not in state or _dtensor.everywhere(not bool(state["remainder"].any()), slot.sharding)
    kept = encode(slot, param, storage) if slot.importance is not None else None
    if kept is not None and "anchor" not in state:
        dtype = storage.anchor_dtype(param, exact)
        state["anchor"] = in_layout_of(param, weights if anchor is None else anchor, dtype, copy=True)
    if record and "path_integral" not in state:
        shared = slot.importance is not None and anchor is None
        shared = shared and _dtensor.everywhere(torch.equal(state["anchor"].to(weights), weights), slot.sharding)
        start = param.dtype if exact else torch.float32
        state["start"] = state["anchor"] if shared else in_layout_of(param, weights, start, copy=True)
        state["path_integral"] = dense_like(param, compute_dtype(param)).zero_()
    slot.form = (
        storage.state_format(param),
        slot.sharding and slot.sharding.group,
        kept,
        state["anchor"].dtype if "anchor" in state else None,
        "remainder" in state,
        slot.bound is not None,
    )


def encode(slot: Slot, param: Tensor, storage: Storage) -> str:
    """Bring the slot's importance into the form and place in which steps read it, once; return the form."""
    given = local_importance(slot, param)
    kept = storage.importance_format(param, given.format)
    if kept in CODES or (given.format in CODES and kept != given.format):
        values = given._replace(values=given.values.contiguous())
        slot.importance = _ops.merge([values], [None], [kept], (1.0, 0.0))[0][0] if kept != given.format else values
    else:
        slot.importance = Encoded(in_layout_of(param, _ops.decoded(given), DTYPES[kept]), None, kept)
    slot.placed = True
    return kept


def local_importance(slot: Slot, param: Tensor) -> Encoded:
    """Return Ω of what is here of a parameter, on its device."""
    assert slot.importance is not None
    sharding = None if slot.placed else _dtensor.Sharding.of(slot.name, param)
    return sharded.encoded_part(slot.importance, slot.name, sharding).to(param.device)


def decoded_importance(slot: Slot, param: Tensor) -> Tensor:
    """Return Ω of what is here of a parameter, as the steps see it."""
    return _ops.decoded(local_importance(slot, param))


def whole(param: Tensor, state: Mapping[str, Any]) -> Tensor:
    """Return θ here as it is known: the float32 master of a split parameter (a new tensor), else the parameter."""
    here = _dtensor.local(param).detach()
    return rounding.join(here, state["remainder"]) if "remainder" in state else here


def in_layout_of(param: Tensor, values: Tensor, dtype: torch.dtype, copy: bool = False) -> Tensor:
    """Return values in the memory layout of what is here of a parameter."""
    values, param = values.detach().resolve_neg(), _dtensor.local(param)
    fits = values.dtype == dtype and values.device == param.device and values.stride() == param.stride()
    return values if fits and not copy else dense_like(param, dtype).copy_(values)


def start_moments(param: Tensor, state: dict[str, Any], storage: Storage) -> None:
    """Create Adam's state at a parameter's first gradient."""
    state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
    name = storage.state_format(param)
    if name in CODES:
        param = _dtensor.local(param)
        scales = torch.zeros(scale_shape(param), dtype=torch.float32, device=param.device)
        state |= {"exp_avg": torch.zeros(param.shape, dtype=torch.int8, device=param.device), "exp_avg_scale": scales}
        state |= {"exp_avg_sq": torch.zeros(param.shape, dtype=torch.uint8, device=param.device)}
        state |= {"exp_avg_sq_scale": scales.clone()}
    else:
        state |= {moment: dense_like(param, DTYPES[name]).zero_() for moment in MOMENTS}


def wide_moments(saved: Mapping[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return m and v of a saved state, decoded."""
    m, v = (saved[key].to(device) for key in MOMENTS)
    if m.dtype is not torch.int8:
        return m, v
    scales = (saved[f"{key}_scale"].to(device) for key in MOMENTS)
    return codecs.decode_exp_avg(m, next(scales)), codecs.decode_exp_avg_sq(v, next(scales))
