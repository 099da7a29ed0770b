"""Exact per-sample gradients of a whole batch in one forward and backward, without one gradient kept in memory.

While the batch runs, weight gradients are off: forward hooks keep each layer's input x, and when the gradient δ of its
output arrives, the layer's Σ_n |g_n|^power is formed at once and both are let go. What a layer's g_n is:

    Linear, Conv1D    δ_nᵀ x_n, a sum over tokens; its bias Σ_t δ_nt
    Embedding         row v: Σ of δ_nt over the tokens t with id v
    LayerNorm, RMSNorm  Σ_t δ_nt · x̂_nt, where the layer is w · x̂ (+ b)

A weight that is used several times waits until the backward pass is over, because its g_n is the sum over all uses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import _ops
from .reference import raised

NORM = re.compile(r"(RMS|Layer)Norm$")


class NotBatchable(Exception):  # noqa: N818 - a finding, not an error: the samples are then taken one by one
    """Why per-sample gradients of this model or batch cannot be formed in one pass."""


class Part(NamedTuple):
    """What one use of a weight contributes to its per-sample gradients."""

    kind: str  # "linear": δ_nᵀ x_n; "rows": δ summed into rows; "vector": given as it is
    deltas: Tensor  # [n, t, rows], [n, t, d] or [n, d]
    inputs: Tensor | None = None  # [n, t, columns]; [n, t] row numbers


@dataclass
class Weight:
    """A trainable parameter, its Ω, and what is known of it in the present batch."""

    name: str
    importance: Tensor
    kinds: set[str] = field(default_factory=set)
    owner: str = ""  # a class of module without a rule that holds it
    calls: int = 0
    waiting: list[Part] = field(default_factory=list)


@dataclass
class Layer:
    """A module that owns trainable parameters, and the rule for them."""

    name: str
    module: nn.Module
    rule: Callable[[Layer, Capture, Tensor, int], Iterator[tuple[Weight, Part]]]
    weights: dict[str, Weight]  # by their names in the module
    proportional: bool | None = None  # a norm: whether its output is w · x̂, so that x̂ is the output over w


@dataclass
class Capture:
    """Input of one call of a layer, and of a norm its output, until the output's gradient is there."""

    x: Tensor
    x_version: int
    y: Tensor | None = None
    y_version: int = 0


def _as_tokens(tensor: Tensor, samples: int) -> Tensor:
    return tensor.reshape(samples, -1, tensor.shape[-1])


def _bias(layer: Layer, delta: Tensor) -> Iterator[tuple[Weight, Part]]:
    if bias := layer.weights.get("bias"):
        yield bias, Part("vector", delta.sum(1, dtype=bias.importance.dtype))


def _linear(layer: Layer, seen: Capture, delta: Tensor, samples: int) -> Iterator[tuple[Weight, Part]]:
    delta = _as_tokens(delta, samples)
    if weight := layer.weights.get("weight"):
        yield weight, Part("linear", delta, _as_tokens(seen.x, samples))
    yield from _bias(layer, delta)


def _conv1d(layer: Layer, seen: Capture, delta: Tensor, samples: int) -> Iterator[tuple[Weight, Part]]:
    delta = _as_tokens(delta, samples)
    if weight := layer.weights.get("weight"):  # lies transposed: [in, out]
        yield weight, Part("linear", _as_tokens(seen.x, samples), delta)
    yield from _bias(layer, delta)


def _embedding(layer: Layer, seen: Capture, delta: Tensor, samples: int) -> Iterator[tuple[Weight, Part]]:
    delta, rows = _as_tokens(delta, samples), seen.x.reshape(samples, -1)
    if (padding := getattr(layer.module, "padding_idx", None)) is not None:
        delta = delta.masked_fill((rows == padding)[..., None], 0.0)
    if (scale := getattr(layer.module, "embed_scale", None)) is not None:  # Gemma, BART: the rows times a constant
        delta = delta * scale
    yield layer.weights["weight"], Part("rows", delta, rows)


def _norm(layer: Layer, seen: Capture, delta: Tensor, samples: int) -> Iterator[tuple[Weight, Part]]:
    """The module is affine in its weight: w · x̂ + b or (1 + w) · x̂, so that x̂ = f(1) − f(0).

    Where the output turns out to be w · x̂ and no w is near zero, Σ_t δ · x̂ = Σ_t δ · y / w from then on.
    """
    if weight := layer.weights.get("weight"):
        divided = layer.proportional and seen.y is not None and seen.y._version == seen.y_version
        grads = delta.to(weight.importance.dtype) * (seen.y if divided else _normalised(layer, seen))
        grads = grads.reshape(samples, -1, delta.shape[-1]).sum(1)
        yield weight, Part("vector", grads / layer.module.weight.detach() if divided else grads)
    yield from _bias(layer, _as_tokens(delta, samples))


