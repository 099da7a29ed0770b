"""A report as one HTML file that needs nothing else: charts inside, a table behind each, the numbers as JSON.

    numbers ──run_page.py, demo_page.py──▶ Page ──write──▶ index.html + one PNG a chart

The same page gives the same bytes, whatever the time and the machine (of one matplotlib version).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .. import _validate_report
from .._files import replaced
from .._plain import plain
from . import style, svg
from .svg import NARROW, WIDE, Draw, escaped

Cell = float | int | str | bool | None
INDEX = "index.html"
MARK = '<script type="application/json" id="results">'  # by which a page is known


@dataclass(frozen=True)
class Chart:
    """A picture and the table of its numbers.

    Args:
        key: of letters, digits, ``-`` and ``_``, unique in the page: the chart's anchor and, with ``.png``, its file.
        title: what the chart is about.
        note: how to read it, in a sentence or two; what stands between backticks is shown as typed.
        draw: draws into an empty matplotlib figure; called once for each size, so it may look at the figure's width.
            Colours of ``palette`` follow the page between light and dark.
        columns: headings of the table, units included.
        rows: the table; the first cell names the row. Numbers stay numbers: the page rounds what it shows.
        height: inches, of the wide and of the narrow drawing.
    """

    key: str
    title: str
    note: str
    draw: Draw
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    height: tuple[float, float] = (3.6, 3.4)


@dataclass(frozen=True)
class Absent:
    """A chart for which there is nothing to draw, and why."""

    key: str
    title: str
    why: str


@dataclass(frozen=True)
class Table:
    """A table that stands alone."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Number:
    """A number that the page begins with.

    Args:
        label: what it is.
        value: the number itself.
        unit: said after it.
        path: where it is in the page's data: keys with dots between. Empty when it is not there as such.
        signed: show a plus.
        note: said below it.
    """

    label: str
    value: float | int | None
    unit: str = ""
    path: str = ""
    signed: bool = False
    note: str = ""


@dataclass(frozen=True)
class Page:
    """All that a report says.

    Args:
        title, subtitle: its head.
        summary: paragraphs of plain words.
        charts: in the order of the page.
        details: tables below them: options, versions, data.
        numbers: shown before the summary.
        data: what the page's numbers come from; embedded as JSON (``<script id="results">``). NaN becomes null.
    """

    title: str
    subtitle: str
    summary: Sequence[str]
    charts: Sequence[Chart | Absent]
    details: Sequence[Table] = ()
    numbers: Sequence[Number] = ()
    data: Any = None


def write(page: Page, folder: Path) -> list[Path]:
    """Write the page and its charts' pictures into the folder, which is made if need be; return their paths.

    ``index.html`` comes first in the list, and is written last.

    Raises:
        ImportError: matplotlib is not installed.
    """
    _validate_report.matplotlib()
    check_folder(folder, [f"{chart.key}.png" for chart in page.charts])
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [chart for chart in page.charts if isinstance(chart, Chart)]
    pictures = [_whole(folder / f"{chart.key}.png", partial(svg.png, chart.draw, chart.height[0])) for chart in drawn]
    return [_whole(folder / INDEX, partial(Path.write_text, data=html(page), encoding="utf-8")), *pictures]


def is_page(path: Path) -> bool:
    """Whether a file is a page that :func:`write` left."""
    try:
        return MARK.encode() in path.read_bytes()
    except OSError:
        return False


def check_folder(folder: Path, pictures: Sequence[str] = ()) -> None:
    """Refuse a folder whose ``index.html``, or pictures of these names, no report left.

    Raises:
        ValueError: which is there.
    """
    there = [name for name in pictures if (folder / name).exists() and not svg.is_picture(folder / name)]
    there += [INDEX] if (folder / INDEX).exists() and not is_page(folder / INDEX) else []
    if there:
        _validate_report.foreign_page(folder, there)


def _whole(path: Path, fill: Callable[[Path], Any]) -> Path:
    with replaced(path) as beside:
        fill(beside)
    return path


