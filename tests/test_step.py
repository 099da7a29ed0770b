"""One step on every CPU backend: against torch, and what must hold whatever the numbers; formats: test_step_formats."""

from __future__ import annotations

import copy
import math

import oracle
import pytest
import torch
from cases import (
    BACKENDS,
    BF16,
    COLUMNS,
    F16,
    F32,
    F64,
    MODES,
    ORACLE_ROLES,
    TOLERANCES,
    Case,
    assert_same_columns,
    assert_same_state,
    copied,
    counts_of,
    formed,
    members,
    operands,
    random_importance,
    relative_error,
    same_bits,
    set_grads,
    take_step,
    tiny_loss,
    tiny_model,
    tiny_optimizer,
    train,
    ulp,
    within,
)
from hypothesis import example, given
from hypothesis import strategies as st

from alr_kernels import AlrAdamW, ImportanceRecorder, _ops
from alr_kernels.step.plan import STATISTICS, Options

backends = pytest.mark.parametrize("backend", BACKENDS)
modes = pytest.mark.parametrize("mode", MODES)
all_modes = pytest.mark.parametrize("mode", [None, *MODES], ids=str)


def test_oracle_proximal_point_is_the_argmin():
    h, anchor, lr = torch.linspace(-1, 1, 9, dtype=F64), torch.tensor(0.3, dtype=F64), 1e-2
    for k in (0.0, 1e-3, 1.0, 1e6):
        denom = torch.linspace(0.01, 2, 9, dtype=F64)
        x = oracle.proximal_point(h, anchor, k, lr, denom).requires_grad_()
        (slope,) = torch.autograd.grad((denom * (x - h) ** 2 / (2 * lr) + k * (x - anchor) ** 2 / 2).sum(), x)
        assert float(slope.abs().max()) < 1e-9 * (1 + k)


# ---------------------------------------------------------------- against torch


@backends
@pytest.mark.parametrize("maximize", [False, True], ids=("minimise", "maximise"))
@pytest.mark.parametrize("plain", ["no importance", "reg_lambda 0"])
def test_without_penalty_it_is_torch_adamw(backend, plain, maximize):
    ours, theirs = tiny_model(), tiny_model()
    options = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-7, "weight_decay": 0.1, "maximize": maximize}
    importance, reg_lambda = (None, 1.0) if plain == "no importance" else (random_importance(ours), 0.0)
    optimizer = AlrAdamW(ours.named_parameters(), importance, reg_lambda=reg_lambda, backend=backend, **options)
    reference = torch.optim.AdamW(theirs.parameters(), foreach=False, **options)
    largest = [torch.full_like(param, 1e-2).double() for param in members(optimizer)]
    for number in range(1, 18):
        largest = [
            torch.maximum(was, p.detach().double().abs()) for was, p in zip(largest, ours.parameters(), strict=True)
        ]
        for stepper in (optimizer, reference):
            set_grads(stepper, number)
            stepper.step()
        if number in (1, 17):
            for got, expected, unit in zip(ours.parameters(), theirs.parameters(), largest, strict=True):
                error = (got - expected).detach().double().abs() / ulp(unit, F32)
                within(float(error.max()), f"torch step {number}")


@backends
@modes
def test_reg_lambda_zero_changes_no_bit(backend, mode):
    penalised, plain = tiny_model(), tiny_model()
    first = tiny_optimizer(penalised, reg_lambda=0.0, mode=mode, backend=backend, record=True)
    second = AlrAdamW(plain.named_parameters(), lr=1e-2, weight_decay=0.1, backend=backend, record=True)
    for model, optimizer in ((penalised, first), (plain, second)):
        train(model, optimizer, 4)
    for state in first.state.values():
        state.pop("anchor")
    assert_same_state(first, second)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("backend", "dtype"), [*((b, F32) for b in ("reference", "native")), ("auto", F64)])
