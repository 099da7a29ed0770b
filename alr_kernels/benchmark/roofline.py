"""Bytes by formula: what one step must read and write, and what it must keep, per element.

The roof of a step is its traffic over the memory's bandwidth: no implementation of the same storage can be faster.
Tensors that stay wide because they are small or oddly shaped (``codecs.storage``) are counted as what they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..codecs.reference import BLOCK
from ..codecs.storage import fitting

SIZE = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0}
CODE = {"int8": 1.0, "int4": 0.5}
MOMENT_SCALE = 4.0  # bytes: fp32
IMPORTANCE_SCALE = 2.0  # bytes: bf16
REMAINDER = 2.0  # bytes: int16
OMEGA = 4.0  # bytes: fp32


def form_bytes(form: str, scale: float) -> tuple[float, float]:
    """Return the bytes an element of a tensor in this form, and of its blocks' scales."""
    return (CODE[form], scale / BLOCK) if form in CODE else (SIZE[form], 0.0)


@dataclass(frozen=True)
class Kept:
    """In which form a step's operands are kept; names as AlrAdamW's options."""

    param: str = "fp32"
    grad: str | None = None  # None: as the parameter
    moments: str = "fp32"  # each of the two
    importance: str | None = None
    anchor: str | None = None  # None with importance: as the parameter
    split: bool = False
    record: bool = False

    def on(self, shape: Sequence[int]) -> Kept:
        """Return how a tensor of this shape is kept: small ones and vectors wide, codes only in whole blocks."""
        importance = None if self.importance is None else fitting(self.importance, shape)
        anchor = None if self.anchor is None or fitting("bf16", shape) != "bf16" else self.anchor
        return replace(self, moments=fitting(self.moments, shape), importance=importance, anchor=anchor)

    def parts(self) -> dict[str, float]:
        """Return the bytes an element of all that is kept beside weights and gradients, by what it is.

        The start of a recording has memory of its own only where no anchor holds the same numbers: without importance,
        or with an anchor that is narrower than the weight.
        """
        moments, moment_scales = form_bytes(self.moments, MOMENT_SCALE)
        found = {"moments": 2 * moments, "moment_scales": 2 * moment_scales}
        if self.importance is not None:
            importance, importance_scales = form_bytes(self.importance, IMPORTANCE_SCALE)
            found |= {"importance": importance, "importance_scales": importance_scales}
            found["anchor"] = SIZE[self.anchor or self.param]
        if self.split:
            found["remainder"] = REMAINDER
        if self.record:
            shared = self.importance is not None and self.anchor in (None, "fp32", self.param)
            found |= {"path_integral": OMEGA, "start": 0.0 if shared else SIZE[self.param]}
        return found

    def traffic(self) -> float:
        """Return the bytes an element that one step must move.

        Parameter, moments, the split master's remainder and ω are read and written; the gradient, importance and
        anchor are read.
        """
        parts = self.parts()
        written = ("moments", "moment_scales", "remainder", "path_integral")
        twice = SIZE[self.param] + sum(parts.get(part, 0.0) for part in written)
        once = ("importance", "importance_scales", "anchor")
        return 2 * twice + SIZE[self.grad or self.param] + sum(parts.get(part, 0.0) for part in once)

    def effective_traffic(self, passes: int) -> float:
        """Return the bytes an element of U = s·B·A that a step moves besides the factors.

        ω is read and written; Ω is read in each of the penalty's passes, of which coupled takes one and proximal two.
        """
        parts = self.parts()
        read = parts.get("importance", 0.0) + parts.get("importance_scales", 0.0)
        return 2 * parts.get("path_integral", 0.0) + passes * read

    def state(self) -> float:
        """Return the bytes an element kept beside weights and gradients: the sum of :meth:`parts`."""
        return sum(self.parts().values())


def mean(quantity: Callable[[Kept], float], kept: Kept, shapes: Sequence[Sequence[int]]) -> float:
    """Return ``Kept.traffic`` or ``Kept.state`` of tensors of these shapes, bytes an element on average."""
    sizes = [math.prod(shape) for shape in shapes]
    return sum(n * quantity(kept.on(shape)) for n, shape in zip(sizes, shapes, strict=True)) / max(sum(sizes), 1)


ADAMW = Kept()
# Rivals that pass over memory more than once, counted pass by pass; lower bounds, temporaries in cache not credited.
FOREACH_PENALTY = 36.0 + ADAMW.traffic()  # θ−θ* (r r w), ·k (r r w), added to g (r r w)
AUTOGRAD_PENALTY = 72.0 + ADAMW.traffic()  # forward: three passes and a sum (36); backward: as many again
ALL_BF16 = Kept("bf16", moments="bf16").traffic()
# Others' 8-bit states: a code a moment; one fp32 scale in 256 (torchao, bitsandbytes) or fp16 in 32 (flashoptim).
EIGHT_BIT_256 = 2 * SIZE["fp32"] + SIZE["fp32"] + 2 * 2 * (1 + 4 / 256)
FLASH = 2 * (SIZE["bf16"] + 1) + SIZE["bf16"] + 2 * 2 * (1 + 2 / 32)  # bf16 weights with an 8-bit correction
