"""LoRA in effective space, U = s·B·A: recording and the pull, each one pass over ω or Ω, beside eager torch.

Every row is timed in rounds with a plain copy; ``share`` is its bytes a second over the copy's in the same round.
lora_model.py has what a whole model's step costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _ops, _ops_lora
from ..codecs.encoded import Encoded
from ..lora.gradients import tangent
from ..lora.passing import unstacked
from ..lora.reference import Product, move
from . import lora_model, memory, roofline
from .importance import BYTES, COPY
from .timing import Sample, Step, copier, in_rounds, ratio, spread

SHAPE = (4096, 4096)  # q_proj of LLaMA-3.1-8B: the bars are of this shape
RANKS, MORE_RANKS = (8, 16), (8, 16, 64)  # the second with --full
PAIRS = {"cpu": 1, "cuda": 16}  # in one call; on a GPU enough that neither a launch nor the cache decides
FORMATS = ("fp32", "int8", "int4")
SCALING, STRENGTH = 2.0, 2.0  # s, and the curvature that Ω is multiplied with
FEW = 5  # rounds beside eager torch

RECORD = "record, factors ready"
RECORD_WHOLE = "record, with tangent factors"
EAGER = "eager, dense products"
READY = "autograd, fp32 Ω"  # and U* ready-made: its best case
DECODED = "autograd, int8 Ω decoded"  # at each use


class Row(NamedTuple):
    """What runs, its bytes an element of U by formula (None: what others are compared with), and the rows beside it."""

    group: str
    name: str
    run: Step
    moved: float | None = None
    beside: tuple[str, ...] = ()


class Operands(NamedTuple):
    """P pairs of one shape in a step that moved the factors by a thousandth; factors are [P, m, r] and [P, r, n]."""

    path_integrals: list[Tensor]
    importance: list[Tensor]
    anchor: Product
    before: Product
    after: Product
    grads: Product  # dL/dB and dL/dA

    @classmethod
    def of(cls, shape: Sequence[int], rank: int, pairs: int, device: str) -> Operands:
        """Return seeded operands."""
        generator = torch.Generator(device).manual_seed(0)
        rows, columns = shape

        def normal(size: Sequence[int], scale: float) -> Tensor:
            return torch.randn(size, generator=generator, device=device).mul_(scale)

        def factors(scale: float) -> Product:
            return Product(normal((pairs, rows, rank), scale), normal((pairs, rank, columns), scale))

        def moved(product: Product) -> Product:
            return Product(*(side + by for side, by in zip(product, factors(1e-3), strict=True)))

        omegas, importance = ([normal(shape, 1e-6).abs_() for _ in range(pairs)] for _ in range(2))
        anchor = factors(0.02)
        before = moved(anchor)
        return cls(omegas, importance, anchor, before, moved(before), factors(1e-3))

    @property
    def elements(self) -> int:
        """Elements of all ω."""
        return sum(omega.numel() for omega in self.path_integrals)


# ---- recording ----


def record(x: Operands) -> None:
    """Record as AlrAdamW does: the tangent factors of the gradients, the factored move, one pass over ω."""
    gradients = unstacked(tangent(x.before, *x.grads, SCALING))
    _ops_lora.lora_record_(x.path_integrals, gradients, unstacked(move(x.before, x.after, SCALING)))


def eager_record(x: Operands) -> None:
    """Record as one would write it in torch: Ĝ = P_B·G + G·P_A − P_B·G·P_A and both U as dense products."""
    for i, omega in enumerate(x.path_integrals):
        (b, a), (b_after, a_after), (grad_b, grad_a) = (
            (left[i], right[i]) for left, right in (x.before, x.after, x.grads)
        )
        of_b = torch.linalg.pinv((b.T @ b).double(), hermitian=True).float()
        of_a = torch.linalg.pinv((a @ a.T).double(), hermitian=True).float()
        gradient = b @ (of_b @ grad_a) + (grad_b @ of_a) @ a - b @ (of_b @ (grad_a @ a.T) @ of_a) @ a
        moved = SCALING * (b_after @ a_after) - SCALING * (b @ a)
        omega -= (gradient / SCALING) * moved


def _record_rows(x: Operands) -> list[Row]:
    gradients = unstacked(tangent(x.before, *x.grads, SCALING))
    moves = unstacked(move(x.before, x.after, SCALING))
    moved = roofline.Kept(record=True).effective_traffic(passes=0)
    return [
        Row("record", EAGER, lambda: eager_record(x)),
        Row("record", RECORD, lambda: _ops_lora.lora_record_(x.path_integrals, gradients, moves), moved, (EAGER,)),
        Row("record", RECORD_WHOLE, lambda: record(x), moved, (EAGER,)),
    ]


# ---- the pull of the penalty ----


def pull(x: Operands, importances: Sequence[Encoded], sides: str, curvature: bool) -> list[Any]:
    """Return the penalty's derivatives as AlrAdamW takes them: from the factors, in one pass over Ω."""
    scales = torch.full((len(importances),), STRENGTH, dtype=torch.float64, device=x.before.left.device)
    drifts = unstacked(move(x.anchor, x.before, SCALING))
    scaled = unstacked(Product(x.before.left * SCALING, x.before.right * SCALING))
    return _ops_lora.lora_pull(importances, scales, drifts, scaled, sides, curvature)


