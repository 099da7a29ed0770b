"""State in few bytes is saved, loaded, copied and carried into the next phase with every bit that it has."""

from __future__ import annotations

import copy
import pickle
import random

import oracle
import pytest
import torch
from cases import (
    BF16,
    F32,
    assert_same_state,
    assert_unchanged,
    members,
    random_importance,
    relative_error,
    same_bits,
    set_grads,
    snapshot,
    within,
)
from forms import ALPHAS, BLOCKS, FORMS, LARGE, backends, fitting, forms, mixed_model, new, steps, trained, whole

from alr_kernels import AlrAdamW, DynamicCoeffs


def through_a_file(state, path):
    torch.save(state, path)
    return torch.load(path, weights_only=True)


# ---------------------------------------------------------------- saving


@backends
@forms
def test_resuming_is_bit_identical(tmp_path, form, backend):
    dtype, options = FORMS[form]
    model, optimizer = trained(form, backend, record=True)
    other = mixed_model(dtype, seed=1)
    other.load_state_dict(through_a_file(model.state_dict(), tmp_path / "model.pt"))
    resumed = new(other, backend=backend, record=True, **options)
    resumed.load_state_dict(through_a_file(optimizer.state_dict(), tmp_path / "state.pt"))
    assert_same_state(resumed, optimizer)
    for each in (optimizer, resumed):
        steps(each, 3, 6)
    assert_same_state(resumed, optimizer)
    assert float(resumed.penalty()) == float(optimizer.penalty()) > 0
    ends = resumed.recorded_importance(), optimizer.recorded_importance()
    assert ends[0].steps == ends[1].steps == 6
    assert ends[0].stats == ends[1].stats


@forms
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_bit_for_bit(form, how):
    pair = trained(form, record=True)
    other, twin = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert not {p.data_ptr() for p in pair[0].parameters()} & {p.data_ptr() for p in other.parameters()}
    for optimizer in (pair[1], twin):
        steps(optimizer, 3, 5)
    assert_same_state(twin, pair[1])
    assert repr(twin) == repr(pair[1])


def assert_nearest_codes(codes, values, kind):
    """Check codes against where they lie between two, so that near a half either will do."""
    positions = oracle.code_positions(values, oracle.code_scales(values, kind), kind)
    if kind == "exp_avg_sq":
        positions = torch.where(values > 0, positions.clamp(min=0.5), positions)
    beyond = ((codes.double() - positions).abs() - 0.5).clamp(min=0)
    within(relative_error(beyond, torch.zeros_like(positions), positions.abs()), "code")


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(
    ("dtype", "master"), [(F32, "none"), (BF16, "none"), (BF16, "split"), (BF16, "stochastic")], ids=str
)
def test_a_state_of_torch_adamw_is_encoded(dtype, master, kind):
    model = mixed_model(dtype)
    reference = torch.optim.AdamW(model.parameters(), lr=3e-3)
    steps(reference, 0, 3)
    optimizer = new(model, state_dtype=kind, master=master, record=True)
    optimizer.load_state_dict(reference.state_dict())
    assert optimizer.param_groups[0]["lr"] == 3e-3
    for name, param in model.named_parameters():
        state, theirs = optimizer.state[param], reference.state[param]
        assert float(state["step"]) == 3
        form = fitting(name, kind, "fp32")
        for key in ("exp_avg", "exp_avg_sq"):
            if form == "int8":
                assert same_bits(state[f"{key}_scale"].double(), oracle.code_scales(theirs[key], key)), (name, key)
                assert_nearest_codes(state[key], theirs[key], key)
            else:
                assert same_bits(state[key], theirs[key].to(F32 if form == "fp32" else BF16)), (name, key)
    steps(optimizer, 3, 4)
    assert float(optimizer.state[model.head.bias]["step"]) == 4


def test_codes_load_into_fp32_moments_and_back():
    model, optimizer = trained("int8")
    wide, back = new(model), new(model, **FORMS["int8"][1])
    wide.load_state_dict(optimizer.state_dict())
    for name, param in model.named_parameters():
        saved, state = optimizer.state[param], wide.state[param]
        assert not {"exp_avg_scale", "exp_avg_sq_scale"} & set(state)
        for key in ("exp_avg", "exp_avg_sq"):
            assert state[key].dtype == F32
            value = oracle.decode(saved[key], saved[f"{key}_scale"], key) if name in BLOCKS else saved[key].double()
            within(relative_error(state[key], value, value.abs()), "moment")
    back.load_state_dict(wide.state_dict())
    for name, param in model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(back.state[param][key], optimizer.state[param][key]), (name, key)


def test_a_split_state_needs_its_remainders():
    model, optimizer = trained("split")
    plain = new(model, anchor_dtype="fp32", importance_dtype="bf16")
    steps(plain, 0, 1)
    before = snapshot(plain)
    with pytest.raises(ValueError, match=r"saved with master='split'.*has 'none'; construct it with master='split'"):
        plain.load_state_dict(optimizer.state_dict())
    assert_unchanged(plain, before)


def test_a_state_without_remainders_becomes_a_master():
    """Whoever turns the master on in mid-run begins with the bf16 weights, exactly."""
    model = mixed_model(BF16)
    plain = new(model)
    steps(plain, 0, 2)
    weights = [p.detach().clone() for p in model.parameters()]
    optimizer = new(model, master="split", record=True)
    optimizer.load_state_dict(plain.state_dict())
    set_grads(optimizer, 2)
    for param in model.parameters():
        param.grad.zero_()
    optimizer.param_groups[0].update(lr=0.0)
    optimizer.step()
    for param, weight in zip(model.parameters(), weights, strict=True):
        assert same_bits(param, weight)
        assert not optimizer.state[param]["remainder"].any()


