"""Moves by importance of sharded parameters against those of whole ones, which test_movement.py holds to the oracle."""

from __future__ import annotations

import torch
from distributed_cases import Weights, give, gradients, importance_of, mesh_of, shard
from distributed_lora_cases import gradients as of_factors
from distributed_lora_cases import models_of, random_importance

from alr_kernels import AlrAdamW, lora_pairs
from alr_kernels.finetune.movement import Movement


def assert_same(first, second, rtol):
    assert first.count == second.count
    assert sum(square > 0 for square in first.square) > 3
    torch.testing.assert_close(torch.tensor(second.square), torch.tensor(first.square), rtol=rtol, atol=0.0)


def elementwise(layout, form, master, folder):
    """With the optimizer's importance and anchors, and with others that are given."""
    models = Weights(torch.bfloat16), shard(Weights(torch.bfloat16), *mesh_of(layout))
    start = {name: value.add(0.1) for name, value in models[0].state_dict().items()}
    importance = importance_of(models[0])
    runs = [AlrAdamW(m.named_parameters(), importance.astype(form), lr=1e-2, master=master) for m in models]
    assert set(Movement.of_optimizer(runs[1]).square) == {0.0}
    for step in range(2):
        for model, run in zip(models, runs, strict=True):
            give(model, gradients(step, torch.bfloat16))
            run.step()
    assert_same(*(Movement.of_optimizer(run) for run in runs), rtol=1e-12)
    assert_same(*(Movement.of_optimizer(run, importance, start) for run in runs), rtol=1e-12)


def pairs_of(kind, layout, folder):
    """Of U = s·B·A, with modules_to_save where the model has such."""
    models = models_of(kind, torch.float64, 2)
    start = {name: value.add(0.1) for name, value in models[0].state_dict().items()}
    shard(models[1], *mesh_of(layout))
    pairs = [lora_pairs(model) for model in models]
    importance = random_importance(pairs[0])
    runs = [
        AlrAdamW([(n, p) for n, p in m.named_parameters() if p.requires_grad], importance, lora=found, lr=1e-2)
        for m, found in zip(models, pairs, strict=True)
    ]
    for model, run in zip(models, runs, strict=True):
        give(model, of_factors(models[0], 0))
        for param in model.parameters():
            param.grad = param.grad if param.requires_grad else None
        run.step()
    assert_same(*(Movement.of_optimizer(run) for run in runs), rtol=1e-9)
    assert_same(*(Movement.of_optimizer(run, importance, start) for run in runs), rtol=1e-9)


CASES = {
    "movement rows": (elementwise, "rows", "int4", "split"),
    "movement columns": (elementwise, "columns", "fp32", "none"),
    "movement replicated": (elementwise, "replicate", "fp32", "none"),
    "movement hsdp": (elementwise, "hsdp", "int8", "split"),
    "movement lora": (pairs_of, "mixed", "rows"),
    "movement lora hsdp": (pairs_of, "wide", "hsdp"),
}
