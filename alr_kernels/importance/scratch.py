"""A file that takes its place once it is whole, whatever happens before."""

from __future__ import annotations

import contextlib
import glob
import os
import tempfile
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: what killed writers leave stays
    fcntl = None  # type: ignore[assignment]


class Scratch:
    """A file beside its target that takes its place once it is whole; until then the target stays as it is."""

    def __init__(self, target: Path) -> None:
        _remove_abandoned(target)
        self._target = target
        while True:
            handle, path = tempfile.mkstemp(".partial", f".{target.name}.", target.parent)
            self.path, self.file = Path(path), os.fdopen(handle, "w+b")
            _lock(self.file.fileno(), True)  # another writer may be looking at whether it is abandoned
            if self.path.exists():  # else another writer took it for abandoned before it was locked
                break
            self.file.close()

    def publish(self) -> None:
        """Flush to disk, with the permissions of a new file, and rename over the target."""
        self.file.flush()
        os.fsync(self.file.fileno())
        os.umask(umask := os.umask(0o077))  # the only way to read it; a scratch file is private
        os.fchmod(self.file.fileno(), 0o666 & ~umask)
        os.replace(self.path, self._target)

    def discard(self) -> None:
        """Close, and remove what was not published."""
        try:
            self.path.unlink(missing_ok=True)
        finally:
            with contextlib.suppress(OSError):  # what is still buffered may not fit on the disk
                self.file.close()


def _lock(handle: int, wait: bool = False) -> bool:
    """Mark a file as being written, for other processes, until it is closed; whether nobody else has.

    ``wait`` until nobody else has.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # held, or a file system without locks
        return False
    return True


def _remove_abandoned(target: Path) -> None:
    """Remove what writers of this file left that were killed: nobody holds its lock any more."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        with contextlib.suppress(OSError), open(path, "rb") as left:
            if _lock(left.fileno()):
                path.unlink(missing_ok=True)
