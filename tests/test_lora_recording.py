"""Recording in effective space: conservation of the loss, independence of the gauge, estimators, skipped steps."""

from __future__ import annotations

import lora_oracle
import pytest
import torch
from cases import F32, F64
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alr_kernels import AlrAdamW, Importance, _ops_lora, lora_pairs
from alr_kernels.codecs.encoded import Encoded
from alr_kernels.lora import gradients, penalty, reference
from alr_kernels.lora.reference import Product

OMEGA = "effective_path_integral"


class Smooth:
    """A quadratic loss of U = s·B·A alone, whose dense gradient is known."""

    def __init__(self, dtype=F64, m=12, n=20, rank=3, zero=False, scaling=2.0):
        generator = torch.Generator().manual_seed(0)

        def normal(*size):
            return torch.randn(*size, generator=generator, dtype=F64)

        self.x, self.target, self.base = normal(50, n), normal(50, m), normal(m, n)
        self.scaling = scaling
        self.a = nn.Parameter((normal(rank, n) * 0.3).to(dtype))
        self.b = nn.Parameter((normal(m, rank) * (0.0 if zero else 0.3)).to(dtype))

    def effective(self):
        return self.scaling * lora_oracle.wide(self.b) @ lora_oracle.wide(self.a)

    def loss_at(self, u):
        return ((self.x @ (self.base + u).T - self.target) ** 2).mean()

    def loss(self):
        return self.loss_at(self.scaling * self.b.double() @ self.a.double())

    def gradient(self):
        u = self.effective().requires_grad_()
        return torch.autograd.grad(self.loss_at(u), u)[0]

    def pairs(self, estimator="tangent"):
        return lora_pairs([("layer.weight", self.a, self.b, self.scaling)], estimator=estimator)

    def named(self):
        return [("A", self.a), ("B", self.b)]

    def optimizer(self, estimator="tangent", **options):
        options = {"lr": 1e-4, "weight_decay": 0.01} | options
        return AlrAdamW(self.named(), lora=self.pairs(estimator), record=True, **options)

    def step(self, optimizer, scale=1.0):
        optimizer.zero_grad()
        (self.loss() * scale).backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("zero", [False, True], ids=["trained", "B = 0 at the start"])
def test_the_tangent_estimate_conserves_the_loss(dtype, zero):
    problem = Smooth(dtype, zero=zero)
    optimizer = problem.optimizer(lr=2e-4 if zero else 1e-4)
    first = problem.loss().item()
    for _ in range(200):
        problem.step(optimizer)
    drop = first - problem.loss().item()
    recorded = optimizer.recorded_importance().stats["layer.weight"].path_integral_sum
    assert drop > 0.05
    assert recorded == pytest.approx(drop, rel=0.01)


