"""Tables of `alr-kernels bench --importance`, from its results alone."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .table import short


def show(results: dict[str, Any], console: Console) -> None:
    """Print every table that the results have."""
    for entry in results["passes"]:
        console.print(passes(entry))
    measured = [row for row in results["claim"] if "skipped" not in row]
    if measured:
        console.print(fisher(measured))
        console.print(claim(measured))
    for row in results["claim"]:
        if "skipped" in row:
            console.print(f"skipped: {row['model']}: {row['skipped']}", markup=False, highlight=False, soft_wrap=True)
    if results.get("storage"):
        console.print(storage(results["storage"]))


def plain_table(title: str, first: str, *headings: str) -> Table:
    """Return an empty table with a left column and others for numbers."""
    shown = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column(first)
    for heading in headings:
        shown.add_column(heading, justify="right", no_wrap=True)
    return shown


def passes(entry: dict[str, Any]) -> Table:
    """Return the passes over memory, each with the row that it is compared with."""
    title = (
        f"{entry['set']}: {entry['elements'] / 1e6:,.1f} M elements in {entry['tensors']} tensors on "
        f"{entry['device']}; a copy moves {entry['copy_bytes_per_s'] / 1e9:,.1f} GB/s"
    )
    shown = plain_table(title, "one pass", "ms\np20 - p80", "bytes\nmoved", "GB/s", "% of\ncopy", "compared")
    for row in entry["rows"]:
        median, p20, p80 = (short(1e3 * row[key]) for key in ("median_s", "p20_s", "p80_s"))
        compared = ""
        if row["ratio"]:
            faster = row["ratio"][0]
            slower = row["group"] == "recording"  # a step that records costs more than one that does not
            compared = f"{1 / faster:.2f} × as long as" if slower else f"{faster:.1f} × faster than"
            compared += f" {row['beside']}"
        shown.add_row(
            row["name"],
            f"{median} ({p20} - {p80})",
            f"{row['bytes_per_element']:.1f}",
            short(row["bytes_per_s"] / 1e9),
            f"{100 * row['share'][0]:.0f}" if row["share"] else "",
            compared,
            style="bold" if row["beside"] else None,
        )
    return shown


def claim(rows: list[dict[str, Any]]) -> Table:
    """Return what each importance costs for the paper's number of samples."""
    shown = plain_table(
        f"Importance from {rows[0]['samples']:,} samples of {rows[0]['length']} tokens, seconds beyond training",
        "model",
        "training",
        "path\nintegral",
        "% of\ntraining",
        "Fisher\nbatched",
        "Fisher\nby sample",
        "by sample /\npath integral",
        "by sample /\nbatched",
    )
    for row in rows:
        shown.add_row(
            f"{row['model']}, {row['parameters'] / 1e6:,.1f} M",
            short(row["training_s"]),
            f"{row['path_integral_s']:.3g}",
            f"{100 * row['path_integral_share_of_training']:.2g}",
            short(row["batched_s"]),
            short(row["loop_s"]),
            _two_digits(row["loop_over_path_integral"]),
            f"{row['fisher'][0]['ratio'][0]:.2f}",
        )
    return shown


def fisher(rows: list[dict[str, Any]]) -> Table:
    """Return the Fisher passes, batched and by sample."""
    shown = plain_table(
        "Fisher passes: fisher_importance beside one sample at a time",
        "model",
        "samples × tokens\na batch",
        "batches",
        "by sample, s",
        "batched, s",
        "forward +\nbackward, s",
        "times faster\n(least - most)",
        "largest\ndifference",
    )
    for row in rows:
        for found in row["fisher"]:
            median, least, most = found["ratio"]
            shown.add_row(
                row["model"],
                f"{found['samples']} × {found['tokens']}",
                str(found["batches"]),
                short(found["loop_s"]),
                short(found["batched_s"]),
                short(found["forward_backward_s"]),
                f"{median:.2f} ({least:.2f} - {most:.2f})",
                f"{found['largest_relative_difference']:.1e}",
            )
    return shown


def _two_digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):,.0f}"


def storage(rows: list[dict[str, Any]]) -> Table:
    """Return the bytes of the importance of q_proj and v_proj in each form, beside a Fisher's of all weights."""
    shown = plain_table(
        "Bytes of importance: q_proj and v_proj, beside an fp32 Fisher of all weights"
        + (f";\nfp32 anchors: LoRA factors of rank {rows[0]['rank']}, beside all weights" if "rank" in rows[0] else ""),
        "model",
        "parameters",
        "Fisher",
        "q + v as",
        "file",
        "of the Fisher",
        "both with\nanchors",
    )
    before = None
    for row in rows:
        if before not in (None, row["model"]):
            shown.add_section()
        first = row["model"] != before
        before = row["model"]
        whole = row.get("ewc_bytes")
        shown.add_row(
            row["model"] if first else "",
            f"{row['parameters'] / 1e9:.2f} G" if first else "",
            _size(row["fisher_bytes"]) if first else "",
            row["dtype"],
            _size(row["file_bytes"]) + ("" if row.get("written", True) else " *"),
            _percent(row["share"]),
            "" if whole is None else f"{_percent(row['share_of_ewc'])} of {_size(whole)}",
        )
    if not all(row.get("written", True) for row in rows):
        shown.caption = "* the size that the file would have; it was not written"
    return shown


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %" if share >= 1e-3 else f"{100 * share:.2g} %"
