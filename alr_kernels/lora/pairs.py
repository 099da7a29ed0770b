"""Which factors of a model make up which weight: PEFT's LoRA layers, or (name, A, B, scaling) from any LoRA code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from .. import _validate, _validate_lora
from ..names import unwrap
from .exact import Gatherer, close_earlier
from .reference import Product

ESTIMATORS = ("tangent", "factored", "exact")
CLAMPS = ("end", "step")
ORIGINS = ("start", "zero")
PRESETS = {"paper": ("factored", "step", "zero")}

Estimator = Literal["tangent", "factored", "exact"]


def as_factors(
    up: Tensor | None, down: Tensor | None, transposed: bool, stacked: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Return what is shaped as B and A, or ``stacked`` [P, ...], as left [.., m, r] and right [.., r, n]: views."""
    left, right = (None if side is None else side.flatten(1 + stacked) for side in (up, down))
    return (_swapped(right), _swapped(left)) if transposed else (left, right)


def as_kept(
    left: Tensor | None, right: Tensor | None, transposed: bool, up: torch.Size, down: torch.Size
) -> tuple[Tensor | None, Tensor | None]:
    """Return left [.., m, r] and right [.., r, n] in the shapes of B and A: the inverse of :func:`as_factors`."""
    left, right = (_swapped(right), _swapped(left)) if transposed else (left, right)
    sides = zip((left, right), (up, down), strict=True)
    b, a = (None if side is None else side.reshape(*side.shape[:-2], *shape) for side, shape in sides)
    return b, a


def _swapped(side: Tensor | None) -> Tensor | None:
    return None if side is None else side.mT


@dataclass(eq=False)
class LoraPair:
    """One weight that LoRA moves by U = s·B·A, and its factors.

    Attributes:
        name: of the base weight, as without PEFT: ``model.layers.0.self_attn.q_proj.weight``.
        up: B, [out, r] (a convolution's [out, r, 1, ...]).
        down: A, [r, in] (a convolution's [r, in, *kernel]).
        scaling: s, e.g. lora_alpha/r.
        transposed: the weight is kept as [in, out], so that U = s·(B·A)ᵀ: transformers' Conv1D, and embeddings.
        shape: of the base weight.

    >>> import torch
    >>> pair = LoraPair("w", torch.ones(4, 2), torch.ones(2, 3), 0.5, False, torch.Size([4, 3]))
    >>> left, right = pair.factors(pair.up, pair.down)
    >>> (pair.scaling * left @ right).shape == pair.matrix_shape
    True
    """

    name: str
    up: Tensor
    down: Tensor
    scaling: float
    transposed: bool
    shape: torch.Size
    gatherer: Gatherer | None = field(default=None, repr=False)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(m, n) of the weight as a matrix: its first dimension, and all others together."""
        return self.shape[0], self.shape[1:].numel()

    @property
    def rank(self) -> int:
        """r."""
        return self.down.shape[0]

    def factors(self, up: Tensor | None, down: Tensor | None) -> Any:
        """Return what is shaped as B and A as left [m, r] and right [r, n] of the weight as a matrix: views.

        A :class:`Product` of B and A, or for a transposed pair of Aᵀ and Bᵀ; where one is None, a tuple with None.
        """
        left, right = as_factors(up, down, self.transposed)
        return (left, right) if left is None or right is None else Product(left, right)

    def as_kept(self, left: Tensor | None, right: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return left [m, r] and right [r, n] in the shapes of B and A: the inverse of :meth:`factors`."""
        return as_kept(left, right, self.transposed, self.up.shape, self.down.shape)

    def take_gradient(self) -> Tensor | None:
        """Return G = dL/dU [m, n] of all backward passes since the last call, and forget it (``estimator="exact"``).

        None when there was none, or with another estimator.
        """
        return self.gatherer.take() if self.gatherer is not None else None

    def drop_gradient(self) -> None:
        """Forget what was gathered, as ``zero_grad`` does."""
        if self.gatherer is not None:
            self.gatherer.take()


class Known(NamedTuple):
    """What else a model has, by identity: parameters may reach the optimizer under other names, or none."""

    names: Mapping[int, str]  # id of a trainable tensor that is no factor → name in importance
    factors: frozenset[int]  # ids of all factors, those of pairs that were not asked for included


