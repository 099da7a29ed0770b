"""Sharded parameters (DTensors, as FSDP2 makes them): which part of a tensor is here, and sums over all ranks.

Steps work on local memory. What they keep is local, named like the parameter and sharded like it; ``state_dict`` wraps
it into DTensors again. Everything that crosses ranks crosses in this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from . import _ranks
from . import _validate_distributed as _validate
from .step.plan import STATISTICS

if TYPE_CHECKING:
    from torch import Tensor

STIFFNESS = STATISTICS.index("stiffness")


def is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """Return what of a tensor is in this process, without a copy: the tensor itself unless it is a DTensor."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


@dataclass(frozen=True)
class Sharding:
    """How a tensor of ``shape`` lies on a device mesh, and which part of it is here."""

    mesh: Any  # torch.distributed.DeviceMesh
    placements: tuple[Any, ...]  # one per mesh dimension
    shape: torch.Size  # of the whole tensor
    local_shape: torch.Size
    begins: tuple[int, ...]  # of the local part in the whole, by dimension

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Sharding | None:
        """Return a DTensor's; None for any other tensor.

        Raises:
            RuntimeError: a placement that holds sums not yet made.
        """
        if not is_sharded(tensor):
            return None
        _validate.placements(name, tensor.placements)
        return cls.make(tensor.device_mesh, tuple(tensor.placements), tensor.shape)

    @classmethod
    def make(cls, mesh: Any, placements: tuple[Any, ...], shape: torch.Size) -> Sharding:
        """Return that of a tensor of this shape."""
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        local_shape, begins = compute_local_shape_and_global_offset(shape, mesh, placements)
        return cls(mesh, placements, shape, torch.Size(local_shape), tuple(begins))

    def of_shape(self, shape: Sequence[int]) -> Sharding:
        """Return that of another tensor on the same mesh, placed in the same way."""
        return self.make(self.mesh, self.placements, torch.Size(shape))

    @cached_property
    def splits(self) -> tuple[int, ...]:
        """Mesh dimensions over which the tensor is split; over the others every rank has the same."""
        return tuple(
            i for i, placement in enumerate(self.placements) if not placement.is_replicate() and self.mesh.size(i) > 1
        )

    @cached_property
    def by_rows(self) -> bool:
        """Whether what is here is a range of rows: replicated, or split once, along dimension 0."""
        plain = all(type(self.placements[i]).__name__ == "Shard" and self.placements[i].dim == 0 for i in self.splits)
        return plain and len(self.splits) < 2

    @property
    def is_first(self) -> bool:
        """Whether this rank is the first of those over which the tensor is split."""
        return all(self.mesh.get_coordinate()[i] == 0 for i in self.splits)

    @property
    def rows(self) -> slice:
        """The rows that are here, where :attr:`by_rows`."""
        return slice(self.begins[0], self.begins[0] + self.local_shape[0])

    @property
    def first_element(self) -> int:
        """Index in the whole tensor of the first element here, where :attr:`by_rows`."""
        return self.begins[0] * self.shape[1:].numel() if self.shape else 0

    @property
    def group(self) -> tuple[Any, tuple[int, ...]]:
        """What tensors have in common whose sums can be made together."""
        return self.mesh, self.splits

    def take(self, whole: Tensor) -> Tensor:
        """Return the local part of a whole tensor of this shape (or with as many rows): a view where it can be."""
        if self.by_rows:
            return whole[self.rows] if self.splits else whole
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(whole, self.mesh, self.placements, src_data_rank=None).to_local()

    def wrap(self, part: Tensor, whole_shape: Sequence[int] | None = None) -> Tensor:
        """Return a DTensor that shares the memory of a local part; ``whole_shape``: if it is another one."""
        from torch.distributed.tensor import DTensor

        shape = self.shape if whole_shape is None else torch.Size(whole_shape)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(part, self.mesh, self.placements, run_check=False, shape=shape, stride=stride)


def part_of(name: str, value: Tensor, sharding: Sharding | None) -> Tensor:
    """Return the local part of a value that belongs to a parameter: a whole tensor, or one that is sharded alike.

    Raises:
        ValueError: it is sharded and the parameter is not, or differently.
    """
    if not is_sharded(value):
        return value if sharding is None else sharding.take(value)
    check_part(name, value, sharding)
    return local(value)


def _placed(sharding: Sharding | None) -> tuple[Any, Any] | None:
    return None if sharding is None else (sharding.mesh, sharding.placements)


def check_part(name: str, value: Tensor, sharding: Sharding | None) -> None:
    """Refuse a value that is sharded otherwise than the parameter to which it belongs; see :func:`part_of`."""
    if is_sharded(value):
        _validate.sharded_alike(name, (value.device_mesh, tuple(value.placements)), _placed(sharding))


