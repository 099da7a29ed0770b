"""`alr-kernels demo`: learn a domain with and without the pull, and see what was forgotten."""

from __future__ import annotations

import json
import os
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

NEEDS = ("transformers", "matplotlib")
LORA_NEEDS = ("peft",)
WIDTH = 110  # columns of the table


class Arch(str, Enum):
    """Model families of the demo."""

    llama = "llama"
    gptj = "gptj"


def demo(
    arch: Annotated[Arch, typer.Option(help="Model family, built from its transformers config.")] = Arch.llama,
    seed: Annotated[int, typer.Option(min=0, help="Fixes the model and every batch: same seed, same table.")] = 0,
    fast: Annotated[bool, typer.Option("--fast", help="Seconds instead of minutes: shows that all runs.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results. (default: demo-results/ARCH(-lora)-seedSEED)")
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves torch's choice.")] = 0,
    lora: Annotated[bool, typer.Option("--lora", help="Train LoRA adapters (PEFT) instead of all weights.")] = False,
) -> None:
    """Learn a domain with and without the pull, and see what was forgotten.

    A byte-level model learns prose (this Python's own documentation) while the importance of its weights is recorded;
    then it learns code (the standard library's source) by AdamW, by L2-SP and by ALR. Nothing is downloaded.

    With --lora a model that has learnt prose stands still. A LoRA adapter learns more prose while the importance of
    U = s·B·A is recorded, then code; plain LoRA, with and without that phase on prose, learns the same code.
    """
    from ..demo.corpus import CorpusError

    _require(NEEDS + LORA_NEEDS if lora else NEEDS)
    folder = out or Path("demo-results") / f"{arch.value}{'-lora' if lora else ''}-seed{seed}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _run(arch.value, seed, fast, lora, folder, threads)
    except OSError as error:
        typer.echo(f"alr-kernels demo: {error}. Choose a folder that can be written with --out.", err=True)
        raise typer.Exit(2) from error
    except CorpusError as error:
        typer.echo(f"alr-kernels demo: {error}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        typer.echo(f"\nStopped. What was written so far is in {folder}.", err=True)
        raise typer.Exit(130) from None


def _require(packages: tuple[str, ...]) -> None:
    from importlib.util import find_spec

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        typer.echo(f'The demo needs {" and ".join(missing)}: pip install "alr-kernels[demo]"', err=True)
        raise typer.Exit(2)


def _quiet_environment() -> None:
    """Set what has to be set before torch and transformers are imported."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _run(arch: str, seed: int, fast: bool, lora: bool, folder: Path, threads: int) -> None:
    _quiet_environment()
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console()
    if not console.is_terminal or console.width > WIDTH:
        console = Console(width=WIDTH)
    with console.status("importing torch and transformers"):
        import torch

        from ..demo.settings import Settings
        from ..demo.study import study
        from ..report import demo_page, forgetting_table
        from ..report.page import write

    if threads:
        torch.set_num_threads(threads)
    settings = Settings.of(arch, seed, lora=lora, fast=fast)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    live = console.is_terminal  # bars in a log file would come all at once, at the end
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not live) as progress:

        def phase(name: str, total: int) -> Any:
            if not live:
                console.print(f"{name} ({total})", highlight=False)
            task = progress.add_task(name, total=total)
            return lambda: progress.advance(task)

        result = study(settings, folder, phase)
    results = folder / "results.json"
    results.write_text(json.dumps(result, indent=1) + "\n")
    index, *_ = write(demo_page.page(result), folder / "report")
    files = [folder / "importance.safetensors", results, index]
    files += [folder / "base", folder / "adapter"] if lora else []
    console.print(forgetting_table.table(result))
    console.print(forgetting_table.few_bytes(result))
    for paragraph in forgetting_table.explanation(result):
        console.print(f"\n{paragraph}", highlight=False)
    console.print(
        f"\nWritten to {folder}/: " + ", ".join(str(path.relative_to(folder)) for path in files), highlight=False
    )
