"""The importance artifact: a read-only mapping name → Ω, and its file.

File: one safetensors file; tensors under their unwrapped names, everything else in its metadata
(strings; ``about`` and ``stats`` are JSON). No pickle. ``docs/artifact.md`` is the specification.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from .. import _validate
from .._version import __version__
from ..names import LayerBy, layer_of, unwrap

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "alr_kernels.importance"
FORMAT_VERSION = 1


class ImportanceFileError(ValueError):
    """A file that is not a whole importance artifact which this version can read."""


class TensorStats(NamedTuple):
    """Statistics of one tensor (or layer). The first two are None when no path integral was recorded."""

    path_integral_sum: float | None  # Σω: how much these weights lowered the loss, to first order
    negative_mass: float | None  # Σ max(−ω, 0): what the clamp threw away
    l2: float  # ‖Ω‖₂
    max: float
    mean: float
    numel: int
    nonfinite: int  # elements of ω that were NaN or inf; their Ω is 0

    @classmethod
    def of(cls, importance: Tensor, name: str = "importance") -> TensorStats:
        """Compute what can be known from Ω alone, once its values are checked."""
        _validate.importance_values(name, importance)
        if importance.numel() == 0:
            return cls(None, None, 0.0, 0.0, 0.0, 0, 0)
        wide = importance.detach().double()
        return cls(None, None, float(wide.norm()), float(wide.max()), float(wide.mean()), wide.numel(), 0)

    @classmethod
    def pooled(cls, parts: Iterable[TensorStats]) -> TensorStats:
        """Combine the statistics of several tensors."""
        rows = list(parts)
        numel = sum(row.numel for row in rows)

        def total(values: list[float | None]) -> float | None:
            known = [value for value in values if value is not None]
            return math.fsum(known) if known else None

        return cls(
            total([row.path_integral_sum for row in rows]),
            total([row.negative_mass for row in rows]),
            math.sqrt(math.fsum(row.l2 * row.l2 for row in rows)),
            max((row.max for row in rows), default=0.0),
            math.fsum(row.mean * row.numel for row in rows) / max(numel, 1),
            numel,
            sum(row.nonfinite for row in rows),
        )


class Importance(Mapping[str, "Tensor"]):
    """Element-wise importance Ω ≥ 0 by parameter name, read-only, with how it was made.

    Args:
        tensors: name → Ω, float32 tensors shaped as their parameters. Names are unwrapped.
        method: the estimator, ``"path_integral"`` for recordings, anything for your own.
        xi: ξ of the denominator (in units of θ², or of the mean squared move when ``relative``); None if not used.
        relative: whether ξ was multiplied by each tensor's mean squared move.
        steps: optimizer steps that were integrated.
        stats: name → :class:`TensorStats`; computed from the tensors when left out.

    Raises:
        ValueError: two names coincide once unwrapped, or a value is negative or not finite. TypeError: an entry is not
            a floating-point tensor.

    >>> import torch
    >>> importance = Importance({"layers.0.weight": torch.tensor([0.0, 2.0])}, method="user")
    >>> importance.stats["layers.0.weight"].max, importance.nbytes
    (2.0, 8)
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        method: str = "user",
        xi: float | None = None,
        relative: bool = False,
        steps: int = 0,
        normalized: bool = False,
        stats: Mapping[str, TensorStats] | None = None,
    ) -> None:
        names = [unwrap(name) for name in tensors]
        _validate.distinct_names(names)
        for name, tensor in tensors.items():
            _validate.importance_tensor(name, tensor)
        self._tensors = dict(zip(names, tensors.values(), strict=True))
        self.method = method
        self.xi = xi
        self.relative = relative
        self.steps = steps
        self.is_normalized = normalized
        given = {unwrap(name): row for name, row in (stats or {}).items()}
        self._stats = {name: given.get(name) or TensorStats.of(tensor, name) for name, tensor in self._tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name] if name in self._tensors else self._tensors[unwrap(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        pooled = TensorStats.pooled(self._stats.values())
        xi = "" if self.xi is None else f", xi={self.xi:g}{' relative' if self.relative else ''}"
        return (
            f"Importance({self.method}{xi}, {self.steps} steps, {len(self)} tensors, {pooled.numel:,} elements, "
            f"{self.nbytes:,} bytes, mean {pooled.mean:.3g}, max {pooled.max:.3g}"
            f"{', normalized' if self.is_normalized else ''})"
        )

    @property
    def stats(self) -> dict[str, TensorStats]:
        """Statistics by tensor."""
        return dict(self._stats)

    def layer_stats(self, by: LayerBy = "block") -> dict[str, TensorStats]:
        """Return the same statistics by layer."""
        members: dict[str, list[TensorStats]] = {}
        for name, row in self._stats.items():
            members.setdefault(layer_of(name, by), []).append(row)
        return {layer: TensorStats.pooled(rows) for layer, rows in members.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors.values())

    @property
    def fingerprint(self) -> str:
        """Digest of names and shapes: the model that this importance fits."""
        return _digest(f"{name}{tuple(tensor.shape)}" for name, tensor in sorted(self._tensors.items()))

    def select(self, names: Iterable[str]) -> Importance:
        """Return the entries of these parameters (names without an entry are ignored).

        Raises:
            ValueError: no entry is left.
        """
        wanted = {unwrap(name) for name in names}
        kept = {name: tensor for name, tensor in self._tensors.items() if name in wanted}
        if not kept:
            raise ValueError(
                f"importance.select: no entry matches; it has {_validate.listed(self._tensors, 3)}, "
                f"asked for {_validate.listed(wanted, 3)}."
            )
        return self._like(kept, self._stats)

    def normalized(self) -> Importance:
        """Return a copy scaled to mean 1 over all elements (new tensors; ω's sums stay as recorded)."""
        mean = TensorStats.pooled(self._stats.values()).mean
        _validate.some_importance({"mean": mean})
        scale = 1.0 / mean
        stats = {
            name: row._replace(l2=row.l2 * scale, max=row.max * scale, mean=row.mean * scale)
            for name, row in self._stats.items()
        }
        result = self._like({name: tensor * scale for name, tensor in self._tensors.items()}, stats)
        result.is_normalized = True
        return result

    def _like(self, tensors: dict[str, Tensor], stats: Mapping[str, TensorStats]) -> Importance:
        return Importance(
            tensors,
            method=self.method,
            xi=self.xi,
            relative=self.relative,
            steps=self.steps,
            normalized=self.is_normalized,
            stats={name: stats[name] for name in tensors},
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, atomically: a reader sees the old file or the whole new one.

        Raises:
            ValueError: the name does not end in ``.safetensors``.
            OSError: the folder does not exist or cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        target = _validate.importance_path(path)
        about = {"xi": self.xi, "relative": self.relative, "steps": self.steps, "normalized": self.is_normalized}
        metadata = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "package_version": __version__,
            "method": self.method,
            "fingerprint": self.fingerprint,
            "about": json.dumps(about),
            "stats": json.dumps({name: list(row) for name, row in self._stats.items()}),
        }
        # Contiguous, and a copy where two entries share memory, which safetensors refuses.
        tensors, memory = {}, set[int]()
        for name, tensor in self._tensors.items():
            dense = tensor.detach().cpu().contiguous()
            address = dense.untyped_storage().data_ptr()
            tensors[name] = dense.clone() if address in memory else dense
            memory.add(address)
        scratch = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            save_file(tensors, scratch, metadata=metadata)
            os.umask(umask := os.umask(0o077))  # the only way to read it; safetensors makes files private
            scratch.chmod(0o666 & ~umask)
            with open(scratch, "rb+") as written:
                os.fsync(written.fileno())
            os.replace(scratch, target)
        except SafetensorError as error:
            raise OSError(f"importance file {str(target)!r}: it could not be written: {error}") from error
        finally:
            scratch.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Importance:
        """Read a file that :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ImportanceFileError: it is truncated, foreign, inconsistent, or of a newer format.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"importance file {str(path)!r}: no such file.")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                _check_format(path, metadata)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            stats = {name: TensorStats(*row) for name, row in json.loads(metadata["stats"]).items()}
            result = cls(tensors, method=metadata["method"], stats=stats, **json.loads(metadata["about"]))
            recorded = metadata["fingerprint"]
        except ImportanceFileError:
            raise
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ImportanceFileError(
                f"importance file {str(path)!r}: expected a whole alr_kernels importance file, got {error}; "
                "it is truncated or damaged: write it again with Importance.save()."
            ) from error
        if result.fingerprint != recorded:
            raise ImportanceFileError(
                f"importance file {str(path)!r}: expected names and shapes of fingerprint {recorded}, "
                f"got {result.fingerprint}; it was changed after it was written."
            )
        return result


def _check_format(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ImportanceFileError(
            f"importance file {str(path)!r}: expected format {FORMAT!r}, got {metadata.get('format')!r}; "
            "it is a safetensors file of something else (model weights?)."
        )
    version = metadata.get("format_version", "")
    if not version.isdigit() or int(version) > FORMAT_VERSION:
        raise ImportanceFileError(
            f"importance file {str(path)!r}: format version {version!r} is newer than {FORMAT_VERSION}, written by "
            f"alr_kernels {metadata.get('package_version', '?')}; this is {__version__}: upgrade alr_kernels."
        )


def content_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Digest of names, shapes and values, the same for any device or thread count.

    The values enter as integer sums of their bit patterns times their positions, modulo 2^64: exact, so that nothing
    depends on rounding, and different when values change places.
    """
    return _digest(
        f"{name}{tuple(tensor.shape)}{tensor.dtype}{_checksum(tensor.detach())}"
        for name, tensor in sorted(tensors.items())
    )


def _checksum(tensor: Tensor, chunk: int = 2**20) -> int:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.contiguous().view(-1).view(integer)
    position = torch.arange(1, chunk + 1, device=bits.device)
    total = 0
    for start in range(0, bits.numel(), chunk):
        part = bits[start : start + chunk].long()
        total += int((part * position[: part.numel()]).sum()) + start * int(part.sum())
    return total % 2**64


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