def place_gradient(name: str, param: Any, sharding: Sharding | None) -> None:
    """Bring a DTensor's gradient into its placements: that of a replicated one may be a sum not yet made.

    Raises:
        RuntimeError: only one of the two is a DTensor, or they are on different meshes.
    """
    grad = param.grad
    meshes = [grad.device_mesh if is_sharded(grad) else None, None if sharding is None else sharding.mesh]
    if meshes[0] != meshes[1]:
        _validate.gradient_sharding(name, *meshes)
    if sharding is not None and tuple(grad.placements) != sharding.placements:
        param.grad = grad.redistribute(placements=sharding.placements)


def all_reduce(values: Tensor, sharding: Sharding, largest: bool = False) -> Tensor:
    """Return the sum (or the largest) of local values over all ranks that hold other parts, where they were."""
    import torch.distributed as dist

    moved = values.to(sharding.mesh.device_type, copy=True)
    for dim in sharding.splits:
        dist.all_reduce(moved, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, sharding.mesh.get_group(dim))
    return moved.to(values.device)


def everywhere(here: bool, sharding: Sharding | None) -> bool:
    """Whether something holds of all parts of a tensor."""
    if sharding is None:
        return here
    return not bool(all_reduce(torch.tensor(not here, dtype=torch.int32), sharding, largest=True))


def totals(values: Sequence[Tensor], shardings: Sequence[Sharding | None], largest: bool = False) -> list[Tensor]:
    """Return each local value, of one shape and dtype, summed over the ranks; one message for all of a mesh."""
    found = list(values)
    groups: dict[Any, list[int]] = {}
    for i, sharding in enumerate(shardings):
        if sharding is not None:
            groups.setdefault(sharding.group, []).append(i)
    for numbers in groups.values():
        sharding = shardings[numbers[0]]
        assert sharding is not None
        home = found[numbers[0]].device
        rows = all_reduce(torch.stack([found[i].to(home) for i in numbers]), sharding, largest)
        for i, row in zip(numbers, rows.unbind(), strict=True):
            found[i] = row.to(values[i].device)
    return found


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor, on every rank."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor.detach()


def summed_over_job(values: Tensor) -> Tensor:
    """Return the sum over all processes; the values themselves where there is one."""
    if _ranks.place()[1] > 1:
        torch.distributed.all_reduce(values)
    return values


def statistics(tables: Sequence[Tensor], shardings: Sequence[Sharding | None]) -> list[Tensor]:
    """Return tables [n, len(STATISTICS)] of the step as sums over the ranks, stiffness as the largest."""
    found = list(tables)
    groups: dict[Any, list[int]] = {}
    for i, sharding in enumerate(shardings):
        if sharding is not None:
            groups.setdefault((sharding.group, tables[i].device), []).append(i)
    for numbers in groups.values():
        sharding = shardings[numbers[0]]
        assert sharding is not None
        both = torch.cat([tables[i] for i in numbers])
        table = all_reduce(both, sharding)
        table[:, STIFFNESS] = all_reduce(both[:, STIFFNESS], sharding, largest=True)
        for i, part in zip(numbers, table.split([len(tables[i]) for i in numbers]), strict=True):
            found[i] = part
    return found


def mostly_padding(rows: int, ranks: int) -> bool:
    """Whether gathering chunks of equal size would send more than summing whole tensors, which costs twice their size:
    the factors of LoRA have few rows, and most of many ranks have none."""
    return -(-rows // ranks) * ranks > 2 * rows


def gather_rows(parts: Tensor, sharding: Sharding) -> Tensor:
    """Return stacked local rows [P, rows here, ...] as the whole [P, rows, ...], on every rank; one message.

    ``parts`` are float32 or float64. ``sharding``: of one of the P, split by rows.
    """
    import torch.distributed as dist

    if not sharding.splits:
        return parts
    group = sharding.mesh.get_group(sharding.splits[0])
    ranks, rows = group.size(), sharding.shape[0]
    chunk = -(-rows // ranks)  # rows of the fullest
    if mostly_padding(rows, ranks):  # the bits of who has a row, and zeros of all others: their sum as integers
        whole = parts.new_zeros(parts.shape[0], rows, *parts.shape[2:], device=sharding.mesh.device_type)
        whole[:, sharding.rows] = parts
        bits = torch.int64 if parts.dtype is torch.float64 else torch.int32
        dist.all_reduce(whole.view(bits), group=group)
        return whole.to(parts.device)
    padded = parts.new_zeros(parts.shape[0], chunk, *parts.shape[2:], device=sharding.mesh.device_type)
    padded[:, : parts.shape[1]] = parts
    gathered = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(gathered, padded, group)
    return torch.cat(gathered, 1)[:, :rows].to(parts.device)


def like(sharding: Sharding | None, shape: Sequence[int]) -> Sharding | None:
    """Return the sharding of another tensor beside a parameter; None if that is not sharded."""
    return None if sharding is None else sharding.of_shape(shape)
