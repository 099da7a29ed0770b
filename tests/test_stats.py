"""Statistics of a step against float64 formulas: which they are, of which parameters, of which step."""

from __future__ import annotations

import copy
import pickle

import oracle
import pytest
import torch
from cases import (
    BACKENDS,
    F64,
    MODES,
    assert_same_state,
    layer,
    members,
    random_importance,
    set_grads,
    tiny_model,
    tiny_optimizer,
    within,
)
from forms import FORMS, mixed_model, steps, whole
from forms import forms as in_every_form
from forms import new as mixed_optimizer

from alr_kernels import AlrAdamW
from alr_kernels.step.plan import STATISTICS

backends = pytest.mark.parametrize("backend", BACKENDS)
modes = pytest.mark.parametrize("mode", MODES)


def before_step(optimizer):
    """Return name → (θ, θ*), float64, as the next step will see them."""
    return {
        slot.name: (whole(optimizer, param), optimizer.state[param]["anchor"].double().clone())
        for _, slot, param in optimizer._members()
    }


def decoded(optimizer):
    """Return name → Ω of a :func:`forms.mixed_model`, float64, decoded by the oracle."""
    tensors, found = iter(optimizer.importance_tensors()), {}
    for _, slot, param in optimizer._members():
        codes = next(tensors)
        if codes.dtype is not torch.uint8:
            found[slot.name] = codes.double()
            continue
        bits = 8 if codes.shape == param.shape else 4
        codes = codes if bits == 8 else oracle.unpack(codes)
        found[slot.name] = oracle.decode(codes, next(tensors), f"importance {bits}")
    return found


def moments(state):
    """Return v, float64, decoded by the oracle."""
    if "exp_avg_sq_scale" in state:
        return oracle.decode(state["exp_avg_sq"], state["exp_avg_sq_scale"], "exp_avg_sq")
    return state["exp_avg_sq"].double()


def expected_stats(optimizer, before, importance, weights, layer_of, *, maximize=False):
    """Return layer → statistic → (value, size of the terms) of the step that was just taken."""
    group = optimizer.param_groups[0]
    result = {}
    for _, slot, param in optimizer._members():
        state = optimizer.state[param]
        denom = oracle.denominator(moments(state), float(state["step"]), group["betas"][1], group["eps"])
        gradient = oracle.task_gradient(param.grad, maximize)
        found = oracle.statistics(
            *(before[slot.name][0], gradient, before[slot.name][1]),
            *(importance[slot.name], weights[slot.name], group["lr"], denom),
        )
        layer_rows = result.setdefault(layer_of(slot.name), {})
        for key, pair in found.items():
            rows = [pair, layer_rows.get(key, (0.0, 0.0))]
            layer_rows[key] = max(rows) if key == "stiffness" else tuple(map(sum, zip(*rows, strict=True)))
    return result


def assert_stats(found, expected, ignore=()):
    assert found.keys() == expected.keys()
    for name, row in expected.items():
        assert tuple(found[name]) == STATISTICS
        for key, (value, size) in row.items():
            got = found[name][key]
            assert (got.dtype, got.shape) == (F64, ()), (name, key)
            if key not in ignore:
                within(abs(float(got) - value) / max(size, 1e-300), "step statistics")


@backends
@modes
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize": False, "maximize": True},
        {"max_grad_norm": 0.1, "record": True},
        {"coeffs": "uniform", "lr": 0.1},
    ],
    ids=str,
)
def test_statistics_are_those_of_the_formulas(options, mode, backend):
    model = tiny_model()
    optimizer = tiny_optimizer(model, mode=mode, backend=backend, stats=True, **options)
    steps(optimizer, 0, 2)
    importance = random_importance(model)
    alphas = {name: optimizer.coeffs[layer(name)] for name in importance}
    weights = oracle.weights(importance, alphas, 3.0, options.get("normalize", True))
    before, penalty = before_step(optimizer), optimizer.penalty_by_layer()
    steps(optimizer, 2, 3)
    found = optimizer.stats()
    expected = expected_stats(optimizer, before, importance, weights, layer, maximize=options.get("maximize", False))
    assert_stats(found, expected)
    for name, row in found.items():
        assert float(row["penalty"]) == pytest.approx(float(penalty[name]), rel=2e-6)
        assert float(row["stiffness"]) > 0


