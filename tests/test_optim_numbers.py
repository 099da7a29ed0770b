"""The numbers of a step: clipping, loss scaling, tensors for lr and λ, and that every change takes effect at once."""

from __future__ import annotations

import copy
import math

import oracle
import pytest
import torch
from cases import (
    ALPHAS,
    BACKENDS,
    BF16,
    F32,
    F64,
    MODES,
    assert_same_state,
    layer,
    members,
    param_error,
    random_importance,
    relative_error,
    same_bits,
    set_grads,
    tiny_model,
    tiny_optimizer,
    within,
)
from forms import FORMS, mixed_model, steps
from forms import forms as in_every_form
from forms import new as mixed_optimizer

from alr_kernels import AlrAdamW, DynamicCoeffs

backends = pytest.mark.parametrize("backend", BACKENDS)
modes = pytest.mark.parametrize("mode", MODES)
HUGE = 2.0**20


# ---------------------------------------------------------------- clipping


def in_groups(model, **options):
    """Return an optimizer of two groups, in which parameters with and without importance take turns."""
    named = list(model.named_parameters())
    importance = {name: t for name, t in random_importance(model).items() if "weight" in name}
    groups = [{"params": named[:3]}, {"params": named[3:], "lr": 3e-3, "reg_lambda": 0.5, "weight_decay": 0.3}]
    return AlrAdamW(groups, importance, lr=1e-2, weight_decay=0.1, reg_lambda=3.0, **options)


@backends
@modes
@pytest.mark.parametrize("limit", [0.3, 1e4], ids=("clipping", "not clipping"))
def test_clipping_inside_is_clip_grad_norm_before(mode, limit, backend):
    ours, theirs = tiny_model(), tiny_model()
    inside = in_groups(ours, mode=mode, backend=backend, max_grad_norm=limit)
    outside = in_groups(theirs, mode=mode, backend=backend)
    assert inside.grad_norm is None
    for number in range(12):  # norms of many gradients: their sum of squares depends on the order
        set_grads(inside, number)
        set_grads(outside, number)
        whole = [p.grad.clone() for p in members(inside)]
        norm = torch.nn.utils.clip_grad_norm_(members(outside), limit)
        inside.step()
        outside.step()
        assert same_bits(inside.grad_norm, norm)
        assert (float(norm) > limit) is (limit < 1)
        assert all(same_bits(p.grad, grad) for p, grad in zip(members(inside), whole, strict=True))
    assert_same_state(inside, outside)


@backends
@modes
def test_omega_is_recorded_with_the_whole_gradient(mode, backend):
    model = tiny_model()
    optimizer = tiny_optimizer(model, mode=mode, backend=backend, record=True, max_grad_norm=0.1, maximize=True)
    omegas = [torch.zeros_like(p) for p in members(optimizer)]
    for number in range(3):
        before = [p.detach().clone() for p in members(optimizer)]
        steps(optimizer, number, number + 1)
        for i, (param, theta) in enumerate(zip(members(optimizer), before, strict=True)):
            omega = oracle.record(omegas[i], param.grad, theta, param, maximize=True)
            found = optimizer.state[param]["path_integral"]
            size = omegas[i].double().abs() + (param.grad.double() * (param.double() - theta.double())).abs()
            within(relative_error(found, omega, size.detach() + 1e-30), "path_integral")
            omegas[i] = found.clone()
    assert float(optimizer.grad_norm) > 1, "nothing was clipped"


@backends
@modes
def test_clipping_leaves_the_penalty_alone(mode, backend):
    model = tiny_model()
    importance, anchor = random_importance(model), {name: torch.randn_like(p) for name, p in model.named_parameters()}
    optimizer = tiny_optimizer(
        model, mode=mode, backend=backend, coeffs=ALPHAS, normalize=False, anchor=anchor, max_grad_norm=0.5
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    steps(optimizer, 0, 1)
    clip = oracle.clip_factor([p.grad for p in members(optimizer)], 0.5)
    assert clip < 0.1
    for name, param in model.named_parameters():
        expected, exp_avg, _ = oracle.step(
            before[name], param.grad, 0 * param, 0 * param, 1, lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8,
            weight_decay=0.1, mode=mode, importance=importance[name], anchor=anchor[name],
            weight=3.0 * ALPHAS[layer(name)], clip=clip,
        )  # fmt: skip
        found = optimizer.state[param]["exp_avg"]
        pull = oracle.penalty_gradient(before[name], anchor[name], importance[name], 3.0 * ALPHAS[layer(name)])
        size = 0.1 * (param.grad.double().abs() * clip + (pull.abs() if mode == "coupled" else 0.0))
        within(relative_error(found, exp_avg, size), "moment")
        distance = float((before[name] - anchor[name]).abs().max())
        within(param_error(param.detach(), expected, before[name], max(1e-2, distance)), ("param", F32))


def test_the_norm_is_one_over_all_dtypes():
    """bf16 gradients are summed in float32, where torch's own function rounds each norm to bf16."""
    model = tiny_model()
    model.head.to(BF16)
    optimizer = tiny_optimizer(model, max_grad_norm=0.5)
    steps(optimizer, 0, 1)
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in members(optimizer)))
    assert optimizer.grad_norm.dtype == F32
    assert float(optimizer.grad_norm) == pytest.approx(norm, rel=1e-6)


