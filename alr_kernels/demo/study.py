"""The demo's plan: pre-train and record once, tune by every arm from the same start, compare at equal learning."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alr_kernels import Importance, _environment, layer_coefficients
from alr_kernels.names import layer_of

from . import corpus, models
from .frontier import forgetting_at, shared_level
from .training import Arm, Run, pretrain, tune

if TYPE_CHECKING:
    from torch import Tensor, nn

ADAMW, L2SP, COUPLED, PROXIMAL = "AdamW", "L2-SP", "ALR coupled", "ALR proximal"
FAMILIES = (ADAMW, L2SP, COUPLED, PROXIMAL)
OURS = (COUPLED, PROXIMAL)
RULES = ("softmax", "proportional", "uniform")
# The chosen proximal run once more in fewer bytes: what is kept how.
FEW_BYTES = (
    (("importance_dtype", "int8"),),
    (("importance_dtype", "int4"),),
    (("importance_dtype", "int4"), ("anchor_dtype", "bf16")),
    (("importance_dtype", "int4"), ("anchor_dtype", "bf16"), ("state_dtype", "int8")),
)
Phase = Callable[[str, int], Callable[[], None]]  # (name, ticks in all) → what to call at each tick


@dataclass(frozen=True)
class Settings:
    """What fixes a study; with the machine and the number of threads it fixes every number but the timings."""

    arch: str = "llama"
    seed: int = 0
    corpus_bytes: int = 1_500_000
    width: int = 128
    layers: int = 4
    context: int = 64
    batch: int = 8
    pretrain_steps: int = 1600
    pretrain_lr: float = 3e-3
    record_share: float = 0.25  # of pre-training, its end, over which ω is integrated
    xi: float = 0.01  # relative: in units of each tensor's mean squared move
    tune_steps: int = 160
    evaluate_every: int = 40
    windows: int = 96  # of context + 1 bytes in each evaluation set
    # Grids set on seed 3, so that no family is held back by where its grid ends: a smaller learning rate no longer
    # reaches the others' domain NLL in these steps, and larger ones forget more. Arms with a pull share one learning
    # rate; importance that lies on few weights wants a larger λ at the same mean curvature.
    lrs: tuple[float, ...] = (1e-4, 2e-4, 4e-4)
    pull_lr: float = 4e-4
    l2sp_lambdas: tuple[float, ...] = (0.01, 0.02, 0.04)
    alr_lambdas: tuple[float, ...] = (0.08, 0.16, 0.32)

    @classmethod
    def fast(cls, arch: str, seed: int) -> Settings:
        """Return a study that takes seconds: it shows that all runs, not which arm is better."""
        return cls(
            arch=arch,
            seed=seed,
            corpus_bytes=60_000,
            width=64,
            layers=2,
            context=32,
            batch=8,
            pretrain_steps=80,
            tune_steps=16,
            evaluate_every=8,
            windows=32,
        )


@dataclass
class _Study:
    """What the arms share."""

    settings: Settings
    model: nn.Module
    start: dict[str, Tensor]
    before: dict[str, float]
    recorded: Importance
    domain_text: Tensor
    sets: dict[str, Tensor]
    phase: Phase

    def run(self, arm: Arm, note: str = "") -> Run:
        """Tune by one arm; every arm sees the same batches in the same order."""
        settings = self.settings
        return tune(
            self.model,
            self.start,
            self.before,
            arm,
            self.recorded,
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
        out: an existing folder; ``importance.safetensors`` is written there.
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
    prepared = _prepare(settings, general, domain, out / "importance.safetensors", phase)
    runs, selection = _tune_all(prepared)
    few_bytes = _few_bytes(prepared, next(run for run in runs if run.arm.label == selection["chosen"][PROXIMAL]))
    return {
        "versions": _environment.versions(),
        "machine": {**_environment.machine(), "threads": torch.get_num_threads()},
        "options": asdict(settings),
        "parameters": sum(param.numel() for param in prepared.model.parameters()),
        "seconds": {"set_up": set_up - began, "study": time.perf_counter() - set_up},
        "corpus": {"general": _corpus_facts(general), "domain": _corpus_facts(domain)},
        "before": prepared.before,
        "importance": {
            "method": prepared.recorded.method,
            "steps": prepared.recorded.steps,
            "xi": prepared.recorded.xi,
            "relative": prepared.recorded.relative,
            "artifact": "importance.safetensors",
            "artifact_bytes": (out / "importance.safetensors").stat().st_size,
        },
        "coefficients": _coefficients(prepared),
        "selection": selection,
        "few_bytes": few_bytes,
        **compare(runs, selection["chosen"]),
    }


def _coefficients(prepared: _Study) -> dict[str, dict[str, float]]:
    """Return rule → layer → α, layers in the model's order (the file holds them by name)."""
    layers = dict.fromkeys(layer_of(name) for name, _ in prepared.model.named_parameters())
    found = {rule: layer_coefficients(prepared.recorded, rule) for rule in RULES}
    return {rule: {layer: values[layer] for layer in layers} for rule, values in found.items()}


def _corpus_facts(texts: corpus.Corpus) -> dict[str, Any]:
    return {split: {"bytes": len(texts.texts[split]), "sources": texts.sources[split]} for split in corpus.SPLITS}


