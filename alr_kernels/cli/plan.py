"""`alr-kernels plan`: what training a model with AlrAdamW holds and moves on each of N devices, on paper."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..planning import Device


class Strategy(str, Enum):
    """How a model is spread over devices."""

    single = "single"
    ddp = "ddp"
    fsdp2 = "fsdp2"
    hsdp = "hsdp"


class Phase(str, Enum):
    """What the optimizer does besides AdamW."""

    plain = "plain"
    record = "record"
    tune = "tune"
    both = "both"


class Mode(str, Enum):
    """How the penalty is applied."""

    proximal = "proximal"
    coupled = "coupled"


class Master(str, Enum):
    """What makes bf16 weights exact."""

    none = "none"
    split_ = "split"  # str has a split of its own
    stochastic = "stochastic"


def plan(
    config: Annotated[Path, typer.Option(help="A Hugging Face config.json, or JSON of shapes by parameter name.")],
    gpus: Annotated[str, typer.Option(help="Numbers of devices, one column each: 1,8,64")] = "1",
    strategy: Annotated[Strategy, typer.Option(help="How the model is spread.")] = Strategy.fsdp2,
    shard: Annotated[int | None, typer.Option(help="hsdp: devices that share one replica.")] = None,
    lora: Annotated[bool, typer.Option("--lora/--full", help="LoRA as PEFT makes it, or every parameter.")] = False,
    rank: Annotated[int | None, typer.Option(help="LoRA's r. (default: 8)")] = None,
    targets: Annotated[str | None, typer.Option(help="Modules with LoRA. (default: q_proj,v_proj)")] = None,
    factor_dtype: Annotated[str | None, typer.Option(help="Of LoRA's factors. (default: fp32, PEFT's)")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights: fp32, bf16, fp16. (default: the config's)")] = None,
    grad_dtype: Annotated[str | None, typer.Option(help="Of the gradients. (default: the parameters')")] = None,
    state_dtype: Annotated[str, typer.Option(help="Of the moments: fp32, bf16, int8.")] = "fp32",
    importance_dtype: Annotated[str | None, typer.Option(help="fp32, bf16, int8, int4. (default: fp32)")] = None,
    anchor_dtype: Annotated[str | None, typer.Option(help="fp32, bf16. (default: the parameters')")] = None,
    master: Annotated[Master, typer.Option(help="Of bf16 parameters.")] = Master.none,
    phase: Annotated[Phase, typer.Option(help="ω recorded, importance applied, both, or plain AdamW.")] = Phase.tune,
    mode: Annotated[Mode, typer.Option(help="Of the penalty; LoRA reads Ω twice in proximal.")] = Mode.proximal,
    bucket_view: Annotated[
        bool, typer.Option("--bucket-view", help="ddp with gradient_as_bucket_view=True.")
    ] = False,
    device: Annotated[str, typer.Option(help="A100-40GB, A100, H100, H200, B200, MI300X: as published.")] = "H100",
    bandwidth: Annotated[float | None, typer.Option(help="Of the device's memory, GB/s, instead.")] = None,
    memory: Annotated[float | None, typer.Option(help="Of the device, GB (10⁹ bytes), instead.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, in bytes and seconds.")] = False,
) -> None:  # fmt: skip
    """Count what training with AlrAdamW holds on each device, and the roof of the optimizer step's time.

    Nothing is allocated, downloaded or measured. docs/scaling.md says what is counted and how.
    """
    from .. import planning

    try:
        factors = _lora(lora, rank, targets, factor_dtype)
        setup = planning.Setup(
            strategy.value, shard, factors, dtype, grad_dtype, state_dtype, importance_dtype, anchor_dtype,
            master.value, phase.value, mode.value, bucket_view,
        )  # fmt: skip
        found = planning.plan(config, _numbers(gpus), setup, _device(device, memory, bandwidth))
    except (ValueError, ImportError, OSError) as error:
        typer.echo(f"alr-kernels plan: {error}", err=True)
        raise typer.Exit(2) from error
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=1))
        return
    from rich.console import Console

    from ..report import plan_table

    width = max(plan_table.NARROW, 32 + 14 * len(found.columns))
    plan_table.show(found, Console(width=width))


def _lora(lora: bool, rank: int | None, targets: str | None, dtype: str | None) -> Any:
    from .. import _validate_planning
    from ..planning import Lora

    given = {"rank": rank, "targets": targets and tuple(targets.split(",")), "dtype": dtype}
    options: dict[str, Any] = {option: value for option, value in given.items() if value is not None}
    _validate_planning.lora_options(lora, ["--factor-dtype" if o == "dtype" else f"--{o}" for o in options])
    return Lora(**options) if lora else None


def _numbers(text: str) -> list[Any]:
    return [int(part) if part.strip().isdecimal() else part for part in text.split(",")]


def _device(name: str, memory: float | None, bandwidth: float | None) -> Device:
    from dataclasses import replace

    from .. import _validate
    from ..planning import DEVICES

    _validate.choice("device", name, list(DEVICES))
    changes: dict[str, Any] = {}
    for option, value in (("memory", memory), ("bandwidth", bandwidth)):
        if value is not None:
            changes[option] = 1e9 * _validate.number(option, value, open_low=True)
    if len(changes) == 2:
        changes["name"] = "your device"
    return replace(DEVICES[name], **changes)
