"""What a trainer must come to: torch's AdamW with the penalty's gradient and the path integral by hand."""

from __future__ import annotations

import torch
from cases import random_importance

from alr_kernels import AlrAdamW

OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "reg_lambda": 3.0}
LAYERS = 4  # of the tiny model


class Shadow:
    """AdamW on copies of the weights, ``g + k(θ − θ*)`` and ``ω += −g·Δθ`` by hand, with the gradients it is told.

    It is told the task's gradients, measured apart from ``p.grad``: whatever a loop does to that on its way to the step
    (accumulates, scales, clips, averages) must come to this.
    """

    def __init__(self, model, importance):
        named = dict(model.named_parameters())
        self.weights = {name: param.detach().clone().requires_grad_() for name, param in named.items()}
        self.start = {name: param.detach().clone() for name, param in named.items()}
        # coeffs="uniform", normalize=False: α = 1/L
        self.curvature = {name: 2 * OPTIONS["reg_lambda"] / LAYERS * importance[name] for name in named}
        self.omega = {name: torch.zeros_like(param, dtype=torch.float64) for name, param in named.items()}
        self.adam = torch.optim.AdamW(self.weights.values(), lr=OPTIONS["lr"], weight_decay=OPTIONS["weight_decay"])

    @torch.no_grad()
    def step(self, grads, max_norm=None):
        norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
        factor = 1.0 if max_norm is None else min(1.0, max_norm / (float(norm) + 1e-6))
        before = {name: weight.clone() for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            weight.grad = factor * grads[name] + self.curvature[name] * (weight - self.start[name])
        self.adam.step()
        for name, weight in self.weights.items():
            self.omega[name] -= grads[name].double() * (weight - before[name]).double()

    def check(self, model, optimizer, tolerance=1e-4):
        for name, param in model.named_parameters():
            state = optimizer.state[param]
            pairs = {
                "weights": (param, self.weights[name]), "ω": (state["path_integral"], self.omega[name]),
                "exp_avg": (state["exp_avg"], self.adam.state[self.weights[name]]["exp_avg"]),
                "exp_avg_sq": (state["exp_avg_sq"], self.adam.state[self.weights[name]]["exp_avg_sq"]),
            }  # fmt: skip
            for what, (got, expected) in pairs.items():
                error = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
                assert error < tolerance, f"{what} of {name} is off by {float(error):.1e}"
            assert float(state["step"]) == float(self.adam.state[self.weights[name]]["step"])


def watched(model, **options):
    """Return a recording, coupled AlrAdamW and its shadow."""
    importance = random_importance(model)
    options = OPTIONS | {"mode": "coupled", "coeffs": "uniform", "normalize": False, "record": True} | options
    return AlrAdamW(model.named_parameters(), importance, **options), Shadow(model, importance)


def batches(number, parts=1):
    """Return the data (x, y) of one step, or a list of its micro-batches."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(64, 4, generator=generator)
    y = (x[:, :1] * x[:, 1:2]).sin()
    return (x, y) if parts == 1 else list(zip(x.chunk(parts), y.chunk(parts), strict=True))


def mse(model, batch):
    x, y = batch
    return (model(x).float() - y).square().mean()


def task_grads(model, loss):
    """Return name → the gradient of the loss, without touching ``p.grad``."""
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def assert_same_run(first, second):
    """Two (model, optimizer) are the same, bit for bit: weights, state of the optimizer, recording."""
    (model, optimizer), (other_model, other) = first, second
    saved, expected = optimizer.state_dict(), other.state_dict()
    assert saved["param_groups"] == expected["param_groups"]
    assert saved["state"].keys() == expected["state"].keys()
    assert saved["state"]
    for key, state in expected["state"].items():
        assert saved["state"][key].keys() == state.keys()
        for what, value in state.items():
            assert torch.equal(saved["state"][key][what], value), (key, what)
            assert saved["state"][key][what].dtype == value.dtype
    weights = other_model.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    if other.record:
        recorded, wanted = optimizer.recorded_importance(), other.recorded_importance()
        assert recorded.steps == wanted.steps
        assert list(recorded) == list(wanted)
        for name in wanted:
            assert torch.equal(recorded[name], wanted[name]), name