def test_coupled_is_autograd_of_the_whole_loss_and_torch_adamw(backend, dtype, normalize):
    """From one common point a step: a sign that flips in m̂/√v̂ would otherwise separate the two paths for good."""
    if backend == "native" and (reason := _ops.step_backends("cpu", F32)["native"]):
        pytest.skip(reason)
    ours, theirs = tiny_model(dtype=dtype), tiny_model(dtype=dtype)
    importance = random_importance(ours)
    alphas = {"embed": 0.1, "layers.0": 0.5, "layers.1": 0.25, "head": 0.15}
    hyper = {"lr": 1e-3, "betas": (0.9, 0.98), "eps": 1e-3, "weight_decay": 0.1}
    anchors = {name: (p + 0.1 * torch.randn_like(p)).detach() for name, p in ours.named_parameters()}
    optimizer = AlrAdamW(
        ours.named_parameters(), importance, alphas, reg_lambda=0.05, mode="coupled", normalize=normalize,
        anchor=anchors, backend=backend, **hyper,
    )  # fmt: skip
    reference = torch.optim.AdamW(theirs.parameters(), foreach=False, **hyper)
    by_name = {name: alphas[name.rpartition(".")[0]] for name in importance}
    weights = oracle.weights(importance, by_name, 0.05, normalize)
    worst = 0.0
    for number in range(17):
        train(ours, optimizer, 1, first=number)
        reference.zero_grad()
        loss = tiny_loss(theirs, number % 3)
        for name, param in theirs.named_parameters():
            loss = loss + oracle.penalty(param, anchors[name], importance[name].to(dtype), weights[name])
        loss.backward()
        reference.step()
        for got, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
            worst = max(worst, float((got - expected).detach().abs().max()))
    assert worst < (1e-12 if dtype == F64 else 2e-6), f"apart by {worst}, after moves of about {17 * hyper['lr']}"


# ---------------------------------------------------------------- what holds for any numbers


