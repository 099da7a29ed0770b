"""Importance files in the terminal: what one holds, how two agree, what a conversion wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.measure import Measurement
from rich.table import Table

from .drawing import as_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from ..importance.chunks import Loss
    from ..importance.comparison import Agreement, Comparison
    from ..importance.conversion import Converted
    from ..importance.inspection import Inspection, Row

WIDEST = 1000  # columns of a terminal, more than any table has
SAME = 1e-6  # relative: sums in another order
TOP = 10  # tensors listed where nothing is said
BARS = "▁▂▃▄▅▆▇█"
LONGEST = 24  # characters of a histogram


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
    tables = [layers(found), tensors(found, TOP if top is None else top)]
    if found.total.losses:
        tables.append(encodings(found))
    _print(console, tables)
    for line in notes(found):
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
        temperature = "" if alphas.temperature is None else f", T {alphas.temperature:.4g}"
        weighed = (
            f"coefficients: {alphas.rule} by {alphas.by}{temperature}; as if {alphas.effective_layers:.1f} of "
            f"{len(alphas)} layers weighed alike"
        )
    return [
        f"{file['path']}: {file['bytes']:,} bytes, format version {file['format_version']}, "
        f"written by alr_kernels {file['package_version']}",
        f"{file['method']}{xi}{cut}, {file['steps']:,} {counted}{', normalized' if file['normalized'] else ''}; "
        f"{file['elements']:,} elements; fits models of fingerprint {file['fingerprint']}",
        f"kept as {forms}",
        weighed,
    ]


def layers(found: Inspection) -> Table:
    """Return the table of layers, with all of the file below."""
    shown = _table("layer")
    forms = list(found.total.losses)
    kept = _drifted(found)
    signed = found.total.negative_share is not None
    bins = bins_shown(found.total.stats.histogram)
    heads = ["α", "share of\nα·Ω", "mass\nΣΩ", "mean\nΩ", "max\nΩ", *(["\nω < 0"] if signed else [])]
    heads += [*(f"{form}\nerror" for form in forms), *(["kept\n‖Ω‖"] if kept else []), "bytes", "\nΩ ≈ 0"]
    for head in heads:
        shown.add_column(head, justify="right", no_wrap=True)
    shown.add_column("histogram", no_wrap=True)
    for row in (*found.layers, found.total):
        whole = row is found.total
        cells = [
            "" if row.alpha is None else f"{row.alpha:.4f}",
            *_numbers(row),
            *([_percent(row.negative_share)] if signed else []),
            *(_percent(row.losses[form].rms) if form in row.losses else "" for form in forms),
            *([_percent(row.drift.against(row.stats)["l2"], signed=True) if row.drift else ""] if kept else []),
            as_bytes(row.nbytes),
            *_histogram(row, bins),
        ]
        shown.add_row(row.name, *cells, style="bold" if whole else None, end_section=row is found.layers[-1])
    return shown


def tensors(found: Inspection, top: int) -> Table:
    """Return the table of the tensors with the largest share."""
    order = sorted(found.tensors, key=lambda row: -(row.share or 0.0))[:top]
    shown = _table(f"the {len(order)} tensors with most of it" if len(order) < len(found.tensors) else "tensor")
    bins = bins_shown(found.total.stats.histogram)
    bad = any(row.stats.nonfinite for row in order)
    shown.add_column("kept as", no_wrap=True)
    heads = ["shape", "share of\nα·Ω", "mass\nΣΩ", "mean\nΩ", "max\nΩ", *(["not\nfinite"] if bad else []), "bytes"]
    for head in (*heads, "\nΩ ≈ 0"):
        shown.add_column(head, justify="right", no_wrap=True)
    shown.add_column("histogram", no_wrap=True)
    for row in order:
        shape = "×".join(map(str, row.shape)) or "scalar"
        counted = [f"{row.stats.nonfinite:,}"] if bad else []
        cells = [row.form, shape, *_numbers(row), *counted, as_bytes(row.nbytes), *_histogram(row, bins)]
        shown.add_row(row.name, *cells)
    return shown


def _drifted(found: Inspection) -> bool:
    """Whether what is kept is something else than what its statistics are of."""
    drifts = [row.drift.against(row.stats) for row in found.tensors if row.drift is not None]
    return any(abs(value or 0.0) > SAME for drift in drifts for value in drift.values())


def encodings(found: Inspection) -> Table:
    """Return the table of what other forms would lose."""
    shown = _table("if kept as")
    for head in ("bytes", "RMS error", "worst, of\nthe largest Ω"):
        shown.add_column(head, justify="right", no_wrap=True)
    shown.add_column("at", no_wrap=True)
    for form, loss in found.total.losses.items():
        shown.add_row(form, as_bytes(loss.nbytes), _percent(loss.rms), _percent(loss.worst), _element(loss))
    return shown


def notes(found: Inspection) -> list[str]:
    """Say how to read the tables."""
    said = []
    bins = bins_shown(found.total.stats.histogram)
    if bins:
        low, high = 4.0 ** bins[0].start * 2.0**-63, 4.0 ** bins[-1].stop * 2.0**-63
        said.append(
            f"histogram: Ω from {low:.1e} to {high:.1e}, each character a factor of {4 ** len(bins[0])}; "
            "Ω ≈ 0: below 4.3e-19."
        )
    if found.total.negative_share is not None:
        said.append("ω < 0: part of Σ|ω| that was negative, which the clamp at 0 dropped.")
    if found.total.losses:
        said.append("RMS error: ‖Ω̂ − Ω‖ / ‖Ω‖ of the tensors that the form takes; the others stay fp32.")
    if found.total.drift is not None:
        drift = found.total.drift.against(found.total.stats)
        names = {"mass": "ΣΩ", "l2": "‖Ω‖", "max": "max Ω"}
        parts = [f"{names[key]} {_percent(value, signed=True)}" for key, value in drift.items() if value is not None]
        what = "kept against the original's statistics" if _drifted(found) else "as the statistics say"
        said.append(f"{what}: {', '.join(parts)}.")
    return [*said, *([found.left_out] if found.left_out else []), *(f"PROBLEM: {text}" for text in found.problems)]


def show_comparison(found: Comparison, console: Console) -> None:
    """Print how two files agree."""
    _say(console, f"A: {found.first}\nB: {found.second}")
    shown = _table("layer")
    top = f"top {100 * found.top:g} %\nshared"
    for head in ("elements", "rank\ncorrelation", "log\ncorrelation", "\ncosine", top, "ΣΩ\nB / A"):
        shown.add_column(head, justify="right", no_wrap=True)
    for row in (*found.layers, found.total):
        whole = row is found.total
        shown.add_row(*_agreement(row), style="bold" if whole else None, end_section=row is found.layers[-1])
    _print(console, [shown])
    for line in comparison_notes(found):
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
    if done.loss is not None:
        _say(
            console,
            f"encoding {len(done.losses):,} tensors: RMS error {_percent(done.loss.rms)}; worst "
            f"{_percent(done.loss.worst)} of the largest Ω, at {_element(done.loss)}",
        )


def _agreement(row: Agreement) -> list[str]:
    sampled = "~" if row.ranked < row.elements else ""
    ratio = "—" if row.scale_ratio is None else f"{row.scale_ratio:.4g}"
    return [
        row.name,
        f"{row.elements:,}",
        "—" if row.rank_correlation is None else f"{sampled}{row.rank_correlation:.4f}",
        *("—" if value is None else f"{value:.4f}" for value in (row.log_correlation, row.cosine)),
        f"{100 * row.overlap:.1f} %",
        ratio,
    ]


def _element(loss: Loss) -> str:
    if not loss.name or not loss.worst:
        return "—"
    return f"{loss.name}[{', '.join(map(str, loss.at))}]: {loss.original:.3g} → {loss.decoded:.3g}"


def _numbers(row: Row) -> list[str]:
    return [_percent(row.share), *(f"{value:.3g}" for value in (row.mass, row.stats.mean, row.stats.max))]


def _histogram(row: Row, bins: Sequence[range]) -> list[str]:
    counts = row.stats.histogram
    return [_percent(counts[0] / max(1, sum(counts))), sparkline([sum(counts[b] for b in part) for part in bins])]


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


def _table(first: str) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    shown.add_column(first, no_wrap=True)
    return shown


def _print(console: Console, tables: Sequence[Table]) -> None:
    """Print tables as wide as they are: what a terminal wraps can be read, what is cut cannot."""
    usual = console.width
    for table in tables:
        wanted = Measurement.get(console, console.options.update(max_width=WIDEST), table).maximum
        console.width = max(usual, wanted)
        console.print()
        console.print(table, crop=False)
        console.width = usual
    console.print()


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