# ---------------------------------------------------------------- loss scaling


def scaler_of(scale=HUGE, backoff=0.25):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=backoff, growth_interval=10**6)
    scaler.scale(torch.zeros(()))  # makes its tensors
    return scaler


def scaled_steps(optimizer, scaler, numbers, unscale=False, poison=()):
    """Take steps with scaled gradients; those whose number is in ``poison`` have one infinity or NaN."""
    for number in numbers:
        set_grads(optimizer, number)
        for param in members(optimizer):
            param.grad *= scaler.get_scale()
        if number in poison:
            members(optimizer)[-1].grad.view(-1)[0] = math.inf if number % 2 else math.nan
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()


SCALED = {
    "plain": {},
    "clipped": {"max_grad_norm": 0.5},
    "recording": {"record": True, "stats": True, "maximize": True},
    "coupled": {"mode": "coupled", "record": True, "max_grad_norm": 0.5},
}


@backends
@pytest.mark.parametrize("unscale", [False, True], ids=("in the step", "unscale_ first"))
@pytest.mark.parametrize("what", SCALED)
def test_scaled_gradients_give_the_same_bits(what, unscale, backend):
    scaled, plain = (tiny_optimizer(tiny_model(), backend=backend, **SCALED[what]) for _ in range(2))
    scaled_steps(scaled, scaler_of(), range(4), unscale)
    steps(plain, 0, 4)
    assert_same_state(scaled, plain)
    if "max_grad_norm" in SCALED[what]:
        assert float(scaled.grad_norm) == float(plain.grad_norm)
    if "record" in SCALED[what]:
        assert scaled.recorded_importance().stats == plain.recorded_importance().stats
        assert scaled.recorded_steps == plain.recorded_steps == 4
    if "stats" in SCALED[what]:
        assert scaled.stats() == plain.stats()
    assert not hasattr(scaled, "found_inf")


@backends
@pytest.mark.parametrize("unscale", [False, True], ids=("in the step", "unscale_ first"))
@pytest.mark.parametrize("bad", [(0,), (2, 3)], ids=str)
@pytest.mark.parametrize("what", SCALED)
def test_a_step_with_infinities_changes_nothing(what, bad, unscale, backend):
    scaled, plain = (tiny_optimizer(tiny_model(), backend=backend, **SCALED[what]) for _ in range(2))
    scaler = scaler_of()
    scaled_steps(scaled, scaler, range(5), unscale, poison=bad)
    for number in sorted({*range(5)} - set(bad)):
        steps(plain, number, number + 1)
    assert_same_state(scaled, plain)
    assert {float(state["step"]) for state in scaled.state.values()} == {5.0 - len(bad)}
    assert scaler.get_scale() == HUGE * 0.25 ** len(bad)
    if "record" in SCALED[what]:
        assert scaled.recorded_steps == scaled.recorded_importance().steps == 5 - len(bad)
        assert scaled.state_dict()["param_groups"][0]["recorded_steps"] == 5 - len(bad)
    if "stats" in SCALED[what]:
        seen = scaled.stats()
        assert seen == plain.stats()
        scaled_steps(scaled, scaler, [7], unscale, poison=[7])
        assert scaled.stats() == seen


@in_every_form
def test_a_skipped_step_changes_nothing_in_few_bytes(form):
    dtype, options = FORMS[form]
    scaled, plain = (mixed_optimizer(mixed_model(dtype), record=True, **options) for _ in range(2))
    scaled_steps(scaled, scaler_of(2.0**10), range(4), poison=(1,))
    for number in (0, 2, 3):
        steps(plain, number, number + 1)
    assert_same_state(scaled, plain)


