"""Tables for a terminal, which leave out their least useful columns where it is too narrow for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import box
from rich.measure import Measurement
from rich.table import Table

if TYPE_CHECKING:
    from rich.console import Console

WIDEST = 1000  # columns of a terminal, more than any table has


class Column(NamedTuple):
    """One column: its head, what it says of a row, and how early it is left out (0: never; higher goes first)."""

    head: str
    cell: Callable[[Any], str]
    spare: int = 0
    right: bool = True

    @property
    def name(self) -> str:
        """The head in one line."""
        return " ".join(self.head.split())


class Grid(NamedTuple):
    """A table that is not drawn yet; ``whole``: its last row, of all others together."""

    rows: Sequence[Any]
    columns: Sequence[Column]  # the first names the row
    whole: Any = None

    def fitted(self, console: Console) -> tuple[Grid, list[str]]:
        """Return the grid with the columns that the console has room for, and the names of those left out."""
        kept = list(self.columns)
        for column in sorted((column for column in kept if column.spare), key=lambda column: -column.spare):
            if self._replace(columns=kept).width(console) <= console.width:
                break
            kept.remove(column)
        return self._replace(columns=kept), [column.name for column in self.columns if column not in kept]

    def width(self, console: Console) -> int:
        """Return how wide it is when nothing is cut."""
        options = console.options.update(max_width=WIDEST)
        return Measurement.get(console, options, self.drawn()).maximum

    def drawn(self) -> Table:
        """Return the table."""
        shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        for column in self.columns:
            shown.add_column(column.head, justify="right" if column.right else "left", no_wrap=True)
        for row in self.rows:
            shown.add_row(*(column.cell(row) for column in self.columns), end_section=row is self.rows[-1])
        if self.whole is not None:
            shown.add_row(*(column.cell(self.whole) for column in self.columns), style="bold")
        return shown


def show(grids: dict[str, Grid], console: Console) -> list[str]:
    """Print tables and return what was left out, as a sentence or none; a name or number is never cut."""
    usual, missing = console.width, []
    for what, grid in grids.items():
        fitting, left = grid.fitted(console)
        missing += [f"{', '.join(left)} (of {what})"] if left else []
        console.width = max(usual, fitting.width(console))
        console.print()
        console.print(fitting.drawn(), crop=False)
        console.width = usual
    console.print()
    if not missing:
        return []
    return [f"Left out at a width of {usual}: {'; '.join(missing)}. A wider terminal or --json shows them."]
