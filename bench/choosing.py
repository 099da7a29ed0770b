"""What λ, mode, ξ, layer coefficients, recording length and codes change: one at a time, on the demo's task.

A byte-level LLaMA is pre-trained on prose while importance is recorded; each run then learns code from the same weights
and the same batches. Everything but what is swept stays as in ``BASE``. Nothing is chosen here, so nothing is chosen on
the test texts; general NLL and domain NLL of all points along each run are kept.

    python bench/choosing.py results.json [seed]      about ten minutes on one core; progress on the terminal
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from alr_kernels import AlrAdamW, Importance, ImportanceRecorder, LayerCoefficients, layer_coefficients
from alr_kernels.benchmark.stamp import stamp
from alr_kernels.demo import corpus, models
from alr_kernels.demo.frontier import general_at
from alr_kernels.demo.settings import Settings
from alr_kernels.demo.study import evaluation_sets

SETTINGS: dict[str, Any] = {"pretrain_steps": 800, "tune_steps": 120, "evaluate_every": 20, "windows": 64}
BASE: dict[str, Any] = {
    "reg_lambda": 0.1, "mode": "proximal", "xi": 0.01, "record_share": 0.25, "coeffs": "softmax", "temperature": 1.0,
    "importance_dtype": "fp32", "lr": 4e-4,
}  # fmt: skip
SWEEPS: dict[str, list[dict[str, Any]]] = {
    "lr": [{"reg_lambda": 0.0, "lr": lr} for lr in (1e-4, 2e-4, 4e-4)],
    "reg_lambda": [{"reg_lambda": value} for value in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)],
    "mode": [{"reg_lambda": value, "mode": "coupled"} for value in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)],
    "xi": [{"reg_lambda": value, "xi": xi} for xi in (1e-4, 1e-2, 1.0, 100.0) for value in (0.1, 0.3)],
    "coeffs": [
        {"reg_lambda": value, **rule}
        for rule in (
            *({"temperature": t} for t in (0.1, 0.3, 1.0, 10.0)),
            {"coeffs": "proportional"},
            {"coeffs": "uniform"},
        )
        for value in (0.1, 0.3)
    ],
    "record_share": [{"reg_lambda": value, "record_share": s} for s in (0.02, 0.25, 1.0) for value in (0.1, 0.3)],
    "importance_dtype": [{"importance_dtype": kept} for kept in ("fp32", "int8", "int4", "rank1")],
}


def pretrained(settings: Settings, text: Tensor) -> tuple[Any, dict[float, ImportanceRecorder], ExitStack]:
    """Train on general text as the demo does; return the model and a recorder for each share of the steps."""
    model = models.build_model(settings.arch, settings.seed, width=settings.width, layers=settings.layers)
    batches = models.batches(text, settings.context, settings.batch, settings.seed)
    optimizer = AlrAdamW(models.trained(model), lr=settings.pretrain_lr, weight_decay=0.01)
    steps, recorders, open_recorders = settings.pretrain_steps, {}, ExitStack()
    begins = {round(steps * (1 - run["record_share"])): run["record_share"] for run in [BASE, *SWEEPS["record_share"]]}
    for step in range(steps):
        if step in begins:
            recorder = ImportanceRecorder(optimizer, models.trained(model))
            recorders[begins[step]] = open_recorders.enter_context(recorder)
        warm = min(1.0, (step + 1) / (steps // 20))
        optimizer.param_groups[0]["lr"] = (
            settings.pretrain_lr * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        )
        optimizer.zero_grad()
        models.nll(model, next(batches)).backward()
        optimizer.step()
    return model, recorders, open_recorders


def weighed(importance: Importance, options: Mapping[str, Any]) -> LayerCoefficients:
    """Return α of a run's rule; its temperature is in units of the mean norm, which is 1 by default."""
    found = layer_coefficients(importance, options["coeffs"])
    if options["coeffs"] == "softmax" and options["temperature"] != 1.0:
        scale = sum(found.norms.values()) / len(found.norms)
        return layer_coefficients(importance, temperature=options["temperature"] * scale)
    return found


def tuned(
    model: Any, importance: Importance | None, options: Mapping[str, Any], settings: Settings,
    batches: Iterator[Tensor], sets: Mapping[str, Tensor],
) -> list[tuple[float, float]]:  # fmt: skip
    """Learn the domain; return (domain NLL, general NLL) at the start and along the way."""
    pull: dict[str, Any] = {}
    if importance is not None:
        pull = {key: options[key] for key in ("reg_lambda", "mode")} | {"coeffs": weighed(importance, options)}
    optimizer = AlrAdamW(models.trained(model), importance, lr=options["lr"], weight_decay=0.0, **pull)
    points = []
    for step in range(settings.tune_steps + 1):
        if step % settings.evaluate_every == 0:
            found = models.evaluate(model, sets)
            points.append((found["domain test"], found["general test"]))
        optimizer.param_groups[0]["lr"] = options["lr"] * min(1.0, (step + 1) / 10)
        optimizer.zero_grad()
        models.nll(model, next(batches)).backward()
        optimizer.step()
    return points


def main(path: str, seed: int) -> None:
    """Run every sweep and write the points."""
    torch.set_num_threads(1)
    began, settings = time.perf_counter(), Settings(seed=seed, **SETTINGS)
    general, domain = corpus.build(settings.corpus_bytes)
    sets = {name: rows for name, rows in evaluation_sets(settings, general, domain).items() if name.endswith("test")}
    text = models.as_tensor(domain.texts["train"])
    model, recorders, open_recorders = pretrained(settings, models.as_tensor(general.texts["train"]))
    start, done, rows, shares = models.snapshot(model), {}, [], {}
    for sweep, runs in SWEEPS.items():
        for changed in runs:
            options = {**BASE, **changed}
            key = json.dumps(options, sort_keys=True)
            if key not in done:
                models.restore(model, start)
                importance = None
                if options["reg_lambda"]:
                    importance = recorders[options["record_share"]].finalise(options["xi"], relative=True)
                    if options["importance_dtype"] != "fp32":
                        importance = importance.astype(options["importance_dtype"])
                    shares[key] = weighed(importance, options).effective_layers
                batches = models.batches(text, settings.context, settings.batch, seed + 1)
                done[key] = tuned(model, importance, options, settings, batches, sets)
            points = done[key]
            rows.append({"sweep": sweep, **options, "points": points, "effective_layers": shares.get(key)})
            print(f"{sweep:17} {changed} domain {points[-1][0]:.3f} forgot {points[-1][1] - points[0][1]:+.3f}")
    open_recorders.close()
    level = max(row["points"][-1][0] for row in rows if row["sweep"] not in ("lr", "reg_lambda", "mode"))
    for row in rows:
        found = general_at(row["points"], level)
        row["forgot_at_level"] = None if found is None else found - row["points"][0][1]
    result = {"alr_kernels": stamp(), "settings": asdict(settings), "base": BASE, "level": level, "runs": rows}
    result["seconds"] = time.perf_counter() - began
    with open(path, "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 3)
