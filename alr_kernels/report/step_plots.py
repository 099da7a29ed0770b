"""The step benchmark's plot, from a results file alone (``alr-kernels bench --json``, ``make bench``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..benchmark.candidates import BASELINE
from ..benchmark.table import sets_of, title

# Okabe and Ito's colours.
OURS, REFERENCE, RIVAL, BYTES = "#D55E00", "#000000", "#999999", "#0072B2"
LONGEST = 8.0  # × the baseline: longer bars run off the page, with their number inside


def write(results: Path, target: Path) -> Path:
    """Draw the results file's sets, one panel each, and write the picture (PNG, SVG or PDF by its name).

    Raises:
        ValueError: the file holds no step benchmark.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    loaded = json.loads(results.read_text(encoding="utf-8"))
    panels = [(entry, [row for row in entry["rows"] if "skipped" not in row]) for entry in sets_of(loaded)]
    heights = [len(rows) + 2 for _, rows in panels]
    figure, axes = pyplot.subplots(
        len(panels),
        1,
        figsize=(8.5, 0.27 * sum(heights) + 0.8),
        dpi=150,
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )
    for place, (entry, rows) in zip(axes[:, 0], panels, strict=True):
        _panel(place, entry, rows)
    axes[-1, 0].set_xlabel(
        f"time of a step, × {BASELINE} in the same round: median, 20th to 80th percentile\n"
        f"blue: bytes to move, × the baseline's\n{_where(loaded)}",
        fontsize=8,
    )
    figure.tight_layout()
    figure.savefig(target)
    pyplot.close(figure)
    return target


def _panel(axes: Any, entry: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Draw one bar a row, the ratio to the baseline, with what the bytes alone would make it."""
    rows = [row for row in rows if BASELINE in row["ratio"]][::-1]
    base = next(row["bytes_per_element"] for row in rows if row["name"] == BASELINE)
    ratios = [row["ratio"][BASELINE] for row in rows]
    limit = min(LONGEST, 1.05 * max(high for _, _, high in ratios))
    for place, (row, (median, low, high)) in enumerate(zip(rows, ratios, strict=True)):
        colour = OURS if row["ours"] else REFERENCE if row["name"] == BASELINE else RIVAL
        bytes_ratio = row["bytes_per_element"] / base
        axes.barh(place, median, color=colour, height=0.65, xerr=[[median - low], [high - median]], error_kw=ERRORS)
        axes.plot(bytes_ratio, place, "|", color=BYTES, markersize=9, markeredgewidth=2)
        inside = high > 0.98 * limit
        axes.annotate(
            f"{median:.2f}   {1e3 * row['median_s']:.3g} ms, {100 * row['copy_share']:.0f} % of a copy",
            (0.98 * limit if inside else max(high, bytes_ratio), place),
            xytext=(0 if inside else 6, 0),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center",
            fontsize=7,
            color="white" if inside and colour != RIVAL else "black",
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 1} if inside else None,
        )
    axes.set_xlim(0, 1.35 * limit)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title(title(entry), fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.5, axis="x")
    axes.set_axisbelow(True)


ERRORS = {"elinewidth": 0.8, "ecolor": "#444444"}


def _where(results: dict[str, Any]) -> str:
    stamp = results.get("alr_kernels", {})
    machine = stamp.get("machine", {})
    device = ", ".join(machine.get("accelerators", [])) or f"{machine.get('processor')}, {machine.get('cores')} cores"
    return f"{device}; torch {stamp.get('versions', {}).get('torch')}; commit {stamp.get('commit')}"
