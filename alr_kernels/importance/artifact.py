"""The importance artifact: a read-only mapping name → Ω, in any form of storage, and what is known of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal

import torch

from .. import _dtensor, _validate, _validate_importance
from ..codecs.encoded import Encoded
from ..codecs.storage import fitting, parse
from ..names import LayerBy, layer_of, unwrap
from . import files, sharded
from .statistics import STATISTICS, TensorStats

if TYPE_CHECKING:
    from torch import Tensor

MAXIMUM = STATISTICS.index("max")
MERGE_RULES = ("sum", "max", "weighted", "decayed")


class Importance(Mapping[str, "Tensor"]):
    """Element-wise importance Ω ≥ 0 by parameter name, read-only, with how it was made.

    ``importance[name]`` is Ω as floats: decoded anew at each look where it is kept as something else.
    ``encoded(name)`` is what is kept. Recorded on sharded parameters, both are DTensors, statistics are of all ranks,
    and whatever is computed or saved needs a call on every rank.

    Args:
        tensors: name → Ω, floating-point tensors shaped as their parameters, or encoded ones. Names are unwrapped.
        method: the estimator: ``"path_integral"`` for recordings, ``"fisher"``, ``"mas"``, ``"magnitude_gradient"``,
            anything for your own.
        xi: ξ of the denominator (in units of θ², or of the mean squared move when ``relative``); None if not used.
        relative: whether ξ was multiplied by each tensor's mean squared move.
        steps: optimizer steps that were integrated, or samples that were averaged.
        cut: eigenvalues of the factors' Gram matrices below this part of the largest counted as zero (LoRA's tangent
            estimate); None if not used.
        normalized: whether it is in units of its mean: scaled to mean 1, or a part or a merger of such.
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
        tensors: Mapping[str, Tensor | Encoded],
        *,
        method: str = "user",
        xi: float | None = None,
        relative: bool = False,
        steps: int = 0,
        normalized: bool = False,
        cut: float | None = None,
        stats: Mapping[str, TensorStats] | None = None,
    ) -> None:
        names = [unwrap(name) for name in tensors]
        _validate.distinct_names(names)
        self._entries: dict[str, Encoded] = {}
        for name, tensor in zip(names, tensors.values(), strict=True):
            if not isinstance(tensor, Encoded):
                _validate_importance.importance_tensor(name, tensor)
                tensor = Encoded.dense(tensor)
            self._entries[name] = tensor
        self.method = method
        self.xi = xi
        self.relative = relative
        self.steps = steps
        self.is_normalized = normalized
        self.cut = cut
        given = {unwrap(name): row for name, row in (stats or {}).items()}
        self._stats = {
            name: given.get(name) or sharded.statistics_of(entry, name) for name, entry in self._entries.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        return sharded.decoded(self.encoded(name), name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    __eq__ = object.__eq__  # a mapping's would compare tensors element by element
    __hash__ = object.__hash__

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._entries or unwrap(name) in self._entries)

    def __repr__(self) -> str:
        pooled = TensorStats.pooled(self._stats.values())
        xi = "" if self.xi is None else f", xi={self.xi:g}{' relative' if self.relative else ''}"
        counted = "steps" if "path_integral" in self.method else "samples"
        return (
            f"Importance({self.method}{xi}, {self.steps} {counted}, {len(self)} tensors, {pooled.numel:,} elements, "
            f"{self.nbytes:,} bytes in {', '.join(self._formats())}, mean {pooled.mean:.3g}, max {pooled.max:.3g}"
            f"{', normalized' if self.is_normalized else ''})"
        )

    def _formats(self) -> list[str]:
        """Return the formats in use, that of the most elements first."""
        sizes: dict[str, int] = {}
        for entry in self._entries.values():
            sizes[entry.format] = sizes.get(entry.format, 0) + entry.numel
        return sorted(sizes, key=lambda kept: -sizes[kept])

    def encoded(self, name: str) -> Encoded:
        """Return what is kept of a parameter: floats, codes with their scales, or factors. Do not write into it."""
        known = name if name in self._entries else unwrap(name)
        if known not in self._entries:
            _validate_importance.unknown_entry(name, self._entries)
        return self._entries[known]

    @property
    def stats(self) -> dict[str, TensorStats]:
        """Statistics by tensor, of Ω before it was encoded."""
        return dict(self._stats)

    def layer_stats(self, by: LayerBy = "block") -> dict[str, TensorStats]:
        """Return the same statistics by layer, ``"block"`` (``model.layers.3``) or ``"module"``."""
        _validate.choice("by", by, ("block", "module"))
        members: dict[str, list[TensorStats]] = {}
        for name, row in self._stats.items():
            members.setdefault(layer_of(name, by), []).append(row)
        return {layer: TensorStats.pooled(rows) for layer, rows in members.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, codes and scales."""
        return sum(entry.nbytes for entry in self._entries.values())

    @property
    def fingerprint(self) -> str:
        """Digest of names and shapes: the model that this importance fits."""
        return files.fingerprint({name: entry.shape for name, entry in self._entries.items()})

    @property
    def content_fingerprint(self) -> str:
        """Digest of names, shapes and values in the form in which they are kept."""
        kept = {name: entry.values for name, entry in self._entries.items()}
        scales = {f"{name}:scales": x.scales for name, x in self._entries.items() if x.scales is not None}
        return content_fingerprint(kept | scales)

    def select(self, names: Iterable[str]) -> Importance:
        """Return the entries of these parameters (names without an entry are ignored).

        Raises:
            ValueError: no entry is left.
        """
        wanted = {unwrap(name) for name in names}
        kept = {name: entry for name, entry in self._entries.items() if name in wanted}
        if not kept:
            raise ValueError(
                f"importance.select: no entry matches; it has {_validate.listed(self._entries, 3)}, "
                f"asked for {_validate.listed(wanted, 3)}."
            )
        return self._like(kept, {name: self._stats[name] for name in kept})

    def renamed(self, old: str, new: str) -> Importance:
        """Return it with another prefix of names: those that begin with ``old`` begin with ``new`` instead.

        For a model inside another module: what was recorded as ``layers.0.weight`` is ``model.layers.0.weight`` there.

        >>> import torch
        >>> list(Importance({"layers.0.weight": torch.ones(2)}).renamed("", "model."))
        ['model.layers.0.weight']

        Raises:
            ValueError: no name begins with ``old``, or two names coincide afterwards.
        """
        names = {name: new + name.removeprefix(old) if name.startswith(old) else name for name in self._entries}
        _validate_importance.prefix(old, self._entries)
        _validate.distinct_names(names.values())
        entries = {names[name]: entry for name, entry in self._entries.items()}
        return self._like(entries, {names[name]: row for name, row in self._stats.items()})

    def to(self, device: str | torch.device) -> Importance:
        """Return it on another device, in the same form."""
        return self._like({name: entry.to(device) for name, entry in self._entries.items()}, self._stats)

    def astype(self, dtype: str | torch.dtype) -> Importance:
        """Return it in another form of storage.

        Args:
            dtype: ``"fp32"``, ``"bf16"``, ``"int8"`` or ``"int4"`` (block codes), or ``"rank1"``: of a tensor viewed as
                a matrix [shape[0], the rest] its row sums and column sums alone, of which Ω is taken to be the product,
                Ω_ij ≈ row_i · column_j / total. Vectors, tensors under 4096 elements and, for codes, rows of no
                multiple of 128 stay fp32.

        Statistics stay those of the original.

        >>> import torch
        >>> importance = Importance({"layers.0.weight": torch.rand(64, 128)})
        >>> [importance.astype(dtype).nbytes for dtype in ("fp32", "int4", "rank1")]
        [32768, 4224, 768]
        """
        kept = parse("dtype", dtype)
        return self._combined(
            None, (1.0, 0.0), {name: fitting(kept, entry.shape) for name, entry in self._entries.items()}
        )._with(self._stats, self.steps, self.is_normalized)

    def normalized(self) -> Importance:
        """Return a copy scaled to mean 1 over all elements, in the same form (ω's sums stay as recorded)."""
        mean = TensorStats.pooled(self._stats.values()).mean
        _validate_importance.some_importance({"mean": mean})
        scaled = self._combined(None, (1.0 / mean, 0.0), {})
        stats = {
            name: row._replace(path_integral_sum=known.path_integral_sum, negative_mass=known.negative_mass)
            for (name, row), known in zip(scaled._stats.items(), self._stats.values(), strict=True)
        }
        return scaled._with(stats, self.steps, True)

    def merged(
        self,
        other: Importance,
        rule: Literal["sum", "max", "weighted", "decayed"] = "sum",
        weight: float | None = None,
    ) -> Importance:
        """Return both in one, for the next of several domains; computed on the codes, block by block.

        Ω kept as rank1 is decoded, merged in float32 and encoded again, one tensor at a time.

        ==========  =====================================================================
        sum         Ω_a + Ω_b
        max         max(Ω_a, Ω_b)
        weighted    w·Ω_a + (1 − w)·Ω_b,  0 ≤ w ≤ 1
        decayed     w·Ω_a + Ω_b,  0 ≤ w ≤ 1: the past fades (online EWC, Schwarz et al. 2018)
        ==========  =====================================================================

        Args:
            other: Ω_b. Entries that one of the two lacks count as 0.
            rule: see above.
            weight: w, for ``"weighted"`` and ``"decayed"``.

        Returns:
            all entries, each in the form in which ``self`` has it (or has most of its own), on its device.

        Raises:
            ValueError: other shapes, an estimator whose Ω has another scale (unless both are ``normalized()``), a
                weight that is missing or has no effect.

        >>> import torch
        >>> a, b = Importance({"w": torch.ones(2)}), Importance({"w": torch.ones(2), "v": torch.ones(1)})
        >>> {name: tensor.tolist() for name, tensor in a.merged(b, "decayed", 0.5).items()}
        {'w': [1.5, 1.5], 'v': [1.0]}
        """
        _validate.choice("rule", rule, MERGE_RULES)
        factor = _validate_importance.merge_weight(rule, weight)
        _validate_importance.mergeable(self, other)
        weights = {"sum": (1.0, 1.0), "max": None, "weighted": (factor, 1.0 - factor), "decayed": (factor, 1.0)}[rule]
        common = (self._formats() or other._formats() or ["fp32"])[0]
        formats = {name: fitting(common, entry.shape) for name, entry in other._entries.items() if name not in self}
        result = self._combined(other, weights, formats)
        about = self.about.merged(other.about)
        result.method, result.xi, result.relative, result.cut = about.method, about.xi, about.relative, about.cut
        return result._with(result._stats, about.steps, self.is_normalized)

    def _combined(
        self, other: Importance | None, weights: tuple[float, float] | None, formats: Mapping[str, str]
    ) -> Importance:
        """Return a·Ω_a + b·Ω_b (max without weights) in given formats, or where none is given as it is kept here."""
        names = [*self, *(name for name in other or () if name not in self)]
        device = next(iter(self._entries.values())).values.device if self._entries else torch.device("cpu")
        pairs = [[None if x is None else x._entries.get(name) for x in (self, other)] for name in names]
        placed = [sharded.of_pair(name, *pair) for name, pair in zip(names, pairs, strict=True)]
        firsts, seconds = (
            [sharded.part(name, x, s, device) for name, x, s in zip(names, column, placed, strict=True)]
            for column in zip(*pairs, strict=True)
        )
        kept = [formats.get(name) or _mergeable_format(self._entries[name].format) for name in names]
        sharded.check_rows(names, kept, placed)
        entries, table, counts = sharded.merge(firsts, seconds, kept, weights, placed)
        entries = list(map(sharded.wrapped, entries, placed))
        stats = {}
        for name, row, histogram in zip(names, table, counts, strict=True):
            known = [x._stats.get(name) if x is not None else None for x in (self, other)]
            _validate_importance.importance_range(name, float(row[MAXIMUM]))
            stats[name] = TensorStats.of_row(row, histogram, False).after(known, weights)
        return self._like(dict(zip(names, entries, strict=True)), stats)

    @property
    def about(self) -> files.About:
        """How it was made, as files say it."""
        return files.About(self.method, self.xi, self.relative, self.steps, self.is_normalized, self.cut)

    def _like(self, entries: Mapping[str, Encoded], stats: Mapping[str, TensorStats]) -> Importance:
        return Importance(entries, stats=stats, **self.about._asdict())

    def _with(self, stats: Mapping[str, TensorStats], steps: int, normalized: bool) -> Importance:
        self._stats, self.steps, self.is_normalized = dict(stats), steps, normalized
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, atomically: a reader sees the old file or the whole new one.

        What is kept in codes is written in codes. :class:`ImportanceWriter` writes tensor by tensor.

        Raises:
            ValueError: the name does not end in ``.safetensors``.
            OSError: the folder does not exist or cannot be written.

        Sharded importance is saved by a call on every rank: each writes its rows into the same file, in a folder that
        all of them see.
        """
        about = self.about
        layout = {name: (entry.format, tuple(entry.shape)) for name, entry in self._entries.items()}
        shardings = [_dtensor.Sharding.of(name, entry.values) for name, entry in self._entries.items()]
        with files.ImportanceWriter.of_layout(path, layout, about, shardings) as writer:
            for name, entry in self._entries.items():
                writer.add(name, entry, self._stats[name])

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Importance:
        """Read a file that :meth:`save` or :class:`ImportanceWriter` wrote.

        On the CPU its tensors stay in the file, which is mapped into memory, until they are looked at: a file larger
        than memory can be read tensor by tensor. On another device each goes there by itself.

        Raises:
            FileNotFoundError: there is no such file.
            ImportanceFileError: it is truncated, foreign, inconsistent, or of another format version.
        """
        entries, stats, about = files.read(path, str(device))
        return cls(entries, stats=stats, **about._asdict())


def _mergeable_format(kept: str) -> str:
    return "fp32" if kept == "fp16" else kept  # sums may pass what float16 holds


def content_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Digest of names, shapes and values, the same for any device or thread count.

    The values enter as integer sums of their bit patterns times their positions, modulo 2^64: exact, so that nothing
    depends on rounding, and different when values change places.
    """
    return files.digest(
        f"{name}{tuple(tensor.shape)}{tensor.dtype}{sharded.checksum(_checksum, tensor.detach(), name)}"
        for name, tensor in sorted(tensors.items())
    )


def _checksum(tensor: Tensor, first: int = 0, chunk: int = 2**20) -> int:
    """Return Σ bits · (index + 1) modulo 2^64 of a part of a tensor that begins at index ``first``."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.contiguous().view(-1).view(integer)
    position = torch.arange(1, chunk + 1, device=bits.device)
    total = 0
    for start in range(0, bits.numel(), chunk):
        part = bits[start : start + chunk].long()
        total += int((part * position[: part.numel()]).sum()) + (first + start) * int(part.sum())
    return total % 2**64
