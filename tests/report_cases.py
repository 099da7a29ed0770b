"""Results as ``alr-kernels run --baseline`` leaves them, made up but consistent, and the same with parts missing."""

from __future__ import annotations

import copy
import math

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
        "options": {"model": "tiny-llama", "data": "domain.jsonl", "reg_lambda": None, "lr": 2e-5, "baseline": True},
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
