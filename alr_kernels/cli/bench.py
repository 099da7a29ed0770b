"""`alr-kernels bench`: one optimizer step on this machine, beside what users would write without it."""

from __future__ import annotations

import json
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer


class Compile(str, Enum):
    """When to measure torch.compile, whose first step takes tens of seconds."""

    none = "none"
    few = "few"
    all = "all"


class Set(str, Enum):
    """Sets of parameter shapes."""

    square = "square"
    llama_layer = "llama-layer"
    lora = "lora"
    resnet101 = "resnet101"
    billion = "billion"


SHORT, FULL_CPU, FULL_GPU = ("square", "lora"), ("square", "llama-layer", "lora", "resnet101"), ("billion",)
CPU_SCALE = {"llama-layer": 0.25}  # 55 M of its 218 M parameters: several copies must fit into memory


def bench(
    sets: Annotated[
        list[Set] | None, typer.Option("--set", help="Shapes to step; may be given again. (default: square, lora)")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Every row and set; minutes instead of one.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. (default: cuda where there is one)")] = None,
    scale: Annotated[float, typer.Option(min=1e-6, max=1.0, help="Share of each set's elements.")] = 1.0,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds of every pairing. (default: 7, with --full 15)")
    ] = None,
    importance: Annotated[
        bool,
        typer.Option(
            "--importance",
            help="Instead of steps, the passes that importance takes and its cost beside a Fisher, and the bytes "
            "of both; with --full two models, and files are written (half a gigabyte in the temporary folder). "
            "--scale and --compile do not apply to the Fisher.",
        ),
    ] = False,
    lora: Annotated[
        bool,
        typer.Option(
            "--lora",
            help="Instead of steps, LoRA in effective space: recording and the penalty's pull of one weight, a model's "
            "step, and the host's part; with --full rank 64 as well. --set and --compile do not apply.",
        ),
    ] = False,
    compile: Annotated[Compile, typer.Option(help="torch.compile: never, up to 64 tensors, or always.")] = Compile.few,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
    plot: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="RESULTS PICTURE", help="Draw a results file instead of measuring."),
    ] = None,
) -> None:
    """Time one optimizer step (or importance, or LoRA) on this machine, beside torch's and what users would write.

    Times are medians of rounds in which a plain copy, torch's fused AdamW and the compiled rival take their turns too;
    ratios are medians over rounds. "state B" counts live tensors beside weights and gradients.
    """
    if plot is not None:
        _draw(*plot)
        return
    from ..benchmark.suite import failures

    chosen = _device(device)
    count = rounds or (15 if full else 7)
    names = [entry.value for entry in sets or ()]
    if lora:
        results = _measure_lora(chosen, scale, full, count)
    elif importance:
        results = _measure_importance(names or ["square"], chosen, scale, full, count)
    else:
        results = _measure(names or _default(full, chosen), chosen, scale, full, compile.value, count)
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        typer.echo(f"Written to {json_file}")
    failed = [line for entry in results.get("sets", ()) for line in failures(entry)]
    if failed:
        typer.echo("alr-kernels bench: failed: " + "; ".join(failed) + ". Run `alr-kernels doctor`.", err=True)
        raise typer.Exit(1)


def _device(requested: str | None) -> str:
    import torch

    chosen = requested or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen not in ("cpu", "cuda") or (chosen == "cuda" and not torch.cuda.is_available()):
        typer.echo(f"alr-kernels bench: device {chosen!r} is not here; use cpu or cuda", err=True)
        raise typer.Exit(2)
    return chosen


def _default(full: bool, device: str) -> list[str]:
    if not full:
        return list(SHORT)
    return [*FULL_CPU, *(FULL_GPU if device == "cuda" else ())]


def _measure(names: list[str], device: str, scale: float, full: bool, compile: str, rounds: int) -> dict[str, Any]:

    from ..benchmark.shapes import shapes_of
    from ..benchmark.stamp import stamp
    from ..benchmark.suite import run_set
    from ..benchmark.table import show

    console = _console()
    results: dict[str, Any] = {"alr_kernels": stamp(), "sets": []}
    for name in names:
        share = scale * (CPU_SCALE.get(name, 1.0) if device == "cpu" else 1.0)
        with console.status(name) as status:
            entry = run_set(
                name,
                shapes_of(name, share),
                device,
                full=full,
                compile=compile,
                rounds=rounds,
                budget_s=10.0 if full else 3.0,
                tick=lambda row, name=name, status=status: status.update(f"{name}: {row}"),  # type: ignore[misc]
            )
        results["sets"].append({**entry, "scale": share})
        show(entry, console)
    return results


def _console() -> Any:
    from rich.console import Console

    from ..benchmark.table import NARROW, WIDTH

    console = Console()
    return Console(width=max(NARROW, min(console.width, WIDTH)) if console.is_terminal else WIDTH)


def _measure_importance(names: list[str], device: str, scale: float, full: bool, rounds: int) -> dict[str, Any]:

    from ..benchmark import importance, importance_table
    from ..benchmark.shapes import shapes_of
    from ..benchmark.stamp import stamp

    console = _console()
    results: dict[str, Any] = {"alr_kernels": stamp(), "passes": [], "claim": []}
    with console.status("") as status:
        for name in names:
            shapes = shapes_of(name, scale * (CPU_SCALE.get(name, 1.0) if device == "cpu" else 1.0))
            entry = importance.run_passes(
                shapes, device, rounds=rounds, budget_s=10.0 if full else 3.0, tick=lambda row: status.update(row)
            )
            results["passes"].append({"set": name, **entry})
        if find_spec("transformers") is None:
            typer.echo('the cost beside a Fisher needs transformers: pip install "alr-kernels[train]"', err=True)
        else:
            from ..benchmark import claim

            for name in claim.models_for(device)[: None if full else 1]:
                status.update(name)
                shapes_seen = claim.SHAPES if full else claim.SHORT
                results["claim"].append(claim.run_model(name, device, rounds=rounds, shapes=shapes_seen))
            written = claim.WRITTEN if full else ()
            results["storage"] = claim.storage(written=written, tick=lambda name: status.update(f"bytes of {name}"))
    importance_table.show(results, console)
    return results


def _measure_lora(device: str, scale: float, full: bool, rounds: int) -> dict[str, Any]:

    from ..benchmark import lora, lora_table
    from ..benchmark.shapes import scaled
    from ..benchmark.stamp import stamp

    console = _console()
    (shape,) = scaled([lora.SHAPE], scale)
    with console.status("") as status:
        entry = lora.run(
            shape, device, ranks=lora.MORE_RANKS if full else lora.RANKS, rounds=rounds,
            budget_s=10.0 if full else 3.0, tick=lambda row: status.update(row),
        )  # fmt: skip
    lora_table.show(entry, console)
    return {"alr_kernels": stamp(), "lora": entry}


def _draw(results: Path, picture: Path) -> None:
    if find_spec("matplotlib") is None:
        typer.echo('--plot needs matplotlib: pip install "alr-kernels[report]"', err=True)
        raise typer.Exit(2)
    from ..report import step_plots

    try:
        typer.echo(f"Written to {step_plots.write(results, picture)}")
    except (OSError, ValueError) as error:
        typer.echo(f"alr-kernels bench: {results}: {error}", err=True)
        raise typer.Exit(2) from error