def test_steps_skipped_before_saving_are_not_counted_after_loading():
    model = tiny_model()
    optimizer = tiny_optimizer(model, record=True)
    scaled_steps(optimizer, scaler_of(), range(3), poison=(1,))
    loaded = tiny_optimizer(model, record=True)
    loaded.load_state_dict(optimizer.state_dict())
    twin = copy.deepcopy(optimizer)
    for each in (loaded, twin):
        assert each.recorded_steps == 2
        steps(each, 3, 4)
        assert each.recorded_steps == each.recorded_importance().steps == 3
        each.start_phase()
        assert each.recorded_steps == 0


# ---------------------------------------------------------------- numbers as tensors


@backends
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_lr_and_lambda_as_tensors_equal_numbers(dtype, backend):
    lr, strength = torch.tensor(2.0**-7, dtype=dtype), torch.tensor(2.5, dtype=dtype)
    given = tiny_optimizer(tiny_model(), backend=backend, lr=lr, reg_lambda=strength)
    plain = tiny_optimizer(tiny_model(), backend=backend, lr=2.0**-7, reg_lambda=2.5)
    for each in (given, plain):
        steps(each, 0, 2)
    assert_same_state(given, plain)
    lr.fill_(2.0**-6)  # in place: what schedulers do, and captured graphs need
    strength.fill_(0.5)
    plain.param_groups[0].update(lr=2.0**-6, reg_lambda=0.5)
    for each in (given, plain):
        steps(each, 2, 4)
    assert_same_state(given, plain)
    assert float(given.penalty()) == float(plain.penalty()) > 0
    assert given.param_groups[0]["lr"] is lr


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=6),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda number: 0.5**number),
        lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.7),
    ],
    ids=("cosine", "lambda", "exponential"),
)
def test_schedulers_drive_an_lr_tensor(make):
    given = tiny_optimizer(tiny_model(), lr=torch.tensor(1e-2, dtype=F64))
    plain = tiny_optimizer(tiny_model(), lr=1e-2)
    schedulers = [make(each) for each in (given, plain)]
    lrs = set()
    for number in range(6):
        for each, scheduler in zip((given, plain), schedulers, strict=True):
            steps(each, number, number + 1)
            scheduler.step()
        lr = given.param_groups[0]["lr"]
        assert float(lr) == pytest.approx(plain.param_groups[0]["lr"], rel=1e-12)
        plain.param_groups[0]["lr"] = float(lr)  # float64 tensors and floats may round differently in the schedule
        lrs.add(float(lr))
    assert len(lrs) == 6
    assert_same_state(given, plain)


# ---------------------------------------------------------------- changes between steps


CHANGES = {
    "lr": lambda o: o.param_groups[0].update(lr=5e-2),
    "betas": lambda o: o.param_groups[0].update(betas=(0.5, 0.9)),
    "eps": lambda o: o.param_groups[0].update(eps=1e-2),
    "weight_decay": lambda o: o.param_groups[0].update(weight_decay=0.7),
    "maximize": lambda o: o.param_groups[0].update(maximize=True),
    "reg_lambda": lambda o: o.param_groups[0].update(reg_lambda=0.25),
    "no penalty": lambda o: o.param_groups[0].update(reg_lambda=0.0),
    "rule": lambda o: o.set_coeffs("uniform"),
    "coefficients": lambda o: o.set_coeffs({"embed": 0.0, "layers.0": 0.7, "layers.1": 0.2, "head": 0.1}),
    "dynamic": lambda o: o.set_coeffs(DynamicCoeffs("uniform", every=1)),
}


@backends
@modes
@pytest.mark.parametrize("what", CHANGES)
def test_a_change_takes_effect_at_the_next_step(what, mode, backend):
    """The changed optimizer goes on as one does that has never stepped before, and not as an unchanged one."""
    model = tiny_model()
    optimizer = tiny_optimizer(model, mode=mode, backend=backend, coeffs=ALPHAS)
    steps(optimizer, 0, 2)
    unchanged = copy.deepcopy(optimizer)
    fresh = tiny_optimizer(copy.deepcopy(model), mode=mode, backend=backend, coeffs=ALPHAS)
    fresh.load_state_dict(optimizer.state_dict())
    for each in (optimizer, fresh):
        CHANGES[what](each)
    for each in (optimizer, fresh, unchanged):
        steps(each, 2, 4)
    assert_same_state(optimizer, fresh)
    assert not any(map(same_bits, members(optimizer), members(unchanged))), f"{what} has no effect"
    assert (optimizer.coeffs != unchanged.coeffs) is (what in ("rule", "coefficients", "dynamic"))


