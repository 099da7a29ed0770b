"""Checks on what users hand to lora_pairs, and their messages: expected, got, where, what to do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ._validate import FLOAT_DTYPES, listed, twice

# Classes of PEFT's LoRA layers whose forward pass is base(x) + s·B(A(dropout(x))).
LINEAR = frozenset(
    {"Linear", "Linear8bitLt", "Linear4bit", "GPTQLoraLinear", "QuantLinear", "AwqLoraLinear", "EetqLoraLinear"}
    | {"HqqLoraLinear", "AqlmLoraLinear"}
)
KNOWN = LINEAR | {"Embedding", "_ConvNd"}
REFUSED_LAYERS = {
    "AdaLoraLayer": ("is AdaLoRA's, whose ranks change while it trains", "use a LoraConfig"),
    "ParamWrapper": (
        "comes from target_parameters, whose factors stand for a stack of matrices in one parameter",
        "name modules in target_modules instead",
    ),
    "MultiheadAttention": (
        "is a MultiheadAttention, into whose in_proj_weight PEFT merges the factors in every forward pass",
        "leave it out of target_modules",
    ),
}


def classes(module: nn.Module) -> set[str]:
    """Return the names of a module's class and of all its bases."""
    return {cls.__name__ for cls in type(module).__mro__}


def no_peft(cause: ImportError) -> NoReturn:
    raise ImportError(
        f"lora_pairs: reading a model needs PEFT, which cannot be imported ({cause}); pip install peft, or pass "
        "(name, A, B, scaling) tuples."
    ) from cause


def source(value: Any) -> None:
    if isinstance(value, (str, Mapping, Tensor)) or not isinstance(value, Iterable):
        raise TypeError(
            "lora_pairs: expected a model with PEFT's LoRA layers or an iterable of (name, A, B, scaling) tuples, got "
            f"{type(value).__name__}."
        )


def entry(index: int, value: Any) -> None:
    """Check one (name, A, B, scaling)."""
    fits = isinstance(value, (tuple, list)) and len(value) == 4
    if not (fits and isinstance(value[0], str) and all(isinstance(factor, Tensor) for factor in value[1:3])):
        got = (
            f"({', '.join(type(item).__name__ for item in value)})" if fits else f"{type(value).__name__} {value!r:.80}"
        )
        raise TypeError(
            f"lora_pairs: pair {index}: expected (name, A, B, scaling) of a str, two tensors and a number, got {got}."
        )


def adapters_of_tuples(adapter: Any) -> None:
    if adapter is not None:
        raise ValueError(f"adapter: it has no effect on tuples, which name no adapter (got {adapter!r}); leave it out.")


def adapters(adapter: Any, known: set[str]) -> list[str]:
    """Return the adapters that are asked for as a list."""
    requested = list(adapter) if isinstance(adapter, (list, tuple, set)) else [adapter]
    for name in requested:
        if name not in known:
            raise ValueError(f"adapter: expected one of {listed(known)}, got {name!r}.")
    return requested


def lora_layers(model: nn.Module, found: int, others: Mapping[str, nn.Module], types: set[str]) -> None:
    """Check that there are LoRA layers and no trainable layers of another method. ``types``: as the configs say."""
    if "XLORA" in types:
        raise ValueError(
            "lora_pairs: the model is X-LoRA's, which mixes adapters anew for every token, so that no one U = s·B·A "
            "acts; train a single LoRA adapter."
        )
    if not found:
        what = f"PEFT's {listed(types)}" if types else "no adapter of PEFT's"
        raise ValueError(
            f"lora_pairs: expected a model with LoRA layers, got {type(model).__name__} with {what}; use "
            "get_peft_model(model, LoraConfig(...)), or AlrAdamW without lora= for full tuning."
        )
    for path, module in others.items():
        if "TrainableTokensLayer" not in classes(module) and any(param.requires_grad for param in module.parameters()):
            raise ValueError(
                f"lora_pairs: module {path!r} is a trainable {type(module).__module__}.{type(module).__name__}, which "
                "is no LoRA; give the model LoRA adapters only, or freeze the others."
            )