def autograd_pull(x: Operands, importances: Callable[[int], Tensor], targets: Sequence[Tensor]) -> list[Any]:
    """Return dB and dA of ½Σ k (U − U*)² by autograd through U = s·B·A; ``targets``: U*."""
    found = []
    for i, target in enumerate(targets):
        up, down = (side[i].detach().requires_grad_() for side in x.before)
        gap = SCALING * (up @ down) - target
        loss = (0.5 * STRENGTH) * (importances(i) * gap.square()).sum()
        found.append(torch.autograd.grad(loss, (up, down)))
    return found


def encoded(x: Operands, kept: str) -> list[Encoded]:
    """Return Ω in a form of storage."""
    dense = [Encoded.dense(importance) for importance in x.importance]
    return dense if kept == "fp32" else _ops.merge(dense, [None] * len(dense), [kept] * len(dense), (1.0, 0.0))[0]


def _pull_rows(x: Operands) -> list[Row]:
    targets = [SCALING * (up @ down) for up, down in unstacked(x.anchor)]
    forms = {kept: encoded(x, kept) for kept in FORMATS}

    def coupled(kept: str) -> Step:
        return lambda: pull(x, forms[kept], "both", False)

    def proximal(kept: str) -> Step:
        return lambda: [pull(x, forms[kept], sides, True) for sides in ("down", "up")]

    rows = [
        Row("pull", READY, lambda: autograd_pull(x, lambda i: x.importance[i], targets)),
        Row("pull", DECODED, lambda: autograd_pull(x, lambda i: _ops.decoded(forms["int8"][i]), targets)),
    ]
    for kept in FORMATS:
        beside = (READY, DECODED) if kept == "int8" else (READY,)
        rows.append(Row("pull", coupled_name(kept), coupled(kept), BYTES[kept], beside))
        rows.append(Row("pull", f"pull, {kept} Ω, proximal", proximal(kept), 2 * BYTES[kept], beside))
    return rows


def coupled_name(kept: str) -> str:
    """Return the name of the coupled row."""
    return f"pull, {kept} Ω, coupled"


# ---- measuring ----


def run_passes(
    shape: Sequence[int], rank: int, device: str, *, pairs: int | None = None, rounds: int = 15, budget_s: float = 10.0
) -> dict[str, Any]:
    """Time recording and pulls of pairs of one shape and rank.

    Returns:
        facts and ``rows``: median, p20, p80 in seconds; bytes an element, a second, and ``share`` of the copy's;
        ``ratios``: how many times longer each row beside it takes (from rounds of their own, fewer, with eager torch);
        ``over_record``: the pull's time over the recording's; all of these medians over rounds with p20 and p80.
        ``extra_share``: the most memory that a call takes, as a share of ω, None where that cannot be told.
    """
    x = Operands.of(shape, rank, pairs or PAIRS[device], device)
    rows = [*_record_rows(x), *_pull_rows(x)]
    for row in rows:
        row.run()
    buffer = min(2**30, 4 * x.elements)
    own = {row.name: row.run for row in rows if row.moved is not None}
    samples = in_rounds({COPY: copier(device, buffer), **own}, rounds, device, budget_s)
    beside = in_rounds({row.name: row.run for row in rows}, min(rounds, FEW), device, budget_s)
    copies = samples[COPY]
    found = []
    for row in rows:
        extra = memory.extra_of(row.run, device)
        found.append(
            {
                "group": row.group,
                "name": row.name,
                **_timed(samples.get(row.name) or beside[row.name]),
                **_bandwidth(row, x.elements, samples.get(row.name), copies, 2 * buffer),
                "ratios": {name: ratio(beside[name], beside[row.name]) for name in row.beside},
                "over_record": ratio(samples[row.name], samples[RECORD])
                if row.group == "pull" and row.name in samples
                else None,
                "extra_bytes": extra,
                "extra_share": None if extra is None else extra / (4 * x.elements),
            }
        )
    return {
        "rank": rank,
        "shape": list(shape),
        "pairs": len(x.path_integrals),
        "elements": x.elements,
        "copy_bytes_per_s": 2 * buffer / spread([sample.device_s for sample in copies])[0],
        "rows": found,
    }


