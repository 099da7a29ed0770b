"""The demo's plan: pre-train and record once, tune by every arm, compare at equal learning."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alr_kernels import _environment, layer_coefficients
from alr_kernels.finetune.movement import coefficient_rows
from alr_kernels.names import LayerBy, layer_of

from . import corpus, models
from .comparison import best, choose, compare, level_of
from .frontier import general_at
from .settings import ADAMW, BASE, COUPLED, FRESH, GENERAL, L2SP, PROXIMAL, RULES, THEN, Settings
from .subjects import Phase, Subject, prepare, save_adapter
from .training import Arm, Run, moves, tune

if TYPE_CHECKING:
    from torch import Tensor

# The chosen proximal run once more in fewer bytes: what is kept how. LoRA's anchors and moments are as thin as its
# factors: there importance is all that weighs.
FEW_BYTES: dict[bool, tuple[tuple[tuple[str, str], ...], ...]] = {
    False: (
        (("importance_dtype", "int8"),),
        (("importance_dtype", "int4"),),
        (("importance_dtype", "int4"), ("anchor_dtype", "bf16")),
        (("importance_dtype", "int4"), ("anchor_dtype", "bf16"), ("state_dtype", "int8")),
    ),
    True: ((("importance_dtype", "int4"),), (("importance_dtype", "rank1"),)),
}


@dataclass
class _Study:
    """What the arms share."""

    settings: Settings
    subject: Subject
    domain_text: Tensor
    sets: dict[str, Tensor]
    phase: Phase

    def run(self, arm: Arm, note: str = "") -> Run:
        """Tune by one arm; every arm sees the same batches in the same order."""
        settings = self.settings
        return tune(
            self.subject,
            arm,
            self.batches(),
            settings.tune_steps,
            settings.evaluate_every,
            self.sets,
            self.phase(f"tune: {arm.label}{note}", settings.tune_steps),
        )

    def batches(self) -> Iterator[Tensor]:
        return models.batches(self.domain_text, self.settings.context, self.settings.batch, self.settings.seed + 1)


def study(settings: Settings, out: Path, phase: Phase) -> dict[str, Any]:
    """Run the whole demo.

    Args:
        settings: see :class:`Settings`.
        out: an existing folder; ``importance.safetensors`` is written there, and in LoRA's space ``base`` and
            ``adapter``, the chosen proximal run's, as transformers and PEFT read them.
        phase: told about each phase, for progress bars.

    Returns:
        Everything that the table, the plots and the JSON show; plain numbers, strings, lists and dicts.
    """
    began = time.perf_counter()
    tick = phase("read the library", 100)
    done = [0]

    def reading(share: float) -> None:
        while done[0] < min(100, int(100 * share)):
            done[0] += 1
            tick()

    general, domain = corpus.build(settings.corpus_bytes, reading)
    reading(1.0)
    set_up = time.perf_counter()
    sets = evaluation_sets(settings, general, domain)
    subject = prepare(settings, models.as_tensor(general.texts["train"]), sets, out, phase)
    prepared = _Study(settings, subject, models.as_tensor(domain.texts["train"]), sets, phase)
    runs, selection = _tune_all(prepared)
    proximal = next(run for run in runs if run.arm.label == selection["chosen"][PROXIMAL])
    few_bytes = _few_bytes(prepared, proximal)
    if settings.adapter is not None:
        save_adapter(subject, proximal.weights, out / "adapter")
    return {
        "kind": "demo",
        "versions": _environment.versions(),
        "machine": {**_environment.machine(), "threads": torch.get_num_threads()},
        "options": asdict(settings),
        "seconds": {"set_up": set_up - began, "study": time.perf_counter() - set_up},
        "corpus": {"general": _corpus_facts(general), "domain": _corpus_facts(domain)},
        **subject.facts(settings, out),
        "coefficients": _coefficients(subject),
        "pull": _pull(subject, selection["rule"]),
        "movement": _movement(subject, runs, selection["chosen"]),
        "selection": selection,
        "few_bytes": few_bytes,
        **compare(runs, selection["chosen"]),
    }


def _coefficients(subject: Subject) -> dict[str, dict[str, float]]:
    """Return rule → layer → α, layers in the model's order (the file holds them by name); of LoRA, modules."""
    pairs = subject.pairs
    by: LayerBy = "block" if pairs is None else "module"
    names = [name for name, _ in models.trained(subject.model)] if pairs is None else [pair.name for pair in pairs]
    layers = dict.fromkeys(layer_of(name, by) for name in names)
    found = {rule: layer_coefficients(subject.recorded, rule, by=by) for rule in RULES}
    return {rule: {layer: values[layer] for layer in layers} for rule, values in found.items()}


