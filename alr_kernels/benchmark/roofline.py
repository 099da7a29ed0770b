"""Bytes by formula: what one step must read and write, and what it must keep, per element.

The roof of a step is its traffic over the memory's bandwidth: no implementation of the same storage can be faster.
Tensors that stay wide because they are small or oddly shaped (``codecs.storage``) are counted as what they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..codecs.storage import SMALL

SIZE = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0}
CODE = {"int8": 1.0, "int4": 0.5}
BLOCK = 128  # elements that share a scale
MOMENT_SCALE = 4.0  # bytes: fp32
IMPORTANCE_SCALE = 2.0  # bytes: bf16


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
        small = len(shape) < 2 or math.prod(shape) < SMALL

        def fitting(name: str) -> str:
            return "fp32" if small or (name in CODE and shape[-1] % BLOCK) else name

        importance = None if self.importance is None else fitting(self.importance)
        return replace(
            self, moments=fitting(self.moments), importance=importance, anchor=None if small else self.anchor
        )

    @property
    def moment_bytes(self) -> float:
        """Bytes an element of both moments, scales included."""
        return 2 * (CODE[self.moments] + MOMENT_SCALE / BLOCK if self.moments in CODE else SIZE[self.moments])

    @property
    def penalty_bytes(self) -> float:
        """Bytes an element of importance and anchor, scales included."""
        if self.importance is None:
            return 0.0
        coded = self.importance in CODE
        importance = CODE[self.importance] + IMPORTANCE_SCALE / BLOCK if coded else SIZE[self.importance]
        return importance + SIZE[self.anchor or self.param]

    def traffic(self) -> float:
        """Return the bytes an element that one step must move.

        Parameter, moments, the split master's remainder and ω are read and written; the gradient, importance and
        anchor are read.
        """
        twice = SIZE[self.param] + self.moment_bytes + (2.0 if self.split else 0.0) + (4.0 if self.record else 0.0)
        return 2 * twice + SIZE[self.grad or self.param] + self.penalty_bytes

    def state(self) -> float:
        """Return the bytes an element kept beside weights and gradients.

        While recording, ω, and the start where no anchor holds it.
        """
        start = SIZE[self.param] if self.record and self.importance is None else 0.0
        recording = 4.0 + start if self.record else 0.0
        return self.moment_bytes + self.penalty_bytes + (2.0 if self.split else 0.0) + recording


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