def _prepare(settings: Settings, general: corpus.Corpus, domain: corpus.Corpus, path: Path, phase: Phase) -> _Study:
    """Pre-train with recording, save the artifact, and load it again: tuning uses what the file holds."""
    model = models.build_model(
        settings.arch, settings.seed, width=settings.width, layers=settings.layers, context=settings.context
    )
    sets = {
        f"{kind} {split}": models.windows(models.as_tensor(texts.texts[split]), settings.context, settings.windows)
        for kind, texts in (("general", general), ("domain", domain))
        for split in ("validation", "test")
    }
    text = models.as_tensor(general.texts["train"])
    optimizer = pretrain(
        model,
        models.batches(text, settings.context, settings.batch, settings.seed),
        settings.pretrain_steps,
        int(settings.pretrain_steps * (1 - settings.record_share)),
        settings.pretrain_lr,
        phase("pre-train on general text, recording", settings.pretrain_steps),
    )
    optimizer.recorded_importance(settings.xi, relative=True).save(path)
    before = models.evaluate(model, sets)
    domain_text = models.as_tensor(domain.texts["train"])
    return _Study(settings, model, models.snapshot(model), before, Importance.load(path), domain_text, sets, phase)


def _tune_all(prepared: _Study) -> tuple[list[Run], dict[str, Any]]:
    """Run every arm. What has to be chosen (AdamW's learning rate, coefficient rule, λ) is chosen on validation."""
    settings = prepared.settings
    plain = [prepared.run(Arm(ADAMW, lr)) for lr in settings.lrs]
    lr = settings.pull_lr
    middle = settings.alr_lambdas[len(settings.alr_lambdas) // 2]
    trials = [prepared.run(Arm(PROXIMAL, lr, middle, "recorded", "proximal", rule), f", {rule}") for rule in RULES]
    chosen_rule = _best(trials, _level(trials))
    rule = RULES[chosen_rule]
    arms = [Arm(L2SP, lr, value, "ones", "proximal", "uniform") for value in settings.l2sp_lambdas]
    arms += [Arm(COUPLED, lr, value, "recorded", "coupled", rule) for value in settings.alr_lambdas]
    arms += [Arm(PROXIMAL, lr, value, "recorded", "proximal", rule) for value in settings.alr_lambdas]
    runs = plain + [trials[chosen_rule] if trials[chosen_rule].arm == arm else prepared.run(arm) for arm in arms]
    families = [[run for run in runs if run.arm.family == family] for family in FAMILIES]
    level = shared_level([[point for run in family for point in run.points["validation"]] for family in families])
    chosen = {family[0].arm.family: family[_best(family, level)].arm.label for family in families}
    return runs, {
        "validation_level": level,
        "rule": rule,
        "chosen": chosen,
        "rule_trials": {run.arm.coeffs: forgetting_at(run.points["validation"], _level(trials)) for run in trials},
    }


def _few_bytes(prepared: _Study, wide: Run) -> list[dict[str, Any]]:
    """Repeat a run with encoded importance, anchor and moments, and say what changed."""
    rows = []
    for run in (wide, *(prepared.run(replace(wide.arm, storage=storage)) for storage in FEW_BYTES)):
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


def _level(runs: Sequence[Run]) -> float:
    return shared_level([run.points["validation"] for run in runs])


def _best(runs: Sequence[Run], level: float) -> int:
    """Return the index of the run that forgot least on validation at this domain NLL."""
    found = [forgetting_at(run.points["validation"], level) for run in runs]
    return min(range(len(runs)), key=lambda i: (found[i] is None, found[i] or 0.0))


def compare(runs: Sequence[Run], chosen: dict[str, str]) -> dict[str, Any]:
    """Compare on the test texts, at the best domain NLL that all the chosen runs reached.

    ``chosen``: family → label of the run that validation chose.
    """
    by_label = {run.arm.label: run for run in runs}
    level = shared_level([by_label[label].points["test"] for label in chosen.values()])
    rows = [
        {
            "arm": run.arm.label,
            "family": run.arm.family,
            "chosen": chosen[run.arm.family] == run.arm.label,
            "general_before": run.final["general test"] - run.points["test"][-1][1],
            "general_after": run.final["general test"],
            "forgetting": run.points["test"][-1][1],
            "domain": run.points["test"][-1][0],
            "forgetting_at_level": forgetting_at(run.points["test"], level),
            "optimizer_ms": run.optimizer_ms,
            "step_ms": run.step_ms,
            "extra_bytes": run.extra_bytes,
        }
        for run in runs
    ]
    at_level = {family: forgetting_at(by_label[label].points["test"], level) for family, label in chosen.items()}
    pooled = {family: [p for run in runs if run.arm.family == family for p in run.points["test"]] for family in chosen}
    return {
        "shared_level": level,
        "rows": rows,
        "at_shared_level": at_level,
        "frontier_at_shared_level": {family: forgetting_at(points, level) for family, points in pooled.items()},
        "verdict": verdict(rows),
        "runs": [{"arm": asdict(run.arm), "label": run.arm.label, "points": run.points} for run in runs],
    }


def verdict(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Say whether each chosen ALR arm forgets less than every AdamW and L2-SP arm that reached the shared level."""
    rivals = [row for row in rows if row["family"] not in OURS and row["forgetting_at_level"] is not None]
    ours = [row for row in rows if row["family"] in OURS and row["chosen"]]
    return {
        row["family"]: {
            "holds": all(row["forgetting_at_level"] < rival["forgetting_at_level"] for rival in rivals),
            "beaten_by": [
                rival["arm"] for rival in rivals if rival["forgetting_at_level"] <= row["forgetting_at_level"]
            ],
        }
        for row in ours
    }
