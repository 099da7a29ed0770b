"""The pairs of an optimizer: which tensors of its groups they are, their importance, and what is kept of them.

``state[B]`` and ``state[A]`` hold ``anchor`` (B*, A*) and ``start`` beside Adam's moments; ω of a pair is dense, shaped
as the base weight, in ``state[B]["effective_path_integral"]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from .. import _ops, _validate_lora
from .. import state as _state
from ..codecs.encoded import Encoded
from ..codecs.storage import CODES, DTYPES, Storage, fitting
from ..names import unwrap
from .pairs import Known, LoraPairs
from .reference import Product, move

if TYPE_CHECKING:
    from torch import Tensor

    from .pairs import LoraPair

OMEGA = _state.EFFECTIVE


@dataclass(eq=False)
class Bound:
    """One pair within an optimizer; parameters are looked up anew each time, because launchers replace them."""

    geometry: LoraPair  # its shapes and names, without its data
    group: int
    up: int  # position of B in the group
    down: int
    importance: Encoded | None = None  # a matrix once bound
    unit_scale: float = 0.0
    largest: float = 0.0

    @property
    def name(self) -> str:
        """The base weight's name."""
        return self.geometry.name

    @cached_property
    def kind(self) -> tuple[Any, ...]:
        """What pairs that are computed together have in common: shapes, orientation and scaling."""
        geometry = self.geometry
        return geometry.up.shape, geometry.down.shape, geometry.transposed, geometry.scaling

    def params(self, groups: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
        """Return B and A as they are now."""
        members = groups[self.group]["params"]
        return members[self.up], members[self.down]


def compute(tensor: Tensor) -> Tensor:
    """Return it in the dtype of the arithmetic."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class Space:
    """All pairs of an optimizer."""

    def __init__(self, pairs: LoraPairs, groups: Sequence[Mapping[str, Any]], slots: Sequence[Sequence[_state.Slot]]):
        self.estimator, self.clamp, self.origin = pairs.estimator, pairs.clamp == "step", pairs.origin
        self.gatherers = {pair.name: pair.gatherer for pair in pairs}
        self._scales: dict[Any, Tensor] = {}
        places = {id(p): (g, i) for g, group in enumerate(groups) for i, p in enumerate(group["params"])}
        self.bounds: list[Bound] = []
        for pair in pairs:
            up, down = _validate_lora.members(pair, places)
            outline = {side: torch.empty_like(getattr(pair, side), device="meta") for side in ("up", "down")}
            self.bounds.append(Bound(replace(pair, gatherer=None, **outline), up[0], up[1], down[1]))
        for bound in self.bounds:
            for position, left in ((bound.up, True), (bound.down, False)):
                slot = slots[bound.group][position]
                slot.bound, slot.left = bound, left is not bound.geometry.transposed
        self._names, self._known = {unwrap(name): kept for name, kept in pairs.names.items()}, pairs.known
        for group, members in zip(groups, slots, strict=True):
            self.rename(members, group["params"])

    def __iter__(self) -> Iterator[Bound]:
        return iter(self.bounds)

    def rename(self, slots: Sequence[_state.Slot], params: Sequence[Tensor]) -> None:
        """Call parameters that are no factors as their importance is; refuse factors of pairs that are not here."""
        for slot, param in zip(slots, params, strict=True):
            if slot.bound is None and param.requires_grad and id(param) in self._known.factors:
                _validate_lora.uncovered_factor(slot.name)
        for slot, param in zip(slots, params, strict=True):
            slot.name = self._known.names.get(id(param)) or self._names.get(slot.name, slot.name)

    @property
    def form(self) -> str:
        """How ω is recorded: what a resumed run must repeat."""
        return f"estimator={self.estimator!r}, clamp={self.clamp}, origin={self.origin!r}"

    def describe(self) -> str:
        """Say what the pairs are and how their importance is recorded."""
        return f"lora: {len(self.bounds)} pairs in effective space, estimator: {self.estimator}"

    def scales(self, values: Sequence[float], device: torch.device) -> Tensor:
        """Return numbers as float64 on the device, uploaded once."""
        key = (device, *values)
        if key not in self._scales:
            if len(self._scales) > 256:  # the coefficients changed often
                self._scales.clear()
            self._scales[key] = torch.tensor(values, dtype=torch.float64).to(device, non_blocking=True)
        return self._scales[key]

    def bind(
        self, groups: Sequence[Mapping[str, Any]], state: Any, storage: Storage, anchors: Mapping[str, Tensor] | None,
        record: bool, names: Sequence[Sequence[str]],
    ) -> None:  # fmt: skip
        """Take anchors and starts, and bring importance into the form in which it is read; see ``state.bind``."""
        for bound in self.bounds:
            params = bound.params(groups)
            for param, position in zip(params, (bound.up, bound.down), strict=True):
                given = anchors.get(names[bound.group][position]) if anchors else None
                kept = state[param]
                weights = _state.whole(param, kept)
                if bound.importance is not None and "anchor" not in kept:
                    kept["anchor"] = (weights if given is None else given).detach().to(weights, copy=True)
                if record and "start" not in kept:
                    shared = "anchor" in kept and torch.equal(kept["anchor"].to(weights), weights)
                    kept["start"] = kept["anchor"] if shared else weights.clone()
            if record and OMEGA not in state[params[0]]:
                dtype = _state.compute_dtype(params[0])
                shape = bound.geometry.shape
                state[params[0]][OMEGA] = torch.zeros(shape, dtype=dtype, device=params[0].device)
            if bound.importance is not None:
                bound.importance = as_matrix(kept_importance(bound, params[0], storage), bound.geometry)

    def drop_gradients(self) -> None:
        """Forget the dense gradients that ``exact`` gathered."""
        for gatherer in self.gatherers.values():
            if gatherer is not None:
                gatherer.take()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": Known({}, frozenset())}  # ids mean nothing to a copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.estimator == "exact":
            _validate_lora.exact_copied()
        return super().__reduce_ex__(protocol)

    def moved(self, bound: Bound, groups: Sequence[Mapping[str, Any]], state: Any) -> Tensor:
        """Return U_end − U_start (U_end with ``origin="zero"``), dense and shaped as the base weight."""
        up, down = bound.params(groups)
        after = factors_of(bound, [_state.whole(p, state[p]) for p in (up, down)])
        if self.origin == "zero":
            return (after.left * bound.geometry.scaling @ after.right).view(bound.geometry.shape)
        before = factors_of(bound, [state[p]["start"] for p in (up, down)])
        left, right = move(before, after, bound.geometry.scaling)
        return (left @ right).view(bound.geometry.shape)


def factors_of(bound: Bound, tensors: Sequence[Tensor]) -> Product:
    """Return (B-like, A-like) tensors as the factors of the base weight as a matrix."""
    up, down = map(compute, tensors)
    return Product(*bound.geometry.factors(up, down))


def kept_importance(bound: Bound, param: Tensor, storage: Storage) -> Encoded:
    """Return the importance on the parameter's device in the form that the storage options ask for."""
    assert bound.importance is not None
    given = bound.importance.to(param.device)
    if storage.importance is not None or param.dtype is torch.float64:
        kept = fitting(storage.importance or "fp32", bound.geometry.shape, param.dtype)
    else:
        kept = given.format if given.format in ("bf16", "rank1", *CODES) else "fp32"
    if kept == given.format:
        return given._replace(values=given.values.contiguous())
    if kept in CODES or kept == "rank1":
        return _ops.merge([given], [None], [kept], (1.0, 0.0))[0][0]
    return Encoded(_ops.decoded(given).to(DTYPES[kept]).contiguous(), None, kept)


def as_matrix(importance: Encoded, geometry: LoraPair) -> Encoded:
    """Return it with two dimensions; block codes lie along the last, so that flattening keeps them whole."""
    rows = geometry.matrix_shape[0]
    scales = importance.scales
    if importance.format == "rank1":
        return importance._replace(scales=None if scales is None else scales.reshape(-1))
    flat = None if scales is None else scales.reshape(rows, -1)
    return Encoded(importance.values.reshape(rows, -1), flat, importance.format)
