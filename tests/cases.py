"""What the tests run on: shapes, dtypes, backends, operands, small problems, and the one table of tolerances."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import oracle
import pytest
import torch
from torch import nn

from alr_kernels import AlrAdamW, _ops
from alr_kernels.codecs.encoded import Encoded
from alr_kernels.step.plan import HYPER as HYPER_NAMES
from alr_kernels.step.plan import MASTERS, Numbers, Operands, Options

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

# Empty, one element, a vector's tail, around a 1,024-element chunk, more than one thread's share, three dimensions.
SHAPES = ((0,), (1,), (17,), (1023,), (1024,), (1025,), (65_537,), (3, 5, 7))
CODED_SHAPES = ((32, 128), (40, 128), (33, 384), (256, 256))  # what may be kept in blocks of 128
DTYPES = ((F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F32, BF16), (F16, F32))  # parameter, gradient
MODES = ("coupled", "proximal")
STEPS = (1, 2, 15, 16, 17)
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}  # decay is never off by default
NUMBERS = HYPER | {"reg_lambda": 0.9, "inverse_scale": 1.0, "clip": 1.0, "found_inf": 0.0}
DEFAULT = Options()
ORACLE_ROLES = ("params", "grads", "exp_avgs", "exp_avg_sqs", "importances", "anchors", "path_integrals")


def _backend(name):
    reason = _ops.step_backends("cpu", F32)[name]
    return pytest.param(name, marks=pytest.mark.skipif(bool(reason), reason=f"backend {name}: {reason}"))


BACKENDS = tuple(map(_backend, ("reference", "native")))  # Triton: test_step_triton.py
NATIVE = BACKENDS[1:]


class Tolerance(NamedTuple):
    limit: float
    reason: str


# θ in ulps, of the parameter's dtype, of max(|θ_before|, |θ_after|, |θ_before − θ*|, lr); the rest relative to the size
# of the terms that were summed. float64 oracle against float32 arithmetic, unless a row says otherwise.
TOLERANCES = {
    ("param", F32): Tolerance(4, "about 12 roundings, most of them of the step alone; 3.0 in 1e8 elements"),
    ("param", F64): Tolerance(8, "float64 against float64, in another order of operations"),
    "pull": Tolerance(3, "beyond the anchor, in float32 ulps of max(|θ|, |θ*|, |h − θ|); 2.0 in 8e7 elements"),
    "moment": Tolerance(8e-7, "k·(θ − θ*) of a decoded Ω rounds 7 times, and counts twice where it is squared"),
    "path_integral": Tolerance(3e-7, "difference, product and sum round once each; θ is taken as it was stored"),
    "code": Tolerance(8e-6, "two Newton steps leave 4.8e-6 of a root, 7.1e-6 of a root of it; of the position"),
    "step statistics": Tolerance(1e-6, "float64 sums of terms whose k, θ − θ* or D is float32; of the terms' size"),
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


def param_unit(before, after, lr, anchor=None):
    """Return the unit of θ in TOLERANCES, before it is rounded down to a power of two; float64."""
    unit = torch.maximum(before.double().abs(), after.double().abs()).clamp(min=lr)
    return unit if anchor is None else torch.maximum(unit, (before.double() - anchor.double()).abs())


def param_error(got, expected, before, lr, anchor=None):
    """Return the largest error of θ, in the unit of TOLERANCES."""
    unit = ulp(param_unit(before, expected, lr, anchor), got.dtype)
    return float(((got.double() - expected).abs() / unit).max()) if got.numel() else 0.0


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
    bits = [t.detach().reshape(-1).view(INTEGERS[t.element_size()]) for t in (got, expected)]
    nan = got.isnan() & expected.isnan()
    return bool(((bits[0] == bits[1]) | nan.reshape(-1)).all())


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


class Case(NamedTuple):
    """How a step is called: what form each operand has, and the options."""

    param: str = "fp32"  # or bf16, fp16, fp64 (then every operand), split and stochastic (both bf16)
    grad: str = "fp32"
    moments: str = "fp32"
    importance: str = "fp32"
    anchor: str = "fp32"
    record: bool = True
    mode: str = "proximal"
    maximize: bool = False
    precise: bool = True
    clip: float = 1.0
    inverse_scale: float = 1.0
    statistics: bool = False

    @property
    def coded(self):
        """Whether an operand has blocks, so that the last dimension must be a multiple of 128."""
        return self.moments == "int8" or self.importance in ("int8", "int4")

    @property
    def options(self):
        master = self.param if self.param in MASTERS else "none"
        return Options(self.mode, self.maximize, self.precise, master, seed=7)


CHOICES = {
    "param": ("fp32", "bf16", "fp16", "split", "stochastic"),
    "grad": ("fp32", "bf16", "fp16"),
    "moments": ("fp32", "bf16", "int8"),
    "importance": ("fp32", "none", "bf16", "int8", "int4"),
    "anchor": ("fp32", "bf16", "fp16"),
    "record": (True, False),
    "mode": MODES,
    "maximize": (False, True),
    "precise": (True, False),
    "clip": (1.0, 0.3),
    "inverse_scale": (1.0, 0.37),
    "statistics": (False, True),
}

GUARD = 32  # elements before and after every operand
COLUMNS = Operands._fields
FORMS = {"fp32": F32, "bf16": BF16, "fp16": F16, "fp64": F64, "split": BF16, "stochastic": BF16}
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def guarded(values):
    """Return a view equal to ``values`` in the middle of a larger storage full of NaN, or of bits 1 for integers."""
    poison = math.nan if values.is_floating_point() else 0
    storage = torch.full((values.numel() + 2 * GUARD,), poison, dtype=values.dtype)
    if not values.is_floating_point():
        storage = ~storage
    view = storage.narrow(0, GUARD, values.numel()).view(values.shape)
    return view.copy_(values)


def guards_are_untouched(tensor):
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    ends = torch.cat((storage[:GUARD], storage[-GUARD:]))
    return bool((ends.isnan() if tensor.is_floating_point() else ~ends == 0).all())


def formed(case, shapes, seed=0):
    """Return the operands of one step, by name; a third of Ω is 0, the rest spans 12 decades of k.

    v is at least 0.01, so that no denominator is small enough to magnify rounding. Codes are the oracle's.
    """
    generator = torch.Generator().manual_seed(seed)
    columns = {name: [] for name in COLUMNS}

    def keep(name, value, form):
        columns[name].append(guarded(value.to(F64 if case.param == "fp64" else FORMS[form])))

    def keep_codes(name, scales, value, kind, dtype, scale_dtype=F32):
        codes, found = oracle.encode(value, kind)
        columns[name].append(guarded((oracle.pack(codes) if kind == "importance 4" else codes).to(dtype)))
        columns[scales].append(guarded(found.to(scale_dtype)))

    for shape in shapes:

        def normal(scale, shape=shape):
            return torch.randn(shape, generator=generator) * scale

        param, grad, exp_avg, exp_avg_sq = normal(1.0), normal(0.1), normal(0.05), normal(0.1).square() + 0.01
        importance = torch.exp(normal(4.0)) * (torch.rand(shape, generator=generator) > 1 / 3)
        anchor, path_integral = param.to(FORMS[case.param]).float() + normal(0.1), normal(1e-3)
        if case.param == "split":
            high, low = (torch.where(half >= 2**15, half - 2**16, half).to(torch.int16) for half in oracle.split(param))
            columns["params"].append(guarded(high.view(BF16)))
            columns["remainders"].append(guarded(low))
        else:
            keep("params", param, case.param)
        keep("grads", grad, case.grad)
        if case.moments == "int8":
            keep_codes("exp_avgs", "exp_avg_scales", exp_avg, "exp_avg", torch.int8)
            keep_codes("exp_avg_sqs", "exp_avg_sq_scales", exp_avg_sq, "exp_avg_sq", torch.uint8)
        else:
            keep("exp_avgs", exp_avg, case.moments)
            keep("exp_avg_sqs", exp_avg_sq, case.moments)
        if case.importance in ("int8", "int4"):
            kind = f"importance {case.importance[3:]}"
            keep_codes("importances", "importance_scales", importance, kind, torch.uint8, BF16)
        elif case.importance != "none":
            keep("importances", importance, case.importance)
        if case.importance != "none":
            keep("anchors", anchor, case.anchor)
        if case.record:
            keep("path_integrals", path_integral, "fp32")
    return columns


def operands(dtype, grad_dtype, *, penalty=True, record=True, shapes=SHAPES, seed=0):
    """Return the operands of a step that keeps nothing in few bytes but the weights and their anchor."""
    form = {dtype: name for name, dtype in FORMS.items() if name not in MASTERS}
    importance = "fp32" if penalty else "none"
    case = Case(form[dtype], form[grad_dtype], importance=importance, anchor=form[dtype], record=record)
    return formed(case, shapes, seed)


def decoded(columns, i):
    """Return name → float64 values of the i-th parameter's operands, or None: what the oracle is given."""
    row = {name: tensors[i] if len(tensors) else None for name, tensors in columns.items()}
    values = {name: None if row[name] is None else oracle.wide(row[name]) for name in ORACLE_ROLES}
    if row["remainders"] is not None:
        values["params"] = oracle.join(row["params"], row["remainders"])
    if row["exp_avg_scales"] is not None:
        values["exp_avgs"] = oracle.decode(row["exp_avgs"], row["exp_avg_scales"], "exp_avg")
        values["exp_avg_sqs"] = oracle.decode(row["exp_avg_sqs"], row["exp_avg_sq_scales"], "exp_avg_sq")
    if row["importance_scales"] is not None:
        packed = row["importances"].shape != row["params"].shape
        codes = oracle.unpack(row["importances"]) if packed else row["importances"]
        values["importances"] = oracle.decode(codes, row["importance_scales"], f"importance {4 if packed else 8}")
    return values


