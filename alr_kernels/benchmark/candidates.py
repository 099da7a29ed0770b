"""What is timed: AlrAdamW in its variants, and beside it what users would write or install instead.

Each is built from :class:`Inputs` and returns one step to call. Rivals with a penalty take the same curvature k as
AlrAdamW computes from the importance, so that all of them minimise the same loss (tests/test_bench.py compares).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from .. import AlrAdamW
from . import rivals, roofline
from .inputs import Inputs
from .roofline import Kept
from .shapes import MANY, Shape
from .timing import Step

BASELINE = "torch AdamW fused"
COMPILED = "torch.compile, penalty + AdamW"
PENALTY = "AlrAdamW, penalty"
FEW_BYTES = "AlrAdamW, few bytes"


@dataclass(frozen=True)
class Candidate:
    """One row: how to build it, and what it moves and keeps by formula.

    ``kept`` says the form of its operands, ``moved`` the bytes an element where they are not one pass over that.
    """

    name: str
    build: Callable[[Inputs], Step]
    kept: Kept | None = None
    moved: float | None = None
    ours: bool = False
    short: bool = False  # part of the short form
    why_not: Callable[[Inputs], str] = field(default=lambda inputs: "")  # a reason to skip it, or ""

    def traffic(self, shapes: Sequence[Shape]) -> float | None:
        """Return the bytes an element that a step moves."""
        if self.moved is not None or self.kept is None:
            return self.moved
        return roofline.mean(Kept.traffic, self.kept, shapes)

    def state(self, shapes: Sequence[Shape]) -> float | None:
        """Return the bytes an element kept beside weights and gradients."""
        return None if self.kept is None else roofline.mean(Kept.state, self.kept, shapes)


def ours(inputs: Inputs, dtype: torch.dtype = torch.float32, penalty: bool = True, **options: Any) -> Step:
    """Return AlrAdamW's step on fresh tensors."""
    importance = inputs.importance() if penalty else None
    return AlrAdamW(inputs.params(dtype), importance, coeffs="uniform", **options).step


def captured(inputs: Inputs, **options: Any) -> Step:
    """Return the replay of a CUDA graph that holds AlrAdamW's step."""
    step = ours(inputs, capturable=True, **options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    held = step  # with it the optimizer and its tensors, which the graph reads and writes

    def run() -> None:
        assert held is not None
        graph.replay()

    return run


FEW: dict[str, Any] = {
    "dtype": torch.bfloat16,
    "importance_dtype": "int4",
    "anchor_dtype": "bf16",
    "state_dtype": "int8",
    "master": "split",
}


def _ours() -> list[Candidate]:
    def row(name: str, kept: Kept, short: bool = True, **options: Any) -> Candidate:
        return Candidate(name, partial(ours, **options), kept, ours=True, short=short)

    fp32 = Kept(importance="fp32")
    int8, int4 = (Kept(importance=name, anchor="bf16") for name in ("int8", "int4"))
    few = Kept("bf16", moments="int8", importance="int4", anchor="bf16", split=True)
    coded: dict[str, Any] = {"importance_dtype": "int8", "anchor_dtype": "bf16"}
    return [
        row("AlrAdamW, no penalty", Kept(), penalty=False),
        row(PENALTY, fp32),
        row("AlrAdamW, penalty, coupled", fp32, short=False, mode="coupled"),
        row("AlrAdamW, penalty, precise=False", fp32, short=False, precise=False),
        row("AlrAdamW, penalty + recording", Kept(importance="fp32", record=True), record=True),
        row("AlrAdamW, penalty, statistics", fp32, short=False, stats=True),
        row("AlrAdamW, int8 Ω, bf16 anchor", int8, **coded),
        row("AlrAdamW, int8 Ω, precise=False", int8, short=False, precise=False, **coded),
        row("AlrAdamW, int4 Ω, bf16 anchor", int4, short=False, importance_dtype="int4", anchor_dtype="bf16"),
        row(FEW_BYTES, few, **FEW),
        row(f"{FEW_BYTES}, precise=False", few, precise=False, **FEW),
        Candidate(
            "AlrAdamW, penalty, CUDA graph",
            captured,
            fp32,
            ours=True,
            why_not=lambda inputs: "" if inputs.device == "cuda" else "CUDA graphs need a CUDA device",
        ),
    ]


def _rivals(compile_many: bool) -> list[Candidate]:
    penalty = Kept(importance="fp32")

    def compilable(inputs: Inputs) -> str:
        if len(inputs.shapes) <= MANY or compile_many:
            return ""
        return f"compiling {len(inputs.shapes)} tensors takes minutes: --compile all"

    return [
        Candidate(COMPILED, rivals.compiled, penalty, short=True, why_not=compilable),
        Candidate("torch.compile, penalty + AdamW.step", rivals.compiled_optimizer, penalty, why_not=compilable),
        Candidate("foreach penalty + AdamW fused", rivals.by_hand, penalty, moved=roofline.FOREACH_PENALTY, short=True),
        Candidate(
            "autograd penalty + AdamW fused", rivals.autograd, penalty, moved=roofline.AUTOGRAD_PENALTY, short=True
        ),
        Candidate("torch AdamW foreach, no penalty", rivals.torch_foreach, roofline.ADAMW),
        Candidate("torch AdamW fused, all in bf16", rivals.torch_bf16, moved=roofline.ALL_BF16),
        Candidate(
            "torchao 8-bit, no penalty", rivals.torchao, moved=roofline.EIGHT_BIT_256, why_not=rivals.too_diverse
        ),
        Candidate("bitsandbytes 8-bit, no penalty", rivals.bitsandbytes, moved=roofline.EIGHT_BIT_256),
        Candidate("flashoptim 8-bit bf16, no penalty", rivals.flashoptim, moved=roofline.FLASH),
    ]


def references(compile_many: bool = False, with_compiled: bool = True) -> list[Candidate]:
    """Return what every other row is compared with, round by round."""
    baseline = Candidate(BASELINE, rivals.torch_fused, roofline.ADAMW, short=True)
    compiled = [row for row in _rivals(compile_many) if row.name == COMPILED]
    return [baseline, *compiled] if with_compiled else [baseline]


def candidates(full: bool = True, compile_many: bool = False, with_compiled: bool = True) -> list[Candidate]:
    """Return the other rows, of the short form or all."""
    rows = [*_ours(), *_rivals(compile_many)]
    wanted = [row for row in rows if row.name != COMPILED and (full or row.short)]
    return [row for row in wanted if with_compiled or "torch.compile" not in row.name]