def test_lambda_goes_to_zero_and_back():
    optimizer, plain = (tiny_optimizer(tiny_model(), stats=True) for _ in range(2))
    steps(optimizer, 0, 2)
    steps(plain, 0, 2)
    optimizer.param_groups[0]["reg_lambda"] = 0.0
    assert float(optimizer.penalty()) == 0
    steps(optimizer, 2, 3)
    assert all(float(row["penalty"]) == 0 for row in optimizer.stats().values())
    steps(plain, 2, 3)
    plain.load_state_dict(optimizer.state_dict())
    for mine, other in zip(members(optimizer), members(plain), strict=True):
        other.data.copy_(mine)
    for each in (optimizer, plain):
        each.param_groups[0]["reg_lambda"] = 3.0
        steps(each, 3, 5)
    assert_same_state(optimizer, plain)
    assert optimizer.stats() == plain.stats()


# ---------------------------------------------------------------- which gradients there are


@backends
def test_parameters_without_gradient_sit_a_step_out(backend):
    """Whatever the others do, each goes on as if it had an optimizer of its own."""
    model, other = tiny_model(), tiny_model()
    options = {"lr": 1e-2, "weight_decay": 0.1, "reg_lambda": 3.0, "normalize": False, "record": True}
    options |= {"backend": backend}
    importance = random_importance(model)
    together = AlrAdamW(model.named_parameters(), importance, ALPHAS, **options)
    alone = [
        AlrAdamW([(name, param)], {name: importance[name]}, {layer(name): ALPHAS[layer(name)]}, **options)
        for name, param in other.named_parameters()
    ]
    for number in range(6):
        set_grads(together, number)
        for index, (param, each) in enumerate(zip(members(together), alone, strict=True)):
            if (index + number) % 3 == 0 or (number == 4 and index < 3):
                param.grad = None
            members(each)[0].grad = None if param.grad is None else param.grad.clone()
            each.step()
        together.step()
    for param, each in zip(members(together), alone, strict=True):
        (own,) = members(each)
        assert same_bits(param, own)
        for key, value in together.state[param].items():
            assert same_bits(value, each.state[own][key]), key
    assert together.recorded_steps == 6


@pytest.mark.skipif(not hasattr(torch.nn.Parameter(torch.ones(1)), "grad_dtype"), reason="this torch has no grad_dtype")
@backends
def test_gradients_may_change_their_dtype(backend):
    turning, plain = (tiny_optimizer(tiny_model(), backend=backend, stats=True, record=True) for _ in range(2))
    for number in range(4):
        for each in (turning, plain):
            for param in members(each):
                param.grad, param.grad_dtype = None, F32
            set_grads(each, number)
            for param in members(each):
                grad, param.grad = param.grad.to(BF16), None
                param.grad_dtype = BF16 if each is turning and number % 2 else F32
                param.grad = grad.to(param.grad_dtype)
            each.step()
        assert turning.stats() == plain.stats()
    assert_same_state(turning, plain)


def test_a_group_added_later_has_numbers_of_its_own():
    model, other = tiny_model(), tiny_model()
    named, twins = list(model.named_parameters()), list(other.named_parameters())
    options = {"lr": 1e-2, "weight_decay": 0.1, "reg_lambda": 3.0, "max_grad_norm": 0.5, "record": True}
    later = AlrAdamW(named[:4], random_importance(named[:4]), **options)
    second = {"lr": 1e-3, "weight_decay": 0.2, "reg_lambda": 0.5}
    later.add_param_group({"params": named[4:], **second})
    assert [group["lr"] for group in later.param_groups] == [1e-2, 1e-3]
    later.start_phase(random_importance(model), ALPHAS)
    at_once = AlrAdamW(
        [{"params": twins[:4]}, {"params": twins[4:], **second}], random_importance(other), ALPHAS, **options
    )
    for each in (later, at_once):
        steps(each, 0, 3)
    assert_same_state(later, at_once)
    assert later.recorded_importance().stats == at_once.recorded_importance().stats
