"""Loops of plain torch: whatever is done to ``p.grad`` before the step, ω and penalty see the task's gradient."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys

import pytest
import torch
from cases import TinyModel, random_importance, tiny_loss, tiny_model, tiny_optimizer, train
from torch.utils.checkpoint import checkpoint
from trainer_cases import OPTIONS, assert_same_run, batches, mse, task_grads, watched

from alr_kernels import AlrAdamW

STEPS = 5


def test_accumulation_is_one_step_of_the_full_batch():
    """The penalty is applied once a step, however many micro-batches made the gradient."""
    model = tiny_model()
    optimizer, shadow = watched(model)
    for number in range(STEPS):
        shadow.step(task_grads(model, mse(model, batches(number))))
        optimizer.zero_grad()
        for part in batches(number, parts=4):
            (mse(model, part) / 4).backward()
        optimizer.step()
    shadow.check(model, optimizer)
    assert optimizer.recorded_steps == STEPS


class Checkpointed(TinyModel):
    """The same model; its blocks are run again in the backward pass."""

    reentrant = False

    def forward(self, x):
        x = torch.tanh(self.embed(x))
        for layer in self.layers:
            x = checkpoint(lambda x, layer: x + torch.tanh(layer(x)), x, layer, use_reentrant=self.reentrant)
        return self.head(x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_bit(reentrant):
    runs = []
    for checkpointed in (False, True):
        model = tiny_model()
        if checkpointed:
            model.__class__ = type("Checkpointed", (Checkpointed,), {"reentrant": reentrant})
        optimizer = tiny_optimizer(model, record=True)
        train(model, optimizer, STEPS)
        runs.append((model, optimizer))
    assert_same_run(*runs)


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_loss_scaling_and_skipped_steps(half, unscale_first):
    """The third step has an infinity: nothing at all changes. All others are those of the unscaled gradient."""
    model = tiny_model()
    optimizer, shadow = watched(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    forward = torch.autocast("cpu", torch.float16, enabled=half)
    for number in range(STEPS):
        with forward:
            loss = mse(model, batches(number))
        if number == 2:
            before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            scaler.scale(loss).backward()
            model.layers[1].weight.grad[3, 3] = torch.inf
        else:
            scale = scaler.get_scale()
            grads = torch.autograd.grad(loss * scale, list(model.parameters()), retain_graph=True)
            names = [name for name, _ in model.named_parameters()]
            shadow.step({name: grad / scale for name, grad in zip(names, grads, strict=True)})
            scaler.scale(loss).backward()
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if number == 2:
            weights, saved = before
            assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
            now = optimizer.state_dict()
            assert now["param_groups"] == saved["param_groups"]
            assert set(saved["state"][0]) == {"step", "exp_avg", "exp_avg_sq", "anchor", "start", "path_integral"}
            for key, state in saved["state"].items():
                assert all(torch.equal(now["state"][key][what], value) for what, value in state.items())
            assert scaler.get_scale() == 2.0**9
    shadow.check(model, optimizer)
    assert optimizer.recorded_steps == STEPS - 1


def test_bf16_autocast():
    """Gradients of float32 weights are float32; ω is theirs, and adds up to the drop of the loss."""
    model = tiny_model()
    optimizer, shadow = watched(model)
    for number in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16):
            assert model(batches(number)[0]).dtype is torch.bfloat16
            loss = mse(model, batches(number))
        shadow.step(task_grads(model, loss))
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            mse(model, batches(number)).backward()
        optimizer.step()
    shadow.check(model, optimizer)


@pytest.mark.parametrize("scaled", [False, True])
def test_clipping_inside_records_the_whole_gradient(scaled):
    model = tiny_model()
    optimizer, shadow = watched(model, max_grad_norm=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
    for number in range(STEPS):
        grads = task_grads(model, mse(model, batches(number)))
        shadow.step(grads, max_norm=0.05)
        optimizer.zero_grad()
        scaler.scale(mse(model, batches(number))).backward()
        scaler.step(optimizer)
        scaler.update()
        norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
        assert norm > 0.05
        assert torch.allclose(optimizer.grad_norm, norm)
    shadow.check(model, optimizer)


def test_clipping_before_the_step_scales_omega():
    """Weights and moments are those of clipping inside; ω holds clipped gradients: why callbacks refuse it."""
    model = tiny_model()
    optimizer, shadow = watched(model)
    mse(model, batches(0)).backward()
    grads = {name: param.grad.clone() for name, param in model.named_parameters()}
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05))
    optimizer.step()
    shadow.step(grads, max_norm=0.05)
    for name in shadow.omega:
        shadow.omega[name] *= 0.05 / (norm + 1e-6)
    shadow.check(model, optimizer)


def test_a_compiled_model():
    """Names get ``_orig_mod.``: importance, recording and checkpoints go from one to the other."""
    runs, saved = [], []
    for wrap in (lambda model: model, functools.partial(torch.compile, backend="aot_eager")):
        model = tiny_model()
        wrapped = wrap(model)
        optimizer = AlrAdamW(wrapped.named_parameters(), random_importance(model), record=True, **OPTIONS)
        train(wrapped, optimizer, STEPS)
        runs.append((model, optimizer))
        saved.append(copy.deepcopy(optimizer.state_dict()))
    assert saved[1]["param_groups"][0]["param_names"][0] == "_orig_mod.embed.weight"
    for (model, optimizer), other in zip(runs, reversed(saved), strict=True):
        optimizer.load_state_dict(other)
        train(model, optimizer, 2, first=STEPS)
    first, second = runs
    assert list(first[1].recorded_importance()) == list(second[1].recorded_importance()) == [
        name for name, _ in tiny_model().named_parameters()
    ]  # fmt: skip
    for a, b in zip(first[0].parameters(), second[0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_an_averaged_copy(kind):
    """It disturbs nothing, its names (``module.``) fit, and importance that it recorded fits the model."""
    average = torch.optim.swa_utils.AveragedModel
    runs = []
    for averaging in (False, True):
        model = tiny_model()
        optimizer = tiny_optimizer(model, record=True)
        multi = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5) if kind == "ema" else None
        averaged = average(model, multi_avg_fn=multi) if averaging else None
        for number in range(STEPS):
            train(model, optimizer, first=number)
            if averaged is not None:
                averaged.update_parameters(model)
        runs.append((model, optimizer))
    assert_same_run(*runs)
    assert any(not torch.equal(a, b) for a, b in zip(averaged.parameters(), model.parameters(), strict=True))
    importance = runs[0][1].recorded_importance()
    onwards = AlrAdamW(averaged.named_parameters(), importance, record=True, **OPTIONS)
    anchors = [param.detach().clone() for param in averaged.parameters()]
    train(averaged, onwards)
    assert all(torch.equal(onwards.state[p]["anchor"], a) for p, a in zip(averaged.parameters(), anchors, strict=True))
    assert list(onwards.recorded_importance()) == list(importance)
    AlrAdamW(model.named_parameters(), onwards.recorded_importance())


SCHEDULES = {
    "warm-up": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda number: min(1.0, (number + 1) / 4)),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=2e-2, total_steps=12),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, base_lr=1e-3, max_lr=2e-2, step_size_up=3),
    "restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "swa": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=5e-2, anneal_epochs=3),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.LinearLR(o, 0.1), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)], [3]
    ),
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_that_write_into_groups(kind):
    """lr and betas act as in torch's AdamW, and a run that is saved and resumed goes on bit for bit."""
    model = tiny_model()
    optimizer, shadow = watched(model)
    schedule, shadows = SCHEDULES[kind](optimizer), SCHEDULES[kind](shadow.adam)
    lrs = set()
    for number in range(8):
        lrs.add(float(optimizer.param_groups[0]["lr"]))
        if number == 4:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), schedule.state_dict()))
        shadow.step(task_grads(model, tiny_loss(model, number % 3)))
        train(model, optimizer, first=number)
        schedule.step()
        shadows.step()
    shadow.check(model, optimizer)
    assert len(lrs) > 1

    other = tiny_model(seed=5)
    resumed, _ = watched(other)
    again = SCHEDULES[kind](resumed)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    for number in range(4, 8):
        train(other, resumed, first=number)
        again.step()
    assert_same_run((other, resumed), (model, optimizer))


def test_no_framework_is_imported_unasked():
    code = "import sys, alr_kernels, alr_kernels.integrations as i; alr_kernels.AlrAdamW, i.param_groups; "
    code += "print(sorted({'transformers', 'accelerate', 'lightning', 'trl', 'peft'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
