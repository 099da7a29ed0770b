"""The benchmark's table, from a set's result (``alr_kernels.benchmark.suite``)."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .candidates import BASELINE, COMPILED

NARROW, WIDTH = 92, 128  # columns: below, numbers would be cut; above, nothing is gained


def sets_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the sets in a results file, of ``alr-kernels bench --json`` or of pytest-benchmark.

    Raises:
        ValueError: there are none.
    """
    sets = results.get("sets") or [entry.get("extra_info", {}) for entry in results.get("benchmarks", [])]
    found = [entry for entry in sets if isinstance(entry.get("rows"), list)]
    if not found:
        raise ValueError(
            "no step benchmark in these results: write them with `alr-kernels bench --json` or `make bench`"
        )
    return found


def title(result: dict[str, Any]) -> str:
    """Say what was stepped, and how fast a copy was in the same rounds."""
    return (
        f"{result['set']}: {result['elements'] / 1e6:,.1f} M elements in {result['tensors']} tensors on "
        f"{result['device']}; a copy moves {result['copy_bytes_per_s'] / 1e9:,.1f} GB/s"
    )


def show(result: dict[str, Any], console: Console) -> None:
    """Print the set's table, and below it which rows were skipped and why."""
    console.print(table(result))
    for row in result["rows"]:
        if "skipped" in row:
            console.print(f"skipped: {row['name']}: {row['skipped']}", markup=False, highlight=False, soft_wrap=True)


def table(result: dict[str, Any]) -> Table:
    """Return the table of the set's rows that were measured."""
    measured = [row for row in result["rows"] if "skipped" not in row]
    on_gpu = any(row.get("peak_bytes") is not None for row in measured)
    compared = any(COMPILED in row["ratio"] for row in measured)
    shown = Table(title=title(result), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column("one step")  # the one to fold where the terminal is narrow
    headings = ["ms\np20 - p80", "× torch\nfused", *(["× com-\npiled"] if compared else []), "bytes\nmoved", "GB/s"]
    headings += [
        "% of\ncopy",
        "state B\na param",
        *(["peak B\na param", "host\nµs"] if on_gpu else []),
        "first\ns",
    ]
    for heading in headings:
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in measured:
        shown.add_row(row["name"], *_cells(row, compared, on_gpu), style="bold" if row["ours"] else None)
    return shown


def _cells(row: dict[str, Any], compared: bool, on_gpu: bool) -> list[str]:
    median, p20, p80 = (short(1e3 * row[key]) for key in ("median_s", "p20_s", "p80_s"))
    return [
        f"{median} ({p20} - {p80})",
        _ratio(row, BASELINE),
        *([_ratio(row, COMPILED)] if compared else []),
        f"{row['bytes_per_element']:.1f}",
        short(row["bytes_per_s"] / 1e9),
        f"{100 * row['copy_share']:.0f}",
        f"{row['state_bytes']:.2f}",
        *([f"{row['peak_bytes']:.2f}", f"{1e6 * row['host_s']:,.0f}"] if on_gpu else []),
        f"{row['first_step_s']:.2f}",
    ]


def short(value: float) -> str:
    """Format with three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _ratio(row: dict[str, Any], reference: str) -> str:
    return f"{row['ratio'][reference][0]:.2f}" if reference in row["ratio"] else "—"
