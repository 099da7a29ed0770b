"""The paper's preset against the published formulas, written out dense and in float64."""

from __future__ import annotations

import lora_oracle
import pytest
import torch
from torch import nn

from alr_kernels import AlrAdamW, lora_pairs
from alr_kernels.lora import paper

F64 = torch.float64
SCALING = 4.0
NAMES = ("layers.0.q.weight", "layers.0.v.weight")


class Task(nn.Module):
    """Two weights with LoRA on them, and a smooth loss."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def normal(*size):
            return torch.randn(*size, generator=generator, dtype=F64)

        self.factors = nn.ParameterList(
            [normal(2, 10) * 0.3, normal(6, 2) * 0.0, normal(2, 6) * 0.3, normal(5, 2) * 0.0]  # A, B, A, B
        )
        self.base, self.x, self.y = (normal(6, 10), normal(5, 6)), normal(40, 10), normal(40, 5)

    def effective(self):
        a, b, c, d = self.factors
        return [SCALING * b @ a, SCALING * d @ c]

    def loss(self, domain=False):
        first, second = (weight + u for weight, u in zip(self.base, self.effective(), strict=True))
        out = torch.tanh(self.x @ first.T) @ second.T
        return ((out - (self.y.flip(0) if domain else self.y)) ** 2).mean()

    def pairs(self):
        a, b, c, d = self.factors
        return [(NAMES[0], a, b, SCALING), (NAMES[1], c, d, SCALING)]


def schedule(step):
    return 8e-4 * (1 - step / 40)


def published(task):
    """Repeat the published loop on dense matrices; return Ω and α."""
    adam = torch.optim.AdamW(task.parameters(), lr=8e-4)
    omega = [torch.zeros_like(u) for u in task.effective()]
    importance = [torch.zeros_like(u) for u in task.effective()]
    step = 0
    for _ in range(3):
        for _ in range(4):
            adam.param_groups[0]["lr"] = schedule(step)
            before = [u.detach().clone() for u in task.effective()]
            factors = [f.detach().clone() for f in task.factors]
            adam.zero_grad()
            task.loss().backward()
            adam.step()
            for i, u in enumerate(task.effective()):
                a, b = factors[2 * i], factors[2 * i + 1]
                grads = task.factors[2 * i + 1].grad, task.factors[2 * i].grad
                pseudo = lora_oracle.factored(b, a, *grads, SCALING, schedule(step))
                omega[i] = (omega[i] - pseudo * (u.detach() - before[i])).clamp(min=0)
            step += 1
        for i, u in enumerate(task.effective()):
            importance[i] = importance[i] + omega[i] / (u.detach() ** 2 + 1e-9)
            omega[i] = torch.zeros_like(omega[i])
    anchor = [u.detach().clone() for u in task.effective()]
    norms = torch.stack([matrix.norm() for matrix in importance])
    alpha = torch.softmax(norms * 1e-8, 0)
    for _ in range(6):
        adam.param_groups[0]["lr"] = schedule(step)
        adam.zero_grad()
        penalty = sum(
            weight * (matrix * (u - start) ** 2).sum()
            for weight, matrix, u, start in zip(alpha, importance, task.effective(), anchor, strict=True)
        )
        (task.loss(domain=True) + 1e-3 * penalty).backward()
        adam.step()
        step += 1
    return importance, alpha


def ours(task):
    named = [(f"{i}", factor) for i, factor in enumerate(task.factors)]
    optimizer = AlrAdamW(named, lora=lora_pairs(task.pairs(), preset="paper"), record=True, **paper.OPTIONS)
    total, step = None, 0
    for _ in range(3):
        for _ in range(4):
            optimizer.param_groups[0]["lr"] = schedule(step)
            optimizer.zero_grad()
            task.loss().backward()
            optimizer.step()
            step += 1
        total = paper.add_epoch(optimizer, total)
    alpha = paper.coefficients(total)
    optimizer.start_phase(total, alpha)
    for _ in range(6):
        optimizer.param_groups[0]["lr"] = schedule(step)
        optimizer.zero_grad()
        task.loss(domain=True).backward()
        optimizer.step()
        step += 1
    return total, alpha


def test_the_preset_repeats_the_published_run():
    wanted, task = Task(), Task()
    importance, alpha = published(wanted)
    total, coeffs = ours(task)
    for name, matrix in zip(NAMES, importance, strict=True):
        torch.testing.assert_close(total[name], matrix, rtol=1e-8, atol=1e-8 * float(matrix.max()))
    assert list(coeffs.values()) == pytest.approx(alpha.tolist(), rel=1e-10)
    for got, same in zip(task.factors, wanted.factors, strict=True):
        torch.testing.assert_close(got, same, rtol=1e-7, atol=1e-9)
    assert float(total[NAMES[0]].max()) > 0


def test_its_settings_are_the_published_ones():
    assert paper.LORA == {"r": 8, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}
    assert paper.OPTIONS == {"lr": 8e-4, "mode": "coupled", "normalize": False, "reg_lambda": 1e-3}
    assert (paper.EPOCHS, paper.XI, paper.TEMPERATURE) == (5, 1e-9, 1e8)
    pairs = lora_pairs(Task().pairs(), preset="paper")
    assert (pairs.estimator, pairs.clamp, pairs.origin) == ("factored", "step", "zero")