def test_a_split_parameter_that_never_had_a_gradient_is_saved_and_loaded():
    model = mixed_model(BF16)
    model.head.weight.requires_grad_(False)
    optimizer = AlrAdamW(model.named_parameters(), master="split")
    for param in model.parameters():
        param.grad = torch.ones_like(param) if param.requires_grad else None
    optimizer.step()
    loaded = AlrAdamW(model.named_parameters(), master="split")
    loaded.load_state_dict(optimizer.state_dict())
    assert_same_state(loaded, optimizer)


# ---------------------------------------------------------------- phases and recording


@pytest.mark.parametrize("fresh", [False, True], ids=("same importance", "new importance"))
@forms
def test_start_phase_in_every_form(form, fresh):
    model, optimizer = trained(form, record=True)
    before = [tensor.clone() for tensor in optimizer.importance_tensors()]
    importance = random_importance(model, 9)
    optimizer.start_phase(importance if fresh else None)
    exact = FORMS[form][1].get("anchor_dtype") != "bf16"
    assert not exact or float(optimizer.penalty()) == 0
    here = {name: whole(optimizer, p) for name, p in model.named_parameters()}
    steps(optimizer, 3, 4)
    assert optimizer.recorded_importance().steps == 1
    other = new(model, **FORMS[form][1])
    other.start_phase(importance if fresh else None)
    steps(other, 0, 1)
    for now, then, expected in zip(optimizer.importance_tensors(), before, other.importance_tensors(), strict=True):
        assert same_bits(now, expected)
        assert torch.equal(now, then) is not fresh
    for name, param in model.named_parameters():
        state = optimizer.state[param]
        assert torch.equal(state["start"].double(), here[name]), f"{name}: the start is the weight, exactly"
        rounded = not exact and name in LARGE
        assert torch.equal(state["anchor"].double(), here[name].to(BF16).double() if rounded else here[name]), name


def test_the_penalty_is_that_of_the_master():
    model = mixed_model(BF16)
    optimizer = new(model, master="split")
    steps(optimizer, 0, 3)
    importance = random_importance(model)
    total = sum(
        float(oracle.penalty(whole(optimizer, p), optimizer.state[p]["anchor"].double(), importance[n], 0.9 * 0.35))
        for n, p in model.named_parameters()
    )
    assert float(optimizer.penalty()) == pytest.approx(total, rel=1e-9)


def test_a_split_master_is_recorded_exactly():
    model, optimizer = trained("split", record=True)
    optimizer.start_phase()  # the start is then a float32 number that bf16 does not hold
    start = {name: whole(optimizer, p) for name, p in model.named_parameters()}
    steps(optimizer, 3, 6)
    recorded = optimizer.recorded_importance(xi=1e-4)
    for name, param in model.named_parameters():
        state = optimizer.state[param]
        end = whole(optimizer, param)
        assert not torch.equal(end, param.double()), "no remainder is at work"
        expected, _ = oracle.finalise(state["path_integral"], end, start[name], 1e-4)
        within(relative_error(recorded[name], expected, expected), "importance")


# ---------------------------------------------------------------- what is kept from step to step


def some_change(draw, optimizer, model):
    """Do one of the things that make what is kept between steps stale."""
    group = optimizer.param_groups[0]
    what, number = draw.randrange(8), draw.randrange(3)
    if what == 0:
        group["lr"] = (1e-2, 3e-3, torch.tensor(1e-3))[number]
    elif what == 1:
        group["reg_lambda"] = (0.0, 0.9, torch.tensor(2.0))[number]
    elif what == 2:
        optimizer.set_coeffs((ALPHAS, "uniform", DynamicCoeffs("softmax", every=2))[number])
    elif what == 3:
        optimizer.start_phase(random_importance(model, number) if number else None)
    elif what == 4:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif what == 5:
        group["maximize"] = bool(number % 2)
    for index, param in enumerate(members(optimizer)):
        if what >= 6 and index % 3 == number:
            param.grad = None


@backends
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("form", ["smallest", "stochastic int8", "bf16"])
def test_nothing_that_is_kept_between_steps_goes_stale(form, seed, backend):
    """After any change the step is that of a copy, which keeps nothing."""
    dtype, options = FORMS[form]
    model = mixed_model(dtype)
    optimizer = new(model, backend=backend, record=True, stats=True, max_grad_norm=5.0, **options)
    draw = random.Random(seed)
    for number in range(12):
        set_grads(optimizer, number)
        some_change(draw, optimizer, model)
        cold = copy.deepcopy(optimizer)
        for param, same in zip(members(optimizer), members(cold), strict=True):
            same.grad = None if param.grad is None else param.grad.clone()
        optimizer.step()
        cold.step()
        assert_same_state(cold, optimizer)
        assert cold.stats() == optimizer.stats()
        assert cold.coeffs == optimizer.coeffs


def test_anchors_of_small_split_parameters_stay_exact_on_resume():
    """After a phase their value is a float32 number, which anchor_dtype="bf16" leaves alone: they are small."""
    model, optimizer = trained("smallest", count=3)
    optimizer.start_phase()
    steps(optimizer, 3, 5)
    twin = copy.deepcopy(model)
    resumed = new(twin, **FORMS["smallest"][1])
    resumed.load_state_dict(optimizer.state_dict())
    for each in (optimizer, resumed):
        steps(each, 5, 30)
    assert float(resumed.penalty()) == float(optimizer.penalty()) > 0
    assert_same_state(resumed, optimizer)
