"""Results as ``alr-kernels run --baseline`` leaves them, made up but consistent, and the same with parts missing."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

from alr_kernels.report.page import html
from alr_kernels.report.results import page_of

LAYERS, MODULES = 6, ("input_layernorm", "mlp.down_proj", "mlp.up_proj", "self_attn.k_proj", "self_attn.q_proj")
STEPS = (0, 20, 40, 60, 80, 100, 120, 140, 160)


def _measured(nll: float, tokens: int) -> dict:
    return {"nll": nll, "perplexity": math.exp(nll), "tokens": tokens}


def _curve(gain: float, loss: float) -> list[dict]:
    """Fall from 3.1 by ``gain`` and rise from 2.4 by ``loss``."""
    done = [1 - math.exp(-step / 50) for step in STEPS]
    return [
        {"step": step, "seconds": step * 0.05, "domain": 3.1 - gain * share, "general": 2.4 + loss * share**2}
        for step, share in zip(STEPS, done, strict=True)
    ]


def _log(start: float, end: float) -> list[dict]:
    return [
        {"step": step, "loss": end + (start - end) * math.exp(-step / 60) + 0.05 * math.sin(step), "lr": 2e-5}
        for step in range(10, 161, 10)
    ]


def _coefficients() -> dict:
    modules = []
    for layer in range(LAYERS):
        for place, module in enumerate(MODULES):
            name = f"model.layers.{layer}"
            mass = (1 + layer) * (0.02 if "norm" in module else 1 + math.sin(3 * place + layer) ** 2)
            modules.append({"name": f"{name}.{module}.weight", "layer": name, "module": module, "mass": mass})
    for layer, mass in (("model.embed_tokens", 3.0), ("model.norm", 0.1), ("lm_head", 5.0)):
        modules.append({"name": f"{layer}.weight", "layer": layer, "module": layer.split(".")[-1], "mass": mass})
    layers = dict.fromkeys(entry["layer"] for entry in modules)
    values = {layer: (place + 1) / sum(range(1, len(layers) + 1)) for place, layer in enumerate(layers)}
    total = sum(values[entry["layer"]] * entry["mass"] for entry in modules)
    for entry in modules:
        entry |= {"alpha": values[entry["layer"]], "share": values[entry["layer"]] * entry["mass"] / total}
    return {
        "rule": "softmax",
        "by": "block",
        "temperature": 0.83,
        "effective_layers": 5.4,
        "values": values,
        "modules": modules,
    }


def _moves(held: float) -> dict:
    """Bins 0 and 24 to 44 hold weights; with ``held`` > 0 important ones move less."""
    counts = [int(4e5 * math.exp(-(((b - 33) / 4) ** 2))) if 24 <= b <= 44 else 0 for b in range(64)]
    counts[0] = 310_000
    means = [1e-6 * (1 + 0.05 * b) / (1 + held * 4.0 ** (b - 36)) if count else None for b, count in enumerate(counts)]
    return {"edges": [4.0**b * 2.0**-63 for b in range(64)], "count": counts, "mean_square_move": means}


def _facts(name: str, rows: int) -> dict:
    return {
        "source": name,
        "format": "text",
        "fingerprint": "9f" * 32,
        "rows": rows,
        "train_rows": rows - 50,
        "held_out_rows": 50,
        "train_tokens": 91_000,
        "held_out_tokens": 4_800,
        "loss_tokens": 90_100,
        "dropped": 0,
        "truncated": 2,
        "packed": True,
    }


def run() -> dict:
    """Return results with every part."""
    curves = {"tune": _curve(0.95, 0.06), "plain": _curve(1.0, 0.31)}
    ends = {phase: curve[-1] for phase, curve in curves.items()}
    before = {"domain": _measured(3.1, 4_800), "general": _measured(2.4, 5_100)}
    after, plain = (
        {kind: _measured(end[kind], before[kind]["tokens"]) for kind in before} for end in (ends["tune"], ends["plain"])
    )
    forgetting = after["general"]["nll"] - 2.4
    return {
        "kind": "run",
        "verb": "run",
        "versions": {"alr_kernels": "0.0.0", "python": "3.11.7", "torch": "2.13.0"},
        "machine": {"cpu": "a processor", "threads": 2},
        "options": {"model": "tiny-llama", "data": "domain.jsonl", "reg_lambda": 0.1, "lr": 2e-5, "baseline": True},
        "seconds": {"record": 61.5, "tune": 48.25, "plain": 44.0, "evaluate": 9.5},
        "data": {"domain": _facts("domain.jsonl", 1_000), "general": _facts("general", 2_000)},
        "model": {
            "name": "tiny-llama",
            "architecture": "LlamaForCausalLM",
            "parameters": 3_212_416,
            "trained_parameters": 3_212_416,
            "space": "full",
            "lora": None,
            "dtype": "float32",
        },
        "importance": {
            "method": "path_integral",
            "steps": 160,
            "xi": 0.01,
            "relative": True,
            "bytes": 12_849_664,
            "file": "importance.safetensors",
            "fingerprint": "3c" * 32,
            "dtype": "fp32",
        },
        "coefficients": _coefficients(),
        "before": before,
        "after": after,
        "plain": plain,
        "summary": {
            "forgetting": forgetting,
            "domain_gain": 3.1 - after["domain"]["nll"],
            "backward_transfer": -forgetting,
            "plain_forgetting": plain["general"]["nll"] - 2.4,
            "plain_domain_gain": 3.1 - plain["domain"]["nll"],
        },
        "curves": curves,
        "log": {"record": _log(3.2, 2.3), "tune": _log(3.2, 2.1), "plain": _log(3.2, 2.0)},
        "movement": {"tune": _moves(2.0), "plain": _moves(0.0)},
        "cost": {
            "step_ms": {
                "record": {"optimizer": 4.1, "whole": 52.0},
                "tune": {"optimizer": 3.2, "whole": 49.5},
                "plain": {"optimizer": 2.4, "whole": 48.1},
            },
            "bytes": {
                "weights": 12_849_664,
                "moments": 25_699_328,
                "importance": 12_849_664,
                "anchor": 12_849_664,
                "other": 0,
            },
            "artifact_bytes": 12_861_004,
            "peak_memory_bytes": 912_000_000,
        },
    }


def without_general() -> dict:
    """Return results of ``tune`` without ``--general``."""
    found = without_baseline() | {"kind": "tune", "verb": "tune"}
    found["data"]["general"] = None
    for when in ("before", "after"):
        found[when]["general"] = None
    found["summary"] |= {"forgetting": None, "backward_transfer": None}
    for entry in found["curves"]["tune"]:
        entry["general"] = None
    return found


def without_baseline() -> dict:
    """Return results without ``--baseline``."""
    found = copy.deepcopy(run())
    found["plain"] = None
    found["summary"] |= {"plain_forgetting": None, "plain_domain_gain": None}
    for part in ("curves", "log", "movement", "seconds"):
        found[part].pop("plain")
    found["cost"]["step_ms"].pop("plain")
    return found


def without_pull() -> dict:
    """Return results of ``tune`` with λ 0: AdamW."""
    found = without_baseline() | {"kind": "tune", "verb": "tune"}
    found |= {"importance": None, "coefficients": None, "movement": None}
    found["cost"]["bytes"] |= {"importance": 0, "anchor": 0}
    found["cost"]["artifact_bytes"] = None
    return found


def demo(lora: bool = False) -> dict:
    """Return results of the demo: every family with two runs, the first of them chosen."""
    families = ("plain LoRA", "general phase then LoRA") if lora else ("AdamW",)
    families += ("L2-SP", "ALR coupled", "ALR proximal")
    runs, rows, ends = [], [], {}
    for place, family in enumerate(families):
        pulled = not family.startswith(("AdamW", "plain", "general"))
        for weaker in (0, 1):
            label = f"{family}, λ 0.0{8 - weaker}" if pulled else f"{family}, lr 0.000{4 - weaker}"
            arm = {"family": family, "lr": 4e-4, "reg_lambda": 0.08 if pulled else 0.0}
            curve = _curve(0.9 - 0.1 * weaker, 0.3 - 0.05 * place)
            points = [[entry["domain"], entry["general"]] for entry in curve]
            steps = [entry["step"] for entry in curve]
            runs.append({"arm": arm, "label": label, "steps": steps, "points": {"test": points, "validation": points}})
            rise = 0.2 - 0.03 * place
            row = {"arm": label, "family": family, "chosen": not weaker, "start": "general phase"}
            row |= {"general_before": 2.4, "general_after": points[-1][1], "forgetting": points[-1][1] - 2.4}
            row |= {"domain": points[-1][0], "general_at_level": None if weaker else 2.4 + rise}
            row |= {"forgetting_at_level": None if weaker else rise, "optimizer_ms": 2.1, "step_ms": 49.0}
            rows.append(row | {"extra_bytes": 8.0 if pulled else 0.0})
            ends |= {} if weaker else {family: rise}
    modules = [entry for entry in _coefficients()["modules"] if not lora or "proj" in entry["module"]]
    layers = dict.fromkeys(entry["name"].removesuffix(".weight") if lora else entry["layer"] for entry in modules)
    weights = {layer: (place + 1) / sum(range(1, len(layers) + 1)) for place, layer in enumerate(layers)}
    held = {row["arm"]: row["family"] for row in rows if row["chosen"] and row["family"] != "plain LoRA"}
    found = {
        "kind": "demo",
        "versions": {"alr_kernels": "0.0.0"},
        "machine": {"cpu": "a processor", "threads": 2},
        "options": {"arch": "llama", "seed": 0, "adapter": None, "fast": False},
        "seconds": {"set_up": 2.0, "study": 180.0},
        "corpus": {kind: {"train": {"bytes": 900, "sources": ["a.py"]}} for kind in ("general", "domain")},
        "space": "lora" if lora else "full",
        "parameters": 800_000,
        "trained_parameters": 20_000 if lora else 800_000,
        "before": {start: {"general test": 2.4} for start in ("base model", "general phase")},
        "importance": {"method": "path_integral", "steps": 400, "artifact_bytes": 3_200_000},
        "coefficients": dict.fromkeys(("softmax", "proportional", "uniform"), weights),
        "pull": _coefficients() | {"modules": modules},
        "movement": {label: {"family": family, **_moves(2.0 * ("ALR" in label))} for label, family in held.items()},
        "selection": {"rule": "uniform", "chosen": {row["family"]: row["arm"] for row in rows if row["chosen"]}},
        "few_bytes": [],
        "shared_level": 2.3,
        "rows": rows,
        "general_at_shared_level": {family: 2.4 + rise for family, rise in ends.items()},
        "at_shared_level": ends,
        "frontier_at_shared_level": ends,
        "verdict": {family: {"holds": True, "beaten_by": []} for family in ("ALR coupled", "ALR proximal")},
        "runs": runs,
    }
    facts = {"r": 8, "alpha": 32, "targets": ["q_proj", "v_proj"], "model_bytes": 3_200_000, "artifact_share": 0.4}
    return found | ({"lora": facts} if lora else {})


def demo_lora() -> dict:
    """Return results of the demo in LoRA's space."""
    return demo(lora=True)


CASES: dict[str, Callable[[], dict]] = {
    case.__name__: case for case in (run, without_general, without_baseline, without_pull, demo, demo_lora)
}


def written(case: str, folder: Path) -> Path:
    """Write a case's results and its page, without pictures, into a folder; return the page."""
    (folder / "results.json").write_text(json.dumps(CASES[case]()), encoding="utf-8")
    (folder / "index.html").write_text(html(page_of(folder)), encoding="utf-8")
    return folder / "index.html"


def drawn(case: str) -> list[str]:
    """Return the charts that a case has."""
    if case.startswith("demo"):
        return ["forgetting", "curves", "coefficients", "pull", "movement", "cost"]
    absent = {"without_general": ("tradeoff",), "without_pull": ("coefficients", "movement")}.get(case, ())
    return [key for key in ("curves", "tradeoff", "loss", "coefficients", "movement", "cost") if key not in absent]
