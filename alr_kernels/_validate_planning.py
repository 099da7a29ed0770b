"""Checks on what a plan is made from, and their messages: expected, got, what to do; see ``_validate.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ._validate import listed

FORM = 'a Hugging Face config with "model_type", or {parameter name: [sizes]}'


def no_json(path: Path, error: ValueError) -> NoReturn:
    raise ValueError(f"config: {path} is no JSON ({error}); expected {FORM}.")


def config(name: str, content: Any) -> None:
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"config: expected {FORM}, got {type(content).__name__} of length {len(content or ())}.")
    if "model_type" not in content and not all(isinstance(value, (list, tuple)) for value in content.values()):
        raise ValueError(f'config: {name} has no "model_type" and is no table of shapes either; expected {FORM}.')


def shape(name: str, value: Any) -> None:
    if not isinstance(value, (list, tuple)) or not all(type(size) is int and size > 0 for size in value):
        raise ValueError(f"config: parameter {name!r}: expected a list of sizes ≥ 1, got {value!r}.")


def no_transformers(missing: ImportError) -> NoReturn:
    raise ImportError(
        'config: building a model from its config needs transformers: pip install "alr-kernels[train]", or hand over '
        "{parameter name: [sizes]}."
    ) from missing


def unbuildable(kind: str, error: Exception) -> NoReturn:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise ValueError(
        f"config: transformers cannot build model_type {kind!r}: {reason}. Install a version that knows it, or hand "
        "over {parameter name: [sizes]}."
    ) from error


def weight_dtype(name: str, dtype: str) -> None:
    if dtype not in ("fp32", "bf16", "fp16"):
        raise ValueError(f"parameter {name!r}: expected fp32, bf16 or fp16, got {dtype}; convert it.")


def some_weights(weights: Sequence[Any]) -> None:
    if not weights:
        raise ValueError("config: the model has no parameters; expected one with some.")


def shard(strategy: str, value: Any) -> None:
    if strategy == "hsdp" and (type(value) is not int or value < 1):
        raise ValueError(
            f"shard: hsdp needs the number of devices that share one replica, an integer ≥ 1, got {value!r}."
        )
    if strategy != "hsdp" and value is not None:
        raise ValueError(f"shard: it has no effect with strategy={strategy!r}; use 'hsdp' or leave it out.")


def penalised(option: str, value: object, phase: str, has_importance: bool) -> None:
    if value is not None and not has_importance:
        raise ValueError(
            f"{option}: it has no effect, because phase={phase!r} has no importance; use 'tune' or 'both'."
        )


def bucket_view(value: bool, strategy: str) -> None:
    if value and strategy != "ddp":
        raise ValueError(f"bucket_view: it has no effect with strategy={strategy!r}; use 'ddp' or leave it out.")


def master(kind: str, dtypes: set[str], lora: bool) -> None:
    if kind != "none" and "bf16" not in dtypes:
        option = "the factors' dtype (--factor-dtype)" if lora else "dtype"
        raise ValueError(
            f"master: it has no effect, because nothing that is trained is bf16 (got {listed(dtypes)}); "
            f"set {option} to 'bf16' or leave it out."
        )


def gpus(value: Sequence[Any], strategy: str, per_replica: int | None) -> None:
    if not value or not all(type(n) is int and n >= 1 for n in value):
        raise ValueError(f"gpus: expected integers ≥ 1, got {list(value)!r}.")
    if strategy == "single" and any(n != 1 for n in value):
        raise ValueError(f"gpus: strategy='single' is one device, got {list(value)!r}; use ddp, fsdp2 or hsdp.")
    if per_replica is not None and any(n % per_replica for n in value):
        raise ValueError(f"gpus: hsdp needs multiples of shard={per_replica}, got {list(value)!r}.")


def no_scalars(names: Sequence[str]) -> None:
    if names:
        raise ValueError(
            f"FSDP2 cannot shard parameters without a dimension, got {listed(names)}; give them shape (1,), as "
            "fully_shard asks, or use ddp."
        )


def targets(wanted: Sequence[str], missing: Sequence[str], adaptable: Sequence[str]) -> None:
    if not wanted or missing:
        known = {name.removesuffix(".weight").rpartition(".")[2] for name in adaptable}
        raise ValueError(
            f"targets: expected ends of module paths whose weights LoRA can adapt, such as {listed(known)}; "
            f"got {listed(missing) or 'none'}."
        )


def lora_options(lora: bool, given: Sequence[str]) -> None:
    if given and not lora:
        raise ValueError(f"{', '.join(given)}: no effect without --lora; add it or leave them out.")
