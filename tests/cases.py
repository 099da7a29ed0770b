"""What the tests run on: shapes, dtypes, backends, operands, small problems, and the one table of tolerances."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import pytest
import torch
from torch import nn

from alr_kernels import AlrAdamW, _ops

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

# Empty, one element, a vector's tail, around a 1,024-element chunk, more than one thread's share, three dimensions.
SHAPES = ((0,), (1,), (17,), (1023,), (1024,), (1025,), (65_537,), (3, 5, 7))
DTYPES = ((F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F32, BF16), (F16, F32))  # parameter, gradient
MODES = ("coupled", "proximal")
STEPS = (1, 2, 15, 16, 17)
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}  # decay is never off by default


def _backend(name):
    reason = _ops.step_backends("cpu", F32)[name]
    return pytest.param(name, marks=pytest.mark.skipif(bool(reason), reason=f"backend {name}: {reason}"))


BACKENDS = tuple(map(_backend, ("reference", "native")))  # Triton: test_step_triton.py
NATIVE = BACKENDS[1:]


class Tolerance(NamedTuple):
    limit: float
    reason: str


# θ in ulps, of the parameter's dtype, of max(|θ_before|, |θ_after|, lr); the rest relative to the largest term of the
# sum that was rounded. float64 oracle against float32 arithmetic, unless a row says otherwise.
TOLERANCES = {
    ("param", F32): Tolerance(
        6, "about 12 roundings; the blend's weight alone has 5, times a distance that may exceed the unit"
    ),
    ("param", BF16): Tolerance(0.51, "one rounding to storage; float32 arithmetic moves a tie by 1/100 ulp at most"),
    ("param", F16): Tolerance(0.51, "one rounding to storage; a float16 ulp is 8,192 float32 ulps"),
    ("param", F64): Tolerance(8, "float64 against float64, in another order of operations"),
    "moment": Tolerance(4e-7, "three float32 roundings of 6e-8 each, and twice that where the gradient is squared"),
    "path_integral": Tolerance(3e-7, "difference, product and sum round once each; θ is taken as it was stored"),
    "importance": Tolerance(
        5e-7, "move, square, sum and quotient round once each; the move is rounded before the square"
    ),
    "statistics": Tolerance(1e-6, "float64 sums of float32 values, each right to `importance`"),
    "torch step 1": Tolerance(2, "torch.optim.AdamW folds the bias corrections in another order"),
    "torch step 17": Tolerance(10, "the same adding up in θ; the unit is that of the largest |θ| on the way"),
    "loss drop": Tolerance(0.02, "Σω is the first-order integral of the loss; the second order is lr·‖H‖ of it"),
}


def ulp(magnitude, dtype):
    """Return the distance between neighbouring numbers of ``dtype`` at ``magnitude`` (float64 tensor)."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(magnitude.clamp(min=info.smallest_normal)))
    return info.eps * torch.exp2(exponent)


def param_error(got, expected, before, lr):
    """Return the largest error of θ, in the unit of TOLERANCES."""
    unit = torch.maximum(before.double().abs(), expected.abs()).clamp(min=lr)
    return float(((got.double() - expected).abs() / ulp(unit, got.dtype)).max()) if got.numel() else 0.0


def relative_error(got, expected, scale):
    """Return the largest |got − expected| / scale; scale is float64, elements of scale 0 must be equal."""
    error = (got.double() - expected).abs()
    ratio = torch.where(error == 0, 0.0, error / scale)
    return float(ratio.max()) if got.numel() else 0.0


def within(error, row):
    tolerance = TOLERANCES[row]
    assert error <= tolerance.limit, f"{row}: error {error:.3g}, allowed {tolerance.limit:g} ({tolerance.reason})"


