"""The processes of a job: who this one is, and what they tell each other. Sums of tensors are in ``_dtensor.py``."""

from __future__ import annotations

from typing import Any

import torch


def in_job() -> bool:
    """Whether a process group is initialised, of one process or more."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def place() -> tuple[int, int]:
    """Return this process's rank and how many there are; (0, 1) outside a job."""
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if in_job() else (0, 1)


def of_all(value: Any) -> list[Any]:
    """Return every process's value, by rank."""
    if not in_job():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def of_first(value: Any) -> Any:
    """Return rank 0's value."""
    box = [value]
    if in_job():
        torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def wait() -> None:
    """Wait until every process is here."""
    if in_job():
        torch.distributed.barrier()
