"""Recording, by ImportanceRecorder or AlrAdamW: Σω is the drop of the loss; only the optimizer's own moves count."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import BF16, MODES, random_importance, relative_error, same_bits, tiny_loss, tiny_model, train, within

from alr_kernels import AlrAdamW, ImportanceRecorder


class SignDescent(torch.optim.Optimizer):
    """A user's own optimizer, with nothing but step()."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                param.add_(param.grad.sign(), alpha=-group["lr"])
        return loss


optim = torch.optim
OPTIMIZERS = {
    "SGD": lambda p: optim.SGD(p, lr=1e-3, weight_decay=0.01),
    "SGD momentum": lambda p: optim.SGD(p, lr=2e-4, momentum=0.9, nesterov=True),
    "Adam": lambda p: optim.Adam(p, lr=1e-4),
    "AdamW fused": lambda p: optim.AdamW(p, lr=1e-4, weight_decay=0.1, fused=True),
    "AdamW foreach": lambda p: optim.AdamW(p, lr=1e-4, weight_decay=0.1, foreach=True),
    "Adagrad": lambda p: optim.Adagrad(p, lr=1e-3),
    "LBFGS": lambda p: optim.LBFGS(p, lr=2e-3, max_iter=1),
    "custom": lambda p: SignDescent(p, lr=1e-4),
    "AlrAdamW": lambda p: AlrAdamW(p, lr=1e-4, weight_decay=0.1),
}


def closure_of(model, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = tiny_loss(model)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("closure", [True, False], ids=("closure", "backward"))
@pytest.mark.parametrize("which", OPTIMIZERS)
def test_path_integral_is_the_drop_of_the_loss(which, closure):
    if which == "LBFGS" and not closure:
        pytest.skip("LBFGS takes closures only")
    model = tiny_model()
    optimizer = OPTIMIZERS[which](model.parameters())
    before = float(tiny_loss(model).detach())
    evaluate = closure_of(model, optimizer)
    with ImportanceRecorder(optimizer, model.named_parameters()) as recorder:
        for _ in range(200):
            if closure:
                optimizer.step(evaluate)
            else:
                evaluate()
                optimizer.step()
    drop = before - float(tiny_loss(model).detach())
    assert drop > 0.02
    importance = recorder.finalise(xi=1e-3)
    assert importance.steps == recorder.steps == 200
    within(abs(sum(row.path_integral_sum for row in importance.stats.values()) - drop) / drop, "loss drop")


@pytest.mark.parametrize("mode", [None, *MODES], ids=str)
def test_recorded_path_integral_sums_to_the_drop_of_the_task_loss(mode):
    """Also while a penalty pulls: ω holds the task's gradient over the whole move, pull and decay included."""
    torch.manual_seed(0)
    model = tiny_model()
    anchor = {name: 0.5 * p.detach() for name, p in model.named_parameters()}
    importance, extra = (random_importance(model), {"anchor": anchor}) if mode else (None, {})
    optimizer = AlrAdamW(
        model.named_parameters(), importance, lr=1e-4, weight_decay=0.1, reg_lambda=0.1, mode=mode or "proximal",
        record=True, **extra,
    )  # fmt: skip
    before = float(tiny_loss(model).detach())
    for _ in range(300):
        optimizer.zero_grad()
        tiny_loss(model).backward()
        optimizer.step()
    drop = before - float(tiny_loss(model).detach())
    assert abs(drop) > 0.02, "the problem is too easy to tell anything"
    recorded = optimizer.recorded_importance(xi=1e-3)
    total = sum(row.path_integral_sum for row in recorded.stats.values())
    within(abs(total - drop) / abs(drop), "loss drop")
    assert recorded.steps == 300


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float64], ids=str)
@pytest.mark.parametrize("maximize", [False, True], ids=("minimise", "maximise"))
def test_equals_what_alradamw_records_itself(dtype, maximize):
    model = tiny_model(dtype=dtype)
    optimizer = AlrAdamW(model.named_parameters(), lr=1e-3, weight_decay=0.1, maximize=maximize, record=True)
    recorder = ImportanceRecorder(optimizer, model.named_parameters())
    train(model, optimizer, 5)
    ours, theirs = optimizer.recorded_importance(), recorder.finalise()
    assert list(ours) == list(theirs)
    for name in ours:
        assert same_bits(ours[name], theirs[name]), name
    assert ours.stats == theirs.stats
    assert ours.steps == theirs.steps == 5