def test_the_factored_estimate_does_not():
    """The published pseudo-gradient is off by the size of the factors, and by how the gauge shares it out."""
    problem = Smooth()
    optimizer = problem.optimizer("factored")
    first = problem.loss().item()
    for _ in range(200):
        problem.step(optimizer)
    drop = first - problem.loss().item()
    recorded = optimizer.recorded_importance().stats["layer.weight"].path_integral_sum
    assert not 0.5 * drop < recorded < 2 * drop


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(20, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return self.head(torch.tanh(self.proj(x)))


def peft_model(**options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": ["proj"]} | options)
    return peft.get_peft_model(Model(), config)


@pytest.mark.parametrize("estimator", ["tangent", "exact"])
def test_a_peft_model_conserves_its_loss(estimator):
    model = peft_model(modules_to_save=["head"])
    x, y = torch.randn(64, 20), torch.randn(64, 5)
    optimizer = AlrAdamW(
        model.named_parameters(), lora=lora_pairs(model, estimator=estimator), record=True, lr=2e-4, weight_decay=0.0
    )

    def loss():
        return ((model(x) - y) ** 2).mean()

    first = loss().item()
    for _ in range(150):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    importance = optimizer.recorded_importance()
    assert set(importance) == {"proj.weight", "head.weight", "head.bias"}
    assert importance["proj.weight"].shape == (12, 20)
    assert importance.method == f"path_integral_{estimator}"
    drop, total = first - loss().item(), sum(row.path_integral_sum for row in importance.stats.values())
    assert drop > 0.03
    assert total == pytest.approx(drop, rel=0.01)


def test_exact_records_the_dense_gradient():
    model = peft_model()
    x, y = torch.randn(64, 20), torch.randn(64, 5)
    optimizer = AlrAdamW(
        model.named_parameters(), lora=lora_pairs(model, estimator="exact"), record=True, lr=1e-2, weight_decay=0.1
    )
    layer, expected = model.base_model.model.proj, 0.0
    for _ in range(3):
        optimizer.zero_grad()
        before = layer.get_delta_weight("default").detach().double()
        u = before.float().requires_grad_()
        inner = model.base_model.model
        h = torch.nn.functional.linear(x, layer.base_layer.weight + u, layer.base_layer.bias)
        dense = torch.autograd.grad(((inner.head(torch.tanh(h)) - y) ** 2).mean(), u)[0].double()
        for part in (0, 1):  # two micro-batches
            rows = slice(32 * part, 32 * part + 32)
            (((model(x[rows]) - y[rows]) ** 2).mean() / 2).backward()
        optimizer.step()
        expected = expected - dense * (layer.get_delta_weight("default").detach().double() - before)
    omega = next(state[OMEGA] for state in optimizer.state.values() if OMEGA in state)
    torch.testing.assert_close(omega.double(), expected, rtol=1e-4, atol=1e-7)


def gauges():
    generator = torch.Generator().manual_seed(5)
    scaled = {f"{c:g}·I": c * torch.eye(3, dtype=F64) for c in (0.1, 0.5, 3.0, 10.0)}
    mixed = torch.randn(3, 3, generator=generator, dtype=F64)
    skewed = torch.diag(torch.tensor([0.05, 1.0, 20.0], dtype=F64)) @ torch.linalg.qr(mixed)[0]
    return scaled | {"random": mixed, "skewed": skewed}


@pytest.mark.parametrize("gauge", gauges())
@pytest.mark.parametrize("estimator", ["tangent", "exact", "factored"])
def test_one_move_of_u_records_the_same_in_every_gauge(estimator, gauge):
    """(B·R⁻¹, R·A) is the same model: for the same move of U, ω is the same, and so are Ω and the penalty's value."""
    generator = torch.Generator().manual_seed(1)
    dense, s = torch.randn(12, 20, generator=generator, dtype=F64), 2.0
    before, after = (
        Product(*(torch.randn(*size, generator=generator, dtype=F64) for size in ((12, 3), (3, 20)))) for _ in "01"
    )

    def recorded(r):
        inverse = torch.linalg.inv(r)
        start, end = (Product(p.left @ inverse, r @ p.right) for p in (before, after))
        grad_up, grad_down = s * dense @ start.right.T, s * start.left.T @ dense
        if estimator == "exact":
            gradient = dense
        elif estimator == "tangent":
            gradient = gradients.tangent(start, grad_up, grad_down, s)
        else:
            gradient = gradients.factored(start, grad_up, grad_down, s, 1e-3)
        omega = torch.zeros(12, 20, dtype=F64)
        moved = reference.move(start, end, s)
        reference.record_(omega, gradient, moved)
        importance = omega.clamp(min=0) / ((moved.left @ moved.right).square() + 1e-6)
        encoded = Encoded.dense(importance)
        factors = Product(s * end.left, s * end.right)
        return omega, importance, penalty.pull(encoded, 0.7, moved, factors, "none", False).value

    wanted, got = recorded(torch.eye(3, dtype=F64)), recorded(gauges()[gauge])
    if estimator != "factored":
        for each, same in zip(got, wanted, strict=True):
            torch.testing.assert_close(each, same, rtol=1e-8, atol=1e-9)
        projected = dense if estimator == "exact" else lora_oracle.tangent(before.left, before.right, dense)
        moved = s * (after.left @ after.right - before.left @ before.right)
        torch.testing.assert_close(wanted[0], -projected * moved, rtol=1e-9, atol=1e-9)
    else:
        assert not torch.allclose(got[0], wanted[0], rtol=1e-2)


@pytest.mark.parametrize("rank", [1, 3])
def test_deficient_factors_have_a_projection(rank):
    """Two equal columns of B, a zero row of A: what is left is projected on."""
    generator = torch.Generator().manual_seed(2)
    dense, s = torch.randn(9, 11, generator=generator, dtype=F64), 1.5
    up, down = (
        torch.randn(9, rank, generator=generator, dtype=F64),
        torch.randn(rank, 11, generator=generator, dtype=F64),
    )
    if rank > 1:
        up[:, 1] = up[:, 0]
        down[2] = 0
    got = gradients.tangent(Product(up, down), s * dense @ down.T, s * up.T @ dense, s)
    torch.testing.assert_close(got.left @ got.right, lora_oracle.tangent(up, down, dense), rtol=1e-8, atol=1e-9)
    nothing = gradients.tangent(Product(0 * up, 0 * down), 0 * dense @ down.T, 0 * up.T @ dense, s)
    assert not (nothing.left @ nothing.right).any()


def test_a_frozen_factor_narrows_the_projection():
    generator = torch.Generator().manual_seed(3)
    dense, s = torch.randn(9, 11, generator=generator, dtype=F64), 1.5
    up, down = torch.randn(9, 2, generator=generator, dtype=F64), torch.randn(2, 11, generator=generator, dtype=F64)
    only_up = gradients.tangent(Product(up, down), s * dense @ down.T, None, s)
    only_down = gradients.tangent(Product(up, down), None, s * up.T @ dense, s)
    rows, columns = torch.linalg.pinv(down) @ down, up @ torch.linalg.pinv(up)
    torch.testing.assert_close(only_up.left @ only_up.right, dense @ rows, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(only_down.left @ only_down.right, columns @ dense, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("estimator", ["tangent", "factored"])
def test_recording_sees_the_task_gradient_unscaled_unclipped_and_without_penalty(estimator):
    other = Smooth()
    importance = {"layer.weight": torch.rand(12, 20, dtype=F64)}
    optimizer = AlrAdamW(
        other.named(), importance, lora=other.pairs(estimator), record=True, lr=1e-3, weight_decay=0.1, mode="coupled",
        max_grad_norm=0.01, maximize=True,
    )  # fmt: skip
    expected = torch.zeros(12, 20, dtype=F64)
    for _ in range(3):
        up, down = lora_oracle.wide(other.b), lora_oracle.wide(other.a)
        optimizer.zero_grad()
        (-other.loss()).backward()
        grads = [-lora_oracle.wide(p.grad) for p in (other.b, other.a)]
        dense = lora_oracle.tangent(up, down, other.gradient())
        if estimator == "factored":
            dense = lora_oracle.factored(up, down, *grads, other.scaling, 1e-3)
        before = other.effective()
        optimizer.step()
        expected -= dense * (other.effective() - before)
    torch.testing.assert_close(optimizer.state[other.b][OMEGA], expected, rtol=1e-8, atol=1e-12)


def test_a_step_that_the_scaler_skips_records_nothing():
    problem, wanted = Smooth(F32), Smooth(F32)
    optimizer, other = problem.optimizer(), wanted.optimizer()
    for number in range(4):
        wanted_step = number != 2
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(64.0), torch.tensor(0.0 if wanted_step else 1.0)
        optimizer.zero_grad()
        (problem.loss() * (64.0 if wanted_step else float("inf"))).backward()
        optimizer.step()
        if wanted_step:
            wanted.step(other)
    assert torch.equal(problem.b, wanted.b)
    omega, same = (o.state[p.b][OMEGA] for o, p in ((optimizer, problem), (other, wanted)))
    torch.testing.assert_close(omega, same, rtol=1e-5, atol=1e-9)
    assert optimizer.recorded_steps == 3


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.parametrize("mode", ["coupled", "proximal"])
def test_a_step_makes_nothing_dense(mode):
    """Neither U, nor Ĝ, nor a decoded Ω: what is made has the size of the factors."""
    if _ops_lora.lora_backends("cpu", F32)["native"]:
        pytest.skip(f"native: {_ops_lora.lora_backends('cpu', F32)['native']}")
    m, n, r = 1024, 1280, 4
    a, b = nn.Parameter(torch.randn(r, n)), nn.Parameter(torch.randn(m, r))
    importance = Importance({"w.weight": torch.rand(m, n)}).astype("int8")
    optimizer = AlrAdamW([("A", a), ("B", b)], importance, lora=[("w.weight", a, b, 2.0)], record=True, mode=mode)
    a.grad, b.grad = torch.randn_like(a), torch.randn_like(b)
    optimizer.step()  # ω is made here
    with Largest() as largest:
        optimizer.step()
    assert 0 < largest.numel <= 4 * r * (m + n)


def test_importance_is_finalised_from_the_move_of_u():
    problem = Smooth(F32)
    optimizer = problem.optimizer(lr=1e-3)
    start = problem.effective()
    for _ in range(5):
        problem.step(optimizer)
    omega = optimizer.state[problem.b][OMEGA].double()
    wanted = omega.clamp(min=0) / ((problem.effective() - start).square() + 1e-4)
    got = optimizer.recorded_importance(xi=1e-4)["layer.weight"]
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-9)