class LoraPairs(Sequence[LoraPair]):
    """The pairs of a model, and how their importance is recorded. Made by :func:`lora_pairs`.

    Attributes:
        names: parameter name, as in ``model.named_parameters()`` → name in importance, for the trainable tensors that
            are no LoRA factors: ``base_model.model.classifier.modules_to_save.default.weight`` → ``classifier.weight``.
        estimator: of G = dL/dU: ``"tangent"``, ``"factored"`` or ``"exact"``.
        clamp: ω ≥ 0 at the ``"end"`` only, or at every ``"step"``.
        origin: the denominator is (U_end − U_start)² (``"start"``) or U_end² (``"zero"``).
    """

    def __init__(
        self, pairs: Iterable[LoraPair], names: Mapping[str, str] | None = None, *,
        estimator: str = "tangent", clamp: str = "end", origin: str = "start", known: Known | None = None,
    ) -> None:  # fmt: skip
        for option, value, allowed in (
            ("estimator", estimator, ESTIMATORS), ("clamp", clamp, CLAMPS), ("origin", origin, ORIGINS),
        ):  # fmt: skip
            _validate.choice(option, value, allowed)
        self._pairs = tuple(pairs)
        self.names = dict(names or {})
        self.known = known or Known({}, frozenset())
        self.estimator, self.clamp, self.origin = estimator, clamp, origin
        _validate_lora.distinct_names([*(pair.name for pair in self._pairs), *self.names.values()])
        _validate_lora.factors_used_once(
            (f"factor {letter} of {pair.name!r}", factor)
            for pair in self._pairs
            for letter, factor in (("A", pair.down), ("B", pair.up))
        )

    @overload
    def __getitem__(self, index: int) -> LoraPair: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[LoraPair, ...]: ...

    def __getitem__(self, index: int | slice) -> LoraPair | tuple[LoraPair, ...]:
        return self._pairs[index]

    def __len__(self) -> int:
        return len(self._pairs)

    def __repr__(self) -> str:
        options = ", ".join(f"{option}={getattr(self, option)!r}" for option in ("estimator", "clamp", "origin"))
        return f"LoraPairs({len(self)} pairs, {len(self.names)} other tensors, {options})"

    @property
    def importance_names(self) -> list[str]:
        """Names of all that an importance of this model may have: ``importance.select(pairs.importance_names)``."""
        return [*(pair.name for pair in self._pairs), *self.names.values()]

    def close(self) -> None:
        """Remove the hooks of ``estimator="exact"``; harmless otherwise."""
        for pair in self._pairs:
            if pair.gatherer is not None:
                pair.gatherer.close()


def lora_pairs(
    model_or_tuples: nn.Module | Iterable[tuple[str, Tensor, Tensor, float]],
    adapter: str | Sequence[str] | None = None,
    *,
    estimator: Estimator = "tangent",
    preset: Literal["paper"] | None = None,
) -> LoraPairs:
    r"""Return the pairs of factors of a model, for ``AlrAdamW(..., lora=...)``: the penalty then acts on U = s·B·A.

    LoRA and rsLoRA of PEFT with any ranks and alphas, on linear layers (8-bit and 4-bit ones too), transformers'
    Conv1D, embeddings, and convolutions with groups=1. Pairs with no trainable factor are left out.

    Args:
        model_or_tuples: a model with PEFT's LoRA layers, also within DDP or torch.compile; or
            (name, A [r, in], B [out, r], scaling) of each weight [out, in], from any LoRA code.
        adapter: its name or names; None: what is active. Where several train on one module, the pairs are called
            ``<name>@<adapter>``.
        estimator: of G = dL/dU: ``"tangent"``, what the factors' gradients tell of it, whatever the gauge;
            ``"factored"``, the published code's; ``"exact"``, G itself by hooks on linear layers, float32
            [m, n] a pair, summed over the processes of a job.
        preset: ``"paper"``: as the published implementation of arXiv 2501.13669, i.e. ``estimator="factored"``,
            ω clamped at every step, and U² as denominator.

    Raises:
        ValueError, TypeError: layers that do not add s·B·A to their weight (DoRA, AdaLoRA, ...), merged or tied ones,
            factors that do not fit; the message names the module and says what to do.
        ImportError: a model was given and PEFT is not installed.

    >>> import torch
    >>> A, B = torch.nn.Parameter(torch.randn(2, 8)), torch.nn.Parameter(torch.zeros(4, 2))
    >>> pairs = lora_pairs([("layers.0.weight", A, B, 0.5)])
    >>> pairs[0].name, pairs[0].shape, pairs[0].rank
    ('layers.0.weight', torch.Size([4, 8]), 2)
    """
    estimator_name, clamp, origin = _options(estimator, preset)
    names: dict[str, str] = {}
    known = None
    if isinstance(model_or_tuples, nn.Module):
        found, names, known = _of_model(model_or_tuples, adapter)
    else:
        _validate_lora.source(model_or_tuples)
        _validate_lora.adapters_of_tuples(adapter)
        found = _of_tuples(model_or_tuples)
    pairs = LoraPairs(
        (item.pair for item in found), names, estimator=estimator_name, clamp=clamp, origin=origin, known=known
    )
    for _, modules, _ in found:
        close_earlier(modules)
    if estimator == "exact":
        for pair, _, reason in found:
            _validate_lora.exact(pair.name, reason)
        for pair, modules, _ in found:  # after all checks: a refusal leaves no hook
            pair.gatherer = Gatherer(modules[0], modules[1], pair.scaling, pair.transposed)
    return pairs


