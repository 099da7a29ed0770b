"""What the callbacks of all frameworks share: where the optimizer is, what is logged, who writes, and to where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import _validate
from ..codecs.storage import parse
from ..importance.recorder import SMALLEST_XI
from ..optim import AlrAdamW

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

FILE_NAME = "importance.safetensors"


def unwrapped(optimizer: Any) -> AlrAdamW | None:
    """Return the AlrAdamW inside wrappers such as accelerate's AcceleratedOptimizer, or None."""
    while optimizer is not None and not isinstance(optimizer, AlrAdamW):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def is_sharded(optimizer: AlrAdamW) -> bool:
    """Whether a process holds parts of parameters only (FSDP2): reading and saving are then work for all ranks."""
    return any(hasattr(param, "to_local") for group in optimizer.param_groups for param in group["params"])


def state_bytes(optimizer: AlrAdamW) -> int:
    """Return the bytes that this process holds for the optimizer: its state and Ω, shared memory once."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    storages: dict[Any, int] = {}
    for tensor in (*tensors, *optimizer.importance_tensors()):
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        storages[local.device, local.data_ptr()] = local.numel() * local.element_size()
    return sum(storages.values())


@torch.no_grad()
def numbers(optimizer: AlrAdamW, task_loss: float | None = None) -> dict[str, float]:
    """Return what is logged, by name. It waits for the device, once.

    ======================  ===========================================================================
    alr/task_loss           the trainer's loss: the penalty is never part of it
    alr/penalty             the penalty; with ``stats=True`` that of the weights that the last step began from
    alr/effective_layers    exp(entropy of α)
    alr/state_bytes         bytes of this process's optimizer state, importance and anchors included
    alr/stiffness           max lr·k/D over all layers; with ``stats=True`` only, as the next
    alr/anchor_drift/LAYER  ‖θ − θ*‖ of a layer's parameters with importance
    ======================  ===========================================================================

    Without ``stats=True`` the penalty takes a pass over the weights. Sharded parameters: all ranks call it together.
    """
    found: dict[str, float] = {} if task_loss is None else {"alr/task_loss": task_loss}
    coeffs = optimizer.coeffs
    if coeffs is not None:
        stepped = _of_steps(optimizer, list(coeffs)) if gathered(optimizer) else {}
        found |= stepped or {"alr/penalty": float(optimizer.penalty())}
        found["alr/effective_layers"] = coeffs.effective_layers
    found["alr/state_bytes"] = float(state_bytes(optimizer))
    return found


def gathered(optimizer: AlrAdamW) -> bool:
    """Whether the last step left statistics."""
    return any(call.statistics is not None for call in optimizer._latest)


def _of_steps(optimizer: AlrAdamW, layers: Iterable[str]) -> dict[str, float]:
    stats = optimizer.stats()
    layers = [layer for layer in layers if layer in stats]
    keys = ("penalty", "stiffness", "drift_sq")
    rows = _read([stats[layer][key] for layer in layers for key in keys])
    penalty, stiffness, drift_sq = (rows[i :: len(keys)] for i in range(len(keys)))
    found = {"alr/penalty": sum(penalty), "alr/stiffness": max(stiffness, default=0.0)}
    return found | {f"alr/anchor_drift/{layer}": sq**0.5 for layer, sq in zip(layers, drift_sq, strict=True)}


def _read(values: list[Tensor]) -> list[float]:
    """Return 0-dim tensors as floats, those of one device in one transfer."""
    return torch.stack([value.to(values[0].device) for value in values]).tolist() if values else []


@dataclass
class Saving:
    """How a recording is written beside a checkpoint: the options of ``AlrAdamW.save_importance``."""

    xi: float = 1e-6
    relative: bool = False
    dtype: str | torch.dtype = "fp32"
    allow_nonfinite: bool = False

    def __post_init__(self) -> None:
        _validate.number("xi", self.xi, low=SMALLEST_XI)
        parse("dtype", self.dtype)

    def write(self, optimizer: AlrAdamW, path: Path, is_main: bool) -> bool:
        """Write what was recorded so far, if anything was; return whether this process took part.

        Under DDP all ranks hold the same ω, and the main one writes. Of sharded parameters each rank holds a part:
        all of them enter ``save_importance``, and each writes its rows.
        """
        takes_part = optimizer.record and optimizer.recorded_steps > 0 and (is_main or is_sharded(optimizer))
        if takes_part:
            optimizer.save_importance(
                path, self.xi, relative=self.relative, dtype=self.dtype, allow_nonfinite=self.allow_nonfinite
            )
        return takes_part
