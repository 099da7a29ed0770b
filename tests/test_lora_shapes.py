"""Pairs of weights that are no plain matrix: transposed, convolutions; importance in any layout."""

from __future__ import annotations

import pytest
import torch
from cases import MODES

from alr_kernels import AlrAdamW
from alr_kernels.lora import LoraPair, LoraPairs


def transposed_twins(shape=(24, 128), rank=3):
    """Return a pair of a weight kept as [in, out], and the pair of the same matrix whose factors are Aᵀ and Bᵀ."""
    generator = torch.Generator().manual_seed(4)
    m, n = shape
    left, right = torch.randn(m, rank, generator=generator) * 0.3, torch.randn(rank, n, generator=generator) * 0.3
    up, down = torch.nn.Parameter(right.T.contiguous()), torch.nn.Parameter(left.T.contiguous())
    kept = LoraPairs([LoraPair("w.weight", up, down, 1.5, True, torch.Size(shape))])
    plain = [("w.weight", torch.nn.Parameter(right), torch.nn.Parameter(left), 1.5)]
    return (up, down, kept), (plain[0][2], plain[0][1], plain)


@pytest.mark.parametrize("frozen", [None, "up", "down"])
@pytest.mark.parametrize("mode", MODES)
def test_a_transposed_weight_is_the_same_weight(mode, frozen):
    importance = {"w.weight": torch.rand(24, 128, generator=torch.Generator().manual_seed(6)).pow(3)}
    results = []
    for up, down, pairs in transposed_twins():
        optimizer = AlrAdamW(
            [("B", up), ("A", down)],
            importance,
            lora=pairs,
            mode=mode,
            record=True,
            stats=True,
            lr=1e-2,
            reg_lambda=0.5,
        )
        transposed = not isinstance(pairs, list)
        left, right = (down, up) if transposed else (up, down)
        generator = torch.Generator().manual_seed(8)
        for _ in range(3):
            for name, param in (("down", left), ("up", right)):
                shape = param.T.shape if transposed else param.shape
                grad = torch.randn(shape, generator=generator) * 0.1
                param.grad = None if name == frozen else (grad.T.contiguous() if transposed else grad)
            optimizer.step()
        factors = [param.detach().T if transposed else param.detach() for param in (left, right)]
        omega = optimizer.state[up]["effective_path_integral"]
        results.append((*factors, omega, *optimizer.stats()["w"].values(), optimizer.penalty()))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


def test_a_convolution_is_the_matrix_of_its_flattened_kernels():
    generator = torch.Generator().manual_seed(4)
    up, down = torch.randn(6, 2, generator=generator), torch.randn(2, 5 * 3 * 3, generator=generator)
    dense = torch.rand(6, 5, 3, 3, generator=generator)
    results = []
    for shapes, weight in (((6, 2, 1, 1), (2, 5, 3, 3)), (6, 5, 3, 3)), (((6, 2), (2, 45)), (6, 45)):
        b, a = (torch.nn.Parameter(x.clone().view(shape)) for x, shape in zip((up, down), shapes, strict=True))
        pairs = LoraPairs([LoraPair("c.weight", b, a, 0.5, False, torch.Size(weight))])
        optimizer = AlrAdamW(
            [("B", b), ("A", a)], {"c.weight": dense.view(weight)}, lora=pairs, record=True, lr=1e-2, reg_lambda=0.5
        )
        for _ in range(3):
            b.grad, a.grad = torch.cos(b.detach()), torch.sin(a.detach())
            optimizer.step()
        assert optimizer.recorded_importance()["c.weight"].shape == weight
        results.append(
            (b.detach().flatten(), a.detach().flatten(), optimizer.recorded_importance()["c.weight"].flatten())
        )
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)


def test_importance_in_any_layout():
    results = []
    dense = torch.rand(128, 24, generator=torch.Generator().manual_seed(6))
    for importance in (dense.T, dense.T.contiguous()):
        _, (up, down, pairs) = transposed_twins()
        optimizer = AlrAdamW([("B", up), ("A", down)], {"w.weight": importance}, lora=pairs, reg_lambda=0.5)
        for _ in range(2):
            up.grad, down.grad = torch.cos(up.detach()), torch.sin(down.detach())
            optimizer.step()
        results.append((up.detach(), down.detach()))
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)
