"""LoRA pairs with sharded factors against whole ones: every kind of layer, estimator and mode."""

from __future__ import annotations

import copy

import torch
from distributed_cases import give, mesh_of, part, same_numbers, shard
from lora_models import MIXED, Mixed, adapted
from torch.distributed.tensor import DTensor

from alr_kernels import AlrAdamW, DynamicCoeffs, Importance, lora_pairs

# Sums over rows, and Gram matrices, are made in another order: of float64, after three steps of Adam.
CLOSE = {torch.float64: {"rtol": 1e-9, "atol": 1e-12}, torch.float32: {"rtol": 2e-4, "atol": 2e-6}}


class Wide(torch.nn.Module):
    """Weights large enough for codes: rows that do not divide, and ranks below the number of processes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(128, 37, bias=False), torch.nn.Linear(256, 64)])


class Twins(torch.nn.Module):
    """Two pairs of one shape."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(7, 5, bias=False) for _ in range(2)])


def models_of(kind, dtype, rank):
    def build():
        if kind == "mixed":
            return adapted(Mixed(), MIXED, r=rank).to(dtype)
        return adapted(Wide() if kind == "wide" else Twins(), ["layers.0", "layers.1"], r=rank, modules_to_save=[]).to(
            dtype
        )

    return build(), build()


def random_importance(pairs, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return Importance({pair.name: torch.rand(pair.shape, generator=generator) ** 4 for pair in pairs})


def gradients(model, step):
    generator = torch.Generator().manual_seed(100 + step)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64).mul(0.1).to(p.dtype)
        for name, p in model.named_parameters()
    }


def local_of(expected, got):
    return (part(expected, got).to_local(), got.to_local()) if isinstance(got, DTensor) else (expected, got)


def pairs_of(kind, layout, rank, dtype, estimator, options, folder):
    """Weights, moments, anchors, ω, statistics, penalty and the recorded importance are those of the whole run."""
    models = models_of(kind, dtype, rank)
    parts = {"": layout}
    if kind == "twins":
        parts = {"base_model.model.layers.0": layout, "base_model.model.layers.1": "replicate"}
    for which, each in parts.items():
        shard(models[1].get_submodule(which), *mesh_of(each))
    preset = {"preset": "paper"} if estimator == "paper" else {"estimator": estimator}
    pairs = [lora_pairs(model, **preset) for model in models]
    importance = random_importance(pairs[0])

    options = dict(options)
    if options.pop("anchored", False):
        options["anchor"] = {n: p.detach() + 0.1 for n, p in models[0].named_parameters() if p.requires_grad}

    def build(model, found):
        members = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        return AlrAdamW(
            members,
            importance,
            lora=found,
            lr=1e-2,
            weight_decay=0.1,
            reg_lambda=0.3,
            record=True,
            stats=True,
            **options,
        )

    runs = [*map(build, models, pairs)]
    close, loose = CLOSE[dtype], {"rtol": 1e-3 if dtype is torch.float32 else 1e-8, "atol": 1e-9}
    same_numbers(*(run.penalty_by_layer() for run in runs), loose)
    for step in range(3):
        if step == 2:  # what is whole loads where it is sharded
            whole = copy.deepcopy(runs[0].state_dict())
            runs[1] = build(models[1], lora_pairs(models[1], **preset))
            runs[1].load_state_dict(whole)
        grads = gradients(models[0], step)
        for model, run in zip(models, runs, strict=True):
            give(model, grads)
            for param in model.parameters():
                param.grad = param.grad if param.requires_grad else None
            run.step()
        for (name, p), (_, q) in zip(*(m.named_parameters() for m in models), strict=True):
            expected, got = local_of(p.detach(), q.detach())
            torch.testing.assert_close(got, expected, **close, msg=lambda text, name=name: f"{name}: {text}")
        saved = [run.state_dict()["state"] for run in runs]
        for index, state in saved[0].items():
            assert state.keys() == saved[1][index].keys()
            for key, value in state.items():
                assert saved[1][index][key].shape == value.shape, key
                expected, got = local_of(value, saved[1][index][key])
                torch.testing.assert_close(got, expected, **close, msg=lambda text, key=key: f"{key}: {text}")
        same_numbers(*(run.stats() for run in runs), loose)
        same_numbers(*(run.penalty_by_layer() for run in runs), loose)
    torch.testing.assert_close(torch.tensor([*runs[1].coeffs.values()]), torch.tensor([*runs[0].coeffs.values()]))
    recorded = [run.recorded_importance(xi=1e-3) for run in runs]
    assert list(recorded[0]) == list(recorded[1])
    for name in recorded[0]:
        assert recorded[1][name].shape == recorded[0][name].shape
        expected, got = local_of(recorded[0][name], recorded[1][name])
        scale = float(recorded[0][name].abs().max())
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=(1e-3 if dtype is torch.float32 else 1e-8) * scale)
        assert recorded[1].stats[name].numel == recorded[0][name].numel()
    assert any(float(row.max) > 0 for row in recorded[0].stats.values())


F64, F32 = torch.float64, torch.float32
CASES = {
    "lora proximal": (pairs_of, "mixed", "rows", 2, F64, "tangent", {}),
    "lora rank 1": (pairs_of, "mixed", "rows", 1, F64, "tangent", {}),
    "lora rank 1 float32": (pairs_of, "wide", "rows", 1, F32, "tangent", {"mode": "coupled"}),
    "lora coupled, clipped": (
        pairs_of, "mixed", "rows", 3, F64, "tangent", {"mode": "coupled", "max_grad_norm": 0.5},
    ),
    "lora factored": (pairs_of, "mixed", "rows", 2, F64, "factored", {"anchored": True}),
    "lora paper": (pairs_of, "mixed", "rows", 2, F64, "paper", {"mode": "coupled"}),
    "lora hsdp": (pairs_of, "mixed", "hsdp", 2, F64, "tangent", {}),
    "lora float32": (pairs_of, "wide", "rows", 4, F32, "tangent", {}),
    "lora int4": (pairs_of, "wide", "rows", 3, F32, "tangent", {"importance_dtype": "int4"}),
    "lora replicated": (pairs_of, "wide", "replicate", 2, F64, "tangent", {}),
    "lora apart": (pairs_of, "twins", "rows", 2, F64, "tangent", {}),
    "lora balanced": (pairs_of, "wide", "rows", 2, F64, "tangent", {"coeffs": DynamicCoeffs("uniform", every=2)}),
}  # fmt: skip
