"""DynamicCoeffs: the documented rule by hand, what it does to a run, and that a resumed run balances alike."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from cases import (
    ALPHAS,
    BACKENDS,
    BF16,
    F64,
    MODES,
    assert_same_state,
    assert_unchanged,
    layer,
    members,
    random_importance,
    set_grads,
    snapshot,
    tiny_model,
    tiny_optimizer,
    train,
)
from forms import FORMS, mixed_model, steps
from forms import new as mixed_optimizer
from hypothesis import given
from hypothesis import strategies as st

from alr_kernels import AlrAdamW, DynamicCoeffs, layer_coefficients
from alr_kernels.coefficients import rebalanced

backends = pytest.mark.parametrize("backend", BACKENDS)
modes = pytest.mark.parametrize("mode", MODES)


# ---------------------------------------------------------------- the rule


def by_hand(alphas, pulls, grads, rate, most):
    """Return layer → α after one re-balancing, in Python's floats."""
    live = [name for name in alphas if pulls[name] > 0 and grads[name] > 0]
    ratios = {name: math.sqrt(pulls[name] / grads[name]) for name in live}
    mean = math.prod(ratio ** (1 / len(live)) for ratio in ratios.values())
    bound = math.sqrt(most)
    factors = {name: min(max((mean / ratios[name]) ** rate, 1 / bound), bound) for name in live}
    moved = {name: alpha * factors.get(name, 1.0) for name, alpha in alphas.items()}
    return {name: value / sum(moved.values()) for name, value in moved.items()}


@backends
@modes
@pytest.mark.parametrize(("every", "rate", "most"), [(1, 0.5, 2.0), (3, 1.0, 1.2), (2, 0.1, 100.0)])
def test_coefficients_follow_the_documented_rule(every, rate, most, mode, backend):
    optimizer = tiny_optimizer(
        tiny_model(), mode=mode, backend=backend, coeffs=DynamicCoeffs(ALPHAS, every, rate, most), stats=True
    )
    alphas, pulls, grads = dict(ALPHAS), dict.fromkeys(ALPHAS, 0.0), dict.fromkeys(ALPHAS, 0.0)
    for number in range(2 * every + 1):
        assert dict(optimizer.coeffs) == pytest.approx(alphas, rel=1e-12)
        steps(optimizer, number, number + 1)
        for name, row in optimizer.stats().items():
            pulls[name] += float(row["pull_sq"])
            grads[name] += float(row["grad_sq"])
        if (number + 1) % every == 0:
            if any(pulls.values()):
                new = by_hand(alphas, pulls, grads, rate, most)
                assert all(1 / most < new[name] / alphas[name] < most for name in new)
                alphas = new
            pulls, grads = dict.fromkeys(ALPHAS, 0.0), dict.fromkeys(ALPHAS, 0.0)
    assert dict(optimizer.coeffs) == pytest.approx(alphas, rel=1e-12)
    assert alphas != ALPHAS
    assert optimizer.coeffs.rule == "dynamic"


sums = st.lists(st.floats(0, 1e30) | st.just(0.0), min_size=3, max_size=3)


@given(pulls=sums, grads=sums, rate=st.floats(0.01, 1.0), most=st.floats(1.01, 100.0))
def test_shares_sum_to_one_and_change_by_a_bounded_factor(pulls, grads, rate, most):
    alpha = torch.tensor([0.2, 0.5, 0.3], dtype=F64)
    new = rebalanced(alpha, torch.tensor(pulls, dtype=F64), torch.tensor(grads, dtype=F64), rate, most)
    assert float(new.sum()) == pytest.approx(1.0, rel=1e-14)
    change = new / alpha
    assert 1 / most * (1 - 1e-12) <= float(change.min())
    assert float(change.max()) <= most * (1 + 1e-12)
    idle = [i for i in range(3) if pulls[i] == 0 or grads[i] == 0]
    for i in idle:  # before they are normalised: in the proportion in which they were
        assert float(change[i]) == pytest.approx(float(change[idle[0]]), rel=1e-12)
    if len(idle) == 3:
        assert new.tolist() == pytest.approx(alpha.tolist(), rel=1e-14)


def test_layers_without_pull_or_gradient_keep_their_share():
    alpha = torch.tensor([0.25, 0.25, 0.25, 0.25], dtype=F64)
    pulls = torch.tensor([0.0, 4.0, 1.0, math.inf], dtype=F64)
    grads = torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=F64)
    new = rebalanced(alpha, pulls, grads, 1.0, 100.0)
    weak, strong = math.sqrt(0.5), math.sqrt(2.0)  # geometric mean √2 of the ratios 2 and 1
    assert new.tolist() == pytest.approx([each / (2 + weak + strong) for each in (1, weak, strong, 1)], rel=1e-12)


# ---------------------------------------------------------------- at work


def spread(optimizer):
    """Return how far apart the layers' pull/gradient ratios are: the deviation of their logarithms."""
    rows = optimizer.stats().values()
    logs = [0.5 * math.log(float(row["pull_sq"]) / float(row["grad_sq"])) for row in rows]
    return torch.tensor(logs).std()


@modes
def test_ratios_of_pull_and_gradient_come_together(mode):
    ends = {}
    for coeffs in ("softmax", DynamicCoeffs("softmax", every=10, max_change=4.0)):
        model = tiny_model()
        optimizer = tiny_optimizer(model, mode=mode, coeffs=coeffs, stats=True, reg_lambda=0.01, lr=1e-3)
        found = []
        for number in range(200):
            train(model, optimizer, first=number)
            if number >= 190:
                found.append(spread(optimizer))
        ends[type(coeffs)] = sum(found) / len(found)
    assert ends[DynamicCoeffs] < 0.5 * ends[str], ends