def _options(estimator: str, preset: str | None) -> tuple[str, str, str]:
    """Return estimator, clamp and origin."""
    _validate.choice("estimator", estimator, ESTIMATORS)
    _validate.choice("preset", preset, (*PRESETS, None))
    if estimator == "exact" and preset is not None:
        _validate_lora.preset_and_exact(preset)
    return (estimator, "end", "start") if preset is None else PRESETS[preset]


class _Found(NamedTuple):
    pair: LoraPair
    modules: tuple[nn.Module, ...]  # lora_A and lora_B, where they are modules
    not_exact: str  # why the exact estimator cannot serve, or ''


def _pair(
    name: str, up: Tensor, down: Tensor, scaling: Any, *,
    transposed: bool = False, dims: int = 2, features: tuple[int | None, int | None] = (None, None),
) -> LoraPair:  # fmt: skip
    _validate_lora.factors(name, up, down, dims, features)
    shape = torch.Size((up.shape[0], *down.shape[1:]))
    shape = torch.Size(reversed(shape)) if transposed else shape
    return LoraPair(name, up, down, _validate_lora.scaling(name, scaling), transposed, shape)


def _of_tuples(rows: Iterable[Any]) -> list[_Found]:
    found = []
    for index, row in enumerate(rows):
        _validate_lora.entry(index, row)
        name, down, up, scaling = row
        if up.requires_grad or down.requires_grad:
            found.append(_Found(_pair(unwrap(name), up, down, scaling), (), "comes as tensors without their modules"))
    if not found:
        _validate_lora.nothing_trainable("the tuples")
    return found


# ---- PEFT ----


def _factor(module: Any, adapter: str, letter: str) -> Tensor | None:
    """Return A or B of an adapter, None where the layer does not have it."""
    for kept in (getattr(module, f"lora_{letter}"), getattr(module, f"lora_embedding_{letter}")):
        if adapter in kept:
            return kept[adapter] if isinstance(kept[adapter], Tensor) else getattr(kept[adapter], "weight", None)
    return None


def _known_adapters(module: Any) -> set[str]:
    return {*module.lora_A, *module.lora_embedding_A}


def _trains(module: Any, adapter: str) -> bool:
    factors = (_factor(module, adapter, letter) for letter in "AB")
    return any(factor is not None and factor.requires_grad for factor in factors)


def _layers(model: nn.Module) -> dict[str, Any]:
    """Return the LoRA layers of a model by path."""
    try:
        from peft.tuners.lora import LoraLayer
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as missing:
        _validate_lora.no_peft(missing)
    modules = dict(model.named_modules())
    layers = {path: module for path, module in modules.items() if isinstance(module, LoraLayer)}
    others = {path: module for path, module in modules.items() if isinstance(module, BaseTunerLayer)}
    others = {path: module for path, module in others.items() if path not in layers}
    configs = [config for module in modules.values() for config in _configs(module)]
    _validate_lora.lora_layers(
        model, len(layers), others, {str(getattr(c.peft_type, "value", c.peft_type)) for c in configs}
    )
    return layers