@backends
@modes
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_zero_importance_steps_as_without_penalty(backend, mode, dtype):
    columns = operands(dtype, dtype)
    plain = copied(columns) | {"importances": [], "anchors": []}
    masks = [importance == 0 for importance in columns["importances"]]
    for anchor in columns["anchors"]:
        anchor.view(-1)[: anchor.numel() // 2] = math.inf  # far away: an exact 0 must still be an exact 0
    for rotation in range(2):
        for lists in (columns, plain):
            take_step(lists, backend, counts_of(columns, rotation), Options(mode))
    assert sum(int(mask.sum()) for mask in masks) > 1000
    for name in ("params", "exp_avgs", "exp_avg_sqs", "path_integrals"):
        for got, expected, mask in zip(columns[name], plain[name], masks, strict=True):
            assert same_bits(got[mask], expected[mask]), name


@backends
@modes
@pytest.mark.parametrize("anchor", [0.0, 0.5])
@pytest.mark.parametrize("k", [10.0**e for e in range(-3, 10)])
def test_rests_where_the_penalty_balances_the_slope(backend, mode, k, anchor):
    """Task loss g·θ and curvature k: the resting point is g/k below the anchor, for k over 12 decades."""
    slope = 0.5
    # coupled is stable while lr·k/D < 2, and D ≥ eps at rest; proximal is stable for any k: lr·k/D up to 1e10
    options = {"eps": 1.0, "lr": 0.2 / k} if mode == "coupled" else {"eps": 1e-8, "lr": max(1.0, 0.1 / k)}
    param = torch.nn.Parameter(torch.tensor([anchor - 0.4 * slope / k]))
    optimizer = AlrAdamW(
        [("w", param)], {"w": torch.ones(1)}, {"(root)": 1.0}, reg_lambda=k / 2, normalize=False, mode=mode,
        anchor={"w": torch.tensor([anchor])}, weight_decay=0.0, backend=backend, **options,
    )  # fmt: skip
    for _ in range(400):
        param.grad = torch.tensor([slope])
        optimizer.step()
    rest = slope / k
    rounding = 4 * float(ulp(torch.tensor(max(anchor, rest), dtype=F64), F32))
    assert float(anchor - param.detach().double()) == pytest.approx(rest, rel=1e-4, abs=rounding if anchor else 0.0)


finite = st.floats(-1e4, 1e4, width=32)
element = st.tuples(finite, finite, finite, finite, st.floats(0, 1e8, width=32), st.floats(0, 2.0**127, width=32))


@backends
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@given(data=st.lists(element, min_size=1, max_size=8))
@example(data=[(1.0, 1.0, 1.0, 0.0, 0.0, 1e9), (-1e4, 1e4, 1e-3, 0.0, 0.0, 1e38), (0.02, 0.0, 1.0, 0.0, 0.0, 1e-38)])
@example(data=[(0.5, -0.5, 0.0, 0.0, 0.0, 1.0), (3.0, 3.1, -7.0, 5.0, 9.0, 700.0), (3.0, 2.9, -7.0, 5.0, 9.0, 1e-6)])
def test_the_pull_never_crosses_the_anchor(backend, dtype, data):
    """The weight ends between where AdamW alone would have put it and its anchor, up to a rounding of the step."""
    param, anchor, grad, exp_avg, exp_avg_sq, importance = (torch.tensor(c) for c in zip(*data, strict=True))
    param, anchor = param.to(dtype), anchor.to(dtype)
    results = []
    for omega, start in ((importance, param.clone()), (torch.zeros_like(importance), param.float())):
        values = (start, grad.to(dtype), exp_avg.clone(), exp_avg_sq.clone(), omega, anchor)
        columns = {name: [] for name in COLUMNS} | {n: [v] for n, v in zip(ORACLE_ROLES, values, strict=False)}
        take_step(columns, backend, [1.0])
        results.append(start.double())
    pulled, alone = results
    ends = torch.stack([alone, anchor.double()])
    unit = torch.stack([param.double(), anchor.double(), alone - param.double()]).abs().amax(0)
    slack = TOLERANCES["pull"].limit * ulp(unit, F32)
    low, high = (ends.amin(0) - slack).to(dtype), (ends.amax(0) + slack).to(dtype)
    assert bool(((low <= pulled) & (pulled <= high)).all()), (data, low, pulled, high, TOLERANCES["pull"].reason)


@backends
@all_modes
def test_maximize_is_minimising_the_negative(backend, mode):
    columns = operands(F32, F32, penalty=mode is not None)
    negated = copied(columns)
    for grad in negated["grads"]:
        grad.neg_()
    for lists, maximize in ((columns, True), (negated, False)):
        take_step(lists, backend, counts_of(columns), Options(mode or "proximal", maximize))
    for name in set(COLUMNS) - {"grads"}:
        assert all(map(same_bits, columns[name], negated[name])), name


@backends
@modes
def test_order_of_parameters_changes_no_bit(backend, mode):
    models = tiny_model(), tiny_model()
    importance = random_importance(models[0])
    named = list(models[1].named_parameters())
    shuffled = [named[i] for i in torch.randperm(len(named)).tolist()]
    assert [name for name, _ in shuffled] != [name for name, _ in named]
    for model, pairs in zip(models, (list(models[0].named_parameters()), shuffled), strict=True):
        optimizer = AlrAdamW(pairs, importance, lr=1e-2, reg_lambda=3.0, mode=mode, backend=backend, record=True)
        train(model, optimizer, 3)
        recorded = optimizer.recorded_importance()
        results = {name: (param, recorded[name]) for name, param in model.named_parameters()}
        if model is models[0]:
            expected = results
    for name, (param, omega) in results.items():
        assert same_bits(param, expected[name][0]), name
        assert same_bits(omega, expected[name][1]), name


@backends
def test_deepcopied_model_steps_alike(backend):
    """State follows the parameter that it belongs to, not its address."""
    model = tiny_model()
    twin = copy.deepcopy(model)
    for each in (model, twin):
        train(each, tiny_optimizer(each, backend=backend), 2)
    assert all(map(same_bits, model.parameters(), twin.parameters()))


def test_float16_parameter_overflows_as_storage_does():
    """A step beyond float16's range stores inf, as a cast does; nothing wraps."""
    for backend in ("reference", "auto"):
        columns = operands(F16, F16, penalty=False, record=False, shapes=((4,),))
        columns["params"][0].fill_(65504.0)
        columns["grads"][0].fill_(-1.0)
        take_step(columns, backend, [1.0], lr=1e6, weight_decay=0.0)
        assert bool(torch.isinf(columns["params"][0]).all())


@pytest.mark.parametrize("through", ["step", "recorder"])
def test_lazily_negated_gradients_keep_their_sign(through):
    """autograd hands real parameters of complex computations gradients whose sign is still to be applied."""
    lazy = torch.complex(torch.zeros(1), torch.ones(1)).conj().imag
    assert lazy.is_neg()
    param = torch.nn.Parameter(torch.zeros(1))
    param.grad = lazy
    if through == "step":
        AlrAdamW([param], lr=0.1, weight_decay=0.0).step()
        assert float(param.detach()) == pytest.approx(0.1)
    else:
        optimizer = torch.optim.SGD([param], lr=0.1)
        recorder = ImportanceRecorder(optimizer, [("w", param)])
        optimizer.step()
        assert float(recorder._path_integrals["w"]) == pytest.approx(0.1)


# ---------------------------------------------------------------- found_inf, clipping, unscaling


@backends
@pytest.mark.parametrize("case", [Case(), Case("split", "fp16", "int8", "int4"), Case("stochastic", moments="bf16")])
def test_found_inf_changes_nothing(case, backend):
    columns = formed(case, ((3, 256), (1, 128)))
    for grad in columns["grads"]:
        grad.view(-1)[:1] = math.inf
    before = copied(columns)
    statistics = torch.full((len(columns["params"]), len(STATISTICS)), 7.0, dtype=F64)
    take_step(columns, backend, counts_of(columns), case.options, statistics=statistics, found_inf=1.0)
    assert_same_columns(columns, before)
    assert bool((statistics == 7.0).all())


@backends
@modes
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_and_unscaling_are_torchs(max_norm, mode, backend):
    """θ, m and v as after ``unscale_`` and ``clip_grad_norm_``; ω as without clipping."""
    case, scale = Case(mode=mode, importance="fp32"), 2.0**10
    ours = formed(case, ((17,), (33, 128)))
    theirs, unclipped = copied(ours), copied(ours)
    for grad in ours["grads"]:
        grad.mul_(scale)
    tensors = [torch.zeros_like(grad) for grad in theirs["grads"]]
    for tensor, grad in zip(tensors, theirs["grads"], strict=True):
        tensor.grad = grad
    norm = torch.nn.utils.clip_grad_norm_(tensors, max_norm, foreach=False)
    clip = oracle.clip_factor(ours["grads"], max_norm, 1 / scale)
    assert clip == pytest.approx(min(1.0, max_norm / float(norm)), rel=1e-6)
    assert (clip < 0.2) == (max_norm == 0.5)
    coefficient = float((max_norm / (norm + 1e-6)).clamp(max=1.0))
    counts = counts_of(ours)
    take_step(ours, backend, counts, case.options, inverse_scale=1 / scale, clip=coefficient)
    take_step(theirs, backend, counts, case.options)
    assert_same_columns(ours, theirs, ("params", "exp_avgs", "exp_avg_sqs"))
    for i, omega in enumerate(ours["path_integrals"]):
        moved = (unclipped["path_integrals"][i], unclipped["grads"][i], unclipped["params"][i], ours["params"][i])
        expected = oracle.record(*moved)
        scales = (expected - unclipped["path_integrals"][i].double()).abs() + moved[0].double().abs()
        within(relative_error(omega, expected, scales), "path_integral")
        assert same_bits(omega, theirs["path_integrals"][i]) == (max_norm == 1e6)
