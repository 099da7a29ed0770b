"""Steps within backward: the normal step's bits with one gradient in memory, whatever changes between the steps."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from functools import partial

import pytest
import torch
from backward_cases import STEPS, assert_same_readings, follow
from cases import (
    ALPHAS,
    BF16,
    assert_same_state,
    members,
    random_importance,
    same_bits,
    tiny_loss,
    tiny_model,
    tiny_optimizer,
    train,
)
from forms import FORMS, mixed_model
from forms import new as mixed_optimizer
from torch import nn

from alr_kernels import AlrAdamW, DynamicCoeffs


def mixed_loss(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 128, generator=generator).to(next(model.parameters()).dtype)
    y = torch.tanh(model.layers[0](x)).repeat(1, 4)[:, :100]
    y = torch.tanh(model.layers[1](y)).repeat(1, 2)
    return model.head(torch.einsum("bi,eoi->bo", y, model.experts[0]).repeat(1, 8)).square().float().mean()


def twins(**options):
    models = [tiny_model(), tiny_model()]
    return models, [tiny_optimizer(model, **options) for model in models]


OPTIONS = {
    "penalty and recording": {"record": True, "stats": True},
    "coupled": {"mode": "coupled", "stats": True},
    "ascending": {"maximize": True},
    "lambda 0": {"reg_lambda": 0.0},
    "tensors": {"lr": torch.tensor(0.02), "reg_lambda": torch.tensor(2.0)},
    "dynamic coefficients": {"coeffs": DynamicCoeffs("uniform", every=2), "record": True},
    "dynamic coefficients, statistics": {"coeffs": DynamicCoeffs(ALPHAS, every=1), "stats": True},
    "reference": {"backend": "reference", "record": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_normal_steps_bits(options):
    follow(*twins(**options))


class Wide(nn.Module):
    """One layer of many parameters, whose statistics rounding adds up differently in another order."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.ParameterDict({f"p{i}": torch.randn(9, i + 1) for i in range(7)})])


def test_statistics_are_added_up_in_the_order_of_a_whole_step():
    def loss(model, seed):
        return sum((param.sin() * (i + seed + 1)).square().sum() for i, param in enumerate(model.parameters()))

    for options in ({"stats": True}, {"coeffs": DynamicCoeffs("uniform", every=1)}):
        models = [Wide(), Wide()]
        optimizers = [tiny_optimizer(model, **options) for model in models]
        for model, optimizer in zip(models, optimizers, strict=True):
            named = list(model.named_parameters())
            plain = [(f"layers.0.extra{i}", nn.Parameter(torch.full((3,), 0.1 * i))) for i in range(3)]
            for name, param in plain:
                model.register_parameter(name.replace(".", "_"), param)
            assert len(named) == 7
            optimizer.add_param_group({"params": plain})
        follow(models, optimizers, loss)


@pytest.mark.parametrize("form", FORMS)
def test_state_in_few_bytes(form):
    """Random rounding is keyed on the parameter's place in the optimizer, not in a call."""
    dtype, chosen = FORMS[form]
    models = [mixed_model(dtype), mixed_model(dtype)]
    follow(models, [mixed_optimizer(model, record=True, stats=True, **chosen) for model in models], mixed_loss)


def load(optimizer, number):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def new_phase(optimizer, number):
    named = [(slot.name, param) for _, slot, param in optimizer._members()]
    optimizer.start_phase(random_importance(named, number), "uniform")


