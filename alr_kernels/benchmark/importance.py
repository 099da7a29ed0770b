"""The passes over memory that importance takes: recording, finalising, merging, encoding; beside eager torch.

Every row is timed in rounds with a plain copy; ``share`` is its bytes a second over the copy's in the same round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import AlrAdamW, _ops
from ..codecs import reference as codecs
from ..codecs.encoded import Encoded
from ..codecs.storage import CODES, fitting
from . import roofline
from .inputs import Inputs, Source
from .shapes import Shape, elements
from .timing import Step, copier, in_rounds, ratio, spread

COPY = "copy"
BYTES = {kept: sum(roofline.form_bytes(kept, roofline.IMPORTANCE_SCALE)) for kept in ("fp32", "bf16", "int8", "int4")}
XI = 1e-6
DECAY = 0.9


class Row(NamedTuple):
    """One pass: what runs, its bytes an element by formula, and the row it is compared with."""

    name: str
    run: Step
    moved: float
    beside: str | None = None
    eager: bool = False  # what it is compared with: fewer rounds, without the copy


class Recorded(NamedTuple):
    """Operands of a recording that moved the weights by a thousandth."""

    path_integrals: list[Tensor]
    grads: list[Tensor]
    params: list[Tensor]
    previous: list[Tensor]

    @classmethod
    def of(cls, shapes: Sequence[Shape], device: str) -> Recorded:
        """Return seeded operands."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(scale: float) -> list[Tensor]:
            return [torch.randn(shape, generator=generator, device=device).mul_(scale) for shape in shapes]

        params = normal(0.02)
        return cls(normal(1e-6), normal(1e-3), params, [p + m for p, m in zip(params, normal(1e-3), strict=True)])


def eager_finalise(r: Recorded, kept: str) -> list[Any]:
    """Finalise as one would write it in torch: the formula, five statistics, then the codes."""
    found: list[Any] = []
    for omega, param, start in zip(r.path_integrals, r.params, r.previous, strict=True):
        importance = omega.clamp(min=0) / ((param - start).square() + XI)
        finite = torch.isfinite(importance)
        numbers = (omega.sum(), -omega.clamp(max=0).sum(), importance.norm(), importance.max(), importance.mean())
        importance = torch.where(finite, importance, 0.0)
        form = fitting(kept, tuple(param.shape))
        stored: Any = importance.to(torch.bfloat16) if form == "bf16" else importance
        if form in CODES:
            stored = codecs.encode_importance(importance, CODES[form])
        found.append((stored, numbers, (~finite).sum()))
    return found


def eager_merge(first: Sequence[Encoded], second: Sequence[Encoded]) -> list[Any]:
    """Decode both, add, encode: three tensors of the parameter's size in float32."""
    pairs = zip(first, second, strict=True)
    return [codecs.encode_importance(a.decoded() * DECAY + b.decoded(), CODES[a.format]) for a, b in pairs]


def _finalise_rows(r: Recorded) -> list[Row]:
    def finalise(kept: str, relative: bool = False) -> Step:
        formats = [fitting(kept, tuple(param.shape)) for param in r.params]
        lists = (r.path_integrals, r.params, r.previous)
        return lambda: _ops.finalise(*lists, formats, XI, relative=relative)

    rows = [
        Row(f"eager formula, {kept}", partial(eager_finalise, r, kept), 12 + size, eager=True)
        for kept, size in BYTES.items()
    ]
    for kept in BYTES:
        rows.append(Row(f"finalise, {kept}", finalise(kept), 12 + BYTES[kept], f"eager formula, {kept}"))
    rows.append(Row("finalise, int4, relative ξ", finalise("int4", True), 20 + BYTES["int4"], "eager formula, int4"))
    return rows


def _accumulate_rows(r: Recorded) -> list[Row]:
    def foreach() -> None:
        moves = torch._foreach_sub(r.params, r.previous)
        torch._foreach_addcmul_(r.path_integrals, r.grads, moves, -1)
        torch._foreach_copy_(r.previous, r.params)

    def foreach_in_place() -> None:
        torch._foreach_sub_(r.previous, r.params)
        torch._foreach_addcmul_(r.path_integrals, r.grads, r.previous, 1)
        torch._foreach_copy_(r.previous, r.params)

    return [
        Row("torch._foreach, with temporaries", foreach, 36, eager=True),
        Row("torch._foreach, in place", foreach_in_place, 36, eager=True),
        Row("accumulate", lambda: _ops.accumulate_(*r), 24, "torch._foreach, with temporaries"),
    ]


