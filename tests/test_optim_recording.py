"""Which parameters AlrAdamW records, and which steps count."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import assert_same_state, random_importance, same_bits, tiny_loss, tiny_model, train

from alr_kernels import AlrAdamW


def test_parameters_without_gradient_are_left_alone():
    model = tiny_model()
    model.embed.weight.requires_grad_(False)
    frozen = model.embed.weight.clone()
    optimizer = AlrAdamW(model.named_parameters(), weight_decay=0.1, record=True)
    train(model, optimizer, 2)
    assert same_bits(model.embed.weight, frozen)
    assert "exp_avg" not in optimizer.state.get(model.embed.weight, {})
    assert "embed.weight" not in optimizer.recorded_importance()
    optimizer.zero_grad()
    before = copy.deepcopy(optimizer)
    optimizer.step()
    assert_same_state(optimizer, before)


@pytest.mark.parametrize("freeze_first", [True, False], ids=("unfrozen later", "frozen after backward"))
def test_freezing_and_unfreezing_while_recording(freeze_first):
    model = tiny_model()
    model.head.weight.requires_grad_(not freeze_first)
    optimizer = AlrAdamW(model.named_parameters(), weight_decay=0.1, record=True)
    tiny_loss(model).backward()
    if freeze_first:
        optimizer.step()
    model.head.weight.requires_grad_(freeze_first)
    if freeze_first:
        optimizer.zero_grad()
        tiny_loss(model).backward()
    optimizer.step()
    assert float(optimizer.recorded_importance()["embed.weight"].sum()) > 0


def test_frozen_parameter_with_importance_is_not_recorded():
    model = tiny_model()
    model.head.weight.requires_grad_(False)
    optimizer = AlrAdamW(model.named_parameters(), random_importance(model), record=True)
    train(model, optimizer)
    assert "path_integral" not in optimizer.state[model.head.weight]
    assert "head.weight" not in optimizer.recorded_importance()


def test_a_step_without_gradients_is_not_counted():
    model = tiny_model()
    optimizer = AlrAdamW(model.named_parameters(), record=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="no step"):
        optimizer.recorded_importance()
    train(model, optimizer)
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.recorded_importance().steps == 1


def test_importance_stays_the_users_tensor():
    """Documented: the tensors are used, not copied, when dtype and layout fit."""
    weight = torch.nn.Parameter(torch.randn(8))
    importance = torch.rand(8)
    optimizer = AlrAdamW([weight], [importance])
    weight.grad = torch.randn(8)
    optimizer.step()
    assert optimizer._slots[0][0].importance.values.data_ptr() == importance.data_ptr()