CHANGES = {
    "lr": lambda optimizer, number: optimizer.param_groups[0].update(lr=0.01 * number),
    "lambda": lambda optimizer, number: optimizer.param_groups[0].update(reg_lambda=float(number)),
    "lambda off and on": lambda optimizer, number: optimizer.param_groups[0].update(reg_lambda=number % 2),
    "coefficients": lambda optimizer, number: optimizer.set_coeffs("uniform" if number % 2 else ALPHAS),
    "load_state_dict": load,
    "a phase": new_phase,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_between_steps_acts(change):
    follow(*twins(record=True, stats=True), change=change)


def test_several_groups_and_frozen_parameters():
    models = [tiny_model(), tiny_model()]
    optimizers = []
    for model in models:
        model.layers[0].weight.requires_grad_(False)
        named = list(model.named_parameters())
        groups = [{"params": named[:3], "lr": 1e-2}, {"params": named[3:], "lr": 1e-3, "weight_decay": 0.2}]
        optimizers.append(AlrAdamW(groups, random_importance(model), record=True, stats=True))

    def unfreeze(optimizer, number):
        members(optimizer)[2].requires_grad_(number >= 2)

    follow(models, optimizers, change=unfreeze)


def assert_steps_in_backward(model, optimizer, loss):
    loss(model, 0).backward()
    assert all(param.grad is None for param in members(optimizer)), "not before step()"
    optimizer.step()


def test_what_is_unfrozen_is_stepped_in_backward_from_the_next_step_on():
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    model.head.weight.requires_grad_(False)
    optimizer.attach_to_backward()
    assert_steps_in_backward(model, optimizer, tiny_loss)
    model.head.weight.requires_grad_(True)
    optimizer.step()
    before = model.head.weight.detach().clone()
    assert_steps_in_backward(model, optimizer, tiny_loss)
    assert not same_bits(model.head.weight, before)


def test_a_group_that_is_added_later():
    models, optimizers = twins(record=True)
    extra = [nn.Linear(4, 1) for _ in range(2)]
    extra[1].load_state_dict(extra[0].state_dict())
    of = dict(zip(map(id, models), extra, strict=True))

    def add(optimizer, number):
        if number == 2:
            added = extra[optimizers.index(optimizer)]
            group = {"params": [(f"extra.{name}", param) for name, param in added.named_parameters()], "lr": 0.1}
            optimizer.add_param_group(group)

    def loss(model, seed):
        return tiny_loss(model, seed) + of[id(model)](torch.ones(1, 4)).square().sum()

    follow(models, optimizers, loss, change=add)
    optimizers[1].attach_to_backward()
    last = nn.Parameter(torch.ones(2))
    optimizers[1].add_param_group({"params": [("last", last)]})
    last.sum().backward()
    assert last.grad is None, "stepped in the backward pass that comes first"


def test_parameters_that_took_no_part():
    def loss(model, seed):
        x = model.embed(torch.ones(3, 4))
        if seed != 1:
            x = torch.tanh(model.layers[seed % 2](x))
        return model.head(x).square().mean()

    follow(*twins(record=True, stats=True), loss)


def test_tied_weights_are_stepped_once_with_the_whole_gradient():
    def loss(model, seed):
        with torch.no_grad():
            model.head(torch.ones(2, 8))
        x = model.embed(torch.ones(3, 4))
        return model.head(torch.tanh(model.layers[0](torch.tanh(model.layers[0](x))))).square().mean() * (seed + 1)

    follow(*twins(record=True), loss)


def test_two_losses_of_different_parameters():
    models, optimizers = twins(record=True)

    def loss(model, seed):
        model.embed(torch.ones(2, 4)).square().sum().backward()
        return model.head(torch.ones(2, 8)).square().sum()

    follow(models, optimizers, loss)


def test_a_gradient_that_came_another_way_is_stepped_with_in_step():
    models, optimizers = twins(record=True, stats=True)
    with optimizers[1].attach_to_backward():
        for number in range(STEPS):
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.zero_grad()
                model.embed(torch.ones(2, 4)).square().sum().backward()
                model.head.bias.grad = torch.full((1,), 0.1 * number)
                optimizer.step()
            assert models[1].head.bias.grad is None
            assert_same_state(*optimizers)
            assert_same_readings(*optimizers)


def test_a_closure():
    models, optimizers = twins(record=True)
    optimizers[1].attach_to_backward()

    def closure(model, optimizer):
        optimizer.zero_grad()
        loss = tiny_loss(model)
        loss.backward()
        return loss.detach()

    for _ in range(STEPS):
        losses = [each.step(partial(closure, model, each)) for model, each in zip(models, optimizers, strict=True)]
        assert same_bits(*losses)
        assert_same_state(*optimizers)


def test_each_gradient_is_gone_before_the_next_comes():
    model = mixed_model()
    optimizer = mixed_optimizer(model, record=True)
    params = members(optimizer)
    live = []

    def measure(_):
        live.append(sum(p.grad.numel() * p.grad.element_size() for p in params if p.grad is not None))

    for param in params:
        param.register_post_accumulate_grad_hook(measure)  # comes before ours
    with optimizer.attach_to_backward():
        for seed in range(2):
            mixed_loss(model, seed).backward()
            optimizer.step()
    sizes = [param.numel() * param.element_size() for param in params]
    assert len(live) == 2 * len(params)
    assert max(live) == max(sizes) < sum(sizes)
    mixed_loss(model).backward()
    assert live[-1] == sum(sizes), "detached, they all stay"


def test_calls_are_kept_from_step_to_step():
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    with optimizer.attach_to_backward():
        train(model, optimizer)
        calls = dict(optimizer._calls)
        assert len(calls) == len(members(optimizer))
        train(model, optimizer, 2)
    assert optimizer._calls.keys() == calls.keys()
    assert all(optimizer._calls[key] is call for key, call in calls.items())


def test_changing_to_and_fro():
    models, optimizers = twins(record=True, stats=True)
    for number in range(6):
        handle = optimizers[1].attach_to_backward() if number % 2 else None
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, first=number)
        if handle:
            handle.remove()
        assert_same_state(*optimizers)
        assert_same_readings(*optimizers)


