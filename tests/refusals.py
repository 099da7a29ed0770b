"""Calls that are refused, and what they are made of; tests/test_validation.py has the table of them."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import torch
from cases import F32, Case, formed, numbers_of, random_importance, tiny_loss, tiny_model, tiny_optimizer, train
from torch import nn

from alr_kernels import AlrAdamW, ImportanceRecorder, _ops
from alr_kernels.step.plan import Operands

ALPHAS = {"embed": 0.25, "layers.0": 0.25, "layers.1": 0.25, "head": 0.25}


def p(*shape, dtype=F32):
    return nn.Parameter(torch.ones(shape or (2,), dtype=dtype), requires_grad=dtype.is_floating_point)


def new(c, importance=None, coeffs="softmax", **options):
    return AlrAdamW(c.model.named_parameters(), importance, coeffs, **options)


def one(name="w", param=None, importance=None, **options):
    return AlrAdamW([(name, p() if param is None else param)], importance, **options)


def step(param, grad=None, **options):
    optimizer = one(param=param, **options)
    param.grad = grad
    optimizer.step()


def shards(*offsets, moments="fp32"):
    columns = formed(Case(moments=moments), ((1, 128), (2, 128)))
    _ops.step_(Operands(**columns), numbers_of(columns, [1.0, 1.0], offsets=offsets))


SHARDED = {
    "offsets too few": (lambda c: shards(0), ValueError, "offsets: expected 2, one per parameter.*got 1"),
    "offset negative": (lambda c: shards(0, -1), ValueError, "offsets.*0 or more, for parameter 1, got -1.*element.$"),
    "offset in a block": (
        lambda c: shards(64, 0, moments="int8"),
        ValueError, "offsets: .*multiple of 128.*for parameter 0, got 64.*whole row",
    ),
}  # fmt: skip


def sparse_gradient(c):
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = AlrAdamW(table.named_parameters())
    table(torch.tensor([1])).sum().backward()
    optimizer.step()


def wrong_gradient_shape(c):
    """The good parameters before it must not have stepped when this one is refused."""
    param = c.model.head.weight
    param.grad, kept = torch.ones_like(param), param.data
    param.data = torch.ones(2, 2)
    try:
        c.optimizer.step()
    finally:
        param.data = kept


def anchored(c, **changes):
    anchor = {name: t.detach() for name, t in c.model.named_parameters()} | changes
    return new(c, c.importance, anchor={name: t for name, t in anchor.items() if t is not None})


def group(c, **options):
    c.optimizer.add_param_group({"params": [("extra", p())], **options})


def load(c, change):
    saved = copy.deepcopy(c.optimizer.state_dict())
    change(saved)
    c.optimizer.load_state_dict(saved)


def recorder(c, optimizer_type=torch.optim.SGD, **options):
    optimizer = optimizer_type(c.model.parameters(), lr=0.1, **options)
    return optimizer, ImportanceRecorder(optimizer, c.model.named_parameters())


def released(c):
    class Releasing(torch.optim.SGD):
        def step(self, closure=None):
            self.zero_grad(set_to_none=True)

    optimizer, _ = recorder(c, Releasing)
    tiny_loss(c.model).backward()
    optimizer.step()


def scaled(c):
    optimizer, _ = recorder(c, torch.optim.AdamW, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(tiny_loss(c.model)).backward()
    scaler.step(optimizer)


def converted_after_the_first_step(c):
    param = c.model.head.bias
    param.data, kept = param.data.bfloat16(), param.data
    param.grad = torch.ones_like(param)
    try:
        c.optimizer.step()
    finally:
        param.data = kept


def other_order(saved):
    saved["param_groups"][0]["param_names"].reverse()


def another_optimizers_state(saved):
    saved["state"][0] = {"momentum_buffer": torch.zeros(1)}


def other_form(saved):
    saved["param_groups"][0]["penalty_form"] = "mode='coupled', normalize=False"


def nan_recording(c):
    optimizer = one(param=(param := p()), record=True)
    param.grad = torch.tensor([math.nan, 1.0])
    optimizer.step()
    optimizer.recorded_importance()


def with_importance(name, value):
    return lambda c: new(c, c.importance | {name: value})


def mark_amsgrad(saved):
    saved["param_groups"][0]["amsgrad"] = True


def grow_moment(saved):
    saved["state"][0]["exp_avg"] = torch.zeros(9)


def add_remainder(saved):
    saved["state"][0]["remainder"] = torch.zeros(8, 4, dtype=torch.int16)


def add_scales(saved):
    saved["state"][0]["exp_avg_scale"] = torch.zeros(8, 3)


def add_group(saved):
    saved["param_groups"].append({"params": []})


def other_fingerprint(saved):
    saved["param_groups"][0]["importance_fingerprint"] = "0" * 16


def context():
    model = tiny_model()
    optimizer = tiny_optimizer(model, record=True)
    train(model, optimizer, 2)
    return SimpleNamespace(model=model, optimizer=optimizer, importance=random_importance(model))
