"""Accelerate: nothing of ours is needed; accumulation, bf16, clipping and resuming are held to the same numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import random_importance, tiny_model, tiny_optimizer
from trainer_cases import OPTIONS, assert_same_run, batches, mse, task_grads, watched

from alr_kernels import AlrAdamW
from alr_kernels.integrations import watching

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

STEPS = 5


@pytest.fixture(autouse=True)
def _own_accelerator():
    """Accelerators of one process share their state."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def test_accumulation_and_clipping_inside():
    """``accelerator.accumulate`` steps every fourth time; the wrapper is looked through."""
    model = tiny_model()
    inner, shadow = watched(model, max_grad_norm=0.05)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    prepared, optimizer = accelerator.prepare(model, inner)
    assert watching.unwrapped(optimizer) is inner is not optimizer
    for number in range(STEPS):
        shadow.step(task_grads(model, mse(model, batches(number))), max_norm=0.05)
        for part in batches(number, parts=4):
            with accelerator.accumulate(prepared):
                accelerator.backward(mse(prepared, part))
                optimizer.step()
                optimizer.zero_grad()
    shadow.check(model, inner)
    assert inner.recorded_steps == STEPS


def test_bf16():
    model = tiny_model()
    inner, shadow = watched(model)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared, optimizer = accelerator.prepare(model, inner)
    for number in range(STEPS):
        optimizer.zero_grad()
        loss = mse(prepared, batches(number))
        shadow.step(task_grads(model, mse(prepared, batches(number))))
        exact = task_grads(model, in_float32(model, batches(number)))
        accelerator.backward(loss)
        assert any(not torch.equal(param.grad, exact[name]) for name, param in model.named_parameters())
        optimizer.step()
    shadow.check(model, inner)


def test_loss_scaling_and_a_skipped_step():
    """accelerate's wrapper hands the scaler over; it does not see that a step was skipped, the state does."""
    model = tiny_model()
    inner, shadow = watched(model)
    accelerate.Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    optimizer = accelerate.optimizer.AcceleratedOptimizer(inner, scaler=scaler)
    for number in range(STEPS):
        if number == 2:
            weights, saved = copy.deepcopy((model.state_dict(), inner.state_dict()))
        else:
            shadow.step(task_grads(model, mse(model, batches(number))))
        scaler.scale(mse(model, batches(number))).backward()
        if number == 2:
            model.embed.weight.grad[0, 0] = torch.nan
        optimizer.step()
        optimizer.zero_grad()
        if number == 2:
            assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
            for key, state in inner.state_dict()["state"].items():
                assert all(torch.equal(value, saved["state"][key][what]) for what, value in state.items())
            assert not optimizer.step_was_skipped
    shadow.check(model, inner)
    assert inner.recorded_steps == STEPS - 1


def in_float32(model, batch):
    """The same loss without the autocast that ``prepare`` puts around the model's forward."""
    return mse(lambda x: type(model).forward(model, x), batch)


PHASES = {"record": {"record": True}, "tune": {"reg_lambda": 0.5}, "both": {"record": True, "state_dtype": "int8"}}


def optimizer_of(model, phase, importance):
    options = OPTIONS | PHASES[phase]
    return AlrAdamW(model.named_parameters(), None if phase == "record" else importance, **options)


@pytest.mark.parametrize("phase", PHASES)
def test_save_state_and_load_state_are_bit_exact(tmp_path, phase):
    """With a prepared scheduler; the second run begins with other weights."""
    importance = random_importance(tiny_model())
    runs = []
    for seed in (0, 1):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(cpu=True)
        model = tiny_model(seed)
        inner = optimizer_of(model, phase, importance)
        schedule = torch.optim.lr_scheduler.LinearLR(inner, 0.2, total_iters=5)
        prepared, optimizer, schedule = accelerator.prepare(model, inner, schedule)
        first = 0
        if seed == 1:
            accelerator.load_state(str(tmp_path / "state"))
            first = 3
        for number in range(first, 6):
            if number == 3 and seed == 0:
                accelerator.save_state(str(tmp_path / "state"))
            optimizer.zero_grad()
            accelerator.backward(mse(prepared, batches(number)))
            optimizer.step()
            schedule.step()
        runs.append((model, inner))
    assert_same_run(runs[1], runs[0])


def test_preparing_an_optimizer_in_the_middle_of_its_run_changes_nothing():
    """``prepare`` sends the state through state_dict and load_state_dict."""
    runs = []
    for prepare in (False, True):
        model = tiny_model()
        optimizer = tiny_optimizer(model, record=True)
        for number in range(STEPS):
            if prepare and number == 2:
                accelerate.Accelerator(cpu=True).prepare(optimizer)
            optimizer.zero_grad()
            mse(model, batches(number)).backward()
            optimizer.step()
        runs.append((model, optimizer))
    assert_same_run(*runs)