def _configs(module: nn.Module) -> list[Any]:
    configs = getattr(module, "peft_config", None)
    return list(configs.values()) if isinstance(configs, dict) else []


def _of_model(model: nn.Module, adapter: str | Sequence[str] | None) -> tuple[list[_Found], dict[str, str], Known]:
    layers = _layers(model)
    known = {name for module in layers.values() for name in _known_adapters(module)}
    requested = _validate_lora.adapters(adapter, known) if adapter is not None else None
    bare = _bare_names(model)
    found, weights = [], []
    for path, module in layers.items():
        wanted = module.active_adapters if requested is None else requested
        chosen = [name for name in wanted if name in _known_adapters(module) and _trains(module, name)]
        weights += [(path, module.get_base_layer())] if chosen else []
        for name in chosen:
            base = bare(f"{path}.weight" if path else "weight")
            found.append(_of_layer(path, module, name, base if len(chosen) == 1 else f"{base}@{name}"))
    if not found:
        active = {name for module in layers.values() for name in module.active_adapters}
        _validate_lora.nothing_trainable(f"adapter(s) {_validate.listed(requested or active)}")
    _validate_lora.weights_used_once((path, getattr(base, "weight", None)) for path, base in weights)
    factors = {id(_factor(m, name, letter)) for m in layers.values() for name in _known_adapters(m) for letter in "AB"}
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    names = _artifact_names((name for name, param in trained.items() if id(param) not in factors), bare)
    return found, names, Known({id(trained[name]): kept for name, kept in names.items()}, frozenset(factors))


def _of_layer(path: str, module: Any, adapter: str, name: str) -> _Found:
    """Read one adapter of one LoRA layer; of the base weight, which may be quantised, nothing is read."""
    _validate_lora.layer(path, module, adapter)
    kinds = _validate_lora.classes(module)
    up, down = _factor(module, adapter, "B"), _factor(module, adapter, "A")
    assert up is not None
    assert down is not None
    embedding, convolution = "Embedding" in kinds, "_ConvNd" in kinds
    pair = _pair(
        name, up, down, module.scaling[adapter], transposed=embedding or getattr(module, "fan_in_fan_out", False),
        dims=2 + (len(module.get_base_layer().kernel_size) if convolution else 0),
        features=(module.out_features, module.in_features),
    )  # fmt: skip
    if embedding or convolution:
        return _Found(pair, (), "is an embedding's" if embedding else "is a convolution's")
    return _Found(pair, (module.lora_A[adapter], module.lora_B[adapter]), "")


def _bare_names(model: nn.Module) -> Callable[[str], str]:
    """Return what strips a parameter's name of the components that PEFT and launchers put into it."""
    added = set()
    for path, module in model.named_modules():
        kinds, prefix = _validate_lora.classes(module), f"{path}." if path else ""
        if "PeftModel" in kinds or "PeftMixedModel" in kinds:
            added.add(f"{prefix}base_model")
        if "BaseTuner" in kinds:
            added.add(f"{prefix}model")
        if "BaseTunerLayer" in kinds:
            added.add(f"{prefix}base_layer")
        if "ModulesToSaveWrapper" in kinds:
            added.add(f"{prefix}modules_to_save")
            added |= {f"{prefix}modules_to_save.{adapter}" for adapter in module.modules_to_save}

    def bare(name: str) -> str:
        parts = name.split(".")
        return unwrap(".".join(part for i, part in enumerate(parts) if ".".join(parts[: i + 1]) not in added))

    return bare


def _artifact_names(trained: Iterable[str], bare: Callable[[str], str]) -> dict[str, str]:
    """Return parameter name → name in importance; copies of several adapters are told apart as ``<name>@<adapter>``."""
    names = {name: bare(name) for name in trained}
    taken = Counter(names.values())
    for name, short in names.items():
        _, _, copy = name.partition(".modules_to_save.")
        if taken[short] > 1 and copy:
            names[name] = f"{short}@{copy.split('.')[0]}"
    return names
