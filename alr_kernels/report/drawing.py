"""What charts are made of: lines, bars and heat maps in a matplotlib figure of any width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .palette import BLACK, BLUE, GREY, HEAT, MUTED, VERMILLION
from .svg import NARROW

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_UNITS = ("B", "kB", "MB", "GB", "TB")
FAINTEST, STRONGEST = 0.06, 0.9  # of a heat map's cells: text is read on both


@dataclass(frozen=True)
class Series:
    """One line of a chart; where ``y`` is None it is interrupted.

    ``strong``: False draws it thin and faint, without an entry in the legend.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: str = BLACK
    marker: str = "o"
    strong: bool = True
    dashed: bool = False


def is_narrow(figure: Figure) -> bool:
    """Say whether the figure is drawn for a phone."""
    return bool(figure.get_figwidth() < (NARROW + 1))


def panels(figure: Figure, count: int, **options: Any) -> list[Any]:
    """Return axes beside each other, or one below the other where the figure is narrow."""
    shape = (count, 1) if is_narrow(figure) else (1, count)
    return list(figure.subplots(*shape, squeeze=False, **options).ravel())


def lines(axes: Any, series: Sequence[Series]) -> None:
    """Draw lines with a mark at each point; many points get marks on some only."""
    for entry in series:
        values = [math.nan if value is None else value for value in entry.y]
        axes.plot(
            entry.x,
            values,
            color=entry.colour,
            marker=entry.marker,
            markevery=max(1, len(values) // 12),
            linestyle="--" if entry.dashed else "-",
            label=elided(entry.label, 40) if entry.strong else None,
            zorder=3 if entry.strong else 2,
            **({} if entry.strong else {"linewidth": 0.8, "markersize": 2.5, "alpha": 0.4}),
        )


def legend(figure: Figure, axes: Any) -> None:
    """Put the entries of some axes above all panels, where no line can run through them."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        room = figure.get_figwidth() / (0.6 + 0.07 * max(map(len, labels)))  # inches: of the mark, and of a letter
        columns = max(1, min(len(labels), int(room)))
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, borderaxespad=0.2)


def level(axes: Any, value: float, text: str) -> None:
    """Mark a height with a dotted line and say what it is."""
    axes.axhline(value, color=MUTED, linestyle=":", linewidth=1.1, zorder=1)
    axes.annotate(
        text,
        (0.99, value),
        xycoords=("axes fraction", "data"),
        xytext=(0, 2),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color=MUTED,
        fontsize=8,
    )


def bars(axes: Any, rows: Sequence[tuple[str, float, str]], colour: str = BLUE) -> None:
    """Draw horizontal bars, the first on top, each with its own words behind it: (name, length, words)."""
    places = range(len(rows))
    axes.barh(places, [length for _, length, _ in rows], height=0.62, color=colour)
    axes.set_yticks(places, [elided(name) for name, _, _ in rows])
    axes.invert_yaxis()
    longest = max((length for _, length, _ in rows), default=0.0)
    for place, (_, length, words) in zip(places, rows, strict=True):
        axes.annotate(words, (length, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5)
    axes.set_xlim(0, longest * (1.1 + 0.05 * max((len(words) for _, _, words in rows), default=0)) or 1)
    axes.grid(False)
    axes.xaxis.set_visible(False)
    axes.spines[["bottom"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def heat_map(
    axes: Any, rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[float | None]], digits: int = 1
) -> None:
    """Draw one cell for each row and column, the stronger the larger its number ≥ 0; None leaves it out.

    The number is written into each cell where there is room for it.
    """
    from matplotlib.patches import Rectangle

    largest = max((value for row in cells for value in row if value is not None), default=0.0) or 1.0
    width = axes.figure.get_figwidth()
    text = (width - 1.4) / max(1, len(columns)) > 0.07 * (digits + 3)
    for y, row in enumerate(cells):
        for x, value in enumerate(row):
            if value is None:
                continue
            alpha = FAINTEST + (STRONGEST - FAINTEST) * value / largest
            axes.add_patch(Rectangle((x - 0.49, y - 0.47), 0.98, 0.94, facecolor=HEAT, alpha=alpha, linewidth=0))
            if text:
                axes.text(x, y, f"{value:.{digits}f}", ha="center", va="center_baseline", fontsize=8)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    columns = [elided(column) for column in columns]
    axes.set_yticks(range(len(rows)), [elided(row) for row in rows])
    turned = max(map(len, columns), default=0) * 0.075 > (width - 1.4) / max(1, len(columns))
    turn: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if turned else {}
    axes.set_xticks(range(len(columns)), columns, **turn)
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)


def elided(name: str, longest: int = 24) -> str:
    """Cut the middle out of a name that would leave no room for the drawing.

    >>> elided("a_module_with_quite_a_long_name.weight")
    'a_module_wit…name.weight'
    """
    half = longest // 2
    return name if len(name) <= longest else f"{name[:half]}…{name[1 + half - longest :]}"


def power_of_ten(exponent: int) -> str:
    """Return 10 to a whole power as text.

    >>> power_of_ten(-7)
    '10⁻⁷'
    """
    return "10" + str(exponent).translate(_SUPERSCRIPT)


def decades(axis: Any) -> None:
    """Label a logarithmic axis by plain powers of ten, or within one or two of them by plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    if high / low < 50:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axis.set_major_locator(LogLocator(numticks=6))
        axis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(round(math.log10(value)))))
    axis.set_minor_formatter(NullFormatter())


def as_bytes(count: float) -> str:
    """Return a number of bytes in the unit that fits.

    >>> as_bytes(3_200_000), as_bytes(12)
    ('3.2 MB', '12 B')
    """
    for unit in _UNITS:
        if abs(count) < 999.5 or unit == _UNITS[-1]:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError  # the last unit returns


def duration(seconds: float) -> str:
    """Return a time in words.

    >>> duration(0.25), duration(75), duration(7300)
    ('0.2 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes = round(seconds) // 60
    return f"{minutes} min {round(seconds) % 60} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def step_times(axes: Any, rows: Sequence[tuple[str, float, float]]) -> None:
    """Draw what a step takes, and within it the optimizer's part: (name, ms of the optimizer, ms of all)."""
    words = [f"{shown_ms(whole)}, optimizer {shown_ms(inside)}" for _, inside, whole in rows]
    bars(axes, [(name, whole, text) for (name, _, whole), text in zip(rows, words, strict=True)], GREY)
    axes.barh(range(len(rows)), [inside for _, inside, _ in rows], height=0.62, color=VERMILLION)
    axes.set_title("time of a step")


def shown_ms(milliseconds: float) -> str:
    """Return a time in milliseconds, three digits.

    >>> shown_ms(1.2345)
    '1.23 ms'
    """
    return f"{milliseconds:.3g} ms" if milliseconds < 999.5 else f"{milliseconds:,.0f} ms"
