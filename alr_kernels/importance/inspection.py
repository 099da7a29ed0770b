"""What an importance file holds, by layer and by tensor: from its statistics alone, or from every value of it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import _validate, _validate_inspection
from ..codecs.encoded import Encoded
from ..codecs.storage import DTYPES, fitting
from ..coefficients import RULES, LayerCoefficients, layer_coefficients
from ..names import LayerBy, layer_of, module_of
from .artifact import Importance
from .chunks import Loss, chunks, loss_of
from .statistics import TensorStats

ENCODED = _validate_inspection.ENCODED
FEW = 2**28  # elements of a file whose values are read without being asked for
Tick = Callable[[int], None]  # told how many elements were gone through


class Drift(NamedTuple):
    """How Ω as it is kept differs from what the file says of Ω before it was encoded."""

    total: float = 0.0  # Σ of what is kept
    square: float = 0.0
    max: float = 0.0
    invalid: int = 0  # elements that are negative or not finite, which a whole file has none of

    @classmethod
    def pooled(cls, parts: Iterable[Drift]) -> Drift:
        """Combine those of several tensors."""
        rows = list(parts)
        return cls(
            math.fsum(row.total for row in rows),
            math.fsum(row.square for row in rows),
            max((row.max for row in rows), default=0.0),
            sum(row.invalid for row in rows),
        )

    def against(self, stats: TensorStats) -> dict[str, float | None]:
        """Return kept over recorded, less 1, of mass, ‖Ω‖₂ and maximum; None where 0 was recorded.

        ‖Ω̂ − Ω‖₂ ≥ |‖Ω̂‖₂ − ‖Ω‖₂|, so the second is the least that encoding can have cost.
        """
        pairs = {
            "mass": (self.total, stats.mean * stats.numel),
            "l2": (math.sqrt(self.square), stats.l2),
            "max": (self.max, stats.max),
        }
        return {key: kept / known - 1.0 if known else None for key, (kept, known) in pairs.items()}


@dataclass(frozen=True)
class Row:
    """One tensor, one layer, or all of a file.

    ``layer``: what the coefficient ``alpha`` is of; ``share``: of Σ α·Ω over the file. Both numbers are None where all
    Ω is 0. ``block`` and ``module``: row and column of a heat map; empty where it is not a single tensor.
    """

    name: str
    layer: str
    block: str
    module: str
    form: str
    shape: tuple[int, ...]
    nbytes: int
    alpha: float | None
    share: float | None
    stats: TensorStats
    losses: Mapping[str, Loss] = field(default_factory=dict)
    drift: Drift | None = None

    @property
    def mass(self) -> float:
        """Σ Ω."""
        return self.stats.mean * self.stats.numel

    @property
    def negative_share(self) -> float | None:
        """Part of Σ|ω| that was negative, which the clamp at 0 dropped; None without a path integral."""
        signed, negative = self.stats.path_integral_sum, self.stats.negative_mass
        if signed is None or negative is None:
            return None
        whole = signed + 2.0 * negative
        return negative / whole if whole > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        stats, drift = self.stats, self.drift
        place: dict[str, Any] = {}
        if self.block:
            place = {"layer": self.block, "module": self.module, "weighed_as": self.layer, "shape": list(self.shape)}
        return {
            "name": self.name,
            **place,
            "form": self.form,
            "elements": stats.numel,
            "bytes": self.nbytes,
            "alpha": self.alpha,
            "mass": self.mass,
            "share": self.share,
            "mean": stats.mean,
            "max": stats.max,
            "l2": stats.l2,
            "path_integral_sum": stats.path_integral_sum,
            "negative_mass": stats.negative_mass,
            "negative_share": self.negative_share,
            "nonfinite": stats.nonfinite,
            "histogram": list(stats.histogram),
            "encodings": {form: loss.as_dict() for form, loss in self.losses.items()},
            "kept": None if drift is None else {**drift.against(stats), "invalid": drift.invalid},
        }


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found."""

    header: dict[str, Any]
    coefficients: LayerCoefficients | None
    layers: list[Row]
    tensors: list[Row]
    total: Row
    encodings: tuple[str, ...]
    left_out: str  # why values were not read, or ""
    problems: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        alphas = self.coefficients
        rule = alphas and {
            "rule": alphas.rule,
            "by": alphas.by,
            "temperature": alphas.temperature,
            "effective_layers": alphas.effective_layers,
        }
        return {
            "file": self.header,
            "coefficients": rule,
            "total": self.total.as_dict(),
            "layers": [row.as_dict() for row in self.layers],
            "modules": [row.as_dict() for row in self.tensors],
            "encodings": list(self.encodings),
            "problems": list(self.problems),
        }


