"""`alr-kernels compare`: whether two importance files agree about what matters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from . import _output
from ._errors import clean
from ._progress import bar
from .inspect import By


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="An importance file.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another, of the same model.")],
    by: Annotated[By, typer.Option(metavar="NAME", help="What a layer is (block, module).")] = By.block,
    top: Annotated[float, typer.Option(metavar="NUMBER", help="Share of the elements whose overlap is told.")] = 0.01,
    sample: Annotated[
        int,
        typer.Option(
            min=2, metavar="N", help="Elements of a layer that are ranked at most; above, a sample of so many."
        ),
    ] = 2**20,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of the sample.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", metavar=" ", help="Print one JSON object.")] = False,
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.", hidden=True)] = False,
) -> None:
    """Tell whether two importance files agree about what matters, by layer and in all.

    Rank correlation (Spearman; equal values share a rank) asks for the same
    order, log correlation for the same magnitudes where both are positive,
    cosine for the same pull, and top 1 % shared for the same most important
    weights. Sum of Ω, B / A, is the ratio of scales. The two may be encoded in
    different ways; they are decoded piece by piece.

    Exit code 1: no tensor has the same name in both; 2: their shapes differ.

    Examples:

      alr-kernels compare recorded.safetensors fisher.safetensors

      alr-kernels compare importance.safetensors int4.safetensors --by module
    """
    with clean("compare", debug):
        from .. import _validate_finetune

        for name, path in (("A", first), ("B", second)):
            _validate_finetune.file_there(name, str(path), "an importance file")
        from .. import _validate_inspection
        from ..importance import Importance
        from ..importance.comparison import PASSES
        from ..importance.comparison import compare as compared

        a, b = Importance.load(first), Importance.load(second)
        elements = sum(a.encoded(name).numel for name in a if name in b)
        try:
            with bar("comparing", PASSES * elements) as tick:
                found = compared(
                    a, b, by=by.value, top=top, sample=sample, seed=seed, names=(str(first), str(second)), tick=tick
                )
        except _validate_inspection.NothingInCommonError as error:
            if debug:
                raise
            typer.echo(f"alr-kernels compare: {error}", err=True)
            raise typer.Exit(1) from error
        if as_json:
            typer.echo(json.dumps(found.as_dict(), indent=1, ensure_ascii=False, allow_nan=False))
            return
        from ..report import importance_table

        importance_table.show_comparison(found, _output.table_console())
