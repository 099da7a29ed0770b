"""`alr-kernels inspect`: what an importance file holds, by layer and by tensor."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from . import _output
from ._errors import clean
from ._progress import bar


class Coeffs(str, Enum):
    """How layers are weighed."""

    softmax = "softmax"
    proportional = "proportional"
    uniform = "uniform"


class By(str, Enum):
    """What a layer is."""

    block = "block"
    module = "module"


def inspect(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="An importance file, of either format version, in any encoding.")
    ],
    coeffs: Annotated[
        Coeffs,
        typer.Option(metavar="NAME", help="Rule of the layers' coefficients α (softmax, proportional, uniform)."),
    ] = Coeffs.softmax,
    temperature: Annotated[
        str,
        typer.Option(metavar="NUMBER", help="Temperature of the softmax: auto, or a number in units of a layer's ‖Ω‖."),
    ] = "auto",
    by: Annotated[
        By | None,
        typer.Option(metavar="NAME", help="What a layer is (block, module). (default: block; module for LoRA)"),
    ] = None,
    encodings: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="What to read every value for: int8,int4,rank1: what each would lose; kept: how what is kept differs "
            "from the original's statistics; all; none: the header alone. auto: all, in files of up to 2^28 elements.",
        ),
    ] = "auto",
    top: Annotated[int | None, typer.Option(min=1, metavar="N", help="Tensors listed, by share. (default: 10)")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw all of it into this .png file.")] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write a page that works offline into this folder.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", metavar=" ", help="Print one JSON object with every tensor.")
    ] = False,
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.", hidden=True)] = False,
) -> None:
    """Show what an importance file holds: where the pull will be, and what an encoding costs.

    For each layer: its coefficient α, its share of the pull (α·Ω), mass, mean
    and largest Ω, how much of the recorded ω was negative, a histogram by
    powers of 4, encoding errors and bytes. Files larger than memory are read
    piece by piece.

    Exit code 1: the file can be read, but values or statistics in it are not
    what they have to be.

    Examples:

      alr-kernels inspect importance.safetensors

      alr-kernels inspect importance.safetensors --coeffs uniform --html page
    """
    with clean("inspect", debug):
        found = _inspected(file, coeffs.value, temperature, by and by.value, encodings, top, plot, as_json)
        written = _drawn(found, plot, html)
        if as_json:
            from .._plain import plain

            typer.echo(json.dumps(plain(found.as_dict()), indent=1, ensure_ascii=False, allow_nan=False))
        else:
            from ..report import importance_table

            importance_table.show(found, top, _output.table_console())
        for path in written:
            typer.echo(f"Written: {path}", err=as_json)
    if found.problems:
        raise typer.Exit(1)


def _inspected(
    file: Path, coeffs: str, temperature: str, by: Any, encodings: str, top: int | None, plot: Path | None,
    as_json: bool,
) -> Any:  # fmt: skip
    from .. import _validate_finetune

    _validate_finetune.file_there("FILE", str(file), "an importance file")
    from .. import _validate_inspection
    from ..importance import Importance
    from ..importance.inspection import chosen, inspect, work

    _validate_inspection.top_rows(top, as_json)
    if plot is not None:
        _validate_inspection.picture(plot)
    importance = Importance.load(file)
    with bar("reading", work(importance, chosen(importance, encodings))) as tick:
        return inspect(file, coeffs=coeffs, temperature=temperature, by=by, encodings=encodings, tick=tick)


def _drawn(found: Any, plot: Path | None, html: Path | None) -> list[Path]:
    if plot is None and html is None:
        return []
    from .. import _validate_report
    from ..report import importance_page

    _validate_report.matplotlib()

    return [
        *([] if plot is None else [importance_page.draw(found, plot)]),
        *([] if html is None else importance_page.write(found, html)),
    ]