def copied(columns):
    return {name: [guarded(tensor) for tensor in tensors] for name, tensors in columns.items()}


def rows(columns, indices):
    """Return the operands of some of the parameters, the same tensors."""
    return {name: [tensors[i] for i in indices] if tensors else [] for name, tensors in columns.items()}


def assert_same_columns(columns, expected, names=COLUMNS):
    for name in names:
        for i, (got, wanted) in enumerate(zip(columns[name], expected[name], strict=True)):
            assert same_bits(got, wanted), f"{name}[{i}] {tuple(got.shape)} differs"


def unit_scales_of(columns):
    """Return curvature / (λ·Ω) of each tensor: it differs, so that mixing them up shows."""
    return [0.7 + 0.1 * i for i in range(len(columns["params"]))]


def counts_of(columns, rotation=0):
    """Give neighbouring tensors different step counts; five rotations give each tensor each of them."""
    return [float(STEPS[(i + rotation) % len(STEPS)]) for i in range(len(columns["params"]))]


def numbers_of(columns, counts, keys=None, offsets=(), **hyper):
    values = NUMBERS | hyper
    assert set(values) == set(HYPER_NAMES), f"unknown: {set(values) - set(HYPER_NAMES)}"
    return Numbers(
        torch.tensor([values[name] for name in HYPER_NAMES], dtype=F64),
        [torch.tensor(count) for count in counts],
        torch.tensor(unit_scales_of(columns), dtype=F64),
        list(range(len(counts))) if keys is None else keys,
        offsets,
    )


def take_step(columns, backend, counts, options=DEFAULT, *, statistics=None, keys=None, **hyper):
    """Take a step in place; ``hyper`` overrides NUMBERS."""
    numbers = numbers_of(columns, counts, keys, **hyper)
    _ops.step_(Operands(**columns), numbers, options, statistics, backend)


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


def encoded(importance, bits, merge=_ops.merge):
    """Return (codes, scales) of Ω by the op that everything is encoded with: merging with nothing."""
    (found,), *_ = merge([Encoded.dense(importance.contiguous())], [None], [f"int{bits}"], (1.0, 0.0))
    return found.values, found.scales
