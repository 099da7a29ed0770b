"""Checks of what trainers are set to, and their messages; see ``_validate.py``."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NoReturn

from ._validate import number


def decay(value: Any) -> float:
    return number("weight_decay", value)


def trainable(count: int) -> None:
    if not count:
        raise ValueError(
            "param_groups: expected a model with trainable parameters, got none; is everything frozen "
            "(requires_grad=False)?"
        )


def factory_protocol(groups: Collection[Any], options: Collection[str]) -> None:
    if groups or options:
        raise TypeError(
            "alr_optimizer: expected to be called without arguments, as transformers ≥ 5.2 calls optimizer factories; "
            "with an older one pass optimizers=(alr_optimizer()(model, lr=...), None)."
        )


def factory_lr(lr: Any) -> None:
    if lr is None:
        raise TypeError(
            "alr_optimizer: expected lr, got none: Trainer hands a factory nothing of TrainingArguments; pass "
            'optimizer_cls_and_kwargs=(alr_optimizer, {"lr": args.learning_rate, "weight_decay": args.weight_decay, '
            "...})."
        )


def factory_params(options: Collection[str]) -> None:
    if "params" in options:
        raise TypeError(
            "alr_optimizer: params: it takes all trainable parameters of the model, split by weight decay; leave it "
            "out, or construct AlrAdamW yourself and pass optimizers=(optimizer, None)."
        )


def factory_lora(lora: Any) -> NoReturn:
    raise TypeError(
        f"alr_optimizer: lora: expected True (what lora_pairs(model) finds), False or what lora_pairs returned, got "
        f"{type(lora).__name__} {lora!r}."
    )


def has_alr_adamw(optimizer: Any, where: str) -> None:
    if optimizer is None:
        raise TypeError(f"AlrCallback: expected {where} to train with AlrAdamW, found none; leave the callback out.")


def one_optimizer(count: int) -> None:
    if count != 1:
        raise TypeError(
            f"AlrCallback: expected one AlrAdamW among the optimizers of the LightningModule, found {count}; "
            "leave the callback out, or train with one."
        )


def clipping(option: str, value: float | None, own: float | None, records: bool, off: str) -> None:
    """Refuse a trainer that clips before the step where the step clips itself, or records.

    Args:
        option: the trainer's name for its threshold; ``off``: how it is turned off.
        value: the threshold, 0 or None for none.
        own: the optimizer's max_grad_norm.
        records: whether the optimizer records.
    """
    if not value:
        return
    if own is not None:
        raise ValueError(
            f"{option}={value}: expected one of the two to clip, got the optimizer's max_grad_norm={own} as well; "
            f"pass {off}, and the step clips alone."
        )
    if records:
        raise ValueError(
            f"{option}={value}: expected gradients that are not clipped, because AlrAdamW(record=True) integrates them "
            f"and ω would be scaled by each step's clip factor; pass {off} and, to clip, "
            f"AlrAdamW(max_grad_norm={value}), which clips inside the step and records the whole gradient."
        )
