"""Columns that grow batch by batch: in memory while they are small, in a file of this process when they are not.

A file is memory-mapped, so that a set larger than memory is read page by page. It lies in a folder of this process
below the system's temporary one (TMPDIR chooses it), which goes when the process ends: nothing is shared between the
processes of a job, hence nothing to race for. It costs each its own copy. The cache of ``datasets`` is not used.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import _validate_data as validate

if TYPE_CHECKING:
    from datasets import Dataset

IN_MEMORY = 2**28  # bytes of a set that is kept in memory; ten such sets still fit a small machine


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="alr-kernels-data-")  # removes itself at exit


class Store:
    """Append batches of columns, then read all of them as one table.

    Args:
        schema: a pyarrow schema.
        in_memory: bytes up to which no file is made; None: `IN_MEMORY`.
        folder: of the file; None: that of this process.
    """

    def __init__(self, schema: Any, in_memory: int | None = None, folder: Path | None = None) -> None:
        self.schema = schema
        self.in_memory = IN_MEMORY if in_memory is None else in_memory
        self._batches: list[Any] = []
        self._bytes = 0
        self._where = folder
        self.path: Path | None = None
        self._writer: Any = None

    def append(self, columns: dict[str, list[Any]]) -> None:
        """Append as many rows as each of the columns has."""
        import pyarrow as pa

        batch = pa.RecordBatch.from_pydict(columns, self.schema)
        self._bytes += batch.nbytes
        if self._writer is None and self._bytes <= self.in_memory:
            self._batches.append(batch)
            return
        if self._writer is None:
            folder = self._where or Path(_folder().name)
            handle, name = tempfile.mkstemp(".arrow", dir=folder)
            self.path = Path(name)
            self._file = open(handle, "wb")  # noqa: SIM115 - until close()
            self._writer = pa.ipc.new_stream(self._file, self.schema)
        try:
            for waiting in (*self._batches, batch):
                self._writer.write_batch(waiting)
        except OSError as error:
            validate.not_written(self.path, error)
        self._batches = []

    def table(self) -> Any:
        """Return all rows; nothing can be appended any more."""
        import pyarrow as pa

        if self._writer is None:
            return pa.Table.from_batches(self._batches, self.schema)
        self._close()
        return pa.ipc.open_stream(pa.memory_map(str(self.path))).read_all()

    def dataset(self) -> Dataset:
        """Return all rows as a ``datasets.Dataset``; nothing can be appended any more."""
        from datasets import Dataset

        if self._writer is None:
            return Dataset(self.table())
        self._close()
        return Dataset.from_file(str(self.path))

    def discard(self) -> None:
        """Remove the file, when there is one; a table that was read from it must be gone."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _close(self) -> None:
        try:
            self._writer.close()
            self._file.close()
        except OSError as error:
            validate.not_written(self.path, error)
