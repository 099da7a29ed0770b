"""The importance file: a safetensors file that can be written and read tensor by tensor.

safetensors puts a table of all tensors first. Names, shapes and formats are known before the first value is, so the
table is written at once and each tensor into its place as it comes: no more than one is ever in memory.
``docs/artifact.md`` is the specification.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import _validate, _validate_distributed, _validate_importance
from .._dtensor import Sharding
from .._version import __version__
from ..codecs.encoded import Encoded
from ..codecs.reference import BLOCK
from ..codecs.storage import CODES, IN_TWO, fitting, parse
from ..names import unwrap
from . import sharded
from .job import Job
from .scratch import Scratch
from .statistics import BINS, STATISTICS, TensorStats, stacked

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "alr_kernels.importance"
FORMAT_VERSION = 3  # of files with rank1 in them; others stay 2, which older versions read. 1 was never released
OLDEST_VERSION = 2
STATISTICS_NAME, HISTOGRAM_NAME, SCALES_SUFFIX = ":statistics", ":histogram", ":scales"  # ":" is in no parameter's name
# safetensors' names of dtypes, widest first: the order in which tensors lie, so that each is aligned to its width.
SAFETENSORS = {"fp64": "F64", "fp32": "F32", "rank1": "F32", "bf16": "BF16", "fp16": "F16", "int8": "U8", "int4": "U8"}
WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "BF16": 2, "F16": 2, "U8": 1}


class ImportanceFileError(ValueError):
    """A file that is not a whole importance artifact which this version can read."""


class About(NamedTuple):
    """What a file says of itself besides its tensors."""

    method: str
    xi: float | None = None
    relative: bool = False
    steps: int = 0
    normalized: bool = False
    cut: float | None = None  # of eigenvalues, where LoRA's factors were made orthonormal

    def merged(self, other: About) -> About:
        """Return what is said of both in one; ``normalized`` stays this one's."""
        alike = (self.xi, self.relative) == (other.xi, other.relative)
        return self._replace(
            method="+".join(dict.fromkeys([*self.method.split("+"), *other.method.split("+")])),
            xi=self.xi if alike else None,
            relative=self.relative and alike,
            steps=self.steps + other.steps,
            cut=self.cut if self.cut == other.cut else None,
        )


Layout = Mapping[str, tuple[str, tuple[int, ...]]]  # name → (format, shape of the parameter)


def fingerprint(shapes: Mapping[str, Iterable[int]]) -> str:
    """Digest of names and shapes: the model that an importance fits."""
    return digest(f"{name}{tuple(shape)}" for name, shape in sorted(shapes.items()))


