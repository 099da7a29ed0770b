"""The charts of an importance file, from what ``importance.inspection`` found."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..importance.statistics import EDGES
from . import charts, drawing
from .page import Absent, Cell, Chart
from .palette import BLACK, BLUE, GREEN, GREY, HEAT, VERMILLION

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..importance.inspection import Inspection, Row

STYLES = {"int8": (GREEN, "s"), "int4": (BLUE, "o"), "rank1": (VERMILLION, "D")}
MOST = 40  # rows of a picture; longer ones are drawn with thinner rows and every n-th name
EDGE = -63  # the first bin begins at 2^-63, each is a factor of 4 wide


def parts(found: Inspection) -> list[Chart | Absent]:
    """Return the charts of a page, in its order."""
    return [_pull(found), _layers(found), _spread(found), _encodings(found)]


def _pull(found: Inspection) -> Chart | Absent:
    title = "Where the pull is"
    if found.coefficients is None:
        return Absent("pull", title, "All importance is 0, so nothing would be pulled.")
    alphas = found.coefficients
    note = (
        f"Share of Σ α·Ω of every module, α being the {alphas.rule} coefficient by {alphas.by}: "
        "where tuning will be held back most."
    )
    modules = [
        {"layer": row.block, "module": row.module, "alpha": row.alpha, "mass": row.mass, "share": row.share or 0.0}
        for row in found.tensors
    ]
    return charts.pull("pull", title, note, modules)


def ordered(found: Inspection) -> list[Row]:
    """Return the layers as they follow each other in a model."""
    return sorted(found.layers, key=lambda row: charts.natural(row.name))


def _layers(found: Inspection) -> Chart:
    rows = ordered(found)
    names = charts.shortened([row.name for row in rows])
    signed = found.total.negative_share is not None
    columns: list[tuple[str, Callable[[Row], float | None], str, str]] = [
        ("coefficient α", lambda row: row.alpha, BLACK, "o"),
        ("mean Ω", lambda row: row.stats.mean or None, BLUE, "s"),
        *([("ω < 0, %", lambda row: _per_cent(row.negative_share), VERMILLION, "D")] if signed else []),
    ]  # fmt: skip

    def draw(figure: Figure) -> None:
        places = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
        for axes, (title, value, colour, marker) in zip(places, columns, strict=True):
            values = [math.nan if (x := value(row)) is None else x for row in rows]
            axes.plot(values, range(len(rows)), color=colour, marker=marker, linewidth=0.9)
            axes.set_title(title)
            axes.margins(x=0.12)
            if title == "mean Ω" and any(value > 0 for value in values):
                axes.set_xscale("log")
                drawing.decades(axes.xaxis)
            else:
                axes.set_xlim(0, 1.12 * max((x for x in values if x > 0), default=1.0))
                axes.locator_params(axis="x", nbins=3)
        _name_rows(places[0], names)

    said = " Negative ω is what the clamp at 0 dropped, as part of Σ|ω|." if signed else ""
    cells: list[list[Cell]] = [
        [
            row.name, row.alpha, _per_cent(row.share), row.mass, row.stats.mean, row.stats.max, row.stats.l2,
            *([_per_cent(row.negative_share)] if signed else []), row.stats.nonfinite, row.stats.numel, row.nbytes,
            row.form,
        ]
        for row in rows
    ]  # fmt: skip
    heads = ["layer", "coefficient α", "share of the pull (%)", "mass ΣΩ", "mean Ω", "largest Ω", "‖Ω‖"]
    heads += [*(["ω < 0 (%)"] if signed else []), "not finite", "elements", "bytes", "kept as"]
    note = f"How each layer is weighed, and how much mattered there on average.{said}"
    return Chart("layers", "Layers", note, draw, heads, cells, _heights(len(rows)))


def _spread(found: Inspection) -> Chart | Absent:
    title = "How importance is spread"
    rows, total = ordered(found), found.total
    filled = [b for b, count in enumerate(total.stats.histogram) if count and b]
    if not filled:
        return Absent("spread", title, f"No Ω is above {EDGES[1]:.1e}.")
    low, high = filled[0], filled[-1]
    names = charts.shortened([row.name for row in rows])
    largest = max(max(_shares(row)[low:], default=0.0) for row in rows) or 1.0

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(
            2, 1, sharex=True, squeeze=True, height_ratios=(1.0, max(1.0, 0.12 * min(len(rows), MOST)))
        )
        above.bar(range(low, high + 1), total.stats.histogram[low : high + 1], width=0.9, color=GREY, align="edge")
        above.set_yscale("log")
        drawing.decades(above.yaxis)
        above.set_ylabel("weights")
        _cells(below, rows, low, high, largest)
        _name_rows(below, names)
        _powers(below, low, high, drawing.is_narrow(figure))
        below.grid(False)
        below.set_xlabel("importance Ω of a weight")

    zeros = total.stats.histogram[0] / max(1, total.stats.numel)
    note = (
        f"Weights by importance, in powers of 4: all above, each layer below, the stronger the more of its weights lie "
        f"there. {100 * zeros:.3g} % of all have Ω below {EDGES[1]:.1e}, most of them 0, and are not drawn."
    )
    cells: list[list[Cell]] = [
        [f"{4.0**b * 2.0**EDGE:.2e} to {4.0 ** (b + 1) * 2.0**EDGE:.2e}" if b else "below 4.34e-19",
         total.stats.histogram[b], *(row.stats.histogram[b] for row in rows)]
        for b in (0, *range(low, high + 1))
    ]  # fmt: skip
    height = 1.9 + _heights(len(rows))[0]
    return Chart("spread", title, note, draw, ["importance Ω", "all", *names], cells, (height, height))


def _encodings(found: Inspection) -> Chart | Absent:
    title = "What an encoding costs"
    forms = list(found.total.losses)
    if not forms:
        return Absent("encodings", title, _no_encodings(found))
    rows = [row for row in ordered(found) if row.losses]
    names = charts.shortened([row.name for row in rows])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for form in forms:
            colour, marker = STYLES[form]
            values = [_per_cent(row.losses[form].rms) if form in row.losses else None for row in rows]
            seen = [value or math.nan for value in values]
            axes.plot(seen, range(len(rows)), color=colour, marker=marker, label=form, linewidth=0.9)
        if any(row.losses[form].rms for row in rows for form in row.losses):
            axes.set_xscale("log")
            drawing.decades(axes.xaxis)
        axes.set_xlabel("RMS error ‖Ω̂ − Ω‖ / ‖Ω‖, %")
        _name_rows(axes, names)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(forms), borderaxespad=0.2)

    cells: list[list[Cell]] = []
    for row in (*rows, found.total):
        for form, loss in row.losses.items():
            at = f"{loss.name}[{', '.join(map(str, loss.at))}]"
            values = (_per_cent(loss.rms), _per_cent(loss.worst), at, loss.original, loss.decoded, loss.nbytes)
            cells.append([row.name, form, *values])
    heads = ["layer", "if kept as", "RMS error (%)", "worst error (% of the tensor's largest Ω)"]
    heads += ["worst element", "Ω there", "Ω there, kept", "bytes"]
    note = (
        "Error of keeping the file in fewer bytes, of the tensors that the form takes; vectors, small matrices and, "
        "for codes, rows of no multiple of 128 stay fp32. An error of 0 is not drawn."
    )
    return Chart("encodings", title, note, draw, heads, cells, _heights(len(rows)))


def _no_encodings(found: Inspection) -> str:
    if found.left_out:
        return f"Not measured: {found.left_out}."
    if not found.encodings:
        return "Not asked for: --encodings all measures it."
    drift = found.total.drift
    said = "Nothing in this file is kept in floats that would take another form."
    if drift is None:
        return said
    names = {"mass": "ΣΩ", "l2": "‖Ω‖", "max": "the largest Ω"}
    changes = [
        f"{names[key]} by {100 * x:+.3g} %" for key, x in drift.against(found.total.stats).items() if x is not None
    ]
    return f"{said} What is kept differs from the original's statistics: {', '.join(changes)}."


def overview(found: Inspection) -> tuple[Callable[[Figure], None], float]:
    """Return what draws all charts below each other into one figure, and its height in inches."""
    drawn = [chart for chart in parts(found) if isinstance(chart, Chart)]

    def draw(figure: Figure) -> None:
        places: Any = figure.subfigures(
            len(drawn), 1, height_ratios=[chart.height[0] for chart in drawn], squeeze=False
        )
        for place, chart in zip(places[:, 0], drawn, strict=True):
            place.get_figwidth = figure.get_figwidth  # what charts look at to tell a phone's page
            place.suptitle(chart.title, x=0.01, ha="left", fontsize=11, fontweight="bold")
            chart.draw(place)

    return draw, sum(chart.height[0] + 0.3 for chart in drawn)


def _per_cent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _heights(rows: int) -> tuple[float, float]:
    height = 1.3 + 0.2 * min(rows, MOST)
    return height, height


def _shares(row: Row) -> list[float]:
    return [count / max(1, row.stats.numel) for count in row.stats.histogram]


def _cells(axes: Any, rows: Sequence[Row], low: int, high: int, largest: float) -> None:
    """Draw a cell for each layer and bin; the square root makes few weights visible beside many."""
    from matplotlib.patches import Rectangle

    for y, row in enumerate(rows):
        shares = _shares(row)
        for b in range(low, high + 1):
            if shares[b]:
                alpha = drawing.FAINTEST + (drawing.STRONGEST - drawing.FAINTEST) * math.sqrt(shares[b] / largest)
                cell = Rectangle((b, y - 0.47), 0.98, 0.94, facecolor=HEAT, alpha=min(1.0, alpha), linewidth=0)
                axes.add_patch(cell)


def _name_rows(axes: Any, names: Sequence[str]) -> None:
    step = math.ceil(len(names) / MOST)
    axes.set_yticks(range(0, len(names), step), names[::step])
    axes.set_ylim(len(names) - 0.5, -0.5)


def _powers(axes: Any, low: int, high: int, narrow: bool) -> None:
    """Label bins, which are powers of 4, by powers of ten."""
    first = math.ceil((2 * low + EDGE) * math.log10(2))
    last = math.floor((2 * (high + 1) + EDGE) * math.log10(2))
    step = max(1, math.ceil((last + 1 - first) / (5 if narrow else 9)))
    powers = range(first, last + 1, step)
    axes.set_xticks([(e / math.log10(2) - EDGE) / 2 for e in powers], [drawing.power_of_ten(e) for e in powers])
    axes.set_xlim(low - 0.3, high + 1.3)