@backends
@modes
@in_every_form
def test_every_form_of_a_layer_is_summed(form, mode, backend):
    """A layer's vectors stay fp32 where its matrices are codes: two calls of the step, one row of statistics."""
    dtype, options = FORMS[form]
    optimizer = mixed_optimizer(mixed_model(dtype), mode=mode, backend=backend, stats=True, **options)
    steps(optimizer, 0, 2)
    before, importance = before_step(optimizer), decoded(optimizer)
    weights = dict.fromkeys(importance, 0.9 * 0.35)
    steps(optimizer, 2, 3)
    block = {"experts.0": "experts.0"}
    expected = expected_stats(optimizer, before, importance, weights, lambda name: block.get(name) or layer(name))
    # D is made of v before it is stored; what is kept of it shows the stiffness less exactly
    ignore = ("stiffness",) if options.get("state_dtype", "fp32") != "fp32" else ()
    assert_stats(optimizer.stats(), expected, ignore)
    for name, row in expected.items():
        assert float(optimizer.stats()[name]["stiffness"]) == pytest.approx(row["stiffness"][0], rel=0.5)


def test_parameters_without_importance_count_by_their_gradient_alone():
    model = tiny_model()
    importance = {name: t for name, t in random_importance(model).items() if name.endswith("weight")}
    optimizer = AlrAdamW(model.named_parameters(), importance, stats=True)
    steps(optimizer, 0, 2)
    row = optimizer.stats()["head"]
    squares = [float(p.grad.double().square().sum()) for p in model.head.parameters()]
    assert float(row["grad_sq"]) == pytest.approx(sum(squares), rel=1e-6)
    moved = model.head.weight.detach().double() - optimizer.state[model.head.weight]["anchor"].double()
    assert 0 < float(row["drift_sq"]) != pytest.approx(float(moved.square().sum()), rel=1e-3)  # before the step
    plain = AlrAdamW(tiny_model().named_parameters(), stats=True)
    steps(plain, 0, 1)
    for row in plain.stats().values():
        assert float(row["grad_sq"]) > 0
        assert not any(float(row[key]) for key in STATISTICS if key != "grad_sq")


@modes
def test_statistics_are_of_the_last_step_alone(mode):
    """Whatever was called before: other gradients, another λ, another dtype."""
    optimizer = tiny_optimizer(tiny_model(), mode=mode, stats=True)
    steps(optimizer, 0, 2)
    set_grads(optimizer, 2)
    for param in members(optimizer)[:-2]:
        param.grad = None
    optimizer.step()
    assert set(optimizer.stats()) == {"head"}
    optimizer.param_groups[0]["reg_lambda"] = 0.0
    steps(optimizer, 3, 4)
    total = sum(float(p.grad.double().square().sum()) for p in members(optimizer))
    assert sum(float(row["grad_sq"]) for row in optimizer.stats().values()) == pytest.approx(total, rel=1e-6)


def test_statistics_are_copies_and_nothing_is_gathered_unasked():
    optimizer = tiny_optimizer(tiny_model(), stats=True)
    with pytest.raises(RuntimeError, match="stats=True and take a step"):
        optimizer.stats()
    steps(optimizer, 0, 2)
    first = optimizer.stats()
    kept = copy.deepcopy(first)
    steps(optimizer, 2, 3)
    assert first == kept != optimizer.stats()
    plain = tiny_optimizer(tiny_model())
    steps(plain, 0, 2)
    with pytest.raises(RuntimeError, match="stats=True"):
        plain.stats()
    steps(twin := pickle.loads(pickle.dumps(optimizer)), 3, 4)
    steps(optimizer, 3, 4)
    assert twin.stats() == optimizer.stats()


@backends
@modes
def test_gathering_changes_no_bit(mode, backend):
    with_stats, without = (
        tiny_optimizer(tiny_model(), mode=mode, backend=backend, record=True, stats=stats) for stats in (True, False)
    )
    for each in (with_stats, without):
        steps(each, 0, 3)
    assert_same_state(with_stats, without)
