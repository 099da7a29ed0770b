"""`alr-kernels report`: draw the page of a results file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ._errors import clean


def report(
    results: Annotated[Path, typer.Argument(help="results.json of tune, run or demo, or the folder that it is in.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the page. (default: report, beside the results)", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the paths of what was written as JSON.")] = False,
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.", hidden=True)] = False,
) -> None:
    """Draw the report of a finished run: what was learnt, what was forgotten, where weights moved, what it cost.

    Writes index.html, one file that works offline, and each chart as PNG.
    Nothing is run again, and the same results give the same page.
    """
    with clean("report", debug):
        from ..report.page import write
        from ..report.results import page_of

        page = page_of(results)
        index, *pictures = write(page, out or (results if results.is_dir() else results.parent) / "report")
        if as_json:
            typer.echo(json.dumps({"page": str(index), "pictures": [str(path) for path in pictures]}))
        else:
            typer.echo(f"Written: {index}, and beside it {', '.join(path.name for path in pictures)}")
