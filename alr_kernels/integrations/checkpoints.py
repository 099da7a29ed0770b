"""Checkpoints of model and optimizer in torch's distributed format: whole or not there, on any number of processes."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import _ranks, _validate, _validate_distributed
from .._files import to_disk

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from torch.optim import Optimizer

MORE = "more.pt"


def save_checkpoint(
    folder: str | os.PathLike[str], step: int, model: nn.Module, optimizer: Optimizer, *, keep: int = 2, **more: Any
) -> Path:
    """Save model, optimizer and whatever else a run needs into ``folder/step-<step>``; call it on every process.

    Each process writes its shards (torch.distributed.checkpoint), into a folder that takes its name when all of it is
    on disk. A process that is killed before leaves the earlier checkpoints as they were.

    Args:
        folder: on a file system that all processes share; made if missing.
        step: ≥ 0, how far the run is.
        model, optimizer: in one process, under DDP, or sharded by ``fully_shard``.
        keep: ≥ 1, how many checkpoints stay: the latest ones, and the one that is saved.
        more: of a scheduler, a sampler, random generators: what ``torch.load(weights_only=True)`` reads; rank 0's.

    Returns:
        where it is.

    Raises:
        RuntimeError: on every process, where rank 0 could not write, or not read ``more`` back: nothing was changed.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    step = int(_validate.number("step", step))
    _validate.number("keep", keep, low=1)
    home = Path(folder)
    scratch, target = home / f".step-{step}.partial", home / f"step-{step}"

    def begin() -> bytes:
        home.mkdir(parents=True, exist_ok=True)
        _restore(home)
        for left in home.glob(".step-*"):  # by a process that was killed
            shutil.rmtree(left)
        torch.save(more, held := io.BytesIO())
        torch.load(io.BytesIO(held.getvalue()), weights_only=True)  # now, not when the run is to go on
        return held.getvalue()

    held = _on_first(begin, target)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=scratch)

    def finish() -> None:
        (scratch / MORE).write_bytes(held)
        for path in [*scratch.iterdir(), scratch]:
            to_disk(path)
        if target.exists():
            target.rename(home / f".step-{step}.replaced")
        scratch.rename(target)
        to_disk(home)
        shutil.rmtree(home / f".step-{step}.replaced", ignore_errors=True)
        for old in _checkpoints(home)[:-keep]:
            if old != target:
                shutil.rmtree(old)

    _on_first(finish, target)
    return target


def load_checkpoint(folder: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer) -> dict[str, Any] | None:
    """Load the latest checkpoint of :func:`save_checkpoint` into both; call it on every process.

    The number of processes may be another than when it was saved; the optimizer is built as it was then.

    Returns:
        ``{"step": step, **more}``, or None where there is none yet.

    Raises:
        ValueError: the processes do not see the same checkpoints.
        RuntimeError, ValueError: it is of another model or optimizer.

    >>> import tempfile, torch
    >>> from alr_kernels import AlrAdamW
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = AlrAdamW(model.named_parameters())
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> optimizer.step()
    >>> folder = tempfile.mkdtemp()
    >>> load_checkpoint(folder, model, optimizer) is None
    True
    >>> _ = save_checkpoint(folder, 1, model, optimizer, seed=3)
    >>> load_checkpoint(folder, model, optimizer)
    {'step': 1, 'seed': 3}
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    _on_first(lambda: _restore(Path(folder)), Path(folder))
    found = _checkpoints(Path(folder))
    _validate_distributed.same_checkpoints(str(folder), _ranks.of_all([path.name for path in found]))
    if not found:
        return None
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    saved = dcp.FileSystemReader(found[-1]).read_metadata().state_dict_metadata
    for name, kept in state["optimizer"]["state"].items():  # of a parameter without gradients less was kept
        for key in [key for key in kept if f"optimizer.state.{name}.{key}" not in saved]:
            del kept[key]
    dcp.load(state, checkpoint_id=found[-1])
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    more = torch.load(found[-1] / MORE, weights_only=True)
    return {"step": _step(found[-1]), **more}


def _checkpoints(home: Path) -> list[Path]:
    """Return the whole ones, the latest last."""
    found = (path for path in home.glob("step-*") if path.name[5:].isdigit() and (path / MORE).is_file())
    return sorted(found, key=_step)


def _restore(home: Path) -> None:
    """Give a checkpoint its name back whose successor of the same step was not there yet when the run was killed."""
    for left in home.glob(".step-*.replaced"):
        target = home / left.name[1:].removesuffix(".replaced")
        if not target.exists():
            left.rename(target)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _on_first(work: Callable[[], Any], path: Path) -> Any:
    """Let rank 0 work while the others wait; return its result there. If it fails, raise on every process."""
    result, reason = None, ""
    if not _ranks.in_job():
        return work()
    if _ranks.place()[0] == 0:
        try:
            result = work()
        except Exception as error:
            result, reason = error, f"rank 0: {type(error).__name__}: {error}"
    reason = _ranks.of_first(reason)
    if reason:
        _validate_distributed.checkpoint_failed(str(path), reason, result)
    return result