def inspect(
    path: str | os.PathLike[str],
    *,
    coeffs: str = "softmax",
    temperature: float | str = "auto",
    by: LayerBy | None = None,
    encodings: str = "auto",
    tick: Tick | None = None,
) -> Inspection:
    """Say what an importance file holds.

    Args:
        path: the file.
        coeffs: rule of the layers' coefficients: ``"softmax"``, ``"proportional"``, ``"uniform"``.
        temperature: T of the softmax.
        by: what a layer is; None: ``"block"``, for LoRA recordings ``"module"``, as the optimizer takes them.
        encodings: for which every value is read. ``"int8"``, ``"int4"``, ``"rank1"``: what each would lose of tensors
            kept in floats; ``"kept"``: what is kept against the statistics of the original. Several with commas
            between, ``"all"``, ``"none"``, or ``"auto"``: all, in files of up to 2^28 elements.
        tick: called with numbers of elements as they are read; they add up to :func:`work`.

    Raises:
        FileNotFoundError, ImportanceFileError: no such file, or it is none of importance.
        ValueError: an option that is unknown or has no effect.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/i.safetensors"
    >>> Importance({"layers.0.w": torch.ones(64, 128), "layers.1.w": 3 * torch.ones(64, 128)}).save(path)
    >>> found = inspect(path, coeffs="proportional")
    >>> [(row.name, round(row.alpha, 6), row.mass, round(row.share, 6)) for row in found.layers]
    [('layers.0', 0.25, 8192.0, 0.1), ('layers.1', 0.75, 24576.0, 0.9)]
    """
    _validate.choice("coeffs", coeffs, RULES)
    used = _validate_inspection.coefficient_options(coeffs, temperature)
    _validate_inspection.rule_choice("by", by, ("block", "module"))
    importance = Importance.load(path)
    by = by or default_layers(importance)
    asked = chosen(importance, encodings)
    total = TensorStats.pooled(importance.stats.values())
    alphas = None
    if total.l2 > 0:
        alphas = layer_coefficients(importance, coeffs, used, by=by)  # type: ignore[arg-type]
    tensors = _tensor_rows(importance, alphas, by, asked, tick or (lambda elements: None))
    layers = _layer_rows(tensors, by)
    whole = _pooled("all", tensors, None, math.fsum(row.share or 0.0 for row in tensors) if alphas else None)
    skipped = encodings == "auto" and not asked and total.numel > FEW
    left_out = f"values were not read: {total.numel:,} elements; --encodings all reads them" if skipped else ""
    return Inspection(
        _header(path, importance), alphas, layers, tensors, whole, asked, left_out, _problems(importance, tensors)
    )


def default_layers(importance: Importance) -> LayerBy:
    """Return what a layer is where nothing is said: a block, or a module of a LoRA recording."""
    return "module" if any(part.startswith("path_integral_") for part in importance.method.split("+")) else "block"


def chosen(importance: Importance, encodings: str) -> tuple[str, ...]:
    """Return the encodings that are looked at."""
    asked = _validate_inspection.encodings(encodings)
    takes = {form: sum(takes_form(importance.encoded(name), form) for name in importance) for form in ENCODED}
    if encodings not in _validate_inspection.WORDS:
        _validate_inspection.encodable(asked or (), takes)
    if asked is None:
        few = sum(row.numel for row in importance.stats.values()) <= FEW
        asked = (*ENCODED, _validate_inspection.KEPT) if few else ()
    return tuple(form for form in asked if takes.get(form, 1))


def takes_form(entry: Encoded, form: str) -> bool:
    """Whether a tensor that is kept in floats would be kept in this form."""
    return entry.format in DTYPES and fitting(form, entry.shape) == form


def work(importance: Importance, encodings: Sequence[str]) -> int:
    """Return how many elements are gone through."""
    kept = _validate_inspection.KEPT
    entries = [importance.encoded(name) for name in importance]
    return sum(entry.numel for entry in entries for form in encodings if form == kept or takes_form(entry, form))


