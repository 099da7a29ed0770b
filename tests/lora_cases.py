"""LoRA in effective space: operands, what they should give in float64, and what rounding may change."""

from __future__ import annotations

from typing import NamedTuple

import torch
from cases import F32, F64

from alr_kernels import _ops
from alr_kernels.codecs.encoded import Encoded
from alr_kernels.lora.reference import Product

# rows, columns, rank: one element, vectors, edges of every tile in both directions, rows of whole blocks of 128 for
# codes, ranks that are no power of two, ranks above both dimensions.
SHAPES = [
    (1, 1, 1),
    (1, 37, 1),
    (37, 1, 2),
    (13, 17, 3),
    (8, 128, 8),
    (33, 256, 4),
    (65, 129, 8),
    (64, 384, 16),
    (130, 128, 5),
    (40, 256, 64),
    (24, 100, 256),
]
CODED = [shape for shape in SHAPES if shape[1] % 128 == 0]
FORMATS = ("fp32", "bf16", "int8", "int4")
LIMIT = 4e-6  # of the terms that are summed: two float32 sums over up to 512 products, one product, in any order


class Case(NamedTuple):
    path_integral: torch.Tensor
    gradient: Product
    move: Product
    importance: Encoded
    scale: float
    drift: Product
    factors: Product


def case(shape, kept="fp32", dtype=F32, seed=0):
    """Return operands of both ops for one pair; Ω has zeros and spans decades."""
    m, n, r = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, scale=1.0):
        return (torch.randn(*size, generator=generator, dtype=F64) * scale).to(dtype)

    def product(k, scale):
        return Product(normal(m, k, scale=scale), normal(k, n, scale=scale))

    dense = torch.rand(m, n, generator=generator, dtype=F64).pow(6) * 3
    dense[torch.rand(m, n, generator=generator) < 0.1] = 0
    importance = Encoded.dense(dense.to(dtype))
    if kept != "fp32":
        (importance,), *_ = _ops.merge([importance], [None], [kept], (1.0, 0.0))
    return Case(
        normal(m, n, scale=1e-3), product(2 * r, 0.1), product(2 * r, 0.1), importance, 0.37, product(2 * r, 0.2),
        product(r, 0.5),
    )  # fmt: skip


def dense(product, absolute=False):
    if isinstance(product, torch.Tensor):
        return product.double().abs() if absolute else product.double()
    left, right = (side.double().abs() if absolute else side.double() for side in product)
    return left @ right


def check_record(got, c, gradient=None, clamp=False, limit=LIMIT):
    """Hold ω to float64."""
    gradient = c.gradient if gradient is None else gradient
    expected = c.path_integral.double() - dense(gradient) * dense(c.move)
    unit = c.path_integral.double().abs() + dense(gradient, True) * dense(c.move, True)
    error = (got.double() - (expected.clamp(min=0) if clamp else expected)).abs()
    assert bool((error <= limit * unit).all()), f"largest error {(error / unit).max():.3g} of the terms"


def expected_pull(c, absolute=False):
    """Return value, gradients and curvatures in float64; ``absolute``: of the sizes of all terms."""
    k = c.scale * c.importance.decoded().double()
    gap, (up, down) = dense(c.drift, absolute), (side.double() for side in c.factors)
    if absolute:
        up, down = up.abs(), down.abs()
    bound_up, bound_down = up.abs() * up.abs().sum(1, keepdim=True), down.abs() * down.abs().sum(0, keepdim=True)
    force = k * gap
    return {
        "value": 0.5 * (force * gap).sum(),
        "grad_up": force @ down.T,
        "grad_down": up.T @ force,
        "curvature_up": k @ bound_down.T,
        "curvature_down": bound_up.T @ k,
    }


def check_pull(got, c, sides="both", curvature=False, limit=LIMIT):
    """Hold a pull to float64, and see that nothing else came back."""
    expected, unit = expected_pull(c), expected_pull(c, absolute=True)
    wanted = {"value"} | {f"grad_{side}" for side in ("up", "down") if sides in ("both", side)}
    wanted |= {name.replace("grad", "curvature") for name in wanted if curvature and name != "value"}
    assert {name for name, value in got._asdict().items() if value is not None} == wanted
    for name in wanted:
        error = (getattr(got, name).double() - expected[name]).abs()
        assert getattr(got, name).shape == expected[name].shape
        assert bool((error <= limit * unit[name]).all()), f"{name}: {(error / unit[name]).max():.3g} of the terms"