def test_remove_finishes_the_step_that_has_begun():
    models, optimizers = twins(record=True, coeffs=DynamicCoeffs("uniform", every=1))
    train(models[0], optimizers[0])
    handle = optimizers[1].attach_to_backward()
    tiny_loss(models[1]).backward()
    handle.remove()
    handle.remove()
    assert_same_state(*optimizers)
    assert_same_readings(*optimizers)
    assert not any(param._post_accumulate_grad_hooks for param in members(optimizers[1]))


def test_an_exception_detaches_and_is_not_hidden():
    model = tiny_model()
    optimizer = tiny_optimizer(model)

    def accumulate():
        with optimizer.attach_to_backward():
            for _ in range(2):
                tiny_loss(model).backward()

    with pytest.raises(RuntimeError, match="second gradient"):
        accumulate()
    optimizer.zero_grad()
    train(model, optimizer)
    assert members(optimizer)[0].grad is not None


def test_after_a_second_gradient_training_goes_on():
    models, optimizers = twins(record=True)
    train(models[0], optimizers[0])
    optimizers[1].attach_to_backward()
    tiny_loss(models[1]).backward()
    before = [param.detach().clone() for param in members(optimizers[1])]
    with pytest.raises(RuntimeError, match="second gradient"):
        tiny_loss(models[1]).backward()
    assert all(map(same_bits, members(optimizers[1]), before))
    optimizers[1].zero_grad()
    optimizers[1].step()
    assert_same_state(*optimizers)
    assert optimizers[1].recorded_steps == 1


def test_a_step_without_gradients_counts_nothing():
    model = tiny_model()
    optimizer = tiny_optimizer(model, record=True, coeffs=DynamicCoeffs("uniform", every=1))
    before = dict(optimizer.coeffs)
    with optimizer.attach_to_backward():
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.recorded_steps == 0
    assert dict(optimizer.coeffs) == before


def test_an_alias_that_forward_saved_is_refused_and_not_read_as_new():
    """Backward would take the moved weight for the old one."""
    model = tiny_model()
    tiny_optimizer(model).attach_to_backward()
    x = torch.ones(2, 4, requires_grad=True)
    y = torch.tanh(x @ model.embed.weight.detach().T)  # saved here, and no part of the weight's own gradient
    later = model.layers[0](y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (later.sum() + model.embed.weight.sum()).backward()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_is_not_attached(copied):
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    optimizer.attach_to_backward()
    train(model, optimizer)
    twin_model, twin = copied((model, optimizer))
    train(twin_model, twin, first=1)
    train(model, optimizer, first=1)
    assert_same_state(optimizer, twin)
    assert members(twin)[0].grad is not None
    assert members(optimizer)[0].grad is None


def test_a_dropped_optimizer_leaves_the_parameters_alone():
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    optimizer.attach_to_backward()
    alive = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None
    before = model.head.bias.detach().clone()
    tiny_loss(model).backward()
    assert same_bits(model.head.bias, before)
    assert model.head.bias.grad is not None


def test_with_a_compiled_model_and_train_step():
    models, optimizers = twins(record=True)
    x = torch.ones(3, 4)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    compiled = torch.compile(step, backend="aot_eager")
    with optimizers[1].attach_to_backward():
        for _ in range(STEPS):
            step(models[0], optimizers[0])
            compiled(models[1], optimizers[1])
            assert_same_state(*optimizers)
    assert optimizers[1].recorded_steps == STEPS


def test_a_split_master():
    models = [tiny_model(dtype=BF16), tiny_model(dtype=BF16)]
    follow(models, [tiny_optimizer(model, master="split", record=True) for model in models])
