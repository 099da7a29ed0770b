"""What `eval` found, as a table and a few sentences."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH = 110  # where there is no terminal

SUMMARY = {
    "forgetting": "forgetting (general NLL, after − before)",
    "domain_gain": "domain gain (domain NLL, before − after)",
    "backward_transfer": "backward transfer (general NLL, before − after)",
    "accuracy_backward_transfer": "backward transfer (normalised accuracy, after − before)",
    "accuracy_domain_gain": "domain gain (normalised accuracy, after − before)",
}
OF_TEXTS = (("nll", "nats a token"), ("perplexity", "perplexity"), ("bits_per_byte", "bits per byte"))
OF_CHOICES = (("accuracy", "accuracy"), ("accuracy_norm", "normalised accuracy"))


def show(results: Mapping[str, Any], console: Console) -> None:
    """Print what `alr_kernels.finetune.comparison.compare` returned."""
    before, after, changes = results["before"], results["after"], results["changes"]
    table = Table("measured on", "", title=f"[bold]{results['model']['name']}[/]")
    if before is not None:
        table.title = f"[bold]{results['before_model']['name']}[/] before, [bold]{results['model']['name']}[/] after"
        table.add_column("before", justify="right")
    table.add_column("after" if before is not None else "", justify="right")
    if before is not None:
        table.add_column("change [95 %]", justify="right")
    for name in ("general", "domain"):
        if name not in after:
            continue
        for key, unit in OF_TEXTS:
            label = (
                f"{name} text" if key == "nll" else f"{after[name]['tokens']:,} tokens" if key == "perplexity" else ""
            )
            cells = [_number(found[name][key]) for found in (before, after) if found is not None]
            _add(table, label, unit, cells, changes and changes[name].get(key))
        table.add_section()
    for name, answers in after["choices"].items():
        for key, unit in OF_CHOICES:
            label = PurePath(name).name if key == "accuracy" else f"{answers['questions']:,} questions"
            cells = [_accuracy(found["choices"][name], key) for found in (before, after) if found is not None]
            _add(table, label, unit, cells, changes and changes["choices"][name][key])
        table.add_section()
    console.print(table)
    for key, value in (results["summary"] or {}).items():
        if value is not None:
            low, high = results["intervals"][key]
            unit = "" if key.startswith("accuracy") else " nats a token"
            console.print(f"{SUMMARY[key]}: {_change({'value': value, 'low': low, 'high': high})}{unit}", markup=False)


def _add(table: Table, label: str, unit: str, cells: list[str], change: Any) -> None:
    """Add a row; where two models are compared its last cell is the change, empty where none is given."""
    from rich.text import Text

    if len(cells) == 2:
        cells = [*cells, _change(change)]
    table.add_row(*(Text(cell) for cell in (label, unit, *cells)))


def _change(change: Any) -> str:
    if change is None:
        return ""
    if not isinstance(change, Mapping):
        return f"{change:+.4f}"
    if change["value"] is None:
        return "not finite"
    bounds = "" if change["low"] is None else f" [{change['low']:+.4f}, {change['high']:+.4f}]"
    return f"{change['value']:+.4f}{bounds}"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _accuracy(found: Mapping[str, Any], key: str) -> str:
    return f"{found[key]:.4f} ± {found[f'{key}_stderr']:.4f}"
