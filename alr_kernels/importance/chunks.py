"""Ω of one tensor some rows at a time, in whatever form it is kept: no temporary is as large as the tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from .. import _dtensor, _validate_inspection
from ..codecs.encoded import Encoded
from ..codecs.reference import encode_rank1
from ..codecs.storage import CODES

if TYPE_CHECKING:
    from torch import Tensor

ELEMENTS = 2**20  # that are decoded together, or one row where that has more


def matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Return (rows, columns) of a tensor seen as a matrix: its last dimension lies in a row, a vector in a column.

    >>> matrix((2, 3, 5)), matrix((7,)), matrix(())
    ((6, 5), (7, 1), (1, 1))
    """
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (math.prod(shape), 1)


def chunks(entry: Encoded, name: str = "importance", elements: int = ELEMENTS) -> Iterator[Tensor]:
    """Yield Ω as matrices of some rows each, in order: floats as they are kept, else float32.

    Two entries of the same shape are cut alike.

    Args:
        entry: Ω of one tensor.
        name: what messages call it.
        elements: of a chunk, about.

    Raises:
        ValueError: the entry is sharded.

    >>> [part.tolist() for part in chunks(Encoded.dense(torch.arange(6.0).view(3, 2)), elements=4)]
    [[[0.0, 1.0], [2.0, 3.0]], [[4.0, 5.0]]]
    """
    from .. import _ops

    _validate_inspection.whole(name, _dtensor.is_sharded(entry.values))
    rows, columns = matrix(entry.shape)
    step = max(1, elements // max(columns, 1))
    if entry.format in CODES and len(entry.shape) == 1:  # blocks would lie across rows; no writer of ours does that
        entry = Encoded.dense(_ops.decoded(entry))
    values = entry.values.detach()
    if entry.format != "rank1":
        values = values.reshape(rows, values.shape[-1] if values.dim() > 1 else 1)
    for first in range(0, rows, step):
        cut = slice(first, min(first + step, rows))
        if entry.scales is None:
            yield values[cut]
        elif entry.format in CODES:
            yield _ops.decoded(Encoded(values[cut], entry.scales.reshape(rows, -1)[cut], entry.format))
        else:  # rank1: a row of the matrix belongs to one of the first dimension
            inner = rows // values.numel()
            index = torch.arange(cut.start, cut.stop, device=values.device)
            yield values[index // inner, None] * entry.scales.reshape(inner, columns)[index % inner]


class Loss(NamedTuple):
    """How far Ω̂, which is kept or would be, is from Ω."""

    squared: float = 0.0  # Σ (Ω̂ − Ω)²
    square: float = 0.0  # Σ Ω²
    worst: float = 0.0  # max |Ω̂ − Ω|, over the tensor's largest Ω
    name: str = ""  # of the tensor with the worst element, its place, Ω and Ω̂ there
    at: tuple[int, ...] = ()
    original: float = 0.0
    decoded: float = 0.0
    nbytes: int = 0  # of Ω̂

    @property
    def rms(self) -> float:
        """‖Ω̂ − Ω‖₂ / ‖Ω‖₂; 0 where Ω is zero."""
        return math.sqrt(self.squared / self.square) if self.square else 0.0

    @classmethod
    def pooled(cls, losses: Iterable[Loss]) -> Loss:
        """Combine those of several tensors; the worst element is that of the tensor where it is worst."""
        rows = list(losses)
        worst = max(rows, key=lambda row: row.worst, default=cls())
        return worst._replace(
            squared=math.fsum(row.squared for row in rows),
            square=math.fsum(row.square for row in rows),
            nbytes=sum(row.nbytes for row in rows),
        )

    def as_dict(self) -> dict[str, object]:
        """Return it as JSON takes it."""
        element = {"name": self.name, "at": list(self.at), "original": self.original, "decoded": self.decoded}
        return {"rms": self.rms, "worst": self.worst, "element": element, "bytes": self.nbytes}


def loss(name: str, original: Encoded, kept: Encoded) -> Loss:
    """Return the loss of what is kept against the original; both stay where they are."""
    pairs = zip(chunks(original, name), chunks(kept, name), strict=True)
    return _measured(name, original.shape, pairs)._replace(nbytes=kept.nbytes)


def loss_of(name: str, entry: Encoded, form: str) -> Loss:
    """Return what keeping an entry in another form would lose; codes are made chunk by chunk and dropped."""
    from .. import _ops

    if form == "rank1":
        return loss(name, entry, Encoded(*encode_rank1(entry.decoded()), form))
    nbytes = 0

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal nbytes
        for part in chunks(entry, name):
            ((found,), *_) = _ops.merge([Encoded.dense(part)], [None], [form], (1.0, 0.0))
            nbytes += found.nbytes
            yield part, _ops.decoded(found)

    found = _measured(name, entry.shape, pairs())
    return found._replace(nbytes=nbytes)


def _measured(name: str, shape: Sequence[int], pairs: Iterable[tuple[Tensor, Tensor]]) -> Loss:
    squared = square = largest = 0.0
    first, worst, place, values = 0, -1.0, 0, (0.0, 0.0)
    for original, decoded in pairs:
        wide = original.float()
        apart = (decoded.float() - wide).abs_().reshape(-1)
        if not apart.numel():
            continue
        squared += float(torch.linalg.vector_norm(apart, dtype=torch.float64)) ** 2
        square += float(torch.linalg.vector_norm(wide, dtype=torch.float64)) ** 2
        largest = max(largest, float(wide.max()))
        index = int(apart.argmax())
        if float(apart[index]) > worst:
            worst, place = float(apart[index]), first + index
            values = (float(wide.reshape(-1)[index]), float(decoded.reshape(-1)[index]))
        first += apart.numel()
    if worst < 0:
        return Loss(name=name)
    return Loss(squared, square, worst / largest if largest else 0.0, name, _unravelled(place, shape), *values)


def _unravelled(place: int, shape: Sequence[int]) -> tuple[int, ...]:
    found = []
    for size in reversed(shape):
        place, index = divmod(place, size)
        found.append(index)
    return tuple(reversed(found))