def _normalised(layer: Layer, seen: Capture) -> Tensor:
    """Return x̂, and find out whether the output is proportional to it."""
    module, x = layer.module, seen.x
    if type(module).forward is nn.LayerNorm.forward:
        return nn.functional.layer_norm(x, module.normalized_shape, eps=module.eps)
    parameters, kept = module._parameters, dict(module._parameters)
    weight = kept["weight"]
    assert weight is not None
    try:
        parameters["weight"] = nn.Parameter(torch.ones_like(weight), requires_grad=False)
        normalised = module.forward(x)
        parameters["weight"] = nn.Parameter(torch.zeros_like(weight), requires_grad=False)
        normalised = normalised - module.forward(x)
    finally:
        parameters.update(kept)
    if layer.proportional is None and seen.y is not None:
        large = bool((weight.abs() > 1e-3 * weight.abs().max()).all())
        apart = (seen.y - weight * normalised).abs().max()
        layer.proportional = large and bool(apart <= 4 * torch.finfo(seen.y.dtype).eps * seen.y.abs().max())
    return normalised


def _rule_of(module: nn.Module) -> tuple[Any, dict[str, str]] | None:
    """Return the rule for a kind of module and what its parameters are, or None when there is none."""
    if "forward" in module.__dict__:  # replaced on this very module: it may do anything
        return None
    forward = type(module).forward
    if forward is nn.Linear.forward:
        return _linear, {"weight": "linear", "bias": "vector"}
    if isinstance(module, nn.Embedding) and module.max_norm is None and not module.scale_grad_by_freq:
        if forward is nn.Embedding.forward or hasattr(module, "embed_scale"):
            return _embedding, {"weight": "rows"}
        return None
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # of transformers
        return _conv1d, {"weight": "transposed", "bias": "vector"}
    weight = module._parameters.get("weight")
    if NORM.search(type(module).__name__) and weight is not None and weight.dim() == 1:
        return _norm, {"weight": "vector", "bias": "vector"}
    return None


