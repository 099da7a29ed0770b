"""The charts that reports of runs and of the demo share, from plain numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import drawing
from .drawing import Series
from .page import Cell, Chart
from .palette import GREY

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ITSELF = "itself"  # the column of what lies outside blocks: an embedding, the last norm


def learning(key: str, title: str, note: str, shown: Sequence[tuple[str, str, Sequence[Series]]], unit: str) -> Chart:
    """Return curves over steps, a panel for each text.

    Args:
        shown: (heading of the panel, heading of the table's columns, lines with the same labels in every panel).
        unit: of the heights.
    """

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import MaxNLocator

        axes = drawing.panels(figure, len(shown), sharex=True)
        for place, (heading, _, series) in zip(axes, shown, strict=True):
            drawing.lines(place, series)
            place.set_title(heading)
            place.set_xlabel("optimizer step")
            place.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
            place.set_ylabel(unit)
        for place in axes[:-1] if drawing.is_narrow(figure) else ():
            place.set_xlabel("")
        drawing.legend(figure, axes[0])

    rows: list[list[Cell]] = []
    for place, first in enumerate(shown[0][2]):
        for i, step in enumerate(first.x):
            rows.append([first.label, int(step), *(series[place].y[i] for _, _, series in shown)])
    columns = ["model", "step", *(f"{heading} ({unit})" for _, heading, _ in shown)]
    return Chart(key, title, note, draw, columns, rows, (3.4, 2.2 + 1.9 * len(shown)))


def tradeoff(
    key: str, title: str, note: str, series: Sequence[Series], labels: tuple[str, str],
    level: float | None = None, top: float | None = None,
) -> Chart:  # fmt: skip
    """Return what was lost against what was learnt, along training.

    Args:
        series: x: domain NLL, y: what it cost.
        labels: of x and y.
        level: a domain NLL to mark, at which lines are compared.
        top: where the picture ends, so that a line that leaves it does not press the others together.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        drawing.lines(axes, series)
        if level is not None:
            axes.axvline(level, color=GREY, linestyle=":", linewidth=1.2, zorder=1)
            axes.annotate(
                f"compared at {level:.3f}", (level, 0.02), xycoords=("data", "axes fraction"),
                xytext=(-3, 0), textcoords="offset points", rotation=90, va="bottom", ha="right", fontsize=8,
            )  # fmt: skip
        if top is not None:
            axes.set_ylim(top=top)
        axes.invert_xaxis()
        joint = "\n" if drawing.is_narrow(figure) else ": "
        axes.set_xlabel(f"{labels[0]}{joint}training goes to the right")
        axes.set_ylabel(labels[1])
        drawing.legend(figure, axes)

    rows = [[entry.label, *point] for entry in series for point in zip(entry.x, entry.y, strict=True)]
    return Chart(key, title, note, draw, ["run", *labels], rows, (4.2, 4.0))


def natural(name: str) -> tuple[Any, ...]:
    """Return a key that sorts layers as they follow each other in a model.

    >>> sorted(["lm_head", "h.10", "h.2", "ln_f", "wte"], key=natural)
    ['wte', 'h.2', 'h.10', 'ln_f', 'lm_head']
    """
    block = any(part.isdigit() for part in name.split("."))
    begins, ends = (re.search(pattern, name) is not None for pattern in ("embed|wte|wpe", "head"))
    rank = 1 if block else 0 if begins else 3 if ends else 2
    return (rank, *((part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")))


def shortened(names: Sequence[str]) -> list[str]:
    """Leave out what all names with a dot begin with, up to a dot.

    >>> shortened(["model.embed", "model.layers.0", "lm_head"])
    ['embed', 'layers.0', 'lm_head']
    """
    first = {name.split(".")[0] for name in names if "." in name}
    return [name.split(".", 1)[1] if "." in name and len(first) == 1 else name for name in names]


def _columns(modules: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Return the modules of a block, and the same without the path where the last part is enough."""
    columns = list(dict.fromkeys(_module(entry) for entry in modules))
    columns.sort(key=lambda name: name == ITSELF)
    last = [name.rpartition(".")[2] if not name.endswith(".bias") else name for name in columns]
    return columns, [short if last.count(short) == 1 else name for short, name in zip(last, columns, strict=True)]


def _module(entry: Mapping[str, Any]) -> str:
    in_block = any(part.isdigit() for part in entry["layer"].split("."))
    return str(entry["module"]) if in_block else ITSELF


def pull(key: str, title: str, note: str, modules: Sequence[Mapping[str, Any]]) -> Chart:
    """Return the share of the pull, α·ΣΩ, of every module of every layer as a heat map.

    Args:
        modules: ``layer``, ``module``, ``alpha``, ``mass`` and ``share`` of each tensor
            (``alr_kernels.finetune.movement.coefficient_rows``).
    """
    columns, heads = _columns(modules)
    layers = sorted({entry["layer"] for entry in modules}, key=natural)
    shares: dict[tuple[str, str], float] = {}
    for entry in modules:
        place = (entry["layer"], _module(entry))
        shares[place] = shares.get(place, 0.0) + 100 * entry["share"]
    cells = [[shares.get((layer, column)) for column in columns] for layer in layers]

    strongest = max(shares.values())

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        drawing.heat_map(axes, shortened(layers), heads, cells, 1 if strongest > 2 else 2)
        axes.set_title(f"share of the pull, % (strongest: {strongest:.3g})")

    rows: list[list[Cell]] = [
        [entry["layer"], entry["module"], entry["alpha"], entry["mass"], 100 * entry["share"]]
        for entry in sorted(modules, key=lambda entry: natural(entry["layer"]))
    ]
    headings = ["layer", "module", "coefficient α", "mass ΣΩ", "share of the pull (%)"]
    height = 1.5 + 0.25 * len(layers)
    return Chart(key, title, note, draw, headings, rows, (height, height))


def movement(key: str, title: str, note: str, moves: Mapping[str, tuple[str, str, Mapping[str, Any]]]) -> Chart:
    """Return how far weights moved, by their importance, above how many there are of each importance.

    Args:
        moves: label → (colour, marker, ``edges``, ``count`` and ``mean_square_move`` by bin of Ω).
    """
    first = next(iter(moves.values()))[2]
    edges, counts = first["edges"], first["count"]
    filled = [b for b, count in enumerate(counts) if count and b > 0]
    low, high = (min(filled), max(filled)) if filled else (1, 1)
    zero = low - 1.2  # where weights without importance stand

    def place_of(b: int) -> float:
        return b + 0.5 if b else zero

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
        for label, (colour, marker, entry) in moves.items():
            roots = [None if value is None else math.sqrt(value) or None for value in entry["mean_square_move"]]
            inside = range(low, high + 1)
            drawing.lines(above, [Series(label, [b + 0.5 for b in inside], roots[low : high + 1], colour, marker)])
            if roots[0] is not None:
                above.plot([zero], [roots[0]], color=colour, marker=marker)
        present = [b for b, count in enumerate(counts) if count]
        below.bar([place_of(b) for b in present], [counts[b] for b in present], width=0.86, color=GREY)
        for axes, name in ((above, "typical move (RMS)"), (below, "weights")):
            axes.set_yscale("log")
            drawing.decades(axes.yaxis)
            axes.set_ylabel(name)
        _importance_axis(below, edges, low, high, zero if counts[0] else None)
        drawing.legend(figure, above)

    rows: list[list[Cell]] = [
        [
            "0 or next to it" if b == 0 else f"{edges[b]:.2e} to {4 * edges[b]:.2e}",
            counts[b],
            *(None if m["mean_square_move"][b] is None else math.sqrt(m["mean_square_move"][b])
              for _, _, m in moves.values()),
        ]
        for b in range(len(edges)) if counts[b]
    ]  # fmt: skip
    columns = ["importance Ω", "weights", *(f"RMS move, {label}" for label in moves)]
    return Chart(key, title, note, draw, columns, rows, (4.2, 4.2))


def _importance_axis(axes: Any, edges: Sequence[float], low: int, high: int, zero: float | None) -> None:
    """Label bins, which are powers of 4, by powers of ten."""
    exponents = range(math.ceil(math.log10(edges[low])), math.floor(math.log10(4 * edges[high])) + 1)
    step = max(1, math.ceil(len(exponents) / 7))
    per_decade, origin = math.log(10, 4), math.log(edges[0], 4)
    ticks = [(e * per_decade - origin, drawing.power_of_ten(e)) for e in exponents if e % step == 0]
    if zero is not None:
        ticks.insert(0, (zero, "0"))
    axes.set_xticks([place for place, _ in ticks], [text for _, text in ticks])
    axes.set_xlim((low if zero is None else zero) - 0.8, high + 1.3)
    axes.set_xlabel("importance Ω of a weight")


def most_important(moves: Mapping[str, Any], share: float = 0.01) -> tuple[float, int, float | None]:
    """Return (share of all weights, their number, their RMS move) of the most important bins that hold ``share``.

    >>> bins = {"count": [90, 8, 2], "mean_square_move": [1.0, 4.0, 9.0]}
    >>> most_important(bins), most_important(bins, 0.1)
    ((0.02, 2, 3.0), (0.1, 10, 2.23606797749979))
    """
    total, taken, square = sum(moves["count"]), 0, 0.0
    for count, mean in zip(reversed(moves["count"]), reversed(moves["mean_square_move"]), strict=True):
        if taken >= share * total:
            break
        taken, square = taken + count, square + count * (mean or 0.0)
    return (taken / total, taken, math.sqrt(square / taken)) if taken else (0.0, 0, None)
