"""Steps inside a torch.compiled region: the eager bits, one graph, and no compilation where only numbers change."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from cases import (
    ALPHAS,
    assert_same_state,
    members,
    same_bits,
    set_grads,
    tiny_model,
    tiny_optimizer,
)
from compiled_cases import STEPS, Compiled, batch, fresh_dynamo, step_twin, train_step, twins  # noqa: F401
from forms import FORMS, mixed_model
from forms import new as mixed_optimizer
from torch._dynamo.utils import counters

from alr_kernels import AlrAdamW, DynamicCoeffs, lora_pairs

pytestmark = pytest.mark.filterwarnings("ignore:.*Profiler record function:UserWarning")


OPTIONS = {
    "penalty, decay, recording": {"record": True},
    "clipping inside": {"record": True, "max_grad_norm": 0.3},
    "coupled": {"mode": "coupled", "stats": True},
    "dynamic": {"coeffs": DynamicCoeffs("uniform", every=2)},
    "maximize": {"maximize": True, "reg_lambda": torch.tensor(2.0)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_whole_train_step_is_one_graph_and_eagers_bits(options):
    eager, model = tiny_model(), tiny_model()
    optimizer, other = tiny_optimizer(eager, **options), tiny_optimizer(model, **options)
    step = Compiled(partial(train_step, model, other))
    for seed in range(STEPS):
        expected = train_step(eager, optimizer, batch(seed))
        assert same_bits(step(batch(seed)), expected)
        assert_same_state(optimizer, other)
    step.assert_one_graph()
    assert optimizer.recorded_steps == other.recorded_steps == STEPS * optimizer.record
    if options.get("max_grad_norm"):
        assert same_bits(optimizer.grad_norm, other.grad_norm)
    if options.get("stats"):
        for layer, row in optimizer.stats().items():
            assert all(same_bits(value, other.stats()[layer][key]) for key, value in row.items())
    if isinstance(options.get("coeffs"), DynamicCoeffs):
        assert dict(optimizer.coeffs) == dict(other.coeffs) != dict(tiny_optimizer(tiny_model(), **options).coeffs)


def test_a_whole_train_step_through_inductor():
    """Its own forward and backward round otherwise; the step is ours."""
    models = tiny_model(), tiny_model()
    optimizer, other = (tiny_optimizer(model, record=True) for model in models)
    step = Compiled(partial(train_step, models[1], other), "inductor")
    for seed in range(STEPS):
        torch.testing.assert_close(step(batch(seed)), train_step(models[0], optimizer, batch(seed)))
        for each in (optimizer, other):
            each.param_groups[0]["lr"] = 1e-3 * seed
    torch.testing.assert_close(members(other), members(optimizer), rtol=1e-3, atol=1e-5)
    assert other.recorded_steps == STEPS
    step.assert_one_graph()


def test_where_torch_does_not_trace_backward_that_is_the_only_break():
    models = tiny_model(), tiny_model()
    optimizer, other = map(tiny_optimizer, models)
    step = Compiled(partial(train_step, models[1], other), fullgraph=False)
    with torch._dynamo.config.patch(trace_autograd_ops=False):
        for seed in range(STEPS):
            assert same_bits(step(batch(seed)), train_step(models[0], optimizer, batch(seed)))
            assert_same_state(optimizer, other)
            for each in (optimizer, other):
                each.param_groups[0]["lr"] = 1e-3 * seed
    (reason,) = counters["graph_break"]
    assert "Tensor.backward" in reason
    assert step.counter.frame_count == 2, "before backward and after it"


@pytest.mark.parametrize("form", ["int8", "smallest", "stochastic"])
def test_state_in_few_bytes(form):
    dtype, chosen = FORMS[form]
    optimizer, other = (mixed_optimizer(mixed_model(dtype), **chosen) for _ in range(2))
    step = Compiled(other.step)
    for seed in range(STEPS):
        step_twin(optimizer, other, step, seed)
        assert_same_state(optimizer, other)
    step.assert_one_graph()


def decay(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)


CHANGES = {
    "lr": lambda optimizer, i: optimizer.param_groups[0].update(lr=0.01 * i),
    "lr tensor": lambda optimizer, i: optimizer.param_groups[0].update(lr=torch.tensor(0.01 * i)),
    "lr from number to tensor": lambda optimizer, i: optimizer.param_groups[0].update(
        lr=torch.tensor(0.02) if i % 2 else 0.03
    ),
    "betas": lambda optimizer, i: optimizer.param_groups[0].update(betas=(0.5 + 0.1 * i, 0.9)),
    "lambda": lambda optimizer, i: optimizer.param_groups[0].update(reg_lambda=1.0 * i),
    "lambda off and on": lambda optimizer, i: optimizer.param_groups[0].update(reg_lambda=i % 2),
    "coefficients": lambda optimizer, i: optimizer.set_coeffs("uniform" if i % 2 else ALPHAS),
    "a new phase": lambda optimizer, i: optimizer.start_phase(),
    "load_state_dict": lambda optimizer, i: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_no_number_compiles_anew(change):
    optimizer, other = twins(record=True)
    step = Compiled(other.step)
    for seed in range(STEPS):
        step_twin(optimizer, other, step, seed)
        assert_same_state(optimizer, other)
        for each in (optimizer, other):
            change(each, seed + 1)
    step.assert_one_graph()


def test_an_lr_scheduler_breaks_no_graph_and_compiles_nothing_anew(recwarn):
    optimizer, other = twins()
    schedulers = decay(optimizer), decay(other)
    step = Compiled(lambda: other.step())
    for seed in range(STEPS):
        step_twin(optimizer, other, step, seed)
        assert_same_state(optimizer, other)
        for scheduler in schedulers:
            scheduler.step()
    assert other.param_groups[0]["lr"] == 1e-2 * 0.5**STEPS
    step.assert_one_graph()
    assert not [str(warning.message) for warning in recwarn if "lr_scheduler" in str(warning.message)]


def test_a_scheduler_still_warns_when_it_comes_before_the_first_step():
    """It need not wrap our step to know: that step notes that it was called."""
    optimizer, _ = twins()
    scheduler = decay(optimizer)
    assert "step" not in vars(optimizer)
    with pytest.warns(UserWarning, match="lr_scheduler.step.*before .*optimizer.step"):
        scheduler.step()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_parameters_read_around_the_step(backend):
    """Before it in the graph they are the old ones, after it the new ones, also where the graph changed them first."""
    optimizer, other = twins()
    first, second = members(optimizer)[:2], members(other)[:2]

    def around(params, step):
        with torch.no_grad():
            params[1].mul_(0.5)
            before = [param.clone() for param in params]
            halves = [param * 0.5 for param in params]
            step()
            return (
                before,
                halves,
                [param * 2 for param in params],
                [(param + old) for param, old in zip(params, before, strict=True)],
            )

    compiled = Compiled(lambda: around(second, other.step), backend)
    for seed in range(STEPS):
        for each in (optimizer, other):
            set_grads(each, seed)
        expected, got = around(first, optimizer.step), compiled()
        for these, those in zip(got, expected, strict=True):
            assert all(map(same_bits, these, those))
        assert not same_bits(got[0][0], got[2][0] / 2)
        assert_same_state(optimizer, other)
    compiled.assert_one_graph()


def test_a_copy_that_the_graph_works_on_is_what_is_stepped():
    """The op itself: the parameter keeps its old value for later readers, and its gradient is its own."""
    optimizer, other = twins()
    set_grads(optimizer, 0)
    optimizer.step()
    grads = [param.grad for param in members(optimizer)]
    own = members(other)
    old = [param.detach().clone() for param in own]
    copies = [param.detach().clone() for param in own]
    own[0].grad = kept = torch.full_like(own[0], 3.0)
    torch.ops.alr_kernels.optimizer_step_(copies, grads, list(range(len(own))), None, None, other._handle)
    assert all(map(same_bits, own, old))
    assert all(map(same_bits, copies, members(optimizer)))
    assert own[0].grad is kept
    assert own[1].grad is None
    assert not hasattr(other, "grad_scale")
    assert not hasattr(other, "found_inf")


def test_gradients_are_the_graphs():
    """What p.grad held before the graph is not stepped with, for none of the parameters."""
    optimizer, other = twins()
    own = members(other)

    def step(grad):
        other.zero_grad()
        own[0].grad = grad * 2
        other.step()

    compiled = Compiled(step)
    for seed in range(STEPS):
        set_grads(other, 100 + seed)  # stale
        grad = torch.randn(own[0].shape)
        optimizer.zero_grad()
        members(optimizer)[0].grad = grad * 2
        optimizer.step()
        compiled(grad)
        assert_same_state(optimizer, other)
        assert same_bits(own[0].grad, grad * 2)
        assert own[1].grad is None
    compiled.assert_one_graph()


def test_gradients_that_the_graph_clips_in_place():
    optimizer, other = twins()

    def step(each):
        torch.nn.utils.clip_grad_norm_(members(each), 0.1, foreach=False)
        each.step()

    own = members(other)

    def clipped():
        torch.nn.utils.clip_grad_norm_(own, 0.1, foreach=False)
        other.step()

    compiled = Compiled(clipped)
    for seed in range(STEPS):
        for each in (optimizer, other):
            set_grads(each, seed)
        step(optimizer)
        compiled()
        assert_same_state(optimizer, other)
        assert all(same_bits(a.grad, b.grad) for a, b in zip(members(optimizer), own, strict=True))
    compiled.assert_one_graph()


def test_zero_grad_in_place():
    _, other = twins()
    set_grads(other, 0)
    grads = [param.grad for param in members(other)]
    zero = Compiled(lambda: other.zero_grad(set_to_none=False))
    for lr in (0.1, 0.2):
        other.param_groups[0]["lr"] = lr
        zero()
    assert all(param.grad is grad and not grad.any() for param, grad in zip(members(other), grads, strict=True))
    zero.assert_one_graph()


def test_two_optimizers_in_one_graph():
    pairs = [twins(record=True), twins(mode="coupled")]
    step = Compiled(lambda: [other.step() for _, other in pairs])
    for seed in range(STEPS):
        for number, (optimizer, other) in enumerate(pairs):
            set_grads(optimizer, seed + 10 * number)
            optimizer.step()
            set_grads(other, seed + 10 * number)
        step()
        for optimizer, other in pairs:
            assert_same_state(optimizer, other)
    step.assert_one_graph()


def lora_twin():
    torch.manual_seed(0)
    params = [("a", torch.nn.Parameter(torch.randn(2, 3))), ("b", torch.nn.Parameter(torch.randn(4, 2)))]
    pairs = lora_pairs([("w.weight", params[0][1], params[1][1], 2.0)])
    return AlrAdamW(params, {"w.weight": torch.rand(4, 3)}, lora=pairs, record=True, lr=1e-2, stats=True)


def test_lora_pairs():
    optimizer, other = lora_twin(), lora_twin()
    step = Compiled(other.step)
    for seed in range(STEPS):
        step_twin(optimizer, other, step, seed)
        assert_same_state(optimizer, other)
    step.assert_one_graph()
