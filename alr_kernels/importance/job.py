"""The processes that write one importance file together: each its rows, rank 0 the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .. import _dtensor, _ranks, _validate_distributed

if TYPE_CHECKING:
    from torch import Tensor

    from .._dtensor import Sharding


class Job:
    """All processes of a job, or this one alone."""

    def __init__(self, shardings: Iterable[Sharding | None]) -> None:
        meshes = [sharding.mesh for sharding in shardings if sharding is not None]
        self.rank, self.size = 0, 1
        if meshes:
            self.rank, self.size = _ranks.place()
            # Under tensor parallel with FSDP2, what the plan leaves out lies whole on each of several smaller meshes.
            _validate_distributed.whole_job(max(mesh.size() for mesh in meshes), self.size)

    def told(self, value: Any) -> Any:
        """Return rank 0's value."""
        return value if self.size == 1 else _ranks.of_first(value)

    def all(self, value: Any) -> list[Any]:
        """Return every rank's value."""
        return [value] if self.size == 1 else _ranks.of_all(value)

    def writes(self, tensor: Tensor, name: str) -> tuple[Tensor, int] | None:
        """Return what of a tensor this rank writes and the byte where it begins; None: nothing.

        A tensor that is not split by rows is put together for it, one at a time: that waits for the other ranks.
        """
        sharding = _dtensor.Sharding.of(name, tensor)
        if sharding is None:
            return (tensor, 0) if self.rank == 0 else None
        if not sharding.by_rows:
            whole = _dtensor.whole(tensor)
            return (whole, 0) if self.rank == 0 else None
        copies = [i for i in range(len(sharding.placements)) if i not in sharding.splits]
        if any(sharding.mesh.get_coordinate()[i] for i in copies):
            return None
        local = _dtensor.local(tensor)
        return local, sharding.first_element * local.element_size()
