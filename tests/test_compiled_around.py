"""What is around a step in a torch.compiled region: copies, loss scales, closures, hooks, readings, shards."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from cases import (
    assert_same_state,
    members,
    same_bits,
    set_grads,
    tiny_loss,
    tiny_model,
    tiny_optimizer,
)
from compiled_cases import STEPS, Compiled, batch, fresh_dynamo, step_twin, train_step, twins  # noqa: F401
from torch.distributed.tensor import Shard, distribute_tensor

from alr_kernels import AlrAdamW, DynamicCoeffs

pytestmark = pytest.mark.filterwarnings("ignore:.*Profiler record function:UserWarning")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_steps_itself(copied):
    optimizer, other = twins()
    twin = copied(other)
    assert twin._handle != other._handle
    before = [param.detach().clone() for param in members(other)]
    step = Compiled(twin.step)
    for seed in range(STEPS):
        step_twin(optimizer, twin, step, seed)
        assert_same_state(optimizer, twin)
    assert all(map(same_bits, members(other), before))


@pytest.mark.parametrize("inf", [0.0, 1.0])
def test_the_loss_scale_that_the_graph_sets(inf):
    """As GradScaler hands it over: set before the step, taken away after it."""
    optimizer, other = twins(record=True)

    def scaled(each, scale, found_inf):
        each.grad_scale, each.found_inf = scale, found_inf
        each.step()
        del each.grad_scale, each.found_inf

    step = Compiled(partial(scaled, other))
    for seed in range(STEPS):
        numbers = torch.tensor(2.0 + seed), torch.tensor(inf * (seed == 1))
        for each, call in ((optimizer, partial(scaled, optimizer)), (other, step)):
            set_grads(each, seed)
            call(*numbers)
        assert_same_state(optimizer, other)
    assert optimizer.recorded_steps == other.recorded_steps == STEPS - inf
    step.assert_one_graph()


def test_a_grad_scaler_around_a_compiled_step():
    model = tiny_model()
    optimizer, other = tiny_optimizer(tiny_model()), tiny_optimizer(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    other.step = torch.compile(other.step, backend="aot_eager")
    for seed in range(STEPS):
        tiny_loss(model, seed).backward()
        grads = [param.grad.clone() for param in members(other)]
        for param, grad in zip(members(optimizer), grads, strict=True):
            param.grad = grad
        optimizer.step()
        other.zero_grad()
        scaler.scale(tiny_loss(model, seed)).backward()
        scaler.step(other)
        scaler.update()
        other.zero_grad()
        assert_same_state(optimizer, other)


def test_a_closure():
    optimizer, other = twins()
    x = batch(0)
    models = [tiny_model(), tiny_model()]
    optimizer, other = map(tiny_optimizer, models)

    def closure(model, each):
        each.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss.detach()

    step = Compiled(lambda: other.step(partial(closure, models[1], other)))
    for _ in range(STEPS):
        expected = optimizer.step(partial(closure, models[0], optimizer))
        assert same_bits(step(), expected)
        assert_same_state(optimizer, other)
    step.assert_one_graph()


def test_hooks_around_the_step():
    _, other = twins()
    first = members(other)[0]
    before, after = torch.zeros_like(first), torch.zeros_like(first)

    def note(kept, *_):
        kept.copy_(first.detach())

    other.register_step_pre_hook(partial(note, before))
    other.register_step_post_hook(partial(note, after))
    step = Compiled(lambda: [other.step()])
    for seed in range(STEPS):
        old = first.detach().clone()
        set_grads(other, seed)
        step()
        assert same_bits(before, old)
        assert same_bits(after, first)
        assert not same_bits(old, after)
    step.assert_one_graph()


READINGS = {
    "penalty": lambda optimizer: optimizer.penalty(),
    "statistics": lambda optimizer: optimizer.stats()["head"]["grad_sq"],
    "gradient norm": lambda optimizer: optimizer.grad_norm,
    "recorded steps": lambda optimizer: torch.tensor(optimizer.recorded_steps),
    "coefficients": lambda optimizer: torch.tensor(optimizer.coeffs["head"]),
}


@pytest.mark.parametrize("read", READINGS.values(), ids=READINGS)
def test_what_is_read_after_the_step_in_the_function_is_of_that_step(read):
    """Readings break the graph: the step in it has not run while it is traced."""
    coeffs = DynamicCoeffs("uniform", every=1)
    optimizer, other = twins(stats=True, max_grad_norm=0.1, record=True, coeffs=coeffs)

    def step():
        other.step()
        return read(other)

    compiled = Compiled(step, fullgraph=False)
    for seed in range(STEPS):
        for each in (optimizer, other):
            set_grads(each, seed)
        optimizer.step()
        assert same_bits(compiled(), read(optimizer))


def test_setting_coefficients_before_the_step_in_the_function_acts_on_that_step():
    optimizer, other = twins()

    def step(each):
        each.set_coeffs({"embed": 1.0, "layers.0": 2.0, "layers.1": 3.0, "head": 4.0})
        each.step()

    for each, call in ((optimizer, step), (other, Compiled(step, fullgraph=False))):
        set_grads(each, 0)
        each.step()  # penalised from the second step on, away from the anchor
        call(each)
    assert_same_state(optimizer, other)


@pytest.mark.parametrize("option", ["lr", "reg_lambda", "betas"])
def test_setting_a_groups_number_before_the_step_in_the_function_acts_on_that_step(option):
    optimizer, other = twins()

    def step(each, value):
        each.param_groups[0][option] = value
        each.step()

    compiled = Compiled(partial(step, other), fullgraph=False)
    for seed in range(STEPS):
        value = (0.1 * seed, 0.9) if option == "betas" else 0.01 * seed
        for each in (optimizer, other):
            set_grads(each, seed)
        step(optimizer, value)
        compiled(value)
        assert_same_state(optimizer, other)


def test_setting_a_groups_number_after_the_step_breaks_no_graph():
    _, other = twins()

    def step():
        other.step()
        other.param_groups[0]["lr"] = 0.5

    compiled = Compiled(step)
    set_grads(other, 0)
    compiled()
    assert other.param_groups[0]["lr"] == 0.5
    compiled.assert_one_graph()


@pytest.fixture
def mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_tensors_are_stepped_outside_the_graph(mesh):
    """Whatever the eager step does with a DTensor, the compiled one does: torch has no sharding rule for our op."""
    outcomes = []
    for compiled in (False, True):
        value = torch.arange(6.0).view(2, 3)
        param = torch.nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]))
        optimizer = AlrAdamW([("w", param)], lr=1e-2)
        param.grad = distribute_tensor(value - 2, mesh, [Shard(0)])
        try:
            (torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step)()
            outcomes.append(param.to_local().tolist())
        except RuntimeError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


def test_the_op_is_kept_out_of_cuda_graphs():
    """Step counts of the host, and what is made at the first step, no replay would repeat."""
    assert torch.Tag.cudagraph_unsafe in torch.ops.alr_kernels.optimizer_step_.default.tags


def test_a_refusal_inside_the_graph_keeps_its_message():
    optimizer, _ = twins()
    set_grads(optimizer, 0)
    step = Compiled(optimizer.step)
    optimizer.param_groups[0]["reg_lambda"] = 1e38
    with pytest.raises(ValueError, match="more than float32 holds"):
        step()
    optimizer.param_groups[0]["reg_lambda"] = 1.0
    step()
    step.assert_one_graph()