def html(page: Page) -> str:
    """Return the page as text."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        # Nothing is ever fetched: the browser holds the page to it.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:\">",
        '<link rel="icon" href="data:,">',
        f"<title>{escaped(page.title)}</title>",
        f"<style>{style.css()}</style></head><body><main>",
        f'<header><h1>{escaped(page.title)}</h1><p class="subtitle">{escaped(page.subtitle)}</p></header>',
        _summary(page),
        *(_chart(chart) if isinstance(chart, Chart) else _absent(chart) for chart in page.charts),
        _details(page.details),
        "<footer><p>The numbers of this page are in it as JSON, too, in the element with the id results. "
        "Each chart lies beside this file as a picture.</p></footer>",
        f"</main>{MARK}{embedded(page.data)}</script></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def embedded(data: Any) -> str:
    """Return JSON that no HTML parser takes for a tag; NaN and infinities become null.

    >>> embedded({"a": float("nan"), "b": "</script>"})
    '{"a": null, "b": "\\\\u003c/script\\\\u003e"}'
    """
    text = json.dumps(plain(data), ensure_ascii=False, allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def shown(value: Cell, signed: bool = False) -> str:
    """Return a cell as text: four significant digits, thousands apart, a dash for what is not known.

    >>> shown(0.123456), shown(1234567), shown(-0.5, signed=True), shown(None), shown(1.5e-7)
    ('0.1235', '1,234,567', '−0.5', '—', '1.5e−07')
    """
    value = plain(value)
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    sign = "+" if signed else ""
    whole = isinstance(value, int) or 1e4 <= abs(value) < 1e15
    return (f"{value:{sign},.0f}" if whole else f"{value:{sign}.4g}").replace("-", "−")


def _prose(text: str) -> str:
    """Return sentences as HTML; what stands between backticks is typed as it is there."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escaped(text))


def _summary(page: Page) -> str:
    tiles = "".join(
        f"<div><dt>{escaped(number.label)}</dt><dd>{_value(number)}"
        + (f" <span>{escaped(number.unit)}</span>" if number.unit else "")
        + (f"<small>{escaped(number.note)}</small>" if number.note else "")
        + "</dd></div>"
        for number in page.numbers
    )
    said = "".join(f"<p>{_prose(paragraph)}</p>" for paragraph in page.summary)
    tiles = f'<dl class="numbers">{tiles}</dl>' if tiles else ""
    return f'<section id="summary"><h2>Summary</h2>{tiles}{said}</section>'


def _value(number: Number) -> str:
    text, value = escaped(shown(number.value, number.signed)), plain(number.value)
    path = f' data-path="{escaped(number.path)}"' if number.path else ""
    return f"<b{path}>{text}</b>" if value is None else f'<data value="{value!r}"{path}>{text}</data>'


def _chart(chart: Chart) -> str:
    pictures = "".join(
        f'<div class="{name}">'
        + svg.inline(chart.draw, f"{chart.key}-{name}", (width, height), chart.title, chart.note.replace("`", ""))
        + "</div>"
        for name, width, height in zip(("wide", "narrow"), (WIDE, NARROW), chart.height, strict=True)
    )
    table = _table(chart.title, chart.columns, chart.rows)
    return (
        f'<section class="chart" id="{escaped(chart.key)}"><h2>{escaped(chart.title)}</h2>'
        f"<p>{_prose(chart.note)}</p><figure>{pictures}</figure>"
        f"<details><summary>The numbers as a table</summary>{table}</details></section>"
    )


def _absent(chart: Absent) -> str:
    return (
        f'<section class="absent" id="{escaped(chart.key)}"><h2>{escaped(chart.title)}</h2>'
        f"<p>{_prose(chart.why)}</p></section>"
    )


def _details(tables: Sequence[Table]) -> str:
    if not tables:
        return ""
    listed = "".join(
        f"<details><summary>{escaped(table.title)}</summary>{_table(table.title, table.columns, table.rows)}</details>"
        for table in tables
    )
    return f'<section id="details"><h2>Details</h2>{listed}</section>'


def _table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    head = "".join(f'<th scope="col">{escaped(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{_cell(row[0])}</th>' + "".join(_data_cell(cell) for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escaped(caption)}, table"><table>'
        f"<caption>{escaped(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _data_cell(cell: Cell) -> str:
    text = isinstance(cell, (str, bool))
    return f'<td class="text">{_cell(cell)}</td>' if text else f"<td>{_cell(cell)}</td>"


def _cell(cell: Cell) -> str:
    text, value = escaped(shown(cell)), plain(cell)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f'<data value="{value!r}">{text}</data>' if is_number else text
