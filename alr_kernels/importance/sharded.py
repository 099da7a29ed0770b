"""Importance of sharded parameters: finalised, merged and summed up where its rows are; statistics are of all of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import _dtensor, _validate_distributed
from ..codecs.encoded import Encoded
from ..codecs.storage import CODES
from .reference import mean_move, squared_move
from .statistics import STATISTICS, TensorStats

if TYPE_CHECKING:
    from torch import Tensor

    from .._dtensor import Sharding
    from .reference import Result

L2, MAX, MEAN, NUMEL = (STATISTICS.index(name) for name in ("l2", "max", "mean", "numel"))


def finalise(
    path_integrals: Sequence[Tensor], ends: Sequence[Tensor], starts: Sequence[Tensor], formats: Sequence[str],
    xi: float, relative: bool, shardings: Sequence[Sharding | None],
) -> Result:  # fmt: skip
    """Do ``_ops.finalise`` of what is here, with ξ and statistics of whole tensors; entries stay local."""
    from .. import _ops

    if not any(shardings):
        return _ops.finalise(path_integrals, ends, starts, formats, xi, relative)
    floors = [(xi, relative)] * len(formats)
    if relative:
        floors = [(xi * mean, False) for mean in _mean_moves(ends, starts, shardings)]
    return _each(
        len(formats), shardings,
        lambda i: _ops.finalise([path_integrals[i]], [ends[i]], [starts[i]], [formats[i]], *floors[i]),
    )  # fmt: skip


def merge(
    first: Sequence[Encoded | None], second: Sequence[Encoded | None], formats: Sequence[str],
    weights: tuple[float, float] | None, shardings: Sequence[Sharding | None],
) -> Result:  # fmt: skip
    """Do ``_ops.merge`` of local parts; statistics are of whole tensors."""
    from .. import _ops

    if not any(shardings):
        return _ops.merge(first, second, formats, weights)
    return _each(
        len(formats), shardings, lambda i: _ops.merge([first[i]], [second[i]], [formats[i]], weights)
    )  # fmt: skip


def _each(count: int, shardings: Sequence[Sharding | None], run: Callable[[int], Result]) -> Result:
    entries, rows, histograms = [], [], []
    for i in range(count):
        (entry,), table, counts = run(i)
        entries.append(_whole_columns(entry, shardings[i]))
        rows.append(table[0])
        histograms.append(counts[0])
    table, counts = whole_statistics(torch.stack(rows), torch.stack(histograms), shardings)
    return entries, table, counts


def _mean_moves(ends: Sequence[Tensor], starts: Sequence[Tensor], shardings: Sequence[Sharding | None]) -> list[float]:
    """Return each whole tensor's mean((θ_end − θ_start)²), from those of what is here."""
    sums = []
    for end, start in zip(ends, starts, strict=True):
        wide = torch.promote_types(end.dtype, torch.float32)
        sums.append(mean_move(squared_move(end, start, wide)) * end.numel())
    sizes = [end.numel() if s is None else s.shape.numel() for end, s in zip(ends, shardings, strict=True)]
    return [float(x) / max(n, 1) for x, n in zip(_dtensor.totals(sums, shardings), sizes, strict=True)]


def _whole_columns(entry: Encoded, sharding: Sharding | None) -> Encoded:
    """Return rank1's factors with the column sums of all rows."""
    if sharding is None or entry.format != "rank1":
        return entry
    assert entry.scales is not None
    total = entry.values.double().sum()
    sums = _dtensor.all_reduce(torch.cat([(entry.scales.double() * total).flatten(), total.reshape(1)]), sharding)
    columns = torch.where(sums[-1] > 0, sums[:-1] / sums[-1], 0.0).to(entry.scales.dtype)
    return entry._replace(scales=columns.view(entry.scales.shape))


def whole_statistics(table: Tensor, histograms: Tensor, shardings: Sequence[Sharding | None]) -> tuple[Tensor, Tensor]:
    """Return statistics [n, 7] and histograms [n, BINS] of whole tensors from those of their local parts."""
    sums = table.clone()
    sums[:, L2] = table[:, L2].square()
    sums[:, MEAN] = table[:, MEAN] * table[:, NUMEL]
    rows = torch.stack(_dtensor.totals(sums.unbind(), shardings))
    rows[:, MAX] = torch.stack(_dtensor.totals(table[:, MAX].unbind(), shardings, largest=True))
    rows[:, L2] = rows[:, L2].sqrt()
    rows[:, MEAN] /= rows[:, NUMEL].clamp(min=1)
    unsharded = torch.tensor([sharding is None for sharding in shardings])
    counts = torch.stack(_dtensor.totals(histograms.unbind(), shardings))
    return torch.where(unsharded[:, None], table, rows), counts


