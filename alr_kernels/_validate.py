"""Checks on what users hand the optimizer, and their messages: expected, got, for which parameter, what to do.

``_validate_values.py`` has those of single values, ``_validate_importance.py`` those of importance and its files,
``_validate_estimators.py`` those of estimators.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ._validate_values import choice, count, listed, number, seed
from .codecs.reference import BLOCK
from .names import unwrap

__all__ = ["choice", "count", "listed", "number", "seed"]  # those of single values, for whoever imports this module

UNSUPPORTED_FLAGS = {
    "amsgrad": "AMSGrad is not implemented; leave it out",
    "foreach": "one fused pass serves all tensors; choose with backend= instead",
    "fused": "the step is always fused; choose with backend= instead",
    "differentiable": "the step is not differentiable; leave it out",
}
FLOAT32_MAX = torch.finfo(torch.float32).max
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def storage_format(option: str, value: object, name: object, allowed: Sequence[str]) -> None:
    if name not in allowed:
        known = ", ".join(map(repr, allowed))
        hint = ""
        if name == "rank1":
            hint = (
                ": it holds sums of rows and columns, and a step reads elements; use it where importance is kept "
                "(importance.astype('rank1'), save_importance(dtype='rank1')), which is decoded when it is passed."
            )
        raise ValueError(f"{option}: expected one of {known} or such a torch dtype, got {value!r}{hint}")


def master(params: Iterable[Tensor]) -> None:
    dtypes = {param.dtype for param in params}
    if torch.bfloat16 not in dtypes:
        raise ValueError(
            f"master: it has no effect, because no parameter is bfloat16 (got {listed(map(str, dtypes))}); "
            "convert the model with .bfloat16() or leave it out."
        )


def capturable(name: str, param: Tensor) -> None:
    if param.device.type == "cpu":
        raise ValueError(
            f"capturable: parameter {name!r} is on the CPU, where no graph is captured; move the model or leave it out."
        )


def dynamic_and_capturable() -> NoReturn:
    raise ValueError(
        "coeffs: DynamicCoeffs decides on the host when to re-balance, which a captured graph cannot repeat; "
        "use capturable=False or fixed coefficients."
    )


def stats_off() -> NoReturn:
    raise RuntimeError("stats: nothing was gathered; construct the optimizer with stats=True and take a step.")


def temperature(value: Any) -> float:
    if isinstance(value, str):
        raise ValueError(f"temperature: expected 'auto' or a number > 0, got {value!r}")
    return number("temperature", value, open_low=True)


def unsupported_flags(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if name in UNSUPPORTED_FLAGS:
            raise TypeError(f"AlrAdamW does not take {name}={value!r}: {UNSUPPORTED_FLAGS[name]}.")
        raise TypeError(f"AlrAdamW got an unknown option {name!r}; see help(AlrAdamW) for the options.")


def group_options(group: Mapping[str, Any], known: Iterable[str]) -> None:
    """Check one param group's hyper-parameters."""
    unsupported_flags({key: value for key, value in group.items() if key in UNSUPPORTED_FLAGS})
    allowed = {*known, "params", "param_names", "initial_lr"}
    for key in group:  # other keys are the user's own (schedulers read them); a misspelt option is an error
        near = difflib.get_close_matches(key, allowed, n=1, cutoff=0.8) if key not in allowed else []
        if near:
            raise TypeError(f"param group has an unknown option {key!r}; did you mean {near[0]!r}?")
    for option in ("lr", "eps", "weight_decay", "reg_lambda"):
        number(option, group[option])
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas: expected a pair of numbers, got {betas!r}")
    for position, beta in enumerate(betas):
        number(f"betas[{position}]", beta, high=1.0)


def parameter(name: str, param: Tensor) -> None:
    """Check that a parameter has a dtype and layout that a step can update."""
    if param.is_complex():
        raise TypeError(f"parameter {name!r}: complex parameters ({param.dtype}) are not supported; view_as_real() it.")
    if param.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"parameter {name!r}: expected dtype float32, bfloat16, float16 or float64, got {param.dtype}; "
            "freeze it or convert it."
        )
    if param.layout is not torch.strided:
        raise TypeError(f"parameter {name!r}: expected a strided tensor, got layout {param.layout}.")


