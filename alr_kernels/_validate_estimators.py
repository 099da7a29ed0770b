"""Checks on what users hand to the estimators, and their messages: expected, got, what to do; see ``_validate.py``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ._validate import FLOAT_DTYPES, listed
from ._validate_distributed import not_flattened


def model(name: str, value: Any) -> None:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name}: expected a torch.nn.Module as model, got {type(value).__name__}.")
    if not any(param.requires_grad for param in value.parameters()):
        raise ValueError(
            f"{name}: expected a model with trainable parameters, got none with requires_grad=True; "
            "unfreeze those whose importance is wanted."
        )
    for key, param in value.named_parameters():
        if not param.requires_grad:
            continue
        if param.is_meta:
            raise RuntimeError(
                f"{name}: parameter {key!r} is on the meta device; materialise the model and load its weights first."
            )
        if hasattr(param, "to_local"):
            raise RuntimeError(
                f"{name}: expected a whole model in one process, got parameter {key!r} as a DTensor; run it on the "
                "unsharded model, or record the path integral, AlrAdamW(..., record=True) or ImportanceRecorder, which "
                "work on shards."
            )
        not_flattened(key, param)


def batches(name: str, value: Any) -> None:
    if isinstance(value, (Mapping, Tensor, str)) or not isinstance(value, Iterable):
        raise TypeError(
            f"{name}: expected an iterable of batches, each a dict that the model is called with, "
            f"got {type(value).__name__}; a single batch goes into a list."
        )


def batch(index: int, value: Any) -> int:
    """Return the number of samples in a batch."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(
            f"batch {index}: expected a dict of the model's arguments, as in model(**batch), got "
            f"{type(value).__name__}; for other models pass loss=lambda model, batch: ... and dicts of tensors."
        )
    sizes = {key: len(item) for key, item in value.items() if isinstance(item, Tensor) and item.dim()}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        got = ", ".join(f"{key}: {tuple(value[key].shape)}" for key in sizes) or "no tensor"
        raise ValueError(
            f"batch {index}: expected tensors whose first dimension is the number of samples, at least 1, got {got}; "
            "expand what all samples share to one row a sample, or leave it out."
        )
    return next(iter(sizes.values()))


def no_batches(name: str) -> NoReturn:
    raise ValueError(f"{name}: expected at least one batch, got none; is the iterable used up already?")


def own_loss(outputs: Any) -> Tensor:
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(
            "expected the model to return a loss, got none; put labels into the batches, or pass "
            "loss=lambda model, batch: ..., which returns one number a sample."
        )
    return loss


def numbers(what: str, values: Any) -> Tensor:
    if not isinstance(values, Tensor) or not values.is_floating_point():
        got = f"{values.dtype}" if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{what}: expected a floating-point tensor, got {got}.")
    return values


def one_a_sample(what: str, values: Tensor, samples: int) -> None:
    if tuple(values.shape) != (samples,):
        raise ValueError(
            f"{what}: expected one number a sample, shape ({samples},), got {tuple(values.shape)}; "
            "average over tokens within each sample."
        )


def rows_of_samples(values: Tensor, samples: int) -> None:
    if values.dim() < 1 or len(values) != samples:
        raise ValueError(
            f"output: expected a tensor whose first dimension is the batch of {samples}, got {tuple(values.shape)}."
        )


def finite_numbers(index: int, first: int, values: Tensor) -> None:
    bad = (~torch.isfinite(values.reshape(-1))).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"batch {index}: the loss (or output) of sample {bad[0] + first} is {values.reshape(-1)[bad[0]].item()}; a "
            "sample without any label other than -100, or without any unmasked token, has none. Remove it, or pass "
            "allow_nonfinite=True, which gives the elements it reaches importance 0."
        )


def finite_importance(index: int, bad: Mapping[str, int]) -> None:
    if bad:
        raise ValueError(
            f"batch {index}: a sample's gradient is NaN or inf in {sum(bad.values())} element(s) of {listed(bad)}; "
            "remove the sample or use a wider dtype, or pass allow_nonfinite=True, which gives them importance 0."
        )


def partial_names(path: str, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a checkpoint's tensors are those of this model."""
    parts = []
    if missing := [name for name in wanted if name not in found]:
        parts.append(f"it lacks {listed(missing)}")
    if extra := [name for name in found if name not in wanted]:
        parts.append(f"it also has {listed(extra)}")
    parts += [
        f"{name!r} has shape {found[name]}, expected {wanted[name]}"
        for name in wanted
        if name in found and found[name] != wanted[name]
    ][:5]
    if parts:
        raise ValueError(
            f"checkpoint {path!r}: expected the sums of this model's trainable parameters, but {'; '.join(parts)}; "
            "continue with the model it was written for, or delete the file."
        )


def partial_damaged(path: str, error: Exception) -> NoReturn:
    raise ValueError(
        f"checkpoint {path!r}: expected partial sums, got {error}; it is truncated or damaged, delete it."
    ) from error


def is_importance(path: str) -> NoReturn:
    raise ValueError(f"checkpoint {path!r}: this file is a finished importance; choose another path for partial sums.")


def every_without_checkpoint() -> NoReturn:
    raise ValueError("every: it has no effect without checkpoint=path; pass a path or leave it out.")


def partial_field(path: str, what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise ValueError(
            f"checkpoint {path!r}: expected {what} {wanted!r}, it was written with {found!r}; "
            "continue with the same, or delete the file to start again."
        )


def partial_data(path: str, done: int, found: str, wanted: str) -> None:
    if found != wanted:
        raise ValueError(
            f"checkpoint {path!r}: the first {done} batches are not those that it was written from; pass the same "
            "batches in the same order (fix the loader's seed), or delete the file to start again."
        )


def partial_length(path: str, done: int, got: int) -> NoReturn:
    raise ValueError(
        f"checkpoint {path!r}: it has the sums of {done} batches, got only {got}; pass the same batches from the start."
    )


def fisher_operands(importance: Tensor, deltas: Tensor, inputs: Tensor, power: int) -> None:
    if power not in (1, 2):
        raise ValueError(f"power: expected 2 (Fisher) or 1 (MAS), got {power!r}")
    shapes = [tuple(tensor.shape) for tensor in (importance, deltas, inputs)]
    fits = [len(shape) for shape in shapes] == [2, 3, 3] and shapes[1][:2] == shapes[2][:2]
    if not fits or shapes[0] != (shapes[1][2], shapes[2][2]):
        raise ValueError(
            "fisher_linear_: expected importance [rows, columns], deltas [n, t, rows] and inputs [n, t, columns], "
            f"got {shapes[0]}, {shapes[1]} and {shapes[2]}"
        )
    wide = importance.dtype in (torch.float32, torch.float64)
    if not wide or not {deltas.dtype, inputs.dtype} <= set(FLOAT_DTYPES):
        raise TypeError(
            "fisher_linear_: expected importance in float32 or float64, deltas and inputs in a floating-point dtype, "
            f"got {importance.dtype}, {deltas.dtype} and {inputs.dtype}"
        )
    devices = {str(tensor.device) for tensor in (importance, deltas, inputs)}
    if len(devices) > 1:
        raise ValueError(f"fisher_linear_: expected tensors on one device, got {listed(devices)}")