def statistics_of(importance: Tensor | Encoded, name: str) -> TensorStats:
    """Return the statistics of what may be sharded."""
    values = importance.values if isinstance(importance, Encoded) else importance
    sharding = _dtensor.Sharding.of(name, values)
    if sharding is None:
        return TensorStats.of(importance, name)
    row = TensorStats.of(unwrapped(importance) if isinstance(importance, Encoded) else _dtensor.local(importance), name)
    table, counts = torch.tensor([row.row()], dtype=torch.float64), torch.tensor([row.histogram])
    table, counts = whole_statistics(table, counts, [sharding])
    return TensorStats.of_row(table[0], counts[0], False)


def wrapped(entry: Encoded, sharding: Sharding | None) -> Encoded:
    """Return local values and scales as DTensors; rank1's columns are whole on every rank."""
    if sharding is None:
        return entry

    def wrap(part: Tensor) -> Tensor:
        dense = part.shape == sharding.local_shape
        return sharding.wrap(part, None if dense else (sharding.shape[0], *part.shape[1:]))

    scales = entry.scales if entry.scales is None or entry.format == "rank1" else wrap(entry.scales)
    return Encoded(wrap(entry.values), scales, entry.format)


def unwrapped(entry: Encoded) -> Encoded:
    """Return what is here of values and scales."""
    scales = None if entry.scales is None else _dtensor.local(entry.scales)
    return Encoded(_dtensor.local(entry.values), scales, entry.format)


def decoded(entry: Encoded, name: str) -> Tensor:
    """Return Ω, a DTensor where it is sharded."""
    from .. import _ops

    sharding = _dtensor.Sharding.of(name, entry.values)
    if sharding is None:
        return _ops.decoded(entry)
    dense = _ops.decoded(unwrapped(entry))
    return sharding.wrap(dense, entry.shape)


def check_rows(names: Sequence[str], formats: Sequence[str], shardings: Sequence[Sharding | None]) -> None:
    """Refuse codes of what is not sharded by rows."""
    for name, kept, sharding in zip(names, formats, shardings, strict=True):
        if sharding is not None and (kept in CODES or kept == "rank1"):
            _validate_distributed.rows_alone(name, f"{kept} importance", sharding.placements, sharding.by_rows)


def checksum(parts: Any, tensor: Tensor, name: str) -> int:
    """Return ``parts(local, first)`` summed over the ranks, modulo 2^64; ``first``: index of the first element here."""
    sharding = _dtensor.Sharding.of(name, tensor)
    if sharding is None:
        return parts(tensor, 0)
    local = _dtensor.local(tensor)
    if not sharding.by_rows:
        return parts(_dtensor.whole(tensor), 0)
    first = sharding.begins[0] * local.shape[1:].numel()
    here = parts(local, first)
    both = torch.tensor([here % 2**32, here // 2**32], dtype=torch.int64)  # sums of halves do not overflow
    low, high = _dtensor.all_reduce(both, sharding).tolist()
    return (low + (high << 32)) % 2**64


def of_pair(name: str, first: Encoded | None, second: Encoded | None) -> Sharding | None:
    """Return the sharding of two importances of a parameter, of which one may be whole."""
    found = [None if x is None else _dtensor.Sharding.of(name, x.values) for x in (first, second)]
    sharding = next((s for s in found if s is not None), None)
    if sharding is None:
        return None
    shape = next(x.shape for x in (first, second) if x is not None)
    return sharding.of_shape(shape)


def part(name: str, entry: Encoded | None, sharding: Sharding | None, device: torch.device) -> Encoded | None:
    """Return what is here of an importance, on a device; it may be whole or sharded."""
    return None if entry is None else encoded_part(entry, name, sharding).to(device)


def encoded_part(importance: Encoded, name: str, sharding: Sharding | None) -> Encoded:
    """Return the part of Ω that belongs to what is here of a parameter; without a sharding, all of it."""
    if _dtensor.is_sharded(importance.values):
        values = _dtensor.part_of(f"importance of {name}", importance.values, sharding)
        scales = None if importance.scales is None else _dtensor.local(importance.scales)
        return Encoded(values, scales, importance.format)
    if sharding is None:
        return importance
    if importance.format in CODES or importance.format == "rank1":
        _validate_distributed.rows_alone(name, f"{importance.format} importance", sharding.placements, sharding.by_rows)
        rows = importance.rows(sharding.rows)
        kept = rows.scales if rows.scales is None or rows.format == "rank1" else rows.scales.clone()
        return Encoded(rows.values.clone(), kept, rows.format)  # not a view that keeps all of it
    return Encoded.dense(_dtensor.part_of(f"importance of {name}", importance.values, sharding).clone())