def twice(keyed: Iterable[tuple[str, Any]]) -> tuple[str, str] | None:
    """Return the first two of (name, key) that have the same key, the earlier one's name first."""
    seen: dict[Any, str] = {}
    for name, key in keyed:
        if key in seen:
            return seen[key], name
        seen[key] = name
    return None


def no_duplicates(named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse a tensor that is listed twice (tied weights are stepped once)."""
    if found := twice((name, id(param)) for name, param in named):
        raise ValueError(
            f"parameter {found[1]!r} is the same tensor as {found[0]!r} (tied weights) and would be stepped twice; "
            "pass each tensor once, as model.named_parameters() does by default."
        )


def distinct_names(names: Iterable[str]) -> None:
    if found := twice((name, name) for name in names):
        raise ValueError(
            f"two parameters are called {found[0]!r} once the components that wrappers add are stripped; rename one."
        )


def gradient(name: str, param: Tensor, grad: Tensor) -> None:
    """The per-step checks on a gradient: cheap, no device sync."""
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"parameter {name!r}: AlrAdamW does not support sparse gradients (layout {grad.layout}); "
            "use sparse=False in the embedding."
        )
    if grad.shape != param.shape:
        raise RuntimeError(f"parameter {name!r}: gradient of shape {tuple(grad.shape)}, expected {tuple(param.shape)}.")


def steppable(name: str, param: Tensor) -> None:
    """Refuse, before the first step, tensors that an in-place step over local memory cannot update."""
    if param.is_meta:
        raise RuntimeError(f"parameter {name!r} is on the meta device: materialise the model before the first step.")
    reach = 0  # of all smaller strides together; a stride within it may lead to the same element twice
    overlaps = False
    for stride, size in sorted((s, n) for s, n in zip(param.stride(), param.shape, strict=True) if n > 1):
        overlaps |= stride <= reach
        reach += stride * (size - 1)
    if overlaps and param.numel():
        raise RuntimeError(
            f"parameter {name!r}: strides {param.stride()} for shape {tuple(param.shape)} make elements share memory "
            "(an expanded view); use .contiguous() before making it a parameter."
        )


def curvature(name: str, scale: float, largest: float) -> None:
    """Refuse a curvature that float32 cannot hold: inf · 0 would be NaN where the importance is zero."""
    if not (scale < FLOAT32_MAX and scale * largest < FLOAT32_MAX):
        raise ValueError(
            f"parameter {name!r}: the largest curvature 2·λ·α·Ω/normaliser is {scale * largest:.3g} (of Ω = 1: "
            f"{scale:.3g}), more than float32 holds; lower reg_lambda or rescale the importance with normalized()."
        )


def same_dtype(name: str, now: torch.dtype, bound: torch.dtype) -> None:
    raise RuntimeError(
        f"parameter {name!r}: its dtype is {now}, it was {bound} at the first step; "
        "convert the model before the first step, or build a new optimizer and load the state."
    )


def named_for_mapping(what: str) -> None:
    raise ValueError(
        f"{what}: a mapping needs named parameters, got unnamed ones; pass model.named_parameters() "
        "(or groups of (name, tensor) pairs), or a sequence aligned with the parameters."
    )


def sequence_length(what: str, got: int, expected: int) -> None:
    if got != expected:
        raise ValueError(f"{what}: expected a sequence of {expected} tensors, one per parameter, got {got}.")


def offsets(values: Sequence[int], expected: int, block: int) -> None:
    """Check the global indices of shards' first elements, which must be multiples of ``block``."""
    if len(values) != expected:
        raise ValueError(f"offsets: expected {expected}, one per parameter, or none at all, got {len(values)}.")
    for i, value in enumerate(values):
        if value < 0 or value % block:
            raise ValueError(
                f"offsets: expected a multiple of {block}, 0 or more, for parameter {i}, got {value}; pass the global "
                "index of the shard's first element"
                + (", and let shards begin where a block of codes does: at a whole row." if block > 1 else ".")
            )


def coefficient_mapping(coeffs: Mapping[str, float], layers: set[str]) -> None:
    """Check a user's layer → α mapping against the layers of the importance."""
    if not isinstance(coeffs, Mapping):
        raise TypeError(f"coeffs: expected a rule's name or a mapping layer → number, got {type(coeffs).__name__}.")
    missing, extra = layers - set(coeffs), set(coeffs) - layers
    if missing or extra:
        raise ValueError(
            "coeffs: expected one number for each layer"
            + (f"; missing {listed(missing)}" if missing else "")
            + (f"; unknown {listed(extra)}" if extra else "")
            + ". layer_coefficients(importance) shows the layers' names."
        )
    for layer, value in coeffs.items():
        number(f"coeffs[{layer!r}]", value)


def anchor_mapping(anchors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Check a user's name → θ* mapping against the parameters that have importance."""
    missing = [name for name in wanted if name not in anchors]
    extra = [name for name in anchors if name not in wanted]
    if missing or extra:
        raise ValueError(
            "anchor: expected one tensor for each parameter with importance"
            + (f"; missing {listed(missing)}" if missing else "")
            + (f"; not penalised {listed(extra)}" if extra else "")
            + "."
        )
    for name, anchor in anchors.items():
        if anchor.shape != wanted[name].shape:
            raise ValueError(
                f"anchor of {name!r}: expected shape {tuple(wanted[name].shape)}, got {tuple(anchor.shape)}."
            )
        if not bool(torch.isfinite(anchor).all()):
            raise ValueError(f"anchor of {name!r}: expected finite values, got NaN or inf.")


def state_dict(
    saved: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    fingerprint: str | None,
    penalty_form: str,
    master: str = "none",
) -> None:
    """Check a state_dict before anything of the optimizer is changed."""
    if "state" not in saved or "param_groups" not in saved:
        raise ValueError(f"state_dict: expected keys 'state' and 'param_groups', got {listed(map(str, saved))}.")
    saved_groups = saved["param_groups"]
    if [len(group["params"]) for group in saved_groups] != [len(group["params"]) for group in groups]:
        raise ValueError(
            f"state_dict: expected param groups of {[len(g['params']) for g in groups]} parameters, "
            f"got {[len(g['params']) for g in saved_groups]}; build the optimizer with the groups it was saved with."
        )
    for saved_group, group in zip(saved_groups, groups, strict=True):
        if saved_group.get("amsgrad"):
            raise ValueError("state_dict: it was saved with amsgrad=True, which AlrAdamW does not implement.")
        names = [[unwrap(name) for name in g.get("param_names") or ()] for g in (saved_group, group)]
        if all(names) and names[0] != names[1]:
            first = next(pair for pair in zip(*names, strict=True) if pair[0] != pair[1])
            raise ValueError(
                f"state_dict: expected parameter {first[1]!r} where it has {first[0]!r}; "
                "pass the parameters in the order in which they were saved."
            )
        for key, param in zip(saved_group["params"], group["params"], strict=True):
            kept = saved["state"].get(key, {})
            if kept and "exp_avg" not in kept and not kept.keys() & {"anchor", "path_integral", "remainder"}:
                raise ValueError(
                    f"state_dict: expected AdamW's exp_avg and exp_avg_sq for parameter {key}, got "
                    f"{listed(map(str, kept))}; it was saved by another optimizer."
                )
            if "remainder" in kept and master != "split":
                raise ValueError(
                    f"state_dict: parameter {key} was saved with master='split' (its remainder is half of the weight), "
                    f"this optimizer has {master!r}; construct it with master='split'."
                )
            for field, value in saved["state"].get(key, {}).items():
                shape = tuple(param.shape)
                if field.endswith("_scale") and shape:
                    shape = (*shape[:-1], shape[-1] // BLOCK)
                if field == "effective_path_integral":
                    continue  # _validate_lora.state_dict
                if field != "step" and isinstance(value, Tensor) and tuple(value.shape) != shape:
                    raise ValueError(
                        f"state_dict: {field} of parameter {key} has shape {tuple(value.shape)}, "
                        f"expected {shape}; it belongs to another model or order of parameters."
                    )
    saved_print = saved_groups[0].get("importance_fingerprint") if saved_groups else None
    if saved_print is not None and saved_print != fingerprint:
        raise ValueError(
            f"state_dict: it was saved with importance {saved_print}, this optimizer has {fingerprint or 'none'}; "
            "construct it with the same importance file, or start a new phase instead of resuming."
        )
    saved_form = saved_groups[0].get("penalty_form") if saved_print is not None else None
    if saved_form is not None and saved_form != penalty_form:
        raise ValueError(
            f"state_dict: it was saved with {saved_form}, this optimizer has {penalty_form}; "
            "construct it with the same options to resume."
        )
