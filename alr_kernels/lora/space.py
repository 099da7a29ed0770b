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

from .. import _dtensor, _ops, _validate_distributed, _validate_lora
from .. import state as _state
from ..codecs.encoded import Encoded
from ..codecs.storage import CODES, DTYPES, Storage, fitting
from ..importance.sharded import encoded_part
from ..names import unwrap
from .pairs import Known, LoraPairs, as_factors
from .pairs import as_kept as pairs_as_kept
from .reference import Product, move

if TYPE_CHECKING:
    from torch import Tensor

    from .._dtensor import Sharding
    from .pairs import LoraPair

OMEGA = _state.EFFECTIVE


@dataclass(eq=False)
class Bound:
    """One pair within an optimizer; parameters are looked up anew each time, because launchers replace them."""

    geometry: LoraPair  # its shapes and names, without its data
    group: int
    up: int  # position of B in the group
    down: int
    importance: Encoded | None = None  # a matrix once placed: with sharded factors, the rows that are here
    placed: bool = False
    rows: Sharding | None = None  # of ω and Ω, once bound; and of the factors
    of_factors: tuple[Sharding | None, Sharding | None] = (None, None)
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

    def sharding(self, param: Tensor) -> Sharding | None:
        """Return that of ω and Ω, by the sharding of a factor; None if that has none."""
        return _dtensor.like(_dtensor.Sharding.of(self.name, param), self.geometry.shape)

    def shard(self, params: Sequence[Tensor]) -> None:
        """Note how factors, ω and Ω are sharded."""
        up, down = (_dtensor.Sharding.of(f"factor of {self.name}", param) for param in params)
        _validate_distributed.factors_alike(self.name, up, down)
        self.of_factors, self.rows = (up, down), self.sharding(params[0])

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

    def place(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Note how everything is sharded, and refuse what cannot be; nothing is taken yet."""
        for bound in self.bounds:
            bound.shard(bound.params(groups))
            if bound.importance is not None and not bound.placed:
                _dtensor.check_part(f"importance of {bound.name}", bound.importance.values, bound.rows)

    def bind(
        self, groups: Sequence[Mapping[str, Any]], state: Any, storage: Storage, anchors: Mapping[str, Tensor] | None,
        record: bool, names: Sequence[Sequence[str]],
    ) -> None:  # fmt: skip
        """Take anchors and starts, and bring importance into the form in which it is read; see ``state.bind``."""
        for bound in self.bounds:
            params = bound.params(groups)
            for param, position, sharding in zip(params, (bound.up, bound.down), bound.of_factors, strict=True):
                given = anchors.get(names[bound.group][position]) if anchors else None
                given = None if given is None else _dtensor.part_of(f"anchor of {bound.name}", given, sharding)
                kept = state[param]
                weights = _state.whole(param, kept)
                if bound.importance is not None and "anchor" not in kept:
                    kept["anchor"] = (weights if given is None else given).detach().to(weights, copy=True)
                if record and "start" not in kept:
                    shared = "anchor" in kept and torch.equal(kept["anchor"].to(weights), weights)
                    kept["start"] = kept["anchor"] if shared else weights.clone()
            if record and OMEGA not in state[params[0]]:
                dtype = _state.compute_dtype(params[0])
                shape = bound.geometry.shape if bound.rows is None else bound.rows.local_shape
                state[params[0]][OMEGA] = torch.zeros(shape, dtype=dtype, device=params[0].device)
            if bound.importance is not None:
                bound.importance = as_matrix(kept_importance(bound, params[0], storage))
                bound.placed = True

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
        """Return U_end − U_start (U_end with ``origin="zero"``), dense, shaped as what is here of the base weight."""
        up, down = bound.params(groups)
        shape = bound.geometry.shape if bound.rows is None else bound.rows.local_shape
        after = factors_of(bound, [_state.whole(p, state[p]) for p in (up, down)])
        if self.origin == "zero":
            return (after.left * bound.geometry.scaling @ after.right).view(shape)
        before = factors_of(bound, [state[p]["start"] for p in (up, down)])
        left, right = move(before, after, bound.geometry.scaling)
        return (left @ right).view(shape)


def matrices(bound: Bound, up: Tensor | None, down: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return stacked tensors like B and A as left [P, m, r] and right [P, r, n] of the weight; a missing one is None.

    Of sharded factors they are given as they lie: the left is then the rows of ω that are here, the right is whole.
    """
    up, down = (None if side is None else compute(side) for side in (up, down))
    transposed = bound.geometry.transposed
    if bound.rows is not None:
        of_up, of_down = bound.of_factors
        if transposed:  # the rows of ω are columns of A
            up = None if up is None else _dtensor.gather_rows(up, _known(of_up))
        down = None if down is None else _dtensor.gather_rows(down, _known(of_down))
    left, right = as_factors(up, down, transposed, stacked=True)
    if transposed and bound.rows is not None and left is not None:
        left = left[:, bound.rows.rows]
    return left, right


def as_kept(bound: Bound, left: Tensor | None, right: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return stacked left [P, m, r] and right [P, r, n] in the shapes of what is here of B and A.

    The inverse of :func:`matrices`.
    """
    geometry = bound.geometry
    up, down = geometry.up.shape, geometry.down.shape
    if bound.rows is None:
        return pairs_as_kept(left, right, geometry.transposed, up, down)
    of_up, of_down = map(_known, bound.of_factors)
    if not geometry.transposed:
        b, a = pairs_as_kept(left, right, False, of_up.local_shape, down)
        return b, None if a is None else a[:, of_down.rows]
    left = None if left is None else _dtensor.gather_rows(left, bound.rows)
    b, a = pairs_as_kept(left, right, True, up, down)
    return None if b is None else b[:, of_up.rows], None if a is None else a[:, of_down.rows]


def _known(sharding: Sharding | None) -> Sharding:
    assert sharding is not None
    return sharding


def factors_of(bound: Bound, tensors: Sequence[Tensor]) -> Product:
    """Return what is here of (B-like, A-like) as factors of the base weight as a matrix; see :func:`matrices`."""
    up, down = (tensor.unsqueeze(0) for tensor in tensors)
    left, right = matrices(bound, up, down)
    assert left is not None
    assert right is not None
    return Product(left.squeeze(0), right.squeeze(0))


def kept_importance(bound: Bound, param: Tensor, storage: Storage) -> Encoded:
    """Return the importance of the rows that are here, on the parameter's device, as the storage options ask for."""
    assert bound.importance is not None
    rows = None if bound.placed else bound.sharding(param)
    given = encoded_part(bound.importance, bound.name, rows).to(param.device)
    if storage.importance is not None or param.dtype is torch.float64:
        kept = fitting(storage.importance or "fp32", bound.geometry.shape, param.dtype)
    else:
        kept = given.format if given.format in ("bf16", "rank1", *CODES) else "fp32"
    if kept == given.format:
        return given._replace(values=given.values.contiguous())
    if kept in CODES or kept == "rank1":
        return _ops.merge([given], [None], [kept], (1.0, 0.0))[0][0]
    return Encoded(_ops.decoded(given).to(DTYPES[kept]).contiguous(), None, kept)


def as_matrix(importance: Encoded) -> Encoded:
    """Return it with two dimensions; block codes lie along the last, so that flattening keeps them whole."""
    scales = importance.scales
    if importance.format == "rank1":
        return importance._replace(scales=None if scales is None else scales.reshape(-1))
    flat = None if scales is None else scales.flatten(1)
    return Encoded(importance.values.flatten(1), flat, importance.format)