def same_bits(got, expected):
    """Whether two tensors have the same bits; NaN counts as equal to NaN."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return False
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    bits = [
        t.detach().contiguous().view(integer) if t.dim() else t.detach().reshape(1).view(integer)
        for t in (got, expected)
    ]
    nan = got.isnan() & expected.isnan()
    return bool(((bits[0] == bits[1]) | nan.reshape(bits[0].shape)).all())


def assert_same_state(optimizer, other):
    """Compare parameters and state of two optimizers, in their own order, bit for bit."""
    pairs = zip(members(optimizer), members(other), strict=True)
    for index, (param, expected) in enumerate(pairs):
        assert same_bits(param, expected), f"parameter {index} differs"
        state, wanted = optimizer.state.get(param, {}), other.state.get(expected, {})
        assert set(state) == set(wanted), f"parameter {index}: state {set(state)}, expected {set(wanted)}"
        for key, value in state.items():
            assert same_bits(value, wanted[key]), f"{key} of parameter {index} differs"


def members(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def snapshot(optimizer):
    """Copy all that a refused call must not change."""
    return copy.deepcopy(
        (optimizer.state_dict(), dict(optimizer.coeffs or {}), [p.detach() for p in members(optimizer)])
    )


def assert_unchanged(optimizer, before):
    state, coeffs, params = snapshot(optimizer)
    assert state["param_groups"] == before[0]["param_groups"]
    assert state["state"].keys() == before[0]["state"].keys()
    for key, fields in state["state"].items():
        assert all(same_bits(value, before[0]["state"][key][name]) for name, value in fields.items())
    assert coeffs == before[1]
    assert all(map(same_bits, params, before[2]))


# ---------------------------------------------------------------- operands of one step

GUARD = 32  # elements before and after every operand
COLUMNS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "importances", "anchors", "path_integrals")


def guarded(values):
    """Return a view equal to ``values`` in the middle of a larger storage full of NaN."""
    storage = torch.full((values.numel() + 2 * GUARD,), math.nan, dtype=values.dtype)
    view = storage.narrow(0, GUARD, values.numel()).view(values.shape)
    return view.copy_(values)


def guards_are_untouched(tensor):
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return bool(storage[:GUARD].isnan().all() and storage[-GUARD:].isnan().all())


def operands(dtype, grad_dtype, *, penalty=True, record=True, shapes=SHAPES, seed=0):
    """Return the tensor lists of one step; a third of Ω is 0, the rest spans 12 decades of k.

    v is at least 0.01, so that no denominator is small enough to magnify rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    columns = {name: [] for name in COLUMNS}
    for shape in shapes:

        def normal(scale, shape=shape):
            return torch.randn(shape, generator=generator) * scale

        compute = torch.promote_types(dtype, F32)
        param = normal(1.0).to(dtype)
        values = (
            param,
            normal(0.1).to(grad_dtype),
            normal(0.05).to(compute),
            (normal(0.1).square() + 0.01).to(compute),
            (torch.exp(normal(4.0)) * (torch.rand(shape, generator=generator) > 1 / 3)).to(compute),
            (param.float() + normal(0.1)).to(dtype),
            normal(1e-3).to(compute),
        )
        for name, value in zip(COLUMNS, values, strict=True):
            columns[name].append(guarded(value))
    if not penalty:
        columns["importances"], columns["anchors"] = [], []
    if not record:
        columns["path_integrals"] = []
    return columns


def copied(columns):
    return {name: [guarded(tensor) for tensor in tensors] for name, tensors in columns.items()}


# ---------------------------------------------------------------- small problems


ALPHAS = {"embed": 0.1, "layers.0": 0.5, "layers.1": 0.25, "head": 0.15}  # of TinyModel's layers


def layer(name):
    return name.rpartition(".")[0]


class TinyModel(nn.Module):
    """Four blocks of weights, smooth: embed, layers.0, layers.1, head."""

    def __init__(self, width=8):
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.head = nn.Linear(width, 1)

    def forward(self, x):
        x = torch.tanh(self.embed(x))
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)


def tiny_model(seed=0, dtype=F32):
    torch.manual_seed(seed)
    return TinyModel().to(dtype)


def tiny_loss(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    x = torch.randn(64, 4, generator=generator).to(dtype)
    return (model(x) - (x[:, :1] * x[:, 1:2]).sin() - seed).square().mean()


def random_importance(named, seed=1):
    """Return name → Ω > 0 over a few decades, for a model or (name, tensor) pairs."""
    generator = torch.Generator().manual_seed(seed)
    pairs = named.named_parameters() if isinstance(named, nn.Module) else named
    return {name: torch.exp(torch.randn(p.shape, generator=generator) * 2) for name, p in pairs}


def train(model, optimizer, steps=1, first=0, seed=0):
    """Take steps on the tiny problem (its data depend on the step's number) and return the last loss."""
    for number in range(first, first + steps):
        optimizer.zero_grad()
        loss = tiny_loss(model, seed + number % 3)
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def set_grads(optimizer, seed):
    """Give every parameter a gradient that depends on the seed and its position only."""
    generator = torch.Generator().manual_seed(seed)
    for param in members(optimizer):
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def tiny_optimizer(model, seed=1, **options):
    """Return an AlrAdamW with importance everywhere, penalty and decay on."""
    options = {"lr": 1e-2, "weight_decay": 0.1, "reg_lambda": 3.0} | options
    return AlrAdamW(model.named_parameters(), random_importance(model, seed), **options)
