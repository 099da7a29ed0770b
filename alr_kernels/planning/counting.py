"""Bytes of one device: tensors cut into shards as FSDP2 cuts them, and what is kept of each.

FSDP2 shards on dim 0 in chunks of c = ceil(m/N) rows: rank k holds rows [k·c, (k+1)·c) of m, the last ranks fewer or
none. Rank 0 is therefore the fullest of every tensor, rank N−1 the emptiest. In which form a tensor is kept is decided
by its whole shape, not by a shard's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .._dtensor import mostly_padding
from ..benchmark.roofline import SIZE, Kept
from ..names import layer_of
from ..step.plan import STATISTICS
from .models import Weight
from .setup import Setup

STEP_COUNT = 4  # bytes a tensor: float32
NORM = 8  # bytes a tensor: of the norm that max_grad_norm clips, float64
COMPUTE = 4  # bytes: LoRA's factors are gathered in float32
GRAM = 8  # bytes: Gram matrices are float64
STATISTIC = 8  # bytes: float64

# What is counted, in the order in which it is printed.
KEPT = (
    *("frozen_weights", "weights", "gradients", "buckets", "moments", "importance", "anchor", "path_integral", "start"),
    *("remainder", "moment_scales", "importance_scales", "steps"),
)


def shard_rows(rows: int, shards: int, rank: int) -> int:
    """Return how many of ``rows`` a rank holds.

    >>> [shard_rows(10, 4, rank) for rank in range(4)], [shard_rows(5, 4, rank) for rank in range(4)]
    ([3, 3, 3, 1], [2, 2, 1, 0])
    """
    chunk = math.ceil(rows / shards)
    return max(0, min(chunk, rows - rank * chunk))


def local_numel(shape: Sequence[int], shards: int, rank: int) -> int:
    """Return the elements that a rank holds of a tensor; one without a dimension is never cut."""
    return math.prod(shape) if shards == 1 else shard_rows(shape[0], shards, rank) * math.prod(shape[1:])


class Item(NamedTuple):
    """Tensors that are alike: what is kept of each, bytes an element."""

    shape: tuple[int, ...]
    block: str = ""  # "" outside blocks
    dtype: str = ""  # of the weight
    trained: bool = False
    exists: bool = True  # False: U = s·B·A of a pair, of which only ω and Ω exist, and what a step gathers
    grad: float = 0.0
    parts: tuple[tuple[str, float], ...] = ()
    moved: float = 0.0  # by a step
    gathered: float = 0.0  # bytes an element of the whole tensor that a step gathers where it is sharded
    reduced: float = 0.0


@dataclass(frozen=True)
class Column:
    """What one device holds, moves and sends; bytes.

    Attributes:
        gpus: devices in all.
        shards: over how many of them each tensor is cut.
        kept: from step to step, on the fullest rank, by the names of :data:`KEPT`.
        emptiest: the same on the emptiest rank.
        in_model: held during forward and backward only (FSDP2's unsharded tensors), on every rank.
        in_step: held during the optimizer's step only.
        moved: read and written by one step, on the fullest rank.
        communicated: what the optimizer adds to the framework's communication, a step.
        seconds: ``moved`` over the device's bandwidth: no step with this storage can be faster; None: not known.
        memory: the device's; None: not known.
    """

    gpus: int
    shards: int
    kept: dict[str, int]
    emptiest: dict[str, int]
    in_model: dict[str, int] = field(default_factory=dict)
    in_step: dict[str, int] = field(default_factory=dict)
    moved: int = 0
    communicated: dict[str, int] = field(default_factory=dict)
    seconds: float | None = None
    memory: float | None = None

    @property
    def total(self) -> int:
        """Bytes kept on the fullest rank."""
        return sum(self.kept.values())

    @property
    def peak(self) -> int:
        """The most at once of what is counted: ``total`` and the larger of ``in_model`` and ``in_step``."""
        return self.total + max(sum(self.in_model.values()), sum(self.in_step.values()))

    @property
    def fits(self) -> bool | None:
        """Whether ``peak`` is at most the device's memory; activations come on top."""
        return None if self.memory is None else self.peak <= self.memory


# ---- what is kept of each tensor ----


def items_of(weights: Iterable[Weight], setup: Setup, adapted: Collection[str]) -> Counter[Item]:
    """Return the tensors of a model in training, alike ones counted; ``adapted``: names of weights with LoRA."""
    found: Counter[Item] = Counter()
    for weight in weights:
        dtype = setup.dtype or weight.dtype
        block = _block(weight.name)
        if setup.lora is None:
            found[_trained(weight.shape, block, dtype, setup)] += 1
            continue
        found[Item(weight.shape, block, dtype)] += 1
        if weight.name in adapted:
            found += Counter(_pair(weight, block, setup))
    return found


def _block(name: str) -> str:
    """Return the block that ``fully_shard`` would wrap: the name up to its first number; "" of the root's own."""
    layer = layer_of(name)
    return layer if layer.rpartition(".")[2].isdigit() else ""


def _trained(shape: tuple[int, ...], block: str, dtype: str, setup: Setup) -> Item:
    kept = Kept(
        dtype,
        setup.grad_dtype,
        setup.state_dtype,
        (setup.importance_dtype or "fp32") if setup.penalised else None,
        setup.anchor_dtype,
        split=setup.master == "split" and dtype == "bf16",
        record=setup.records,
    ).on(shape)
    grad = SIZE[setup.grad_dtype or dtype]
    return Item(shape, block, dtype, True, True, grad, tuple(kept.parts().items()), kept.traffic())


def _pair(weight: Weight, block: str, setup: Setup) -> list[Item]:
    """Return the factors of a weight and what is kept of U, which itself does not exist."""
    assert setup.lora is not None
    (m, *rest), r = weight.shape, setup.lora.rank
    transposed = weight.kind == "transposed"
    up: tuple[int, ...] = (math.prod(rest), r) if transposed else (m, r, *[1] * (len(rest) - 1))
    down = (r, m) if transposed else (r, *rest)
    passes = (2 if setup.mode == "proximal" else 1) if setup.penalised else 0
    importance = (setup.importance_dtype or "fp32") if setup.penalised else None
    kept = Kept(importance=importance, record=setup.records).on(weight.shape)
    parts = tuple((part, size) for part, size in kept.parts().items() if part in OF_U)
    return [
        _factor(up, block, setup),
        _factor(down, block, setup),
        Item(weight.shape, block, "", exists=False, parts=parts, moved=kept.effective_traffic(passes)),
        *_exchanged(m, up, down, transposed, setup),
    ]


OF_U = ("importance", "importance_scales", "path_integral")


def _factor(shape: tuple[int, ...], block: str, setup: Setup) -> Item:
    assert setup.lora is not None
    dtype = setup.lora.dtype
    split = setup.master == "split" and dtype == "bf16"
    own = SIZE[dtype]  # anchor and start of factors are exact
    kept = Kept(dtype, setup.grad_dtype, setup.state_dtype, split=split).on(shape)
    parts, moved = kept.parts(), kept.traffic()
    if setup.penalised:
        parts["anchor"] = own
        moved += own
    elif setup.records:
        parts["start"] = own
    grad = SIZE[setup.grad_dtype or dtype]
    return Item(shape, block, dtype, True, True, grad=grad, parts=tuple(parts.items()), moved=moved)


def _exchanged(m: int, up: tuple[int, ...], down: tuple[int, ...], transposed: bool, setup: Setup) -> list[Item]:
    """Return what a step gathers and sums of a pair whose factors are sharded, as tensors that do not stay.

    The rows of the factor on the right are not those of Ω that a rank holds, so that all of them are needed: as they
    are, their anchor, once they have moved (proximal), their gradient (coupled, recording), and after the step
    (recording). The pull on it is summed over ranks, with its curvature if the mode is proximal. B of a linear layer is
    cut as the weight is, and its rows are at hand; of a transposed one both factors are cut otherwise: A is gathered
    as well, and so is what A is stepped with, to be cut as A is. Recording sums B's Gram matrix.
    """
    assert setup.lora is not None
    proximal, coupled = (setup.penalised and setup.mode == mode for mode in ("proximal", "coupled"))
    copies = (setup.penalised or setup.records) + setup.penalised + proximal + (coupled or setup.records)
    gathered = float(COMPUTE * (copies + setup.records))
    pulls = float(COMPUTE * (2 * proximal + coupled))
    right, left = (up, down) if transposed else (down, up)
    found = [Item(right, exists=False, gathered=gathered, reduced=pulls)]
    if transposed:
        found += [Item(left, exists=False, gathered=gathered)]
        found += [Item((m, setup.lora.rank), exists=False, gathered=pulls)]
    if setup.records:
        found += [Item((setup.lora.rank, setup.lora.rank), exists=False, reduced=float(GRAM))]
    return found


# ---- one device ----


def held(items: Counter[Item], setup: Setup, shards: int, rank: int) -> dict[str, int]:
    """Return the bytes that a rank keeps from step to step.

    FSDP2 pads weights and gradients of every rank to the fullest's, what the optimizer keeps is not padded.
    """
    found = dict.fromkeys(KEPT, 0.0)
    for item, count in items.items():
        n, padded = (count * local_numel(item.shape, shards, k) for k in (rank, 0))
        if item.exists:
            found["weights" if item.trained else "frozen_weights"] += padded * SIZE[item.dtype]
        if item.trained:
            found["gradients"] += padded * item.grad
            found["steps"] += count * STEP_COUNT
            if setup.strategy == "ddp" and not setup.bucket_view:
                found["buckets"] += n * SIZE[item.dtype]
        for part, size in item.parts:
            found[part] += n * size
    return {part: round(size) for part, size in found.items()}


def in_model(items: Counter[Item]) -> dict[str, int]:
    """Return what FSDP2 holds unsharded in forward and backward, each block and the root being a group of its own.

    The root's group stays from the start of the forward pass to its turn in the backward pass; of the blocks one is in
    use while the next is gathered; gradients of a group are whole until they are reduced.
    """
    weights: Counter[str] = Counter()
    grads: Counter[str] = Counter()
    for item, count in items.items():
        if item.exists:
            size = count * math.prod(item.shape) * int(SIZE[item.dtype])
            weights[item.block] += size
            grads[item.block] += size if item.trained else 0
    blocks = sorted((size for block, size in weights.items() if block), reverse=True)
    return {
        "unsharded_outside_blocks": weights[""],
        "unsharded_block": blocks[0] if blocks else 0,
        "prefetched_block": blocks[1] if len(blocks) > 1 else 0,
        "unsharded_gradients": max(grads.values(), default=0),
    }


def _gathered_numel(shape: tuple[int, ...], shards: int) -> int:
    """Return the elements of a tensor that cross ranks: every rank's part is padded to the fullest's."""
    return math.prod(shape) if mostly_padding(shape[0], shards) else shards * local_numel(shape, shards, 0)


def column(items: Counter[Item], setup: Setup, gpus: int) -> Column:
    """Count one device of ``gpus``."""
    shards = setup.shards(gpus)
    kept, emptiest = (held(items, setup, shards, rank) for rank in (0, shards - 1))
    moved = sum(count * local_numel(item.shape, shards, 0) * item.moved for item, count in items.items())
    if not setup.sharded:
        return Column(gpus, shards, kept, emptiest, moved=round(moved))
    in_step = {"gathered_factors": 0, "reduced_pull": 0}
    communicated = {**in_step, "statistics": 0}
    if shards > 1:
        gathered = padded = reduced = 0.0
        for item, count in items.items():
            gathered += count * math.prod(item.shape) * item.gathered
            padded += count * _gathered_numel(item.shape, shards) * item.gathered if item.gathered else 0.0
            reduced += count * math.prod(item.shape) * item.reduced
        in_step = {"gathered_factors": round(gathered), "reduced_pull": round(reduced)}
        trained = sum(count for item, count in items.items() if item.trained)
        rows = trained // 2 if setup.lora is not None and setup.penalised else trained  # of pairs
        communicated = {
            "gathered_factors": round(padded),
            "reduced_pull": round(reduced),
            "statistics": NORM * trained + STATISTIC * (len(STATISTICS) + 1) * rows,
        }
    return Column(gpus, shards, kept, emptiest, in_model(items), in_step, round(moved), communicated)
