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
from .eval import eval
from .inspect import inspect
from .plan import plan
from .record import record
from .report import report
from .run import run
from .tune import tune

app = typer.Typer(
    name="alr-kernels",
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
    """Fine-tune a language model on a domain without forgetting what it knew.

    Begin with `alr-kernels run --help`: it does all of it, from a model and two texts to a tuned model and a report.
    """


TUNING, LOOKING, MACHINE = "Tune a model", "Look closer", "This machine"
VERBS = (  # in the order of use
    (TUNING, record),
    (TUNING, tune),
    (TUNING, run),
    (TUNING, eval),
    (LOOKING, report),
    (LOOKING, inspect),
    (LOOKING, compare),
    (LOOKING, convert),
    (MACHINE, plan),
    (MACHINE, demo),
    (MACHINE, bench),
    (MACHINE, doctor),
)
for _panel, _verb in VERBS:
    app.command(rich_help_panel=_panel)(_verb)
