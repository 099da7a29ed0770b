"""What is tuned, and from where: all weights of a model, or LoRA's factors on a model that stands still.

In LoRA's space a base model is pre-trained plainly and frozen; an adapter is trained on general text while the
importance of U = s·B·A is recorded, and every arm but plain LoRA starts from it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alr_kernels import Importance
from alr_kernels.lora import LoraPairs, lora_pairs

from . import models
from .settings import BASE, GENERAL, Settings
from .training import pretrain

if TYPE_CHECKING:
    from torch import Tensor, nn

Phase = Callable[[str, int], Callable[[], None]]  # (name, ticks in all) → what to call at each tick
ARTIFACT = "importance.safetensors"


@dataclass(frozen=True)
class Start:
    """A place to tune from."""

    weights: dict[str, Tensor]  # of what is trained
    before: dict[str, float]  # evaluation set → NLL


@dataclass(frozen=True)
class Subject:
    """A model, what of it is trained, and what was recorded about that."""

    model: nn.Module
    starts: dict[str, Start]
    recorded: Importance
    pairs: LoraPairs | None = None

    def facts(self, settings: Settings, folder: Path) -> dict[str, Any]:
        """Return what the results say about it."""
        trained = sum(param.numel() for _, param in models.trained(self.model))
        parameters = sum(param.numel() for param in self.model.parameters())
        facts = {
            "space": "full" if self.pairs is None else "lora",
            "parameters": parameters if self.pairs is None else parameters - trained,
            "trained_parameters": trained,
            "before": {name: start.before for name, start in self.starts.items()},
            "importance": {
                "method": self.recorded.method,
                "steps": self.recorded.steps,
                "xi": self.recorded.xi,
                "relative": self.recorded.relative,
                "artifact": ARTIFACT,
                "artifact_bytes": (folder / ARTIFACT).stat().st_size,
            },
        }
        if settings.adapter is None:
            return facts
        whole = 4 * (parameters - trained)
        share = facts["importance"]["artifact_bytes"] / whole
        adapter = {"r": settings.adapter.r, "alpha": settings.adapter.alpha, "targets": list(settings.adapter.targets)}
        return facts | {"lora": adapter | {"model_bytes": whole, "artifact_share": share}}


def prepare(settings: Settings, text: Tensor, sets: Mapping[str, Tensor], folder: Path, phase: Phase) -> Subject:
    """Train on general text with recording, save the artifact, and load it again: tuning uses what the file holds.

    Args:
        settings: see :class:`Settings`.
        text: general text to train on.
        sets: what to evaluate on.
        folder: the artifact's; with an adapter, the base model is written there too.
        phase: told about each phase.
    """
    model = models.build_model(
        settings.arch, settings.seed, width=settings.width, layers=settings.layers, context=settings.context
    )
    batches = models.batches(text, settings.context, settings.batch, settings.seed)
    steps = settings.pretrain_steps
    if settings.adapter is not None:
        tick = phase("pre-train the base model on general text", steps)
        pretrain(model, batches, steps, settings.pretrain_lr, tick, record_from=None)
        return _adapted(settings, model, text, sets, folder, phase)
    tick = phase("pre-train on general text, recording", steps)
    record_from = int(steps * (1 - settings.record_share))
    optimizer = pretrain(model, batches, steps, settings.pretrain_lr, tick, record_from=record_from)
    optimizer.recorded_importance(settings.xi, relative=True).save(folder / ARTIFACT)
    return Subject(model, {GENERAL: _start(model, sets)}, Importance.load(folder / ARTIFACT))


def _adapted(
    settings: Settings, base: nn.Module, text: Tensor, sets: Mapping[str, Tensor], folder: Path, phase: Phase
) -> Subject:
    """Put an adapter on the base model and train it on general text, on other batches than the base model saw."""
    import peft
    from transformers.utils import logging

    adapter = settings.adapter
    assert adapter is not None
    logging.disable_progress_bar()  # one for each file that is written
    base.save_pretrained(folder / "base")
    torch.manual_seed(settings.seed)
    config = peft.LoraConfig(
        r=adapter.r, lora_alpha=adapter.alpha, target_modules=list(adapter.targets), task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads an attribute that transformers has renamed
        model = peft.get_peft_model(base, config)
    starts = {BASE: _start(model, sets)}
    pairs = lora_pairs(model)
    batches = models.batches(text, settings.context, settings.batch, settings.seed + 2)
    tick = phase("general phase: train the adapter, recording", adapter.steps)
    optimizer = pretrain(model, batches, adapter.steps, adapter.lr, tick, record_from=0, pairs=pairs)
    optimizer.recorded_importance(settings.xi, relative=True).save(folder / ARTIFACT)
    starts[GENERAL] = _start(model, sets)
    return Subject(model, starts, Importance.load(folder / ARTIFACT), pairs)


def save_adapter(subject: Subject, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write a tuned adapter as PEFT does: ``PeftModel.from_pretrained(base model, folder)`` reads it."""
    models.restore(subject.model, weights)
    subject.model.save_pretrained(folder, save_embedding_layers=False)


def _start(model: nn.Module, sets: Mapping[str, Tensor]) -> Start:
    return Start(models.snapshot(model), models.evaluate(model, sets))