def _convolution(base: nn.Module) -> tuple[str, str] | None:
    if base.groups != 1:
        return (
            f"is a convolution with groups={base.groups}, where s·B·A is no product of two matrices",
            "target convolutions with groups=1 only",
        )
    if any(step != 1 for step in base.dilation) or base.padding_mode != "zeros":
        return (
            f"is a convolution with dilation={base.dilation} and padding_mode={base.padding_mode!r}, which PEFT's "
            "lora_A does not follow, so that s·B·A is no change of its weight",
            "leave it out of target_modules",
        )
    return None


def layer(path: str, module: Any, adapter: str) -> None:
    """Refuse a LoRA layer that does not add s·B·A to its weight, with the reason."""
    names = classes(module)
    refusal = next((REFUSED_LAYERS[name] for name in REFUSED_LAYERS if name in names), None)
    if refusal is None and not names & KNOWN:
        why = f"is a {type(module).__name__}, of which it is not known how it applies its factors"
        refusal = (why, "pass (name, A, B, scaling) tuples if it adds s·B·A to its weight")
    if refusal is None and adapter in module.lora_magnitude_vector:
        refusal = ("uses DoRA, whose weight is no sum of the base weight and s·B·A", "set use_dora=False")
    if refusal is None and adapter in module.lora_variant:
        variant = type(module.lora_variant[adapter]).__name__
        refusal = (f"uses the variant {variant}, which does more than add s·B·A", "use plain LoRA or rsLoRA")
    if refusal is None and "_ConvNd" in names:
        refusal = _convolution(module.get_base_layer())
    if refusal is None and "Embedding" in names and module.get_base_layer().max_norm is not None:
        refusal = ("is an embedding with max_norm, which rewrites A in every forward pass", "set max_norm=None")
    if refusal is None and module.merged:
        refusal = ("is merged: its weight holds s·B·A already", "call model.unmerge_adapter() first")
    if refusal is not None:
        why, advice = refusal
        raise ValueError(f"lora_pairs: module {path!r} (adapter {adapter!r}) {why}; {advice}.")


def nothing_trainable(what: str) -> NoReturn:
    raise ValueError(
        f"lora_pairs: expected at least one trainable factor, got none in {what}; call model.set_adapter(...), load "
        "the adapter with is_trainable=True, or requires_grad_(True)."
    )


def scaling(name: str, value: Any) -> float:
    try:
        result = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"scaling of {name!r}: expected a number, got {type(value).__name__} {value!r}.") from None
    if not (math.isfinite(result) and result > 0):
        raise ValueError(
            f"scaling of {name!r}: expected a finite number > 0, got {value!r}; U = s·B·A is recorded and penalised "
            "divided by it: give the adapter lora_alpha > 0, and do not scale it to zero."
        )
    return result


def factors(name: str, up: Tensor, down: Tensor, dims: int, features: tuple[int | None, int | None]) -> None:
    """Check A and B against each other, and against (out, in) features where these are known."""
    for letter, factor in (("B", up), ("A", down)):
        if factor.dtype not in FLOAT_DTYPES or factor.layout is not torch.strided or not factor.is_leaf:
            raise TypeError(
                f"factor {letter} of {name!r}: expected a strided leaf of float32, bfloat16, float16 or float64, got "
                f"{factor.dtype}, {factor.layout}, is_leaf={factor.is_leaf}; pass the parameter itself."
            )
    if up.dtype != down.dtype or up.device != down.device:
        raise ValueError(
            f"factors of {name!r}: expected one dtype and one device, got A {down.dtype} on {down.device} and B "
            f"{up.dtype} on {up.device}; convert or move one."
        )
    out_features, in_features = features
    fits = up.dim() == down.dim() == dims and up.shape[1] == down.shape[0] > 0 and up.shape[2:].numel() == 1
    fits = fits and out_features in (None, up.shape[0]) and in_features in (None, down.shape[1])
    if not fits:
        sizes = [("out", out_features), ("in", in_features)]
        (out, into) = (word if size is None else f"{word} = {size}" for word, size in sizes)
        raise ValueError(
            f"factors of {name!r}: expected A [rank, {into}] and B [{out}, rank], got A {tuple(down.shape)} and B "
            f"{tuple(up.shape)}; sharded factors (tensor parallel, ZeRO-3) are not supported."
        )
    if not down.flatten(1).data_ptr() == down.data_ptr():
        raise ValueError(
            f"factor A of {name!r}: expected contiguous memory, got strides {down.stride()} for shape "
            f"{tuple(down.shape)}; use model.to(memory_format=torch.contiguous_format)."
        )


