"""Importance files in the terminal: what one holds, how two agree, what a conversion wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..importance.statistics import EDGES
from . import columns
from .columns import Column, Grid
from .drawing import as_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from ..importance.chunks import Loss
    from ..importance.comparison import Agreement, Comparison
    from ..importance.conversion import Converted
    from ..importance.inspection import Inspection, Row

SAME = 1e-6  # relative: sums in another order
TOP = 10  # tensors listed where nothing is said
BARS = "▁▂▃▄▅▆▇█"
LONGEST = 24  # characters of a histogram
MOST = 0.6  # of the pull: with more on one layer, little else is held


def sparkline(counts: Sequence[int]) -> str:
    """Draw counts as bars, the fullest the highest; a blank is an empty bin.

    >>> sparkline([0, 1, 4, 8])
    ' ▁▄█'
    """
    largest = max(counts, default=0)
    return "".join(" " if not n else BARS[max(0, -(-n * len(BARS) // largest) - 1)] for n in counts)


def bins_shown(histogram: Sequence[int]) -> list[range]:
    """Return the bins that stand in one character each: from the first to the last that is filled, joined to fit."""
    filled = [b for b, count in enumerate(histogram) if count and b]
    if not filled:
        return []
    first, last = filled[0], filled[-1]
    width = -(-(last + 1 - first) // LONGEST)
    return [range(begin, min(begin + width, last + 1)) for begin in range(first, last + 1, width)]


def show(found: Inspection, top: int | None, console: Console) -> None:
    """Print what a file holds for people."""
    for line in heading(found):
        _say(console, line)
    tables = {"layers": layers(found), "tensors": tensors(found, TOP if top is None else top)}
    if found.total.losses:
        tables["encodings"] = encodings(found)
    for line in [*columns.show(tables, console), *verdict(found), *notes(found)]:
        _say(console, line)


def heading(found: Inspection) -> list[str]:
    """Say what the file is."""
    file = found.header
    counted = "steps" if "path_integral" in file["method"] else "samples"
    xi = "" if file["xi"] is None else f", ξ {file['xi']:g}{' relative' if file['relative'] else ''}"
    cut = "" if file["cut"] is None else f", cut {file['cut']:g}"
    forms = ", ".join(
        f"{form} {entry['tensors']} of {file['tensors']} tensors, {as_bytes(entry['bytes'])}"
        for form, entry in file["forms"].items()
    )
    alphas = found.coefficients
    weighed = "all importance is 0, so that no layer can be weighed"
    if alphas is not None:
        temperature = "" if alphas.temperature is None else f", temperature {alphas.temperature:.4g}"
        weighed = (
            f"coefficients: {alphas.rule} by {alphas.by}{temperature}; spread as if {alphas.effective_layers:.1f} of "
            f"{len(alphas)} layers counted equally"
        )
    return [
        f"{file['path']}: {file['bytes']:,} bytes, format version {file['format_version']}, "
        f"written by alr_kernels {file['package_version']}",
        f"{file['method']}{xi}{cut}, {file['steps']:,} {counted}{', normalized' if file['normalized'] else ''}; "
        f"{file['elements']:,} elements; fits models of fingerprint {file['fingerprint']}",
        f"kept as {forms}",
        weighed,
    ]


def layers(found: Inspection) -> Grid:
    """Return the table of layers, with all of the file below."""
    shown = [
        Column("layer", lambda row: row.name, right=False),
        Column("coeff.", lambda row: "" if row.alpha is None else f"{row.alpha:.4f}"),
        *_numbers(),
    ]
    if found.total.negative_share is not None:
        shown.append(Column("lost\nat 0", lambda row: _percent(row.negative_share), 2))
    shown += [_error(form, 7) for form in found.total.losses]
    if _drifted(found):
        shown.append(Column("change\nof norm", _norm_change, 1))
    return Grid(found.layers, [*shown, *_sizes(found)], found.total)


def _error(form: str, spare: int) -> Column:
    return Column(f"{form}\nerror", lambda row: _percent(row.losses[form].rms) if form in row.losses else "", spare)


def _norm_change(row: Row) -> str:
    return _percent(row.drift.against(row.stats)["l2"], signed=True) if row.drift else ""


def tensors(found: Inspection, top: int) -> Grid:
    """Return the table of the tensors with the largest share."""
    order = sorted(found.tensors, key=lambda row: -(row.share or 0.0))[:top]
    first = f"the top {len(order)} tensors" if len(order) < len(found.tensors) else "tensor"
    shown = [
        Column(first, lambda row: row.name, right=False),
        Column("kept as", lambda row: row.form, 2, right=False),
        Column("shape", lambda row: "×".join(map(str, row.shape)) or "scalar", 1),
        *_numbers(),
    ]
    if any(row.stats.nonfinite for row in order):
        shown.append(Column("not\nfinite", lambda row: f"{row.stats.nonfinite:,}"))
    return Grid(order, [*shown, *_sizes(found)])


def _numbers() -> list[Column]:
    return [
        Column("share\nof pull", lambda row: _percent(row.share)),
        Column("sum\nof Ω", lambda row: f"{row.mass:.3g}", 1),
        Column("mean\nΩ", lambda row: f"{row.stats.mean:.3g}", 4),
        Column("max\nΩ", lambda row: f"{row.stats.max:.3g}", 3),
    ]


def _sizes(found: Inspection) -> list[Column]:
    bins = bins_shown(found.total.stats.histogram)
    return [
        Column("size", lambda row: as_bytes(row.nbytes), 6),
        Column("near\n0", lambda row: _percent(row.stats.histogram[0] / max(1, sum(row.stats.histogram))), 8),
        Column(
            "histogram",
            lambda row: sparkline([sum(row.stats.histogram[b] for b in part) for part in bins]),
            5,
            right=False,
        ),
    ]


def _drifted(found: Inspection) -> bool:
    """Whether what is kept is something else than what its statistics are of."""
    drifts = [row.drift.against(row.stats) for row in found.tensors if row.drift is not None]
    return any(abs(value or 0.0) > SAME for drift in drifts for value in drift.values())


def encodings(found: Inspection) -> Grid:
    """Return the table of what other forms would lose."""
    shown = [
        Column("if kept as", lambda entry: entry[0], right=False),
        Column("size", lambda entry: as_bytes(entry[1].nbytes)),
        Column("error", lambda entry: _percent(entry[1].rms)),
        Column("worst, of\nthe max Ω", lambda entry: _percent(entry[1].worst)),
        Column("worst at", lambda entry: _element(entry[1]), 1, right=False),
    ]
    return Grid(list(found.total.losses.items()), shown)


def verdict(found: Inspection) -> list[str]:
    """Say that one layer has most of the pull, and which coefficients would spread it, as a sentence or none."""
    alphas = found.coefficients
    largest = max(found.layers, key=lambda row: row.share or 0.0)
    share = largest.share or 0.0
    if alphas is None or len(found.layers) < 2 or share <= MOST:
        return []
    said = f"Verdict: {largest.name} has {_percent(share)} of the pull, so that the rest of the model is hardly held"
    better = []
    for rule in ("uniform", "proportional"):
        pulls = [row.mass * (row.stats.l2 if rule == "proportional" else 1.0) for row in found.layers]
        under = max(pulls) / sum(pulls)
        if rule != alphas.rule and under < share:
            better.append(f"--coeffs {rule} (largest share {_percent(under)})")
            if rule == "uniform" and alphas.rule == "softmax":
                better.append(f"a --temperature above {alphas.temperature:.4g}")
    if not better:
        return [f"{said}; other coefficients do not spread it, because its importance itself is that much larger."]
    return [f"{said}; try {' or '.join(better)}."]


def notes(found: Inspection) -> list[str]:
    """Say how to read the tables."""
    said = [
        "Ω: the importance of one weight. Share of pull: the row's part of Σ α·Ω, with the layer's coefficient α "
        "(coeff.): where training will be held back most."
    ]
    bins = bins_shown(found.total.stats.histogram)
    if bins:
        low, high = EDGES[bins[0].start], 4.0 * EDGES[bins[-1].stop - 1]
        said.append(
            f"Histogram: Ω from {low:.1e} to {high:.1e}, each character a factor of {4 ** len(bins[0])}. "
            f"Near 0: weights with Ω below {EDGES[1]:.1e}."
        )
    if found.total.negative_share is not None:
        said.append("Lost at 0: part of the recorded Σ|ω| that was negative and was set to 0.")
    if found.total.losses:
        said.append("Error: RMS, ‖Ω̂ − Ω‖ / ‖Ω‖, over the tensors that take the form; the others stay fp32.")
    said += _agreement_with_statistics(found)
    return [*said, *([found.left_out] if found.left_out else []), *(f"PROBLEM: {text}" for text in found.problems)]


def _agreement_with_statistics(found: Inspection) -> list[str]:
    """Say whether the values are those of which the file has statistics, as a sentence or none."""
    if found.total.drift is None:
        return []
    drift = found.total.drift.against(found.total.stats)
    names = {"mass": "sum of Ω", "l2": "norm ‖Ω‖", "max": "largest Ω"}
    known = {names[key]: value for key, value in drift.items() if value is not None}
    if not known:
        return []
    if _drifted(found):
        parts = [f"{name} {_percent(value, signed=True)}" for name, value in known.items()]
        return [f"The encoded file differs from the statistics recorded before encoding: {', '.join(parts)}."]
    if set(found.header["forms"]) <= {"fp32", "fp64"}:
        return [f"The values agree with the statistics recorded with them: {', '.join(known)}."]
    return [f"The encoded file agrees with the statistics recorded before encoding: {', '.join(known)}."]


def show_comparison(found: Comparison, console: Console) -> None:
    """Print how two files agree."""
    _say(console, f"A: {found.first}\nB: {found.second}")
    shown = [
        Column("layer", lambda row: row.name, right=False),
        Column("elements", lambda row: f"{row.elements:,}", 2),
        Column("rank\ncorrelation", _rank_correlation),
        Column("log\ncorrelation", lambda row: _fraction(row.log_correlation), 1),
        Column("cosine", lambda row: _fraction(row.cosine)),
        Column(f"top {100 * found.top:g} %\nshared", lambda row: f"{100 * row.overlap:.1f} %"),
        Column("sum of Ω\nB / A", lambda row: "—" if row.scale_ratio is None else f"{row.scale_ratio:.4g}", 3),
    ]
    left = columns.show({"layers": Grid(found.layers, shown, found.total)}, console)
    for line in [*left, *comparison_notes(found)]:
        _say(console, line)


def comparison_notes(found: Comparison) -> list[str]:
    """Say how to read the table, and what it is not about."""
    said = [*found.notes]
    ranked = [row for row in (*found.layers, found.total) if row.ranked < row.elements]
    if ranked:
        said.append(
            f"~: ranks of a sample of {found.sample:,} elements (--sample), seed {found.seed}; all else is of every "
            "element."
        )
    for side, alone in (("A", found.only_first), ("B", found.only_second)):
        if alone:
            names = ", ".join(sorted(alone)[:3])
            more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
            said.append(f"only in {side}, {sum(alone.values()):,} elements: {names}{more}")
    return said


def show_conversion(done: Converted, before: Sequence[dict[str, Any]], console: Console) -> None:
    """Print what was written; ``before``: path, bytes and tensors of each input."""
    for entry in before:
        _say(console, f"read {entry['path']}: {entry['tensors']:,} tensors, {entry['bytes']:,} bytes")
    about, forms = done.as_dict(), done.as_dict()["forms"]
    kept = ", ".join(f"{count:,} {form}" for form, count in forms.items())
    normalized = ", normalized" if about["normalized"] else ""
    _say(console, f"wrote {done.path}: {about['tensors']:,} tensors ({kept}), {done.nbytes:,} bytes")
    _say(console, f"      {about['method']}, {about['steps']:,} steps or samples{normalized}")
    if done.wide:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in done.wide.items())
        _say(console, f"{sum(done.wide.values()):,} of {about['tensors']:,} tensors stay fp32: {reasons}")
    if done.loss is not None:
        _say(
            console,
            f"encoding {len(done.losses):,} tensors: RMS error {_percent(done.loss.rms)}; worst "
            f"{_percent(done.loss.worst)} of the largest Ω, at {_element(done.loss)}",
        )


def _rank_correlation(row: Agreement) -> str:
    sampled = "~" if row.ranked < row.elements else ""
    return "—" if row.rank_correlation is None else f"{sampled}{row.rank_correlation:.4f}"


def _fraction(value: float | None) -> str:
    return "—" if value is None else f"{value:.4f}"


def _element(loss: Loss) -> str:
    if not loss.name or not loss.worst:
        return "—"
    return f"{loss.name}[{', '.join(map(str, loss.at))}]: {loss.original:.3g} → {loss.decoded:.3g}"


def _percent(value: float | None, signed: bool = False) -> str:
    """Return a share in per cent, with three digits where it is small.

    >>> _percent(0.12345), _percent(0.00123), _percent(0), _percent(None), _percent(-0.002, signed=True)
    ('12.3 %', '0.123 %', '0 %', '—', '-0.200 %')
    """
    if value is None:
        return "—"
    per_cent = 100 * value
    size = abs(per_cent)
    if size == 0 or (signed and size < 5e-4):
        return "0 %"
    digits = 1 if size >= 10 else 2 if size >= 1 else 3
    text = f"{per_cent:{'+' if signed else ''}.{digits}f}"
    return f"{'<' if size < 5e-4 else ''}{text if size >= 5e-4 else '0.001'} %"


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