def _pull(subject: Subject, rule: str) -> dict[str, Any]:
    """Return how the rule that was chosen spreads the pull over layers and modules."""
    by: LayerBy = "block" if subject.pairs is None else "module"
    return coefficient_rows(subject.recorded, layer_coefficients(subject.recorded, rule, by=by))


def _movement(subject: Subject, runs: Sequence[Run], chosen: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return label → family, and moves by importance, of the chosen runs that start where importance was recorded."""
    return {
        run.arm.label: {"family": run.arm.family, **moves(subject, run).as_dict()}
        for run in runs
        if run.arm.label == chosen[run.arm.family] and run.arm.start == GENERAL
    }


def _corpus_facts(texts: corpus.Corpus) -> dict[str, Any]:
    return {split: {"bytes": len(texts.texts[split]), "sources": texts.sources[split]} for split in corpus.SPLITS}


def evaluation_sets(settings: Settings, general: corpus.Corpus, domain: corpus.Corpus) -> dict[str, Tensor]:
    """Return "general validation", "general test", "domain validation" and "domain test": windows of text."""
    return {
        f"{kind} {split}": models.windows(models.as_tensor(texts.texts[split]), settings.context, settings.windows)
        for kind, texts in (("general", general), ("domain", domain))
        for split in ("validation", "test")
    }


def _plain(settings: Settings) -> list[Arm]:
    """Return the arms without a pull: AdamW, or in LoRA's space a new adapter, and the general phase's."""
    if settings.adapter is None:
        return [Arm(ADAMW, lr) for lr in settings.lrs]
    return [Arm(family, lr, start=start) for family, start in ((FRESH, BASE), (THEN, GENERAL)) for lr in settings.lrs]


def _tune_all(prepared: _Study) -> tuple[list[Run], dict[str, Any]]:
    """Run every arm. What has to be chosen (learning rate without a pull, coefficient rule, λ), validation chooses."""
    settings = prepared.settings
    plain = [prepared.run(arm) for arm in _plain(settings)]
    lr = settings.pull_lr
    middle = settings.alr_lambdas[len(settings.alr_lambdas) // 2]
    trials = [prepared.run(Arm(PROXIMAL, lr, middle, "recorded", "proximal", rule), f", {rule}") for rule in RULES]
    trial_level = level_of(trials)
    chosen_rule = best(trials, trial_level)
    rule = RULES[chosen_rule]
    arms = [Arm(L2SP, lr, value, "ones", "proximal", "uniform") for value in settings.l2sp_lambdas]
    arms += [Arm(COUPLED, lr, value, "recorded", "coupled", rule) for value in settings.alr_lambdas]
    arms += [Arm(PROXIMAL, lr, value, "recorded", "proximal", rule) for value in settings.alr_lambdas]
    runs = plain + [trials[chosen_rule] if trials[chosen_rule].arm == arm else prepared.run(arm) for arm in arms]
    chosen, level = choose(runs)
    return runs, {
        "validation_level": level,
        "rule": rule,
        "chosen": chosen,
        "rule_trials": {run.arm.coeffs: general_at(run.points["validation"], trial_level) for run in trials},
    }


def _few_bytes(prepared: _Study, wide: Run) -> list[dict[str, Any]]:
    """Repeat a run with encoded importance, anchor and moments, and say what changed."""
    rows = []
    storages = FEW_BYTES[prepared.subject.pairs is not None]
    for run in (wide, *(prepared.run(replace(wide.arm, storage=storage)) for storage in storages)):
        apart = [abs(a - b) / b for a, b in zip(run.losses, wide.losses, strict=True)]
        rows.append(
            {
                "storage": dict(run.arm.storage),
                "held_bytes": run.held_bytes,
                "general": run.final["general test"],
                "domain": run.final["domain test"],
                "loss_apart": max(apart),
                "loss_apart_mean": abs(sum(run.losses) / sum(wide.losses) - 1),
                "optimizer_ms": run.optimizer_ms,
            }
        )
    return rows