def _tensor_rows(
    importance: Importance, alphas: LayerCoefficients | None, by: LayerBy, asked: Sequence[str], tick: Tick
) -> list[Row]:
    stats = importance.stats
    weighed = {}
    if alphas is not None:
        weighed = {name: alphas[layer_of(name, by)] * row.mean * row.numel for name, row in stats.items()}
    whole = math.fsum(weighed.values())
    rows = []
    for name in importance:
        entry, layer = importance.encoded(name), layer_of(name, by)
        losses, drift = {}, None
        for form in asked:
            if form == _validate_inspection.KEPT:
                drift = _drift(name, entry, tick)
            elif takes_form(entry, form):
                losses[form] = loss_of(name, entry, form)
                tick(entry.numel)
        rows.append(
            Row(
                name, layer, *module_of(name), entry.format, tuple(entry.shape), entry.nbytes,
                None if alphas is None else alphas[layer], weighed[name] / whole if whole else None,
                stats[name], losses, drift,
            )
        )  # fmt: skip
    return rows


def _drift(name: str, entry: Encoded, tick: Tick) -> Drift:
    parts = []
    for part in chunks(entry, name):
        tick(part.numel())
        if not part.numel():
            continue
        low, high = (float(bound) for bound in torch.aminmax(part))
        invalid = 0
        if not (low >= 0 and math.isfinite(high)):
            valid = torch.isfinite(part) & (part >= 0)
            invalid = part.numel() - int(valid.sum())
            part = torch.where(valid, part, 0.0)
        wide = part.reshape(-1)
        norm = float(torch.linalg.vector_norm(wide, dtype=torch.float64))
        parts.append(Drift(float(wide.sum(dtype=torch.float64)), norm * norm, float(wide.max()), invalid))
    return Drift.pooled(parts)


def _layer_rows(tensors: Sequence[Row], by: LayerBy) -> list[Row]:
    members: dict[str, list[Row]] = {}
    for row in tensors:
        members.setdefault(row.layer, []).append(row)
    return [
        _pooled(
            layer, rows, rows[0].alpha, None if rows[0].share is None else math.fsum(row.share or 0.0 for row in rows)
        )
        for layer, rows in members.items()
    ]


def _pooled(name: str, rows: Sequence[Row], alpha: float | None, share: float | None) -> Row:
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row.form] = sizes.get(row.form, 0) + row.stats.numel
    forms = sorted(sizes, key=lambda form: -sizes[form])
    measured = [form for form in ENCODED if any(form in row.losses for row in rows)]
    drifts = [row.drift for row in rows if row.drift is not None]
    return Row(
        name, name, "", "", "+".join(forms), (), sum(row.nbytes for row in rows), alpha, share,
        TensorStats.pooled(row.stats for row in rows),
        {form: Loss.pooled(row.losses[form] for row in rows if form in row.losses) for form in measured},
        Drift.pooled(drifts) if drifts else None,
    )  # fmt: skip


def _header(path: str | os.PathLike[str], importance: Importance) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    forms: dict[str, dict[str, int]] = {}
    for name in importance:
        entry = importance.encoded(name)
        counts = forms.setdefault(entry.format, {"tensors": 0, "elements": 0, "bytes": 0})
        for key, more in (("tensors", 1), ("elements", entry.numel), ("bytes", entry.nbytes)):
            counts[key] += more
    return {
        "path": str(path),
        "bytes": Path(path).stat().st_size,
        "tensor_bytes": importance.nbytes,
        "format_version": int(metadata["format_version"]),
        "package_version": metadata.get("package_version"),
        "fingerprint": importance.fingerprint,
        "method": importance.method,
        "xi": importance.xi,
        "relative": importance.relative,
        "cut": importance.cut,
        "steps": importance.steps,
        "normalized": importance.is_normalized,
        "tensors": len(importance),
        "elements": sum(row.numel for row in importance.stats.values()),
        "forms": forms,
    }


def _problems(importance: Importance, tensors: Sequence[Row]) -> list[str]:
    """Say what a whole file has none of."""
    found = []
    for row in tensors:
        numel = math.prod(row.shape)
        if row.drift is not None and row.drift.invalid:
            found.append(f"{row.name}: {row.drift.invalid:,} of {numel:,} values are negative or not finite")
        if row.stats.numel != numel or sum(row.stats.histogram) != numel:
            found.append(f"{row.name}: its statistics are of {row.stats.numel:,} elements, it has {numel:,}")
    return found
