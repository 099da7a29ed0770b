"""Optimizers that keep their state in few bytes: parameters of every kind, and the combinations of forms to test."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import BACKENDS, BF16, F32, random_importance, set_grads
from torch import nn

from alr_kernels import AlrAdamW

backends = pytest.mark.parametrize("backend", BACKENDS)
ALPHAS = {"layers.0": 0.35, "layers.1": 0.35, "experts.0": 0.35, "head": 0.35}
BLOCKS = ("layers.0.weight", "experts.0")  # 4,096 elements, rows of 128; the second has three dimensions
LARGE = (*BLOCKS, "layers.1.weight")  # 50 × 128 elements in rows of 100; the others are small: (31, 128), vectors
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1, "reg_lambda": 0.9, "normalize": False}

# what → (dtype of the parameters, options of the optimizer)
FORMS = {
    "bf16": (F32, {"importance_dtype": "bf16", "anchor_dtype": "bf16", "state_dtype": "bf16"}),
    "int8": (F32, {"importance_dtype": "int8", "state_dtype": "int8"}),
    "split": (BF16, {"importance_dtype": "bf16", "anchor_dtype": "fp32", "master": "split"}),
    "stochastic": (BF16, {"importance_dtype": "int8", "state_dtype": "bf16", "master": "stochastic", "seed": 3}),
    "stochastic int8": (BF16, {"importance_dtype": "int4", "state_dtype": "int8", "master": "stochastic", "seed": 4}),
    "smallest": (
        BF16,
        {"importance_dtype": "int4", "anchor_dtype": "bf16", "state_dtype": "int8", "master": "split"},
    ),
}
forms = pytest.mark.parametrize("form", FORMS)


def mixed_model(dtype=F32, seed=0):
    """Return parameters of every kind that storage tells apart; see BLOCKS and LARGE."""
    torch.manual_seed(seed)
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(128, 32), nn.Linear(100, 64)])
    model.experts = nn.ParameterList([torch.randn(2, 16, 128) * 0.1])
    model.head = nn.Linear(128, 31)
    return model.to(dtype)


def new(model, **options):
    return AlrAdamW(model.named_parameters(), random_importance(model), **{"coeffs": ALPHAS, **OPTIONS, **options})


def steps(optimizer, first, last):
    for number in range(first, last):
        set_grads(optimizer, number)
        optimizer.step()


def trained(form, backend="auto", count=3, **options):
    dtype, chosen = FORMS[form]
    model = mixed_model(dtype)
    optimizer = new(model, backend=backend, **chosen, **options)
    steps(optimizer, 0, count)
    return model, optimizer


def fitting(name, kind, fallback):
    """Return the form that a tensor gets where ``kind`` was asked for."""
    return kind if name in (BLOCKS if kind in ("int8", "int4") else LARGE) else fallback


def whole(optimizer, param):
    """Return θ in float64, with its remainder."""
    state = optimizer.state[param]
    return oracle.join(param, state["remainder"]) if "remainder" in state else param.detach().double()