@pytest.mark.parametrize("which", ["SGD", "AdamW fused"])
def test_step_that_the_grad_scaler_skips_is_not_recorded(which):
    model, clean = tiny_model(), tiny_model()
    results = []
    for each, steps in ((model, (0, "overflow", 1)), (clean, (0, 1))):
        optimizer = OPTIMIZERS[which](each.parameters())
        recorder = ImportanceRecorder(optimizer, each.named_parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
        for number in steps:
            optimizer.zero_grad()
            scaler.scale(tiny_loss(each, 0 if number == "overflow" else number)).backward()
            if number == "overflow":  # the scale halves: a power of two, no rounding
                each.embed.weight.grad[0, 0] = torch.inf
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        results.append((recorder.steps, recorder.finalise()))
    assert results[0][0] == results[1][0] == 2
    for name, param in model.named_parameters():
        assert same_bits(param, dict(clean.named_parameters())[name])
        assert same_bits(results[0][1][name], results[1][1][name])


def test_alradamw_skips_everything_with_a_skipped_step():
    model = tiny_model()
    optimizer = AlrAdamW(model.named_parameters(), lr=1e-3, record=True)
    train(model, optimizer)
    before = [{key: v.clone() for key, v in optimizer.state[p].items()} for p in model.parameters()]
    weights = [p.detach().clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer.zero_grad()
    scaler.scale(tiny_loss(model)).backward()
    model.embed.weight.grad[0, 0] = torch.nan
    scaler.step(optimizer)
    scaler.update()
    assert all(map(same_bits, model.parameters(), weights))
    for param, state in zip(model.parameters(), before, strict=True):
        assert all(same_bits(optimizer.state[param][key], value) for key, value in state.items())
    assert optimizer.recorded_importance().steps == 1


def test_alradamw_under_a_grad_scaler_sees_unscaled_gradients():
    scaled, plain = tiny_model(), tiny_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    recorded = []
    for model in (scaled, plain):
        optimizer = AlrAdamW(model.named_parameters(), lr=1e-3, record=True)
        for _ in range(3):
            optimizer.zero_grad()
            loss = tiny_loss(model)
            if model is scaled:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            else:
                loss.backward()
                optimizer.step()
        recorded.append(optimizer.recorded_importance())
    for name, omega in recorded[0].items():  # the scale is a power of two: no rounding
        assert same_bits(omega, recorded[1][name])


def test_scaled_gradients_inside_the_step_are_refused():
    model = tiny_model()
    optimizer = OPTIMIZERS["AdamW fused"](model.parameters())
    ImportanceRecorder(optimizer, model.named_parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(tiny_loss(model)).backward()
    with pytest.raises(RuntimeError, match="unscale_"):
        scaler.step(optimizer)


def add_in_place(param):
    param.add_(0.5)


def add_to_data(param):
    param.data.add_(0.5)


def replace_data(param):
    param.data = param.data + 0.5


@pytest.mark.parametrize("move", [add_in_place, add_to_data, replace_data])
def test_moves_between_steps_are_not_integrated(move):
    """Only what the optimizer did counts; ω is linear in the optimizer's own move."""
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(8))
    optimizer = torch.optim.SGD([param], lr=0.1)
    recorder = ImportanceRecorder(optimizer, [("w", param)])
    expected = torch.zeros(8, dtype=torch.float64)
    for _ in range(3):
        param.grad = torch.randn(8)
        before = param.detach().clone()
        optimizer.step()
        expected -= param.grad.double() * (param.detach().double() - before.double())
        with torch.no_grad():
            move(param)
        if move is add_to_data:
            recorder.resync()  # .data has no version counter to notice it by
    omega = recorder._path_integrals["w"]
    assert relative_error(omega, expected, expected.abs()) < 1e-6


def test_parameter_without_gradient_does_not_move_omega():
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = ImportanceRecorder(optimizer, model.named_parameters())
    loss = model.embed(torch.ones(1, 4)).sum()  # nothing else has a gradient
    loss.backward()
    optimizer.step()
    importance = recorder.finalise()
    assert float(importance["embed.weight"].sum()) > 0
    assert float(importance["head.weight"].sum()) == 0


def test_close_removes_the_hooks():
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ImportanceRecorder(optimizer, model.named_parameters()) as recorder:
        train(model, optimizer, 2)
        inside = {name: t.clone() for name, t in recorder._path_integrals.items()}
    train(model, optimizer, 2)
    assert recorder.steps == 2
    assert all(same_bits(recorder._path_integrals[name], value) for name, value in inside.items())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    recorder.close()  # twice is no error


def test_a_recording_goes_on_after_it_was_read():
    model, other = tiny_model(), tiny_model()
    results = []
    for each in (model, other):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        recorder = ImportanceRecorder(optimizer, each.named_parameters())
        train(each, optimizer, 2)
        if each is model:
            recorder.finalise()
        train(each, optimizer, 2)
        results.append(recorder.finalise())
    assert all(same_bits(results[0][name], results[1][name]) for name in results[0])


def test_gradients_released_within_the_step_are_noticed():
    class Releasing(SignDescent):
        def step(self, closure=None):
            super().step(closure)
            self.zero_grad(set_to_none=True)

    model = tiny_model()
    optimizer = Releasing(model.parameters(), lr=0.1)
    ImportanceRecorder(optimizer, model.named_parameters())
    tiny_loss(model).backward()
    with pytest.raises(RuntimeError, match="released every gradient"):
        optimizer.step()


def test_a_parameter_unfrozen_later_is_recorded_from_then_on():
    layer = torch.nn.Linear(2, 1)
    layer.bias.requires_grad_(False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    recorder = ImportanceRecorder(optimizer, layer.named_parameters())
    for _ in range(2):
        optimizer.zero_grad()
        layer(torch.ones(1, 2)).square().sum().backward()
        optimizer.step()
        layer.bias.requires_grad_(True)
    assert set(recorder.finalise()) == {"weight", "bias"}
    assert float(recorder.finalise()["bias"].sum()) > 0


def test_a_recorder_is_not_copied_without_its_hooks():
    layer = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    recorder = ImportanceRecorder(optimizer, layer.named_parameters())
    with pytest.raises(TypeError, match="hooks"):
        copy.deepcopy(recorder)
