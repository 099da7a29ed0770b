"""What record, tune and run do alike: settings, what is needed, the phases, the report, and what is printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from . import _output
from ._errors import clean
from ._options import Call

if TYPE_CHECKING:
    from ..finetune.settings import Settings


def train(call: Call) -> None:
    """Run a verb as it was called, on this process of a job, and print what came out."""
    from .. import _environment

    main = _environment.launched()[0] == 0
    with _output.quiet(call.verb, main, call.debug):
        with clean(call.verb, call.debug, silent=not _environment.first_on_machine()):
            from ..finetune.settings import resolve

            settings = resolve(call.verb, call.flags, call.config)
            need(settings)
        with clean(call.verb, call.debug):
            results = _phases(settings, call, main)
            if main:
                _print(settings, call, results)


def _print(settings: Settings, call: Call, results: dict[str, Any]) -> None:
    """Write the report, where there is one, and print what came out."""
    report = _report(settings, results)
    if report is not None:
        results["files"]["report"] = str(report)
    if call.as_json:
        typer.echo(json.dumps(results, indent=1, ensure_ascii=False))
    else:
        from . import _summary

        _summary.show(results)


def need(settings: Settings) -> None:
    """Refuse to begin without the packages that the run will use.

    Raises:
        ImportError: what is missing, and the extra that brings it.
    """
    from .. import _validate_finetune
    from ..finetune.options import ModelOptions, TrainOptions

    model = settings.of(ModelOptions)
    wanted: list[tuple[str, str, tuple[str, ...]]] = [
        ("train", settings.verb, ("transformers", "datasets", "accelerate", "yaml"))
    ]
    if settings.in_lora_space:
        wanted.append(("peft", "LoRA", ("peft",)))
    if model.quantize != "none":
        wanted.append(("all", "--quantize", ("bitsandbytes",)))
    if settings.of(TrainOptions).tensorboard:
        wanted.append(("all", "--tensorboard", ("tensorboard",)))
    folder = _report_folder(settings)
    if folder is not None:
        if settings.verb == "tune":  # run's own folder is looked at when the run begins
            from ..report.page import check_folder

            check_folder(folder)
        wanted.append(("report", "the report", ("matplotlib",)))
    for extra, what, packages in wanted:
        missing = [package for package in packages if find_spec(package) is None]
        if missing:
            _validate_finetune.missing_package(missing, extra, what)


def _phases(settings: Settings, call: Call, main: bool) -> dict[str, Any]:
    """Call the verb's function, with progress on the main process."""
    from rich.console import Console

    from ..finetune.progress import Interrupted, Progress, Stopped

    console = Console(file=sys.stderr)
    with ExitStack() as stack, _before_it_began(Interrupted, Stopped):
        if main:
            with console.status("importing torch and transformers"):
                from ..finetune import phases
            progress: Progress = stack.enter_context(_output.Shown(call.verb, console))
        else:
            from ..finetune import phases

            progress = Progress()
        verb = getattr(phases, settings.verb)
        results = verb(settings, resume=call.resume, overwrite=call.overwrite, progress=progress)
    _leave()
    return results


@contextmanager
def _before_it_began(*known: type[BaseException]) -> Iterator[None]:
    """Say that an interruption was early, unless it is of a ``known`` kind, which a run that has begun raises."""
    try:
        yield
    except known:
        raise
    except KeyboardInterrupt as error:
        raise known[0](
            "interrupted before the run began: nothing was written, and the same command can simply be given again."
        ) from error


def _leave() -> None:
    """Leave the job of many processes, of which torch complains otherwise."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _report_folder(settings: Settings) -> Path | None:
    """Return where the page goes: run always writes one, tune when it is asked to."""
    from ..finetune.options import RunFiles, TuneFiles

    if settings.has(RunFiles):
        return Path(settings.of(RunFiles).out) / "report"
    if settings.has(TuneFiles) and (folder := settings.of(TuneFiles).report) is not None:
        return Path(folder)
    return None


def _report(settings: Settings, results: dict[str, Any]) -> Path | None:
    folder = _report_folder(settings)
    if folder is None:
        return None
    from ..report import page, run_page

    return page.write(run_page.page(results), folder)[0]