def digest(lines: Iterable[str]) -> str:
    """Return 16 hex digits for a list of lines."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _table(layout: Layout) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return stored name → (safetensors dtype, shape), in the order in which they lie in the file."""
    parts: dict[str, tuple[str, tuple[int, ...]]] = {
        STATISTICS_NAME: ("F64", (len(layout), len(STATISTICS))),
        HISTOGRAM_NAME: ("I64", (len(layout), BINS)),
    }
    for name, (kept, shape) in layout.items():
        if kept == "rank1":
            parts |= {name: (SAFETENSORS[kept], shape[:1]), name + SCALES_SUFFIX: (SAFETENSORS[kept], shape[1:])}
            continue
        stored = (*shape[:-1], shape[-1] // 2) if kept == "int4" else tuple(shape)
        parts[name] = (SAFETENSORS[kept], stored)
        if kept in CODES:
            parts[name + SCALES_SUFFIX] = ("BF16", (*shape[:-1], shape[-1] // BLOCK))
    return dict(sorted(parts.items(), key=lambda part: -WIDTHS[part[1][0]]))


class ImportanceWriter:
    """Write an importance file tensor by tensor, in any order; memory holds one tensor at a time.

    Nothing is seen under ``path`` until :meth:`close`: until then a file that was there stays whole, whatever happens.

    Args:
        path: ends in ``.safetensors``; its folder exists.
        shapes: name → shape of the parameter, of every tensor to come.
        dtype: ``"fp32"``, ``"bf16"``, ``"int8"``, ``"int4"`` or ``"rank1"``; vectors, tensors under 4096 elements and,
            for codes, rows of no multiple of 128 stay fp32.
        method, xi, relative, steps, normalized: as of :class:`Importance`.

    Raises:
        ValueError: a name that is not expected or comes twice, another shape, a tensor that is missing at the end.
        OSError: the file cannot be written.

    >>> import tempfile, torch
    >>> from alr_kernels import Importance
    >>> path = tempfile.mkdtemp() + "/importance.safetensors"
    >>> with ImportanceWriter(path, {"layers.0.weight": (64, 128)}, dtype="int4", method="user") as writer:
    ...     writer.add("layers.0.weight", torch.ones(64, 128))
    >>> Importance.load(path).nbytes
    4224
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        shapes: Mapping[str, Iterable[int]],
        *,
        dtype: str | torch.dtype = "fp32",
        method: str = "user",
        xi: float | None = None,
        relative: bool = False,
        steps: int = 0,
        normalized: bool = False,
    ) -> None:
        kept = parse("dtype", dtype)
        _validate.distinct_names(unwrap(name) for name in shapes)
        layout = {unwrap(name): tuple(shape) for name, shape in shapes.items()}
        about = About(method, xi, relative, steps, normalized)
        self._open(path, {name: (fitting(kept, shape), shape) for name, shape in layout.items()}, about, Job(()))

    @classmethod
    def of_layout(
        cls, path: str | os.PathLike[str], layout: Layout, about: About, shardings: Iterable[Sharding | None] = ()
    ) -> ImportanceWriter:
        """Return a writer of tensors in given formats; of sharded ones every rank writes its rows into the one file."""
        writer = cls.__new__(cls)
        writer._open(path, layout, about, Job(shardings))
        return writer

    def _open(self, path: str | os.PathLike[str], layout: Layout, about: About, job: Job) -> None:
        self._target = _validate_importance.importance_path(path)
        _validate_importance.file_names(layout)
        self._layout, self._job = layout, job
        self._stats: dict[str, TensorStats] = {}
        header, self._places = _header(layout, about)
        self._size = max((end for _, end in self._places.values()), default=len(header))
        self._scratch: Scratch | None = None
        self._file: Any = None
        self._failed = ""  # why this rank could not write; the others must not be left waiting
        with self._together():
            if job.rank == 0:
                _validate_importance.importance_folder(self._target)
                self._scratch = Scratch(self._target)
                self._file = self._scratch.file
                self._file.write(header)
                self._file.flush()
                self._file.truncate(self._size)
        if job.size > 1:
            self._join()
        self._is_open = True

    def _join(self) -> None:
        """Open on every rank the file that rank 0 began."""
        path = self._job.told(None if self._failed or self._scratch is None else str(self._scratch.path))
        if path is None:
            self.abort()
            _validate_distributed.several_writers_failed(str(self._target), [self._job.told(self._failed)])
        missing = [rank for rank, found in enumerate(self._job.all(os.path.exists(path))) if not found]
        if missing:
            self.abort()
        _validate_distributed.shared_folder(str(self._target), missing)
        if self._job.rank > 0:
            with self._together():
                self._file = open(path, "r+b")  # noqa: SIM115 - until close() or abort()

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Let a failure of this rank alone be told when all are done; without others it is raised here."""
        try:
            yield
        except OSError as error:
            if self._job.size == 1:
                self.abort()
                raise
            self._failed = self._failed or f"rank {self._job.rank}: {error}"

    def __enter__(self) -> ImportanceWriter:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    @property
    def nbytes(self) -> int:
        """Size of the file, known from the start."""
        return self._size

    def add(self, name: str, importance: Tensor | Encoded, stats: TensorStats | None = None) -> None:
        """Write Ω of one parameter: floats, which are encoded here, or what is encoded already.

        ``stats`` are those of Ω before encoding; without them they are computed.
        """
        from .. import _ops

        name = unwrap(name)
        if not self._is_open:
            _validate_importance.closed_writer()
        if not isinstance(importance, Encoded):
            _validate_importance.importance_tensor(name, importance)
        _validate_importance.expected_entry(name, self._layout, self._stats)
        if self._job.size == 1:
            values = importance.values if isinstance(importance, Encoded) else importance
            _validate_distributed.whole_entry(name, Sharding.of(name, values))
        kept, shape = self._layout[name]
        given = importance if isinstance(importance, Encoded) else Encoded.dense(importance.detach())
        _validate_importance.entry_shape(name, given.shape, shape)
        row = stats or sharded.statistics_of(importance, name)
        if given.format != kept:
            given = _ops.merge([given], [None], [kept], (1.0, 0.0))[0][0]
        self._put(name, given.values)
        if given.scales is not None:
            self._put(name + SCALES_SUFFIX, given.scales)
        self._stats[name] = row

    def _put(self, name: str, tensor: Tensor) -> None:
        begin, end = self._places[name]
        found = self._job.writes(tensor.detach(), name)
        if found is None or self._failed:
            return
        part, offset = found
        data = part.cpu().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy()
        assert begin + offset + data.nbytes <= end if self._job.size > 1 else data.nbytes == end - begin, name
        with self._together():
            self._file.seek(begin + offset)
            self._file.write(data)

    def close(self) -> None:
        """Flush to disk and put the file in its place.

        Raises:
            ValueError: a tensor is missing; the file that was there stays.
        """
        if not self._is_open:
            return
        try:
            _validate_importance.complete_file(str(self._target), self._layout, self._stats)
            table, counts = stacked(self._stats[name] for name in self._layout)
            self._put(STATISTICS_NAME, table)
            self._put(HISTOGRAM_NAME, counts)
            self._publish()
        finally:
            self.abort()

    def _publish(self) -> None:
        if self._job.size > 1:
            with self._together():
                if not self._failed:  # else there may be no file
                    self._file.flush()
                    os.fsync(self._file.fileno())
            reasons = [reason for reason in self._job.all(self._failed) if reason]
            if reasons:
                _validate_distributed.several_writers_failed(str(self._target), reasons)
        with self._together():
            if self._scratch is not None:
                self._scratch.publish()
        if self._job.size > 1 and (reason := self._job.told(self._failed)):
            _validate_distributed.several_writers_failed(str(self._target), [reason])

    def abort(self) -> None:
        """Give up and remove what was written; a file that was there stays. Does nothing after :meth:`close`."""
        self._is_open = False
        if self._scratch is not None:
            scratch, self._scratch = self._scratch, None
            scratch.discard()
        elif self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()


def _header(layout: Layout, about: About) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Return the head of the file and the places (begin, end) of its tensors."""
    newer = any(kept == "rank1" for kept, _ in layout.values())
    kept = {key: value for key, value in about._asdict().items() if key not in ("method", "cut")}
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION if newer else OLDEST_VERSION),
        "package_version": __version__,
        "method": about.method,
        "fingerprint": fingerprint({name: shape for name, (_, shape) in layout.items()}),
        "about": json.dumps(kept),
        "layout": json.dumps([[name, kept, list(shape)] for name, (kept, shape) in layout.items()]),
    }
    if about.cut is not None:
        metadata["cut"] = repr(about.cut)
    entries: dict[str, Any] = {"__metadata__": metadata}
    offsets, at = {}, 0
    for name, (dtype, shape) in _table(layout).items():
        size = math.prod(shape) * WIDTHS[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        offsets[name] = (at, at + size)
        at += size
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    start = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {name: (start + a, start + b) for name, (a, b) in offsets.items()}


def read(path: str | os.PathLike[str], device: str) -> tuple[dict[str, Encoded], dict[str, TensorStats], About]:
    """Return the entries of a file, which on the CPU stay in it until they are looked at, and what goes with them."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"importance file {str(path)!r}: no such file.")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            metadata = file.metadata() or {}
            _check_format(path, metadata)
            layout = {name: (kept, tuple(shape)) for name, kept, shape in json.loads(metadata["layout"])}
            _check_forms(path, metadata, layout)
            expected = {name: (dtype, list(shape)) for name, (dtype, shape) in _table(layout).items()}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            found = {name: (part.get_dtype(), list(part.get_shape())) for name, part in slices.items()}
            _check_layout(path, metadata["fingerprint"], layout, expected, found)
            entries = {}
            for name, (kept, _) in layout.items():
                scales = file.get_tensor(name + SCALES_SUFFIX) if kept in IN_TWO else None
                entries[name] = Encoded(file.get_tensor(name), scales, kept)
            table, counts = (file.get_tensor(name).cpu() for name in (STATISTICS_NAME, HISTOGRAM_NAME))
        cut = float(metadata["cut"]) if "cut" in metadata else None  # beside "about": older versions know no such key
        about = About(metadata["method"], **json.loads(metadata["about"]), cut=cut)
        stats = {name: TensorStats.of_row(*pair) for name, *pair in zip(layout, table, counts, strict=True)}
    except ImportanceFileError:
        raise
    except (SafetensorError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ImportanceFileError(
            f"importance file {str(path)!r}: expected a whole alr_kernels importance file, got {error}; "
            "it is truncated, damaged or something else: write it again with Importance.save()."
        ) from error
    return entries, stats, about


def _check_format(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ImportanceFileError(
            f"importance file {str(path)!r}: expected format {FORMAT!r}, got {metadata.get('format')!r}; "
            "it is a safetensors file of something else (model weights?)."
        )
    version, writer = metadata.get("format_version", ""), metadata.get("package_version", "?")
    if not version.isdigit() or int(version) > FORMAT_VERSION:
        raise ImportanceFileError(
            f"importance file {str(path)!r}: format version {version!r} is newer than {FORMAT_VERSION}, written by "
            f"alr_kernels {writer}; this is {__version__}: upgrade alr_kernels."
        )
    if int(version) < OLDEST_VERSION:
        raise ImportanceFileError(
            f"importance file {str(path)!r}: format version {version} was written by a development version before "
            f"0.1.0; this reads {OLDEST_VERSION} and {FORMAT_VERSION}: record it again."
        )


def _check_forms(path: str | os.PathLike[str], metadata: Mapping[str, str], layout: Layout) -> None:
    unknown = {kept for kept, _ in layout.values()} - set(SAFETENSORS)
    if unknown:
        raise ImportanceFileError(
            f"importance file {str(path)!r}: expected tensors in the forms {', '.join(SAFETENSORS)}, got "
            f"{_validate.listed(unknown)}, written by alr_kernels {metadata.get('package_version', '?')}; "
            f"this is {__version__}: upgrade alr_kernels."
        )


def _check_layout(
    path: str | os.PathLike[str], recorded: str, layout: Layout, expected: Mapping[str, Any], found: Mapping[str, Any]
) -> None:
    differing = [name for name in {*found, *expected} if found.get(name) != expected.get(name)]
    if differing or fingerprint({name: shape for name, (_, shape) in layout.items()}) != recorded:
        raise ImportanceFileError(
            f"importance file {str(path)!r}: expected the names, dtypes and shapes of fingerprint {recorded}; "
            f"{_validate.listed(differing) or 'its list of them'} differ; it was changed after it was written."
        )
