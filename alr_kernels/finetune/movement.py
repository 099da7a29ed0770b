"""Where the pull was strong and where weights moved: coefficients by layer and module, and moves by importance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import _dtensor, _ops, _validate, _validate_importance
from .. import state as _state
from ..codecs import rounding
from ..codecs.encoded import Encoded
from ..importance.sharded import encoded_part
from ..importance.statistics import BINS, EDGES, bin_of
from ..lora.reference import move, row_blocks
from ..lora.space import factors_of
from ..names import layer_of, module_of, unwrap

if TYPE_CHECKING:
    from torch import Tensor

    from .._dtensor import Sharding
    from ..coefficients import LayerCoefficients
    from ..importance.artifact import Importance
    from ..lora.space import Bound
    from ..optim import AlrAdamW


def coefficient_rows(importance: Importance, coeffs: LayerCoefficients) -> dict[str, Any]:
    """Return how layers are weighed and how that is spread over their tensors, as a dictionary fit for JSON.

    Args:
        importance: Ω; of LoRA its names are those of the base weights.
        coeffs: layer → α, of blocks or of modules.

    Returns:
        ``rule``, ``by``, ``temperature``, ``effective_layers``; ``values`` (layer → α); and ``modules``, for each
        tensor of the importance its ``name``, the block (``layer``) and its place there (``module``), ``alpha``,
        ``mass`` (Σ Ω) and ``share`` of Σ α·Ω over all.

    Raises:
        ValueError: the coefficients are those of other layers.

    >>> import torch
    >>> from alr_kernels import Importance, layer_coefficients
    >>> importance = Importance({"layers.0.up.weight": torch.ones(4), "layers.1.up.weight": torch.ones(4) * 3})
    >>> rows = coefficient_rows(importance, layer_coefficients(importance, "uniform"))
    >>> [(row["layer"], row["module"], row["mass"], row["share"]) for row in rows["modules"]]
    [('layers.0', 'up', 4.0, 0.25), ('layers.1', 'up', 12.0, 0.75)]
    """
    _validate.coefficient_mapping(coeffs, {layer_of(name, coeffs.by) for name in importance})
    stats = importance.stats
    alpha = {name: coeffs[layer_of(name, coeffs.by)] for name in stats}
    mass = {name: row.mean * row.numel for name, row in stats.items()}
    total = math.fsum(alpha[name] * mass[name] for name in stats)
    rows = []
    for name in stats:
        share = alpha[name] * mass[name] / total if total else 0.0
        place = dict(zip(("layer", "module"), module_of(name), strict=True))
        rows.append({"name": name, **place, "alpha": alpha[name], "mass": mass[name], "share": share})
    return {
        "rule": coeffs.rule,
        "by": coeffs.by,
        "temperature": coeffs.temperature,
        "effective_layers": coeffs.effective_layers,
        "values": dict(coeffs),
        "modules": rows,
    }


@dataclass(frozen=True)
class Movement:
    """How far weights are from their anchors, by importance.

    ``count``: weights with Ω in bin b, that is in [4^b · 2^-63, 4^(b+1) · 2^-63); the first bin has all below, 0
    included, and the last all above. ``square``: Σ (θ − θ*)² of those, in float64. Of a LoRA pair θ is U = s·B·A.
    """

    count: tuple[int, ...]
    square: tuple[float, ...]

    @classmethod
    @torch.no_grad()
    def of_optimizer(
        cls,
        optimizer: AlrAdamW,
        importance: Importance | None = None,
        anchor: Mapping[str, Tensor] | None = None,
    ) -> Movement:
        """Read it off the weights that an optimizer steps, a block of rows at a time; nothing is changed.

        Args:
            optimizer: with its LoRA pairs and masters, if it has such; importance and anchors unless they are given.
            importance: Ω by name; None: as the steps see it. For runs with different ones, or with none, to compare.
            anchor: θ* by parameter name (of LoRA both factors); what it has beyond the parameters with importance is
                ignored. None: the optimizer's anchors, which before the first step are the weights as they are.

        Raises:
            ValueError: there is no importance, or importance or anchors do not fit the parameters, or the optimizer
                has no anchor of a parameter.

        With sharded parameters every rank must call it, and gets the sums over all.
        """
        sums: dict[Any, tuple[Tensor, Sharding | None]] = {}
        for tensor in _tensors(optimizer, importance, anchor):
            key = (tensor.sharding and tensor.sharding.group, tensor.device)
            if key not in sums:
                sums[key] = torch.zeros(2, BINS, dtype=torch.float64, device=tensor.device), tensor.sharding
            tensor.add_to(sums[key][0])
        tables, shardings = zip(*sums.values(), strict=True)
        count, square = sum(table.cpu() for table in _dtensor.totals(tables, shardings)).tolist()
        return cls(tuple(map(int, count)), tuple(square))

    def as_dict(self) -> dict[str, list[Any]]:
        """Return ``edges`` (where the bins begin), ``count`` and ``mean_square_move``, fit for JSON.

        A mean is None where there is no weight, or where it is not finite.
        """
        means = [square / n if n else math.nan for square, n in zip(self.square, self.count, strict=True)]
        finite = [mean if math.isfinite(mean) else None for mean in means]
        return {"edges": list(EDGES), "count": list(self.count), "mean_square_move": finite}


class _Tensor(NamedTuple):
    """One tensor with importance: what is here of it."""

    importance: Encoded
    moved: Callable[[slice], Tensor]  # rows → θ − θ*, float64
    device: torch.device
    sharding: Sharding | None

    def add_to(self, sums: Tensor) -> None:
        """Add counts and squares to [2, BINS]."""
        shape = self.importance.shape
        for rows in row_blocks(shape[0] if shape else 1, shape[1:].numel()):
            omega = self.importance.rows(rows) if shape else Encoded.dense(self.importance.values.reshape(1))
            bins = bin_of(_ops.decoded(omega.to(self.device)))
            sums[0] += torch.bincount(bins, minlength=BINS)
            sums[1].index_add_(0, bins, self.moved(rows).square().reshape(-1))


def _tensors(
    optimizer: AlrAdamW, importance: Importance | None, anchor: Mapping[str, Tensor] | None
) -> Iterator[_Tensor]:
    """Yield what is here of every tensor with importance, in the same order on every rank."""
    state = optimizer.state
    given = _given_importance(optimizer, importance)
    members = [(slot, param) for _, slot, param in optimizer._members() if slot.layer_name in given]
    anchors = _given_anchors(optimizer, members, anchor)
    for slot, param in members:
        if slot.bound is None:
            sharding = _dtensor.Sharding.of(slot.name, param)
            kept, placed = given[slot.name]
            part = encoded_part(kept, slot.name, None if placed else sharding)
            start = anchors.get(param, state.get(param, {}).get("anchor"))
            yield _Tensor(part, _move_of(param, state.get(param, {}), start), param.device, sharding)
    for bound in optimizer._space or ():
        if bound.name in given:
            params = bound.params(optimizer.param_groups)
            bound.shard(params)
            kept, placed = given[bound.name]
            part = encoded_part(kept, bound.name, None if placed else bound.rows)
            now = [_state.whole(param, state.get(param, {})) for param in params]
            starts = [anchors.get(p, state.get(p, {}).get("anchor", x)) for p, x in zip(params, now, strict=True)]
            yield _Tensor(part, _move_of_pair(bound, now, starts), params[0].device, bound.rows)


def _given_importance(optimizer: AlrAdamW, importance: Importance | None) -> dict[str, tuple[Encoded, bool]]:
    """Return name → (Ω, whether it is only that of what is here)."""
    members = [(slot, param) for _, slot, param in optimizer._members()]
    if importance is not None:
        entries = _state.named_importance(importance, members, True, optimizer._space)
        assert entries is not None
        return {name: (entries.encoded(name), False) for name in entries}
    if optimizer._penalty is None:
        _validate_importance.needs_importance("Movement.of_optimizer")
    sources = [*(slot for slot, _ in members if slot.bound is None), *(optimizer._space or ())]
    return {x.name: (x.importance, x.placed) for x in sources if x.importance is not None}


def _given_anchors(
    optimizer: AlrAdamW, members: Sequence[tuple[_state.Slot, Tensor]], anchor: Mapping[str, Tensor] | None
) -> dict[Tensor, Tensor]:
    """Return parameter → what is here of a θ* that was given, and refuse parameters of which there is none."""
    wanted = {slot.name: param for slot, param in members}
    given: Mapping[str, Tensor] | None = optimizer._anchor
    if anchor is not None:
        named = (zip(g["params"], g.get("param_names") or (), strict=False) for g in optimizer.param_groups)
        known = {param: name for pairs in named for param, name in pairs}
        entries = {unwrap(name): tensor for name, tensor in anchor.items()}
        names = {slot.name: unwrap(known.get(param, slot.name)) for slot, param in members}
        given = {name: entries[own] for name, own in names.items() if own in entries}
        given = _state.named_anchor(given, wanted)
    elif optimizer._bound:
        _validate.anchor_mapping({}, {n: p for n, p in wanted.items() if "anchor" not in optimizer.state.get(p, {})})
    return {
        param: _dtensor.part_of(f"anchor of {slot.name}", given[slot.name], _dtensor.Sharding.of(slot.name, param))
        for slot, param in members
        if given and slot.name in given
    }


def _move_of(param: Tensor, state: Mapping[str, Any], anchor: Tensor | None) -> Callable[[slice], Tensor]:
    """Return rows → θ − θ* of what is here of a parameter, float64; without an anchor it has not moved."""

    def flat(tensor: Tensor) -> Tensor:
        return tensor.detach() if tensor.ndim else tensor.detach().reshape(1)

    here = flat(_dtensor.local(param))
    remainder = flat(state["remainder"]) if "remainder" in state else None

    def moved(rows: slice) -> Tensor:
        now = here[rows] if remainder is None else rounding.join(here[rows], remainder[rows])
        return now.double() - (now if anchor is None else flat(anchor)[rows].to(now.device)).double()

    return moved


def _move_of_pair(bound: Bound, now: Sequence[Tensor], anchors: Sequence[Tensor]) -> Callable[[slice], Tensor]:
    """Return rows → U − U* of what is here of a LoRA pair, float64, from (B, A) and (B*, A*)."""
    pairs = ((x.double() for x in side) for side in (anchors, now))
    before, after = (factors_of(bound, [x.to(now[0].device) for x in side]) for side in pairs)
    left, right = move(before, after, bound.geometry.scaling)
    return lambda rows: left[rows] @ right
