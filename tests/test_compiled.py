"""Steps inside a torch.compiled region: the eager bits, one graph, and no compilation where only numbers change."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from cases import (
    ALPHAS,
    assert_same_state,
    members,
    same_bits,
    set_grads,
    tiny_loss,
    tiny_model,
    tiny_optimizer,
)
from forms import FORMS, mixed_model
from forms import new as mixed_optimizer
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._dynamo.variables.constant import CONSTANT_VARIABLE_NONE
from torch.distributed.tensor import Shard, distribute_tensor

from alr_kernels import AlrAdamW, DynamicCoeffs, lora_pairs

pytestmark = pytest.mark.filterwarnings("ignore:.*Profiler record function:UserWarning")
STEPS = 4


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        yield
    torch._dynamo.reset()
    CONSTANT_VARIABLE_NONE.source = None  # torch 2.13 leaves there the p.grad that it saw become None


class Compiled:
    """A function compiled as one graph, which counts its compilations."""

    def __init__(self, function, backend="aot_eager", fullgraph=True):
        self.counter = CompileCounterWithBackend(backend)
        self.call = torch.compile(function, backend=self.counter, fullgraph=fullgraph)

    def __call__(self, *args):
        return self.call(*args)

    def assert_one_graph(self, compilations=1):
        assert not counters["graph_break"], list(counters["graph_break"])
        assert self.counter.frame_count == compilations


def batch(seed):
    return torch.randn(64, 4, generator=torch.Generator().manual_seed(seed))


def train_step(model, optimizer, x):
    optimizer.zero_grad()
    loss = (model(x) - x[:, :1].sin()).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def step_twin(optimizer, other, step, seed):
    """Take one step eagerly and one with ``step``, with the same gradients."""
    for each in (optimizer, other):
        set_grads(each, seed)
    optimizer.step()
    step()


def twins(**options):
    return [tiny_optimizer(tiny_model(), **options) for _ in range(2)]


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