def _merge_rows(r: Recorded) -> list[Row]:
    formats = [fitting("int4", tuple(param.shape)) for param in r.params]
    lists = (r.path_integrals, r.params, r.previous)
    first, second = (_ops.finalise(*lists, formats, xi)[0] for xi in (XI, 10 * XI))
    coded = all(kept == "int4" for kept in formats)
    rows = (
        [Row("eager merge, int4", lambda: eager_merge(first, second), 3 * BYTES["int4"], eager=True)] if coded else []
    )
    merge = Row(
        "merge, int4 and int4",
        lambda: _ops.merge(first, second, formats, (DECAY, 1.0)),
        3 * BYTES["int4"],
        "eager merge, int4" if coded else None,
    )
    wide = [entry.decoded() for entry in first]
    encode = Row(
        "encode, fp32 to int4",
        lambda: _ops.merge([Encoded.dense(x) for x in wide], [None] * len(wide), formats, (1.0, 0.0)),
        4 + BYTES["int4"],
    )
    return [*rows, merge, encode]


def _step_rows(source: Source) -> list[Row]:
    """Return four optimizer steps: recording must cost little more than the bytes it moves."""

    def step(penalty: bool, record: bool) -> Step:
        inputs = Inputs(source)
        importance = inputs.importance() if penalty else None
        return AlrAdamW(inputs.params(torch.float32), importance, coeffs="uniform", record=record).step

    rows = []
    for penalty, name in ((False, "step"), (True, "step with penalty")):
        kept = roofline.Kept(importance="fp32" if penalty else None)
        plain = "step"
        rows.append(Row(name, step(penalty, False), kept.traffic(), None if name == plain else plain))
        recording = roofline.Kept(importance=kept.importance, record=True)
        rows.append(Row(f"{name}, recording", step(penalty, True), recording.traffic(), name))
    return rows


def run_passes(
    shapes: Sequence[Shape],
    device: str,
    *,
    rounds: int = 15,
    budget_s: float = 10.0,
    tick: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Time every pass on the shapes.

    Returns:
        facts and ``rows``: median, p20, p80 in seconds; bytes an element; ``share`` of the copy's bytes a second, and
        ``ratio`` to the row that it is ``beside`` (how many times longer that takes; from rounds of their own, fewer
        with eager torch), medians over rounds with p20 and p80.
    """
    buffer = min(2**30, 4 * elements(shapes))
    copy = copier(device, buffer)
    groups: list[tuple[str, Callable[[], list[Row]]]] = [
        ("finalise", lambda: _finalise_rows(Recorded.of(shapes, device))),
        ("accumulate", lambda: _accumulate_rows(Recorded.of(shapes, device))),
        ("merge", lambda: _merge_rows(Recorded.of(shapes, device))),
        ("recording", lambda: _step_rows(Source(shapes, device))),
    ]
    found: list[dict[str, Any]] = []
    copies = []
    for group, build in groups:
        tick(group)
        rows = build()
        for row in rows:
            row.run()
        own = {row.name: row.run for row in rows if not row.eager}
        samples = in_rounds({COPY: copy, **own}, rounds, device, budget_s)
        copies += samples[COPY]
        compared = {row.name for row in rows if row.eager} | {row.name for row in rows if row.beside}
        compared |= {row.beside for row in rows if row.beside}
        few = rounds if not any(row.eager for row in rows) else min(rounds, 5)
        beside = in_rounds({row.name: row.run for row in rows if row.name in compared}, few, device, budget_s)
        for row in rows:
            times = samples.get(row.name) or beside[row.name]
            moved = row.moved * elements(shapes)
            pairs = () if row.eager else zip(times, samples[COPY], strict=True)
            shares = [moved / a.device_s / (2 * buffer / b.device_s) for a, b in pairs]
            median, p20, p80 = spread([sample.device_s for sample in times])
            found.append(
                {
                    "group": group,
                    "name": row.name,
                    "rounds": len(times),
                    "median_s": median,
                    "p20_s": p20,
                    "p80_s": p80,
                    "bytes_per_element": row.moved,
                    "bytes_per_s": moved / median,
                    "share": spread(shares) if shares else None,
                    "beside": row.beside,
                    "ratio": None if row.beside is None else ratio(beside[row.beside], beside[row.name]),
                }
            )
        del rows, samples, beside, own
    return {
        "device": device,
        "elements": elements(shapes),
        "tensors": len(shapes),
        "copy_bytes_per_s": 2 * buffer / spread([sample.device_s for sample in copies])[0],
        "rows": found,
    }
