"""Whether two importance files agree about what matters: order, magnitude, the largest elements, scale; by layer.

    rank correlation   Spearman's ρ of Ω_a and Ω_b, ties by mean ranks: order alone, whatever the units
    log correlation    Pearson's r of ln Ω_a and ln Ω_b where both are positive: magnitudes over decades. Of Ω itself it
                       would be that of a few elements: Ω spans ten decades and more
    cosine             Σ Ω_a Ω_b / (‖Ω_a‖ ‖Ω_b‖): how alike the two pulls are; the penalty is linear in Ω
    overlap            |top_a ∩ top_b| / k of the k = ⌈share · n⌉ largest elements of each; those at the bound count by
                       their part, k less those above it over how many there are
    scale ratio        Σ Ω_b / Σ Ω_a

All but the first are of every element. Ranks are of every element of a layer up to ``sample``, of a seeded sample of
that size above: one element at random in each of as many equal stretches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import _validate, _validate_importance, _validate_inspection
from ..names import LayerBy, layer_of
from .chunks import chunks
from .ranking import Bound, Moments, Selection, bits_of, overlap, rank_correlation, sampled, upper_counts

if TYPE_CHECKING:
    from torch import Tensor

    from .artifact import Importance

SAMPLE = 2**20
PASSES = 3  # over both files
Tick = Callable[[int], None]


@dataclass(frozen=True)
class Agreement:
    """One layer, or all. Measures are None where they mean nothing: one side is constant, or zero."""

    name: str
    tensors: int
    elements: int
    rank_correlation: float | None
    ranked: int  # elements
    log_correlation: float | None
    both_positive: int
    cosine: float | None
    overlap: float
    top: int  # elements that the overlap is of
    scale_ratio: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        return {**self.__dict__, "exact": self.ranked == self.elements}


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found."""

    first: str
    second: str
    by: LayerBy
    top: float
    sample: int
    seed: int
    layers: list[Agreement]
    total: Agreement
    only_first: dict[str, int]  # name → elements
    only_second: dict[str, int]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        return {
            **{key: getattr(self, key) for key in ("first", "second", "by", "top", "sample", "seed")},
            "total": self.total.as_dict(),
            "layers": [row.as_dict() for row in self.layers],
            "only_first": self.only_first,
            "only_second": self.only_second,
            "notes": self.notes,
        }


def compare(
    first: Importance,
    second: Importance,
    *,
    by: LayerBy = "block",
    top: float = 0.01,
    sample: int = SAMPLE,
    seed: int = 0,
    names: tuple[str, str] = ("first", "second"),
    tick: Tick | None = None,
) -> Comparison:
    """Compare what two importances have in common, in three passes over both; see the module's formulas.

    Args:
        first, second: as :meth:`Importance.load` maps them: chunks of their tensors are decoded, never a whole one.
        by: what a layer is, ``"block"`` or ``"module"``.
        top: share of the elements whose overlap is told, in (0, 0.5].
        sample: elements of a layer, and of all, that are ranked at most.
        seed: of the sample.
        names: what messages call them.
        tick: called with numbers of elements as they are read: three times those in common.

    Raises:
        NothingInCommonError: no tensor has the same name in both. ValueError: another shape, an option out of range, or
            values that are negative or not finite.

    >>> from alr_kernels import Importance
    >>> a = Importance({"layers.0.w": torch.tensor([0.0, 1.0, 2.0, 4.0])})
    >>> b = Importance({"layers.0.w": torch.tensor([0.0, 2.0, 8.0, 4.0])})
    >>> found = compare(a, b, top=0.25).total
    >>> found.rank_correlation, found.overlap, found.scale_ratio
    (0.8, 0.0, 2.0)
    """
    _validate.choice("by", by, ("block", "module"))
    share, limit = _validate_inspection.comparison_options(top, sample)
    shapes = [{name: tuple(x.encoded(name).shape) for name in x} for x in (first, second)]
    common = [name for name in first if name in second]
    _validate_inspection.comparable(shapes[0], shapes[1], common)
    members: dict[str, dict[str, int]] = {}
    for name in common:
        members.setdefault(layer_of(name, by), {})[name] = first.encoded(name).numel

    def pairs(name: str) -> Iterator[tuple[Tensor, Tensor]]:
        both = (chunks(x.encoded(name), name) for x in (first, second))
        for pair in zip(*both, strict=True):
            if tick is not None:
                tick(pair[0].numel())
            yield pair

    layers, total = _agreements(pairs, members, _Options(share, limit, seed))
    alone = [{name: math.prod(x[name]) for name in x if name not in y} for x, y in (shapes, shapes[::-1])]
    return Comparison(*names, by, share, limit, seed, layers, total, alone[0], alone[1], notes(first, second))


class _Options(NamedTuple):
    top: float
    sample: int
    seed: int


