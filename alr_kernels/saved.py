"""From what is kept to what is saved, and back: whole, sharded, or of a plain AdamW."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from . import _dtensor, _validate
from .codecs import reference as codecs
from .codecs.storage import CODES, DTYPES, Storage, scale_shape
from .state import (
    EFFECTIVE,
    MOMENT_KEYS,
    OPTIONS,
    SAVED_KEYS,
    TORCH_ONLY,
    Penalty,
    Slot,
    compute_dtype,
    in_layout_of,
    wide_moments,
)

if TYPE_CHECKING:
    from torch import Tensor


def in_format(name: str, exp_avg: Tensor, exp_avg_sq: Tensor) -> dict[str, Tensor]:
    """Return the moments, given wide, as they are kept."""
    if name not in CODES:
        return {"exp_avg": exp_avg.to(DTYPES[name]), "exp_avg_sq": exp_avg_sq.to(DTYPES[name])}
    m, v = exp_avg.float().contiguous(), exp_avg_sq.float().contiguous()
    values = (*codecs.encode_exp_avg(m), *codecs.encode_exp_avg_sq(v.double().sqrt().float(), v))
    return dict(zip(("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale"), values, strict=True))


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
            same = value.shape == _dtensor.local(param).shape and name not in CODES
            state[key] = in_layout_of(param, value, value.dtype, copy=True) if same else value.clone()
    if storage.is_split(param) and "remainder" in saved:
        state["remainder"] = in_layout_of(param, saved["remainder"].to(param.device), torch.int16, copy=True)
    if factor:  # of a LoRA pair: its anchor is small and stays exact
        storage = replace(storage, anchor=None)
    kinds = {"anchor": storage.anchor_dtype(param)} if has_importance else {}
    kinds |= {"start": param.dtype, "path_integral": compute_dtype(param)} if record else {}
    for key, dtype in kinds.items():
        if (value := saved.get(key)) is not None:
            inexact = storage.is_split(param) and value.dtype is torch.float32 and not _fits(value, param)
            wide = storage.anchor_dtype(param, exact=False) if key == "anchor" else value.dtype
            kept = wide if inexact else dtype
            state[key] = in_layout_of(param, value.to(param.device), kept, copy=True)
    if record and EFFECTIVE in saved:
        state[EFFECTIVE] = saved[EFFECTIVE].to(param.device, compute_dtype(param), copy=True)
    start, anchor = state.get("start"), state.get("anchor")
    if start is not None and anchor is not None and _are_one(start, anchor, param, storage):
        state["start"] = anchor
    return state


def _fits(value: Tensor, param: Tensor) -> bool:
    """Whether the dtype of a split weight holds, on every rank, what was saved of it in float32."""
    same = torch.equal(value.to(param.dtype).to(value.dtype), value)
    return _dtensor.everywhere(same, _dtensor.Sharding.of("a parameter", param))


def _are_one(start: Tensor, anchor: Tensor, param: Tensor, storage: Storage) -> bool:
    """Whether start and anchor can share a buffer; a split weight's start then has the anchor's dtype on all ranks."""
    if not storage.is_split(param):
        return start.dtype is anchor.dtype and torch.equal(start, anchor)
    return _dtensor.everywhere(torch.equal(start.float(), anchor.float()), _dtensor.Sharding.of("a parameter", param))


def local_parts(slot: Slot, param: Tensor, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved state with what is here of its tensors, which are whole or sharded like the parameter."""
    sharding = _dtensor.Sharding.of(slot.name, param)
    of_pair = slot.bound.sharding(param) if slot.bound else None
    parts: dict[str, Any] = {}
    for key, value in saved.items():
        owner = of_pair if key == EFFECTIVE else sharding
        is_part = isinstance(value, torch.Tensor) and value.ndim > 0
        parts[key] = _dtensor.part_of(f"{key} of {slot.name}", value, owner) if is_part else value
    return parts


def wrapped(slot: Slot, param: Tensor, state: Mapping[str, Any], storage: Storage) -> dict[str, Any]:
    """Return a state as it is saved: DTensors where the parameter is one, and no tensor twice.

    Loading in place (torch.distributed.checkpoint) would write anchor and start into the buffer that they share here,
    and round a split weight's, once it moved, to the bf16 in which a new optimizer has them: they are saved wide.
    """
    saved: dict[str, Any] = dict(state)
    if storage.is_split(param) and slot.bound is None:
        wide = {"start": torch.float32, "anchor": storage.anchor_dtype(param, exact=False)}
        saved |= {key: saved[key].to(dtype) for key, dtype in wide.items() if key in saved}
    if "start" in saved and saved["start"] is saved.get("anchor"):
        saved["start"] = torch.clone(saved["start"])
    sharding = _dtensor.Sharding.of(slot.name, param)
    if sharding is None:
        return saved
    of_pair = slot.bound.sharding(param) if slot.bound else None
    for key, value in saved.items():
        if key == EFFECTIVE and of_pair:
            saved[key] = of_pair.wrap(value)
        elif isinstance(value, torch.Tensor) and value.ndim > 0:
            saved[key] = sharding.wrap(value, scale_shape(param) if key.endswith("_scale") else None)
    return saved


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
