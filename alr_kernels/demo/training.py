"""The two training loops: general text, with the importance recorded or without, and the domain by one arm."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from alr_kernels import AlrAdamW, Importance
from alr_kernels.finetune.movement import Movement

from . import models
from .frontier import Point
from .settings import GENERAL

if TYPE_CHECKING:
    from torch import Tensor, nn

    from alr_kernels.lora import LoraPairs

    from .subjects import Subject

Tick = Callable[[], None]
WARMUP = 10  # tuning steps until the learning rate is whole
# AdamW's own state: every arm has it, so it is not counted as extra.
MOMENTS = frozenset({"step", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"})


@dataclass(frozen=True)
class Arm:
    """One way to tune: what pulls (``importance``: none, ones or recorded), how (``mode``), and how hard."""

    family: str
    lr: float
    reg_lambda: float = 0.0
    importance: str = "none"
    mode: str = "proximal"
    coeffs: str = "uniform"
    storage: tuple[tuple[str, str], ...] = ()  # dtype options of AlrAdamW
    start: str = GENERAL

    @property
    def label(self) -> str:
        """The arm's row in tables."""
        kept = "".join(f", {option.removesuffix('_dtype')} {name}" for option, name in self.storage)
        return f"{self.family}, " + (f"λ {self.reg_lambda:g}" if self.reg_lambda else f"lr {self.lr:g}") + kept


@dataclass
class Run:
    """What one arm left behind: its trade-off along training, and its cost."""

    arm: Arm
    before: dict[str, float]  # set → NLL at the start
    points: dict[str, list[Point]]  # split → (domain NLL, general NLL), from the start on
    steps: list[int] = field(default_factory=list)  # of tuning that were done at each point
    final: dict[str, float] = field(default_factory=dict)  # set → NLL at the end
    optimizer_ms: float = 0.0  # median of optimizer.step()
    step_ms: float = 0.0  # median of forward, backward and optimizer.step()
    extra_bytes: float = 0.0  # a trained parameter, beyond the moments of AdamW
    held_bytes: float = 0.0  # a trained parameter, moments included
    losses: list[float] = field(default_factory=list)  # training loss of every step
    coeffs: dict[str, float] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)  # at the end


def pretrain(
    model: nn.Module, batches: Iterator[Tensor], steps: int, lr: float, tick: Tick, *,
    record_from: int | None, pairs: LoraPairs | None = None,
) -> AlrAdamW:  # fmt: skip
    """Train on general text with a cosine schedule; ω is integrated from step ``record_from`` to the end.

    No gradient is clipped, since that would scale ω.
    """
    recording = record_from is not None
    optimizer = AlrAdamW(models.trained(model), lr=lr, weight_decay=0.01, record=recording, lora=pairs)
    for step in range(steps):
        if step == record_from:
            optimizer.start_phase()  # ω from zero, Δθ from here; the moments go on
        warm = min(1.0, (step + 1) / max(1, steps // 20))
        optimizer.param_groups[0]["lr"] = lr * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        optimizer.zero_grad()
        models.nll(model, next(batches)).backward()
        optimizer.step()
        tick()
    return optimizer


def importance_of(arm: Arm, recorded: Importance) -> Mapping[str, Tensor] | None:
    """Return the importance that the arm tunes with: none, ones everywhere, or the recorded one."""
    if arm.importance == "ones":
        return {name: torch.ones_like(tensor) for name, tensor in recorded.items()}
    return recorded if arm.importance == "recorded" else None


def build_optimizer(subject: Subject, arm: Arm) -> AlrAdamW:
    """Return the arm's optimizer. Every arm is the same class; without importance it is AdamW."""
    recorded, storage = subject.recorded, dict(arm.storage)
    if storage.get("importance_dtype") == "rank1":  # a form of importance that is taken as given
        recorded = recorded.astype(storage.pop("importance_dtype"))
    importance = importance_of(arm, recorded)
    options: dict[str, Any] = {"lr": arm.lr, "weight_decay": 0.0, **storage}
    if importance is not None:
        options |= {"coeffs": arm.coeffs, "reg_lambda": arm.reg_lambda, "mode": arm.mode, "lora": subject.pairs}
    return AlrAdamW(models.trained(subject.model), importance, **options)


def tune(
    subject: Subject,
    arm: Arm,
    batches: Iterator[Tensor],
    steps: int,
    evaluate_every: int,
    sets: Mapping[str, Tensor],
    tick: Tick,
) -> Run:
    """Tune on the domain by one arm, from its start, and evaluate along the way.

    ``sets``: "general validation", "domain validation", "general test", "domain test".
    """
    model, start = subject.model, subject.starts[arm.start]
    models.restore(model, start.weights)
    optimizer = build_optimizer(subject, arm)
    run = Run(arm, start.before, {split: [] for split in ("validation", "test")})
    _note(run, 0, start.before)
    whole, inside = [], []
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = arm.lr * min(1.0, step / WARMUP)
        batch = next(batches)
        began = time.perf_counter()
        optimizer.zero_grad()
        loss = models.nll(model, batch)
        loss.backward()
        middle = time.perf_counter()
        optimizer.step()
        ended = time.perf_counter()
        whole.append(1e3 * (ended - began))
        inside.append(1e3 * (ended - middle))
        run.losses.append(float(loss.detach()))
        tick()
        if step % evaluate_every == 0 or step == steps:
            _note(run, step, models.evaluate(model, sets))
    run.optimizer_ms, run.step_ms = statistics.median(inside), statistics.median(whole)
    run.held_bytes, run.extra_bytes = bytes_per_parameter(model, optimizer)
    run.coeffs = dict(optimizer.coeffs or {})
    run.weights = models.snapshot(model)
    return run


def _note(run: Run, step: int, found: Mapping[str, float]) -> None:
    run.final = dict(found)
    run.steps.append(step)
    for split, points in run.points.items():
        points.append((found[f"domain {split}"], found[f"general {split}"]))


def moves(subject: Subject, run: Run) -> Movement:
    """Return how far a run took the weights from where it began, by their recorded importance."""
    models.restore(subject.model, run.weights)
    # Of any arm: what reads weights by importance is an optimizer that knows the pairs of LoRA.
    reader = AlrAdamW(models.trained(subject.model), subject.recorded, lora=subject.pairs)
    return Movement.of_optimizer(reader, anchor=subject.starts[run.arm.start].weights)


def bytes_per_parameter(model: nn.Module, optimizer: AlrAdamW) -> tuple[float, float]:
    """Count the live tensors that the arm holds beside weights and gradients: (all, without AdamW's moments).

    Bytes for each trained parameter; memory that several of them share counts once.
    """
    held = [(key in MOMENTS, value) for state in optimizer.state.values() for key, value in state.items()]
    held += [(False, tensor) for tensor in optimizer.importance_tensors()]
    numel = sum(param.numel() for _, param in models.trained(model))
    storages = {t.untyped_storage().data_ptr(): (moment, t.untyped_storage().nbytes()) for moment, t in held}
    extra = sum(nbytes for moment, nbytes in storages.values() if not moment)
    return sum(nbytes for _, nbytes in storages.values()) / numel, extra / numel