@pytest.mark.parametrize("normalize", [True, False])
def test_the_mean_curvature_is_the_same_after_a_change(normalize):
    model = tiny_model()
    optimizer = tiny_optimizer(model, coeffs=DynamicCoeffs("uniform", every=1), normalize=normalize)
    numel = sum(p.numel() for p in members(optimizer))
    for number in range(4):
        steps(optimizer, number, number + 1)
        moved = copy.deepcopy(optimizer)
        for param in members(moved):
            param.data = moved.state[param]["anchor"] + 1.0  # the penalty is then Σ ½k
        mean = 2 * float(moved.penalty()) / numel
        importance = random_importance(model)
        alphas = optimizer.coeffs
        raw = sum(2 * 3.0 * alphas[layer(n)] * float(t.double().sum()) for n, t in importance.items()) / numel
        assert mean == pytest.approx(2 * 3.0 if normalize else raw, rel=1e-6)
    assert dict(optimizer.coeffs) != pytest.approx(dict.fromkeys(ALPHAS, 0.25), rel=0.1)


def dynamic(model, **options):
    rule = DynamicCoeffs("proportional", every=3, max_change=5.0)
    return tiny_optimizer(model, coeffs=rule, **options)


@backends
@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
@pytest.mark.parametrize("at", [2, 3, 7])
def test_a_resumed_run_balances_bit_for_bit(tmp_path, at, how, backend):
    model = tiny_model()
    optimizer = dynamic(model, backend=backend)
    steps(optimizer, 0, at)
    if how == "state_dict":
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        twin = dynamic(copy.deepcopy(model), backend=backend)
        twin.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    else:
        twin = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    assert twin.coeffs == optimizer.coeffs
    for each in (optimizer, twin):
        steps(each, at, at + 5)
    assert_same_state(twin, optimizer)
    assert twin.coeffs == optimizer.coeffs != layer_coefficients(random_importance(model), "proportional")
    assert float(twin.penalty()) == float(optimizer.penalty())


def test_the_order_of_layers_does_not_matter_when_resuming():
    model = tiny_model()
    first = dynamic(model)
    steps(first, 0, 4)
    importance = random_importance(model)
    reordered = {name: importance[name] for name in sorted(importance, reverse=True)}
    rule = DynamicCoeffs("proportional", every=3, max_change=5.0)
    second = AlrAdamW(model.named_parameters(), reordered, rule, lr=1e-2, weight_decay=0.1, reg_lambda=3.0)
    second.load_state_dict(first.state_dict())
    assert dict(second.coeffs) == dict(first.coeffs)
    assert {k: float(v) for k, v in second.penalty_by_layer().items()} == pytest.approx(
        {k: float(v) for k, v in first.penalty_by_layer().items()}, rel=1e-12
    )


def test_a_state_of_other_layers_is_refused_and_changes_nothing():
    model = mixed_model()
    importance = random_importance(model)
    by_module = layer_coefficients(importance, "uniform", by="module")  # experts.0 is then in experts
    first, second = (mixed_optimizer(model, coeffs=DynamicCoeffs(rule)) for rule in ("uniform", by_module))
    for each in (first, second):
        steps(each, 0, 2)
    before = snapshot(second)
    with pytest.raises(ValueError, match=r"missing 'experts'; unknown 'experts.0'"):
        second.load_state_dict(first.state_dict())
    assert_unchanged(second, before)


def test_fixed_and_dynamic_coefficients_take_turns():
    model = tiny_model()
    optimizer = tiny_optimizer(model, coeffs="uniform")
    steps(optimizer, 0, 2)
    optimizer.set_coeffs(DynamicCoeffs(ALPHAS, every=2))
    steps(optimizer, 2, 4)
    found = dict(optimizer.coeffs)
    assert found != ALPHAS
    resumed = tiny_optimizer(model, coeffs="softmax")  # a fixed one takes over where the other stood
    resumed.load_state_dict(optimizer.state_dict())
    assert dict(resumed.coeffs) == found
    assert float(resumed.penalty()) == pytest.approx(float(optimizer.penalty()), rel=1e-12)
    optimizer.set_coeffs("uniform")
    assert optimizer.coeffs.rule == "uniform"
    steps(optimizer, 4, 8)
    assert set(optimizer.coeffs.values()) == {0.25}


def test_a_new_phase_begins_with_the_rule():
    model = tiny_model()
    optimizer = dynamic(model)
    steps(optimizer, 0, 4)
    importance = random_importance(model, 9)
    optimizer.start_phase(importance)
    assert dict(optimizer.coeffs) == dict(layer_coefficients(importance, "proportional"))
    steps(optimizer, 4, 8)
    assert dict(optimizer.coeffs) != dict(layer_coefficients(importance, "proportional"))


def test_a_skipped_step_is_counted_and_not_weighed():
    """The host cannot know without waiting; what a skipped step would have added is nothing."""
    optimizer, plain = dynamic(tiny_model()), dynamic(tiny_model())
    for each in (optimizer, plain):
        steps(each, 0, 1)
    set_grads(optimizer, 1)
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(1.0)
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf
    kept, other = (each.state_dict()["param_groups"][0]["balance"] for each in (optimizer, plain))
    assert kept["window"] == other["window"]
    assert (kept["steps"], other["steps"]) == (2, 1)
    assert any(map(any, kept["window"]))


def test_bf16_parameters_with_everything_on_balance_too():
    model = mixed_model(BF16)
    optimizer = mixed_optimizer(model, coeffs=DynamicCoeffs("uniform", every=2), **FORMS["smallest"][1])
    steps(optimizer, 0, 5)
    assert sum(optimizer.coeffs.values()) == pytest.approx(1.0, rel=1e-12)
    assert len(set(optimizer.coeffs.values())) == 4
