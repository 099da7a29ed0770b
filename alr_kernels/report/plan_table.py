"""A plan as a table: a column for each number of devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from ..planning.counting import KEPT
from ..planning.plan import MOST, NOT_COUNTED

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from ..planning import Column, Plan

NARROW = 88

LABELS = {
    "frozen_weights": "frozen weights",
    "weights": "weights",
    "gradients": "gradients",
    "buckets": "DDP's buckets",
    "moments": "moments",
    "importance": "importance Ω",
    "anchor": "anchor θ*",
    "path_integral": "path integral ω",
    "start": "start",
    "remainder": "split remainders",
    "moment_scales": "scales of moments",
    "importance_scales": "scales of Ω",
    "steps": "step counts",
    "unsharded_outside_blocks": "  embeddings, head, norms",
    "unsharded_block": "  one block",
    "prefetched_block": "  the next, prefetched",
    "unsharded_gradients": "  gradients of one group",
    "gathered_factors": "  gathered LoRA factors",
    "reduced_pull": "  pull summed over ranks",
    "statistics": "  norm and statistics",
}


def size(count: float) -> str:
    """Format bytes with three significant digits, decimal units.

    >>> size(16_060_522_496), size(9.996e8), size(12), size(0)
    ('16.1 GB', '1.00 GB', '12 B', '0')
    """
    if not count:
        return "0"
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        count /= 1000
        if count < 999.5 or unit == "TB":
            break
    return f"{count:.{2 if count < 9.995 else 1 if count < 99.95 else 0}f} {unit}"


def seconds(value: float | None) -> str:
    """Format seconds as ms or µs."""
    if value is None:
        return "—"
    return f"{1e3 * value:.2f} ms" if value >= 1e-3 else f"{1e6 * value:.1f} µs"


def table(plan: Plan) -> Table:
    """Return the table of a plan's columns."""
    setup = plan.setup
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    shown.add_column("bytes a device" + (", fullest rank" if setup.sharded else ""), no_wrap=True)
    for column in plan.columns:
        shown.add_column(f"{column.gpus:,} device{'s' if column.gpus > 1 else ''}", justify="right", no_wrap=True)

    def row(label: str, cell: Callable[[Column], str], style: str | None = None, last: bool = False) -> None:
        shown.add_row(label, *map(cell, plan.columns), style=style, end_section=last)

    present = [part for part in KEPT if any(column.kept[part] for column in plan.columns)]
    labels = LABELS | ({"weights": "LoRA factors"} if setup.lora is not None else {})
    for part in present:
        row(labels[part], lambda column, part=part: size(column.kept[part]), last=part == present[-1])  # type: ignore[misc]
    row("kept from step to step", lambda column: size(column.total), "bold")
    if setup.sharded:
        row("  on the emptiest rank", lambda column: size(sum(column.emptiest.values())))
        row("unsharded, forward and backward", lambda column: size(sum(column.in_model.values())))
        for part in plan.columns[0].in_model:
            row(LABELS[part], lambda column, part=part: size(column.in_model[part]))  # type: ignore[misc]
        if any(any(column.in_step.values()) for column in plan.columns):
            row("in the optimizer's step", lambda column: size(sum(column.in_step.values())))
            for part in plan.columns[0].in_step:
                row(LABELS[part], lambda column, part=part: size(column.in_step[part]))  # type: ignore[misc]
    row("most at once", lambda column: size(column.peak), "bold")
    if plan.device.memory is not None:
        row(f"fits in {plan.device.memory / 1e9:,.0f} GB", lambda column: "yes" if column.fits else "NO", last=True)
    row("a step reads and writes", lambda column: size(column.moved))
    row("a step takes at least", lambda column: seconds(column.seconds), "bold")
    if setup.sharded:
        row("gathered and reduced, a step", lambda column: size(sum(column.communicated.values())))
    return shown


def show(plan: Plan, console: Console) -> None:
    """Print a plan for people."""

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    for line in heading(plan):
        say(line)
    console.print(table(plan))
    for line in notes(plan):
        say(line)


def heading(plan: Plan) -> list[str]:
    """Say what is planned."""
    setup = plan.setup
    trained = "every parameter"
    if setup.lora is not None:
        trained = (
            f"LoRA r = {setup.lora.rank} ({setup.lora.dtype}) on {', '.join(setup.lora.targets)}: "
            f"{plan.trained_parameters:,} parameters in {plan.trained_tensors:,} tensors"
        )
    strategy = f"hsdp, {setup.shard} devices a replica" if setup.strategy == "hsdp" else setup.strategy
    kept = [f"moments {setup.state_dtype}"]
    if setup.penalised:
        kept = [f"importance {setup.importance_dtype or 'fp32'}", f"anchor {setup.anchor_dtype or 'as param'}", *kept]
    kept += [f"master {setup.master}"] if setup.master != "none" else []
    mode = f", {setup.mode}" if setup.penalised else ""
    device = plan.device
    about = [f"{device.memory / 1e9:,.0f} GB"] if device.memory is not None else []
    about += [f"{device.bandwidth / 1e9:,.0f} GB/s"] if device.bandwidth is not None else []
    return [
        f"{plan.model}: {plan.parameters:,} parameters in {plan.tensors:,} tensors",
        f"trained: {trained}; {strategy}; phase {setup.phase}{mode}; {', '.join(kept)}",
        f"device: {device.name}, {', '.join(about) or 'memory and bandwidth unknown'}",
    ]


def notes(plan: Plan) -> list[str]:
    """Say how many devices are needed, and what is not counted."""
    found = []
    if plan.device.memory is not None:
        found.append(_needed(plan))
    return [*found, f"not counted: {NOT_COUNTED}"]


def _needed(plan: Plan) -> str:
    what = "devices a replica" if plan.setup.strategy == "hsdp" else "devices"
    if plan.enough is None:
        cure = f"not even {MOST:,} shards do" if plan.setup.sharded else "each holds everything: use fsdp2"
        return f"devices needed: none are enough, {cure}"
    if not plan.setup.sharded:
        return "devices needed: 1"
    return f"{what} needed: {plan.enough:,}, before activations"