class PerSample:
    """Adds Σ_n |g_n|^power of a batch to the importance of every trainable parameter of a model.

    Args:
        model: in the mode in which it is to be run.
        importance: parameter's name → Ω, for all trainable parameters.
        power: 2 for the Fisher information, 1 for MAS.

    Raises:
        NotBatchable: a trainable parameter is owned by a kind of module without a rule.
    """

    def __init__(self, model: nn.Module, importance: Mapping[str, Tensor], power: int) -> None:
        self.model = model
        self.power = power
        self.narrow = False  # whether 16-bit numbers passed by
        self._samples = 0
        self._forward = False
        self._weights: dict[nn.Parameter, Weight] = {}
        for name, param in model.named_parameters():
            if name in importance:
                self._weights[param] = Weight(name, importance[name])
        self._layers = [layer for name, module in model.named_modules() if (layer := self._layer(name, module))]
        for weight in self._weights.values():
            if not weight.kinds:
                raise NotBatchable(f"there is no per-sample rule for {weight.name!r} of {weight.owner}")
            if len(weight.kinds) > 1 and weight.kinds != {"linear", "rows"}:
                raise NotBatchable(f"parameter {weight.name!r} is shared by layers of different kinds")

    def _layer(self, name: str, module: nn.Module) -> Layer | None:
        owned = {key: p for key, p in module._parameters.items() if p is not None and p in self._weights}
        if not owned:
            return None
        known = _rule_of(module)
        if known is None or not owned.keys() <= known[1].keys():
            for param in owned.values():  # right only if a layer with a rule shares them all
                self._weights[param].owner = type(module).__name__
            return None
        for key, param in owned.items():
            self._weights[param].kinds.add(known[1][key])
        return Layer(name, module, known[0], {key: self._weights[p] for key, p in owned.items()})

    def add(self, losses: Callable[[], Tensor], samples: int, started: Callable[[Tensor], None]) -> None:
        """Run a batch: ``losses`` returns [n], one number a sample; ``started`` sees it before Ω is written to.

        Raises:
            NotBatchable: something in the forward pass does not have the batch as its first dimension. Ω is as before.
        """
        self._samples = samples
        for weight in self._weights.values():
            weight.calls, weight.waiting = 0, []
        with self._hooked(), torch.enable_grad():
            self._forward = True
            values = losses()
            self._forward = False
            started(values.detach())
            if values.requires_grad:
                values.sum().backward()
        for weight in self._weights.values():
            waiting, weight.waiting = weight.waiting, []
            if waiting:
                self._finish(weight, waiting)

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        trainable = [param for param in self._weights if param.requires_grad]
        hooks = []
        try:
            for layer in self._layers:
                hooks.append(layer.module.register_forward_hook(self._called(layer), with_kwargs=True))
            for param in trainable:
                param.requires_grad_(False)
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for param in trainable:
                param.requires_grad_(True)
            self._forward = False

    def _called(self, layer: Layer) -> Callable[..., Tensor | None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
            if self._forward:  # a checkpointed part is run again in the backward pass
                for weight in layer.weights.values():
                    weight.calls += 1
            if not torch.is_grad_enabled():
                return None
            given = [*args, *kwargs.values()]
            if len(given) != 1 or not isinstance(given[0], Tensor) or not isinstance(output, Tensor):
                raise NotBatchable(f"layer {layer.name!r} is called with more than one tensor")
            return self._capture(layer, given[0], output)

        return hook

    def _capture(self, layer: Layer, x: Tensor, output: Tensor) -> Tensor:
        n = self._samples
        if n > 1 and layer.rule is _embedding and len(x) == 1:  # positions, which the model adds to every sample
            x, output = x.expand(n, *x.shape[1:]), output.expand(n, *output.shape[1:])
        if n > 1 and ((x.dim() < 2 and layer.rule is not _embedding) or len(x) != n or len(output) != n):
            raise NotBatchable(
                f"layer {layer.name!r} is given {tuple(x.shape)}, whose first dimension is not the batch of {n}"
            )
        if not output.requires_grad:
            output = output.detach().requires_grad_().clone()  # a copy: the model may write to it
        self.narrow |= output.dtype in (torch.bfloat16, torch.float16)
        seen = [Capture(x.detach(), x._version)]
        if layer.rule is _norm:
            seen[0].y, seen[0].y_version = output.detach(), output._version
        output.register_hook(lambda delta: self._arrived(layer, seen.pop(), delta))  # popped, because the hook stays
        return output

    @torch.no_grad()
    def _arrived(self, layer: Layer, seen: Capture, delta: Tensor) -> None:
        if seen.x._version != seen.x_version:
            raise NotBatchable(f"the input of layer {layer.name!r} is overwritten after the layer has read it")
        for weight, part in layer.rule(layer, seen, delta, self._samples):
            if weight.calls == 1:
                self._finish(weight, [part])
            else:
                weight.waiting.append(part)

    @torch.no_grad()
    def _finish(self, weight: Weight, parts: list[Part]) -> None:
        """Add Σ_n |Σ_parts g_n|^power to Ω."""
        omega = weight.importance
        if parts[0].kind == "vector":
            grads = parts[0].deltas if len(parts) == 1 else sum(part.deltas for part in parts)
            omega.add_(raised(grads, self.power).sum(0).view_as(omega))
            return
        linear = _joined([part for part in parts if part.kind == "linear"])
        if linear is not None:
            _ops.fisher_linear_(omega, *linear, 1.0, self.power)
        rows = _joined([part for part in parts if part.kind == "rows"])
        if rows is not None:
            self._add_rows(omega, *rows, linear)

    def _add_rows(self, omega: Tensor, deltas: Tensor, rows: Tensor, linear: tuple[Tensor, Tensor] | None) -> None:
        """Add Σ_n |e_n|^power of an embedding; with a tied linear layer, what |l_n + e_n|^power has beyond |l_n|^power.

        e_n is zero but in the rows that sample n holds, so that nothing else of l_n is needed.
        """
        samples = len(rows)
        keys = rows.long() * samples + torch.arange(samples, device=rows.device)[:, None]
        held, place = torch.unique(keys.reshape(-1), return_inverse=True)
        grads = omega.new_zeros(len(held), omega.shape[1])
        _ops.add_rows_(grads, place, deltas.reshape(-1, omega.shape[1]).to(omega.dtype))
        row, sample = held // samples, held % samples
        if linear is None:
            _ops.add_rows_(omega, row, raised(grads, self.power))
            return
        others = torch.empty_like(grads)
        for n in range(samples):
            mine = sample == n
            delta = linear[0][n][:, row[mine]]
            others[mine] = delta.T.to(omega.dtype) @ linear[1][n].to(omega.dtype)
        both = grads * (grads + 2 * others) if self.power == 2 else (grads + others).abs() - others.abs()
        _ops.add_rows_(omega, row, both)


def _joined(parts: list[Part]) -> tuple[Tensor, Any] | None:
    """Return δ and x of several uses of a weight as those of one use with more tokens."""
    if len(parts) < 2:
        return (parts[0].deltas, parts[0].inputs) if parts else None
    inputs: list[Any] = [part.inputs for part in parts]
    return torch.cat([part.deltas for part in parts], 1), torch.cat(inputs, 1)
