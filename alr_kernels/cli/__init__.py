"""The command line: one file per verb. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

from typing import Annotated

import typer

from .._version import __version__
from .bench import bench
from .compare import compare
from .convert import convert
from .demo import demo
from .doctor import doctor
from .inspect import inspect
from .plan import plan
from .report import report

app = typer.Typer(
    name="alr-kernels",
    help="Fine-tune a language model on a domain without forgetting what it knew.",
    no_args_is_help=True,
    add_completion=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"alr-kernels {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tune a language model on a domain without forgetting what it knew."""


app.command()(doctor)
app.command()(demo)
app.command()(bench)
app.command()(plan)
app.command()(inspect)
app.command()(compare)
app.command()(convert)
app.command()(report)