def _identity(tensor: Tensor) -> Any:
    """Return what two tensors have in common that start at the same memory."""
    return (tensor.device, tensor.data_ptr()) if not tensor.is_meta and tensor.data_ptr() else id(tensor)


def factors_used_once(factors_by_name: Iterable[tuple[str, Tensor]]) -> None:
    if found := twice((name, _identity(factor)) for name, factor in factors_by_name):
        raise ValueError(
            f"lora_pairs: {found[1]} and {found[0]} are the same memory (tied adapters) and would be stepped twice; "
            "give each pair its own, or target one of the modules only."
        )


def weights_used_once(weights: Iterable[tuple[str, Any]]) -> None:
    """Refuse two modules that adapt one base weight: each pair would be U of a part of it."""
    if found := twice((path, id(weight)) for path, weight in weights if weight is not None):
        raise ValueError(
            f"lora_pairs: modules {found[0]!r} and {found[1]!r} share one base weight (tied weights) and adapt it "
            "apart; target one of them only."
        )


def distinct_names(names: Iterable[str]) -> None:
    if found := twice((name, name) for name in names):
        raise ValueError(
            f"lora_pairs: two of the pairs and other trainable tensors are called {found[0]!r} in importance; rename "
            "one, or freeze the base weight of an adapted module."
        )


def preset_and_exact(preset: str) -> NoReturn:
    raise ValueError(f"preset={preset!r} sets estimator='factored', got estimator='exact'; leave one of them out.")


def exact(name: str, reason: str) -> None:
    """Refuse the exact estimator where ``reason`` is not ''."""
    if reason:
        raise ValueError(
            f"estimator='exact': {name!r} {reason}, so that dL/dU cannot be gathered from its inputs and output "
            "gradients; use estimator='tangent'."
        )


# ---- pairs in an optimizer ----


