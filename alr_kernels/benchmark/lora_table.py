"""Tables of `alr-kernels bench --lora`, from its results alone."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from .importance_table import plain_table
from .table import short


def show(result: dict[str, Any], console: Console) -> None:
    """Print every table of a result."""
    for entry in result["passes"]:
        console.print(passes(entry, result["device"]))
    console.print(steps(result["model"], _model_title(result["model"], result["device"]), 1e3, "ms"))
    console.print(_training(result["model"]), markup=False, highlight=False, soft_wrap=True)
    host = result["host"]
    title = f"The host's part: until step() returns, {host['pairs']} pairs of {host['side']} × {host['side']}"
    console.print(steps(host, f"{title}, r = {host['rank']}", 1e3, "ms"))
    if result["bars"]:
        console.print(bars(result["bars"]))


def passes(entry: dict[str, Any], device: str) -> Table:
    """Return recording and pulls of one rank, each with the rows that it is compared with."""
    rows, columns = entry["shape"]
    title = (
        f"{entry['pairs']} × U of {rows} × {columns}, r = {entry['rank']}, on {device}; "
        f"a copy moves {entry['copy_bytes_per_s'] / 1e9:,.1f} GB/s"
    )
    headings = ("ms\np20 - p80", "bytes\nmoved", "GB/s", "% of\ncopy", "÷ re-\ncord", "extra\n% of ω", "compared")
    shown = plain_table(title, "one pass", *headings)
    for row in entry["rows"]:
        compared = "\n".join(f"{ratio[0]:.1f} × faster than {name}" for name, ratio in row["ratios"].items())
        rate, over = row["bytes_per_s"], row["over_record"]
        shown.add_row(
            row["name"],
            _time(row, 1e3),
            "" if rate is None else f"{row['bytes_per_element']:.1f}",
            "" if rate is None else short(rate / 1e9),
            "" if row["share"] is None else f"{100 * row['share'][0]:.0f}",
            "" if over is None else f"{over[0]:.2f}",
            "" if row["extra_share"] is None else f"{100 * row['extra_share']:.1f}",
            compared,
            style="bold" if row["ratios"] else None,
        )
    return shown


def steps(entry: dict[str, Any], title: str, unit: float, name: str) -> Table:
    """Return the optimizer's step in every variant, beside torch's AdamW."""
    shown = plain_table(title, "one step", f"{name}\np20 - p80", "× torch\nfused", f"beyond it,\n{name}")
    for row in entry["rows"]:
        shown.add_row(row["name"], _time(row, unit), f"{row['ratio'][0]:.2f}", f"{unit * row['extra_s'][0]:.2f}")
    return shown


def bars(found: list[dict[str, Any]]) -> Table:
    """Return what is wanted, what came out, and whether it holds."""
    shown = plain_table("Bars", "what", "wanted", "got", "holds")
    for bar in found:
        got = "not measured" if bar["got"] is None else f"{bar['got']:.3g}"
        holds = {None: "?", True: "yes", False: "no"}[bar["holds"]]
        shown.add_row(bar["name"], f"{'≥' if bar['at_least'] else '≤'} {bar['wanted']:g}", got, holds)
    return shown


def _model_title(entry: dict[str, Any], device: str) -> str:
    part = "all pairs" if entry["whole_model"] else "not the whole model: a few pairs"
    return (
        f"{entry['model']}, q_proj and v_proj, r = {entry['rank']}, on {device}: {part} "
        f"({entry['pairs']}, {entry['elements'] / 1e6:,.1f} M elements of U)"
    )


def _training(entry: dict[str, Any]) -> str:
    training = entry["training"]
    if "skipped" in training:
        return f"skipped: a training step: {training['skipped']}"
    tokens = training["batch"] * training["length"]
    way = ", checkpointing" if training["checkpointing"] else ""
    return (
        f"A training step of {tokens:,} tokens{way} takes {1e3 * training['seconds']:,.0f} ms; recording and penalty "
        f"add {100 * entry['share_of_training']:.2f} %"
    )


def _time(row: dict[str, Any], unit: float) -> str:
    median, p20, p80 = (short(unit * row[key]) for key in ("median_s", "p20_s", "p80_s"))
    return f"{median} ({p20} - {p80})"
