"""Checks of ``attach_to_backward``: what a step that is taken gradient by gradient cannot do."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from . import _ranks

if TYPE_CHECKING:
    from .stepping import Stepping


def attachable(optimizer: Stepping) -> None:
    """Refuse what needs all gradients at once, or a step of its own."""
    if optimizer.max_grad_norm is not None:
        raise ValueError(
            f"attach_to_backward: max_grad_norm={optimizer.max_grad_norm} clips by the norm over all gradients, which "
            "are never there together; use max_grad_norm=None, or step after backward."
        )
    if optimizer.capturable:
        raise ValueError(
            "attach_to_backward: capturable=True is for a step that a CUDA graph replays, and backward's hooks are "
            "not replayed; use capturable=False, or step after backward."
        )
    size = _ranks.place()[1]
    if size > 1:
        raise ValueError(
            f"attach_to_backward: expected a single process, got {size}: hooks come before gradients are averaged, "
            "so that each would step with its own; step after backward."
        )


def attached_twice() -> NoReturn:
    raise RuntimeError("attach_to_backward: it is attached already; call remove() on the handle first.")


def second_gradient(name: str) -> NoReturn:
    raise RuntimeError(
        f"parameter {name!r}: a second gradient before optimizer.step(), and the first has been stepped with. Call "
        "step() after each backward pass; to accumulate gradients (or with reentrant checkpointing of a weight that is "
        "used twice), remove() the handle that attach_to_backward() returned."
    )


def scaled() -> NoReturn:
    raise RuntimeError(
        "attach_to_backward: GradScaler looks for infinities in all gradients before a step, and these have been "
        "stepped with, scaled as they were; train in bfloat16 without a scaler, or step after backward."
    )