def members(pair: Any, places: Mapping[int, tuple[int, int]]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (group, position) of B and A, once both are the optimizer's and in one group."""
    up, down = places.get(id(pair.up)), places.get(id(pair.down))
    if up is None or down is None:
        missing = [letter for letter, place in (("B", up), ("A", down)) if place is None]
        raise ValueError(
            f"lora: {' and '.join(missing)} of {pair.name!r} is not among the optimizer's parameters; pass both "
            "factors of every pair (model.named_parameters() has them), a frozen one too."
        )
    if up[0] != down[0]:
        raise ValueError(
            f"lora: B of {pair.name!r} is in param group {up[0]}, A in group {down[0]}; put both factors of a pair "
            "into one group: the penalty on U = s·B·A has one λ and one learning rate."
        )
    return up, down


def no_factors(entries: Iterable[str], factors: Mapping[str, str]) -> None:
    """Refuse importance of a factor where that of the pair is meant."""
    for name in entries:
        if name in factors:
            raise ValueError(
                f"importance of {name!r}: it is a factor of the LoRA pair {factors[name]!r}, whose importance is "
                "that of U = s·B·A under that name; record it with lora=..., or leave lora out to "
                "penalise the factors apart."
            )


def state_dict(
    saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], bounds: Sequence[Any], form: str | None
) -> None:
    """Check what a state_dict has of LoRA pairs, before anything is changed; ``form``: how this optimizer records."""
    shapes = {id(bound.params(groups)[0]): tuple(bound.geometry.shape) for bound in bounds}
    factors = {id(param) for bound in bounds for param in bound.params(groups)}
    saved_groups = saved["param_groups"]
    for saved_group, group in zip(saved_groups, groups, strict=True):
        for key, param in zip(saved_group["params"], group["params"], strict=True):
            kept = saved["state"].get(key, {})
            omega = kept.get("effective_path_integral")
            if omega is not None and tuple(omega.shape) != shapes.get(id(param)):
                expected = f"of a pair of shape {shapes[id(param)]}" if id(param) in shapes else "of none"
                raise ValueError(
                    f"state_dict: parameter {key} was saved as B of a LoRA pair of shape {tuple(omega.shape)} that was "
                    f"recorded in effective space, here it is B {expected}; construct the optimizer with the same "
                    "lora=... to resume."
                )
            if "path_integral" in kept and id(param) in factors:
                raise ValueError(
                    f"state_dict: parameter {key} was recorded element by element, here it is a factor of a LoRA pair; "
                    "construct the optimizer without lora=... to resume, or start the recording anew."
                )
    saved_form = saved_groups[0].get("lora_form") if saved_groups else None
    if saved_form is not None and form is not None and saved_form != form:
        raise ValueError(
            f"state_dict: its ω was recorded with {saved_form}, this optimizer records with {form}; "
            "use the same options of lora_pairs to resume."
        )


def uncovered_factor(name: str) -> NoReturn:
    raise ValueError(
        f"parameter {name!r} is a trainable factor of a LoRA adapter whose pairs this optimizer does not have: it "
        "would be recorded and penalised by itself. Freeze it, or build the optimizer with lora_pairs of all adapters "
        "that train."
    )


def paper_optimizer(form: str | None) -> None:
    """Refuse an optimizer that does not record as the paper's preset."""
    expected = "estimator='factored', clamp=True, origin='zero'"
    if form != expected:
        raise ValueError(
            f"add_epoch: expected an optimizer with record=True that records with {expected}, as lora_pairs(..., "
            f"preset='paper') says, got {form or 'none'}."
        )


def recording(estimator: str, record: bool, capturable: bool) -> None:
    """Refuse estimators that cannot be captured, or would gather gradients that nobody reads."""
    if estimator == "exact" and not record:
        raise ValueError(
            "lora: estimator='exact' gathers dense gradients for recording, and this optimizer does not record; use "
            "record=True, or lora_pairs(model) without it."
        )
    if record and capturable and estimator == "tangent":
        raise ValueError(
            "record: the tangent estimator finds eigenvalues of r × r matrices, for which the host waits: a CUDA graph "
            "cannot capture it; use capturable=False while recording, or another estimator."
        )


def exact_copied() -> NoReturn:
    raise TypeError(
        "lora_pairs(estimator='exact') hangs on the hooks of its modules and cannot be copied; build the optimizer "
        "anew and load its state_dict."
    )


def nothing_gathered(name: str) -> NoReturn:
    raise RuntimeError(
        f"lora_pairs(estimator='exact'): the factors of {name!r} have gradients, but no backward pass went by its "
        "hooks; call lora_pairs before torch.compile, keep the pairs open, and take each step after its own backward."
    )


def another_gradient(name: str, apart: float) -> NoReturn:
    raise RuntimeError(
        f"lora_pairs(estimator='exact'): the gradients of the factors of {name!r} are not those that the gathered "
        f"dense gradient implies ({apart:.0%} apart). Those of another backward pass were thrown away or changed: "
        "clear them with optimizer.zero_grad(), which forgets the gathered ones too."
    )
