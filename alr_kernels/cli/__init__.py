"""The command line: one file per verb. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

from typing import Annotated

import typer

from .._version import __version__
from .bench import bench
from .demo import demo
from .doctor import doctor
from .eval import eval
from .plan import plan
from .record import record
from .run import run
from .tune import tune

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
    """Fine-tune a language model on a domain without forgetting what it knew.

    Start with `alr-kernels run --help`, which does all of it, or with record and then tune.
    """


# In the order of use.
PANELS = {
    "Tune a model": (
        record,
        tune,
        run,
        eval,
    ),
    "This machine": (
        plan,
        demo,
        bench,
        doctor,
    ),
}
for _panel, _verbs in PANELS.items():
    for _verb in _verbs:
        app.command(rich_help_panel=_panel)(_verb)
