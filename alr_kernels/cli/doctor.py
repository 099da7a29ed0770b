"""`alr-kernels doctor`: what is installed, what serves which op and why not, and one real step per backend."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

if TYPE_CHECKING:
    from torch import Tensor

Backend = Literal["reference", "native", "triton"]
# Sizes around the kernels' block and vector widths, and one tensor that several threads share.
CHECK_SIZES = (1, 17, 1023, 1024, 4099)
CODED_SHAPE = (33, 128)  # large enough to be kept as block codes
LARGE_CHECK_SIZE = 100_001  # native and GPU only: the interpreter would take seconds


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Check the installation: versions, build, backends, which commands work, and one real step of each backend.

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

    from .. import _environment, _ops, _ops_lora

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    backends = {
        device: _ops.doctor_table(device) | {"lora": _ops_lora.lora_backends(device, torch.float32)}
        for device in devices
    }
    checks = []
    for device in devices:
        for backend, reason in backends[device]["step"].items():
            if backend != "reference" and not reason:
                checks.append(check_step(cast(Backend, backend), device))
        for backend, reason in backends[device]["importance"].items():
            if backend != "reference" and not reason:
                checks.append(check_importance(device))
        for backend, reason in backends[device]["lora"].items():
            if backend != "reference" and not reason:
                checks.append(check_lora(cast(Backend, backend), device))
    if "cuda" not in devices and backends["cpu"]["step"]["triton"]:
        checks += _check_interpreted()
    return {
        "ok": all(check["ok"] for check in checks),
        "versions": _environment.versions(),
        "machine": _environment.machine(),
        "build": _environment.build_facts(),
        "openmp_runtimes": _environment.openmp_runtimes(),
        "extras": {extra: _environment.lacking(extra) for extra in _environment.EXTRAS},
        "commands": _environment.commands(),
        "backends": backends,
        "checks": checks,
    }


def check_step(backend: Backend, device: str, interpreted: bool = False) -> dict[str, Any]:
    """Take two recorded steps with penalty and weight decay in every mode, dtype and form of storage; compare.

    ``interpreted``: in a few of these, which take Triton's interpreter a second each.
    """
    worst, where = 0.0, ""
    sizes = INTERPRETED_SIZES if interpreted else (*CHECK_SIZES, LARGE_CHECK_SIZE)
    for mode, dtype, form in itertools.product(MODES, DTYPES, FORMS):
        if ("master" in FORMS[form] and dtype != "bfloat16") or (interpreted and (dtype, form) not in INTERPRETED):
            continue
        names: tuple[Backend, ...] = ("reference", backend)
        results = [_two_steps(name, device, sizes, mode, dtype, form) for name in names]
        for expected, got in zip(*results, strict=True):
            scale = float(expected.abs().max())
            error = float((expected - got).abs().max()) / max(scale, 1e-30)
            if not error <= worst:  # NaN counts as wrong
                worst, where = error, f"{mode}, {dtype}, {form}"
    return {
        "op": "step",
        "backend": backend,
        "device": device,
        "ok": worst <= 1e-6,
        "largest_relative_error": worst,
        "where": where,
    }


MODES: tuple[Literal["proximal", "coupled"], ...] = ("proximal", "coupled")
DTYPES = ("float32", "bfloat16", "float16")
LEAN = {"importance_dtype": "int4", "anchor_dtype": "bf16", "state_dtype": "int8"}
FORMS: dict[str, dict[str, Any]] = {
    "wide": {},
    "few bytes": LEAN,
    "few bytes, split": LEAN | {"master": "split"},
    "bf16 moments, stochastic": {"state_dtype": "bf16", "master": "stochastic"},
}
INTERPRETED = {("float32", "wide"), ("bfloat16", "few bytes, split")}
INTERPRETED_SIZES = (1, 17, 1025)


def _two_steps(
    backend: Backend, device: str, sizes: tuple[int, ...], mode: Literal["proximal", "coupled"], dtype: str, form: str
) -> list[Tensor]:
    """Return parameters and state after two steps, as float64."""
    import torch

    from .. import AlrAdamW

    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [*((n,) for n in sizes), CODED_SHAPE]
    values = [torch.randn(2, *shape, generator=generator) for shape in shapes]
    params = [torch.nn.Parameter(value[0].to(device, getattr(torch, dtype))) for value in values]
    importance = [value[1].abs().to(device) for value in values]
    options = FORMS[form]
    optimizer = AlrAdamW(params, importance, mode=mode, record=True, lr=1e-2, backend=backend, **options)
    for _ in range(2):
        for param, value in zip(params, values, strict=True):
            param.grad = value[1].to(param)
        optimizer.step()
    return [tensor.double() for p in params for tensor in (p.detach(), *optimizer.state[p].values())]


def check_importance(device: str) -> dict[str, Any]:
    """Finalise, merge and sum up per-sample gradients natively and by the reference; compare."""
    import torch

    from ..importance import native, reference
    from ..importance.estimators import reference as per_sample

    generator = torch.Generator().manual_seed(0)
    shapes = [(n,) for n in (*CHECK_SIZES, LARGE_CHECK_SIZE)] + [(32, 256), (32, 256)]
    values = [torch.randn(3, *shape, generator=generator).to(device) for shape in shapes]
    operands = [[value[row].clone() for value in values] for row in range(3)]
    formats = [*["fp32"] * (len(shapes) - 2), "int8", "int4"]
    errors = {}
    results = []
    for module in (reference, native):
        kept, stats, counts = module.finalise(*operands, formats, 1e-3)
        merged = module.merge(kept, kept, ["fp32"] * len(kept), (0.5, 0.25))[0]
        results.append([[x.values for x in kept], [stats, counts], [x.values for x in merged]])
    for name, expected, got in zip(("finalise", "statistics", "merge"), *results, strict=True):
        errors[name] = max(_relative(a, b) for a, b in zip(expected, got, strict=True))
    deltas, inputs = (torch.randn(4, 9, n, generator=generator).to(device) for n in (33, 70))
    sums = [torch.zeros(33, 70, device=device) for _ in range(2)]
    for module, total in zip((per_sample, native), sums, strict=True):
        module.fisher_linear_(total, deltas, inputs, 0.25)
    errors["fisher_linear"] = _relative(*sums)
    limits = dict.fromkeys(errors, 1e-6) | {"fisher_linear": 1e-5}
    where = max(errors, key=lambda name: errors[name] / limits[name])
    return {
        "op": "importance",
        "backend": "native",
        "device": device,
        "ok": errors[where] <= limits[where],
        "largest_relative_error": errors[where],
        "where": where,
    }


def check_lora(backend: Backend, device: str, shapes: tuple[tuple[int, int, int], ...] | None = None) -> dict[str, Any]:
    """Record and pull in effective space, with every form of importance and by the reference; compare."""
    import torch

    from .. import _ops, _ops_lora
    from ..codecs.encoded import Encoded
    from ..lora.reference import Product

    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device)

    shapes = shapes or ((33, 70, 3), (64, 256, 8), (300, 512, 16))
    errors = {"record": 0.0, "pull": 0.0}
    for m, n, r in shapes:
        low = [Product(normal(m, 2 * r), normal(2 * r, n)) for _ in range(2)]
        omega, factors = normal(m, n), Product(normal(m, r), normal(r, n))
        sums = [omega.clone(), omega.clone()]
        for name, total in zip(("reference", backend), sums, strict=True):
            _ops_lora.lora_record_([total], [low[0]], [low[1]], backend=name)
        errors["record"] = max(errors["record"], _relative(*sums))
        for kept in ("fp32", "bf16", "int8", "int4") if n % 128 == 0 else ("fp32", "bf16"):
            (encoded,), *_ = _ops.merge([Encoded.dense(normal(m, n).abs())], [None], [kept], (1.0, 0.0))
            lists = ([encoded], torch.tensor([0.5], dtype=torch.float64, device=device), [low[0]], [factors])
            wanted, got = (
                _ops_lora.lora_pull(*lists, "both", True, backend=name)[0] for name in ("reference", backend)
            )
            pairs = zip(wanted, got, strict=True)
            errors["pull"] = max(errors["pull"], *(_relative(a, b) for a, b in pairs))
    where = max(errors, key=lambda name: errors[name])
    return {
        "op": "lora",
        "backend": backend,
        "device": device,
        "ok": errors[where] <= 1e-5,
        "largest_relative_error": errors[where],
        "where": where,
    }


def _relative(expected: Any, got: Any) -> float:
    expected, got = expected.double().cpu(), got.double().cpu()
    return float((expected - got).abs().max() / expected.abs().max())


def _check_interpreted() -> list[dict[str, Any]]:
    """Run the Triton kernel through its interpreter, in a process of its own; empty when Triton is not installed."""
    import os

    from ..step import triton_kernel

    if triton_kernel.triton is None:
        return []
    code = (
        "import json; from alr_kernels.cli.doctor import check_step; "
        "print(json.dumps(check_step('triton', 'cpu', interpreted=True)))"
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
    if len(report["openmp_runtimes"] or ()) > 1:
        files = "".join(f"\n  {file}" for file in report["openmp_runtimes"])
        console.print(
            "[yellow]several OpenMP runtimes are loaded, each with threads of its own, which may compete for the "
            f"cores; import torch before anything else that uses one:[/]{files}"
        )
    _print_commands(console, report)
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


def _print_commands(console: Any, report: dict[str, Any]) -> None:
    """Print which extras are complete, and of each command whether it works and what it or its options lack."""
    from rich.markup import escape
    from rich.table import Table

    extras = (f"{name}: {'complete' if not lacks else ', '.join(lacks)}" for name, lacks in report["extras"].items())
    console.print(f"[bold]extras[/]    {escape('; '.join(extras))}")
    table = Table("command", "works", "lacks", title="commands")
    for command, row in report["commands"].items():
        lacks = [f"{', '.join(row['lacks'])}: {row['install']}"] if row["lacks"] else []
        lacks += [f"for {option}: {install}" for option, install in row["without"].items()]
        table.add_row(command, "[green]yes[/]" if row["works"] else "[red]no[/]", escape("; ".join(lacks)))
    console.print(table)


def _short(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
