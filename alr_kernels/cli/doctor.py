"""`alr-kernels doctor`: what is installed, what serves which op and why not, and one real step per backend."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Annotated, Any, Literal, cast

import typer

Backend = Literal["reference", "native", "triton"]
# Sizes around the kernels' block and vector widths, and one tensor that several threads share.
CHECK_SIZES = (1, 17, 1023, 1024, 4099)
LARGE_CHECK_SIZE = 300_001  # native and GPU only: the interpreter would take seconds


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Check the installation: versions, build, backends, and one real step of each against the reference.

    Exit code 0 when every backend that is here steps correctly (a missing one is explained, not an error), 1 when one
    is wrong.
    """
    report = examine()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print(report)
    raise typer.Exit(0 if report["ok"] else 1)


def examine() -> dict[str, Any]:
    """Gather everything that the command prints."""
    import torch

    from .. import _environment, _ops

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    backends = {device: _ops.doctor_table(device) for device in devices}
    checks = []
    for device in devices:
        for backend, reason in backends[device]["step"].items():
            if backend != "reference" and not reason:
                checks.append(check_step(cast(Backend, backend), device))
        for backend, reason in backends[device]["importance"].items():
            if backend != "reference" and not reason:
                checks.append(check_importance(device))
    if "cuda" not in devices and backends["cpu"]["step"]["triton"]:
        checks += _check_interpreted()
    return {
        "ok": all(check["ok"] for check in checks),
        "versions": _environment.versions(),
        "machine": _environment.machine(),
        "build": _environment.build_facts(),
        "backends": backends,
        "checks": checks,
    }


def check_step(backend: Backend, device: str, sizes: tuple[int, ...] | None = None) -> dict[str, Any]:
    """Take two recorded steps with penalty and weight decay in every mode and dtype; compare with the reference."""
    import torch

    from .. import AlrAdamW

    worst, where = 0.0, ""
    sizes = sizes or (*CHECK_SIZES, LARGE_CHECK_SIZE)
    for mode in ("proximal", "coupled"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            results = []
            names: tuple[Backend, ...] = ("reference", backend)
            for name in names:
                generator = torch.Generator().manual_seed(0)
                values = [torch.randn(2, n, generator=generator) for n in sizes]
                params = [torch.nn.Parameter(value[0].to(device, dtype)) for value in values]
                importance = [value[1].abs().to(device) for value in values]
                optimizer = AlrAdamW(params, importance, mode=mode, record=True, lr=1e-2, backend=name)
                for _ in range(2):
                    for param, value in zip(params, values, strict=True):
                        param.grad = value[1].to(device, dtype)
                    optimizer.step()
                state = [t for p in params for t in (p.detach(), *map(optimizer.state[p].get, STATE_COMPARED))]
                results.append([tensor.double() for tensor in state])
            for expected, got in zip(*results, strict=True):
                scale = float(expected.abs().max())
                error = float((expected - got).abs().max()) / max(scale, 1e-30)
                if not error <= worst:  # NaN counts as wrong
                    worst, where = error, f"{mode}, {dtype}"
    return {
        "op": "step",
        "backend": backend,
        "device": device,
        "ok": worst <= 1e-6,
        "largest_relative_error": worst,
        "where": where,
    }


STATE_COMPARED = ("exp_avg", "exp_avg_sq", "path_integral")


def check_importance(device: str) -> dict[str, Any]:
    """Finalise a recording natively and by the reference; compare."""
    import torch

    from ..importance import native, reference

    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(3, n, generator=generator).to(device) for n in (*CHECK_SIZES, LARGE_CHECK_SIZE)]
    operands = [[value[row].clone() for value in values] for row in range(3)]
    expected, expected_stats = reference.finalise(*operands, 1e-3)
    got, stats = native.finalise(*operands, 1e-3)
    pairs = [*zip(expected, got, strict=True), (expected_stats, stats)]
    worst = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
    return {
        "op": "importance",
        "backend": "native",
        "device": device,
        "ok": worst <= 1e-6,
        "largest_relative_error": worst,
        "where": "finalise",
    }


def _check_interpreted() -> list[dict[str, Any]]:
    """Run the Triton kernel through its interpreter, in a process of its own; empty when Triton is not installed."""
    import os

    from ..step import triton_kernel

    if triton_kernel.triton is None:
        return []
    code = (
        "import json; from alr_kernels.cli.doctor import CHECK_SIZES, check_step; "
        "print(json.dumps(check_step('triton', 'cpu', CHECK_SIZES)))"
    )
    child = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    found: dict[str, Any] = {"op": "step", "backend": "triton", "device": "cpu (interpreter)", "ok": False}
    if child.returncode == 0:
        found = {**json.loads(child.stdout.splitlines()[-1]), "device": "cpu (interpreter)"}
    else:
        found |= {"largest_relative_error": None, "where": (child.stderr.strip().splitlines() or ["no output"])[-1]}
    return [found]


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print("[bold]versions[/]  " + "  ".join(f"{name} {v}" for name, v in report["versions"].items()))
    machine = report["machine"]
    console.print(
        f"[bold]machine[/]   {machine['processor']}, {machine['cores']} cores, torch uses {machine['torch_threads']} "
        f"threads, GPUs: {', '.join(machine.get('accelerators', [])) or 'none'}"
    )
    build = report["build"]
    if build["extension"]:
        console.print(
            "[bold]extension[/] " + "  ".join(f"{k}: {_short(v)}" for k, v in build.items() if k != "extension")
        )
    else:
        console.print(f"[bold]extension[/] missing: {build['reason']}")
    table = Table("op", "device", "backend", "serves", title="who serves what (the first that serves is the default)")
    for device, ops in report["backends"].items():
        for op, rows in ops.items():
            for backend, reason in rows.items():
                table.add_row(op, device, backend, f"no: {reason}" if reason else "[green]yes[/]")
    console.print(table)
    table = Table("op", "device", "backend", "largest relative error", "", title="one real step against the reference")
    for check in report["checks"]:
        error = check["largest_relative_error"]
        verdict = "[green]ok[/]" if check["ok"] else f"[red]WRONG[/] ({check['where']})"
        shown = "-" if error is None else "0 (bit for bit)" if error == 0 else f"{error:.1e}"
        table.add_row(check["op"], check["device"], check["backend"], shown, verdict)
    console.print(table)
    console.print("[green]everything that is here works[/]" if report["ok"] else "[red]a backend steps wrongly[/]")


def _short(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
