"""`alr-kernels convert`: importance files encoded anew, merged, renamed, selected, normalized."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from . import _output
from ._errors import clean
from ._progress import bar


class Form(str, Enum):
    """How importance is kept."""

    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"
    int4 = "int4"
    rank1 = "rank1"


class Rule(str, Enum):
    """How several become one."""

    sum = "sum"
    max = "max"
    weighted = "weighted"
    decayed = "decayed"


def convert(
    files: Annotated[list[Path], typer.Argument(metavar="IN", help="One importance file, or several to merge.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="File to write, ending in .safetensors.")],
    select: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Keep tensors of these names: '*.q_proj.weight'.")
    ] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(metavar="OLD=NEW", help="Names that begin with OLD begin with NEW instead; either may be empty."),
    ] = None,
    normalize: Annotated[bool, typer.Option("--normalize", metavar=" ", help="Scale each file to mean 1.")] = False,
    merge: Annotated[
        Rule | None,
        typer.Option(metavar="NAME", help="sum; max; weighted: w·A + (1−w)·B; decayed: w·A + B, from file to file."),
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option(metavar="NUMBER", help="w of weighted (or one a file, of sum 1) and of decayed."),
    ] = None,
    dtype: Annotated[
        Form | None,
        typer.Option(metavar="NAME", help="How to keep it (fp32, bf16, int8, int4, rank1). (default: as it is)"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", metavar=" ", help="Replace OUT if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", metavar=" ", help="Print one JSON object.")] = False,
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.", hidden=True)] = False,
) -> None:
    """Make an importance file of others: select, rename, normalize, merge and encode, in this order.

    Tensor by tensor, so that files may be larger than memory. OUT appears
    whole or not at all, and may be one of the inputs with --overwrite. What
    encoding loses is printed. An option that has no effect is refused.

    Examples:

      alr-kernels convert a.safetensors --dtype int4 --out small.safetensors

      alr-kernels convert a.safetensors b.safetensors --merge decayed \\
        --weight 0.9 --out both.safetensors

      alr-kernels convert a.safetensors --select '*.q_proj.*' \\
        --rename layers.=model.layers. --out q.safetensors
    """
    with clean("convert", debug):
        from .. import _validate_finetune

        for path in files:
            _validate_finetune.file_there("IN", str(path), "an importance file")
        from .. import _validate_inspection
        from ..importance import Importance
        from ..importance.conversion import convert as converted

        _validate_inspection.free_target(out, overwrite)
        given = [Importance.load(path) for path in files]
        before = [
            {"path": str(path), "bytes": path.stat().st_size, "tensors": len(importance)}
            for path, importance in zip(files, given, strict=True)
        ]
        with bar("converting", sum(row.numel for x in given for row in x.stats.values())) as tick:
            done = converted(
                given, out, select=select or (), rename=rename or (), normalize=normalize,
                merge=merge and merge.value, weights=weight or (), dtype=dtype and dtype.value, tick=tick,
            )  # fmt: skip
        if as_json:
            from .._plain import plain

            said = {**done.as_dict(), "inputs": before}
            typer.echo(json.dumps(plain(said), indent=1, ensure_ascii=False, allow_nan=False))
            return
        from ..report import importance_table

        importance_table.show_conversion(done, before, _output.table_console())
