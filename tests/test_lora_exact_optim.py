"""Recording with the exact gradient in an optimizer: what is done to gradients between backward and step."""

from __future__ import annotations

import gc

import pytest
import torch
from test_lora_recording import OMEGA, peft_model

from alr_kernels import AlrAdamW, lora_pairs

X, Y = torch.linspace(-1, 1, 80).view(4, 20), torch.linspace(0, 1, 20).view(4, 5)


def recorded(change, estimator="exact", model=None):
    """Return ω after one step; ``change``(model, optimizer, backward) makes the gradients."""
    torch.manual_seed(0)
    model = peft_model() if model is None else model
    optimizer = AlrAdamW(model.named_parameters(), lora=lora_pairs(model, estimator=estimator), record=True, lr=1e-2)

    def backward(scale=1.0):
        (((model(X) - Y) ** 2).mean() * scale).backward()

    change(model, optimizer, backward)
    optimizer.step()
    return next(state[OMEGA] for state in optimizer.state.values() if OMEGA in state)


def grads(model):
    return [param.grad for param in model.parameters() if param.grad is not None]


def plain(model, optimizer, backward):
    backward()


def unscaled(model, optimizer, backward):
    backward(4096.0)
    for grad in grads(model):
        grad.div_(4096.0)


def scaled_by_hand(model, optimizer, backward):
    backward()
    for grad in grads(model):
        grad.mul_(3.0)


def cleared(model, optimizer, backward):
    backward()
    optimizer.zero_grad()
    backward()


def test_unscaling_after_backward_is_inferred():
    torch.testing.assert_close(recorded(unscaled), recorded(plain), rtol=1e-5, atol=0)


def test_what_scales_the_gradients_scales_the_record_as_elsewhere():
    for estimator in ("exact", "tangent"):
        ratio = recorded(scaled_by_hand, estimator) / recorded(plain, estimator)
        torch.testing.assert_close(ratio[ratio.isfinite()].median(), torch.tensor(3.0), rtol=1e-2, atol=0)


def test_zero_grad_forgets_what_was_gathered():
    assert torch.equal(recorded(cleared), recorded(plain))


def test_gradients_thrown_away_past_the_optimizer_are_refused():
    def discarded(model, optimizer, backward):
        (model(X.flip(1)) ** 3).mean().backward()
        model.zero_grad()
        backward()

    with pytest.raises(RuntimeError, match=r"'proj\.weight' are not those that the gathered.*optimizer.zero_grad"):
        recorded(discarded)


def test_a_module_that_was_not_used_records_nothing():
    def unused(model, optimizer, backward):
        backward()
        optimizer.zero_grad(set_to_none=False)

    assert not recorded(unused).any()


def test_a_later_call_takes_the_hooks_off():
    model = peft_model()
    first = lora_pairs(model, estimator="exact")
    lora_pairs(model)  # of the next phase, say
    gc.collect()
    ((model(X) - Y) ** 2).mean().backward()
    assert first[0].take_gradient() is None
    again = lora_pairs(model, estimator="exact")
    ((model(X) - Y) ** 2).mean().backward()
    assert again[0].take_gradient().any()