def notes(first: Importance, second: Importance) -> list[str]:
    """Say what keeps numbers of the two from being compared as they are."""
    said = []
    if first.method != second.method or first.is_normalized != second.is_normalized:
        forms = [f"{x.method}{', normalized' if x.is_normalized else ''}" for x in (first, second)]
        said.append(f"The two are in different units ({forms[0]}; {forms[1]}): the scale ratio compares those.")
    elif (first.xi, first.relative) != (second.xi, second.relative):
        said.append("The two have different ξ: the scale ratio is that of the denominators, too.")
    return said


class _Group:
    """What is gathered of one layer, or of all."""

    def __init__(self, label: str, elements: int, options: _Options) -> None:
        self.label, self.elements, self.seed = label, elements, options.seed
        self.wanted = min(elements, options.sample)  # elements to rank
        self.count = math.ceil(elements * options.top - 1e-9)
        self.selections = (Selection(self.count), Selection(self.count))
        self.bounds: tuple[Bound, Bound] | None = None
        self.samples: Tensor | None = None  # [2, wanted]
        self.seen = 0  # elements, of which so many were ranked as are their share
        self.logs = Moments()
        self.sums = [0.0] * 5  # Σa, Σb, Σa², Σb², Σab
        self.ranked, self.inside = 0, 0.0
        self.correlation: float | None = None

    def add(self, part: _Part) -> None:
        """Take a chunk in the first pass."""
        self.logs.add(part.logs)
        self.sums = [x + y for x, y in zip(self.sums, part.sums, strict=True)]
        for side in (0, 1):
            self.selections[side].count_upper(part.counts[side])
        if self.samples is None:
            self.samples = torch.empty(2, self.wanted)  # whole: pieces of it would fragment memory
        numel = part.values[0].numel()
        first, last = (x * self.wanted // max(self.elements, 1) for x in (self.seen, self.seen + numel))
        self.seen += numel
        places = slice(None)
        if self.wanted < self.elements:
            places = sampled(numel, last - first, f"{self.seed} {self.label} {part.key}")
        for kept, values in zip(self.samples, part.values, strict=True):
            kept[first:last] = values[places]

    def end_first(self) -> None:
        """Rank what was sampled, and let it go."""
        if self.samples is not None and self.count:
            self.ranked, self.correlation = self.wanted, rank_correlation(*self.samples)
            for selection in self.selections:
                selection.narrow()
        self.samples = None

    def end_second(self) -> None:
        """Find the bounds of the largest elements."""
        if self.count:
            self.bounds = (self.selections[0].bound(), self.selections[1].bound())

    def result(self, tensors: int) -> Agreement:
        """Return what was found."""
        a, b, aa, bb, ab = self.sums
        return Agreement(
            self.label, tensors, self.elements, self.correlation, self.ranked, self.logs.correlation, self.logs.count,
            ab / math.sqrt(aa) / math.sqrt(bb) if aa > 0 and bb > 0 else None,
            self.inside / self.count if self.count else 1.0, self.count, b / a if a > 0 else None,
        )  # fmt: skip


class _Part:
    """A chunk of both, and what every group takes of it in the first pass."""

    def __init__(self, name: str, number: int, pair: Sequence[Tensor]) -> None:
        for part in pair:
            _validate_importance.importance_values(name, part)
        self.key = f"{name} {number}"
        self.values = [part.float().reshape(-1) for part in pair]
        self.counts = [upper_counts(bits_of(part)) for part in self.values]
        a, b = (part.double() for part in self.values)
        self.sums = [float(a.sum()), float(b.sum()), float(a.dot(a)), float(b.dot(b)), float(a.dot(b))]
        both = (a > 0) & (b > 0)
        first, second = (part.log() for part in self.values)  # −inf where Ω is 0, which does not count
        self.logs = Moments.of(first, second, both)


def _agreements(
    pairs: Callable[[str], Iterator[tuple[Tensor, Tensor]]], members: Mapping[str, Mapping[str, int]], options: _Options
) -> tuple[list[Agreement], Agreement]:
    """Do the three passes; ``members``: layer → tensor → elements."""
    groups = {layer: _Group(layer, sum(sizes.values()), options) for layer, sizes in members.items()}
    every = _Group("all", sum(group.elements for group in groups.values()), options)
    for layer, sizes in members.items():
        for name in sizes:
            for number, pair in enumerate(pairs(name)):
                part = _Part(name, number, pair)
                groups[layer].add(part)
                every.add(part)
        groups[layer].end_first()
    every.end_first()
    for layer, sizes in members.items():
        for pair in (pair for name in sizes for pair in pairs(name)):
            for side, bits in enumerate(map(bits_of, pair)):
                groups[layer].selections[side].count_lower(bits)
                every.selections[side].count_lower(bits)
        groups[layer].end_second()
    every.end_second()
    for layer, sizes in members.items():
        for pair in (pair for name in sizes for pair in pairs(name)):
            bits = (bits_of(pair[0]), bits_of(pair[1]))
            for group in (groups[layer], every):
                if group.bounds is not None:
                    group.inside += overlap(*bits, group.bounds)
    return [group.result(len(members[layer])) for layer, group in groups.items()], every.result(
        sum(map(len, members.values()))
    )