def _timed(times: Sequence[Sample]) -> dict[str, Any]:
    median, p20, p80 = spread([sample.device_s for sample in times])
    return {"rounds": len(times), "median_s": median, "p20_s": p20, "p80_s": p80}


def _bandwidth(
    row: Row, elements: int, times: Sequence[Sample] | None, copies: Sequence[Sample], copied: int
) -> dict[str, Any]:
    if row.moved is None or times is None:
        return {"bytes_per_element": None, "bytes_per_s": None, "share": None}
    moved = row.moved * elements
    shares = [moved / a.device_s / (copied / b.device_s) for a, b in zip(times, copies, strict=True)]
    rate = moved / spread([sample.device_s for sample in times])[0]
    return {"bytes_per_element": row.moved, "bytes_per_s": rate, "share": spread(shares)}


def run(
    shape: Sequence[int], device: str, *, ranks: Sequence[int] = RANKS, rounds: int = 15, budget_s: float = 10.0,
    tick: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:  # fmt: skip
    """Measure everything: ``passes`` of each rank, ``model`` and ``host`` (see lora_model.py), and the ``bars``."""
    result: dict[str, Any] = {"device": device, "passes": []}
    for rank in ranks:
        tick(f"rank {rank}")
        result["passes"].append(run_passes(shape, rank, device, rounds=rounds, budget_s=budget_s))
    tick("a model's step")
    result["model"] = lora_model.run_model(device, lora_model.sizes_of(shape, device), rounds=rounds, budget_s=budget_s)
    tick("the host's part")
    result["host"] = lora_model.run_host(device, rounds=rounds, budget_s=budget_s)
    result["bars"] = bars(result) if tuple(shape) == SHAPE else []
    return result


# ---- bars ----


def bars(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what is wanted of this device and what came out: name, wanted, at_least, got, holds (None: unknown)."""
    found = []

    def bar(name: str, wanted: float, got: float | None, at_least: bool) -> None:
        holds = None if got is None else got >= wanted if at_least else got <= wanted
        found.append({"name": name, "wanted": wanted, "at_least": at_least, "got": got, "holds": holds})

    for entry in result["passes"]:
        rows, rank = {row["name"]: row for row in entry["rows"]}, entry["rank"]
        if (result["device"] == "cpu" and rank != 8) or rank not in RANKS:
            continue
        ready, whole, coupled = rows[RECORD], rows[RECORD_WHOLE], rows[coupled_name("int8")]
        if result["device"] == "cuda":
            bar(
                f"recording, r = {rank}: share of a copy's bandwidth",
                0.75 if rank == 8 else 0.5,
                ready["share"][0],
                True,
            )
            bar(f"pull with int8 Ω, r = {rank}: over the recording's time", 1.2, coupled["over_record"][0], False)
        else:
            bar(f"recording, r = {rank}: times faster than the eager formula", 6.0, whole["ratios"][EAGER][0], True)
            bar(f"pull with int8 Ω, r = {rank}: times faster than autograd", 4.0, coupled["ratios"][READY][0], True)
        bar(f"recording, r = {rank}: extra memory as a share of ω", 0.05, whole["extra_share"], False)
    if result["device"] == "cuda":
        share = result["model"]["share_of_training"]
        bar("recording and penalty: share of a training step at 8k tokens", 0.01, share, False)
    return found
