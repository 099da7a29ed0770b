"""What the tests of steps within backward share: two optimizers, one attached, held together bit for bit."""

from __future__ import annotations

from cases import assert_same_state, members, same_bits, tiny_loss

STEPS = 4


def follow(models, optimizers, loss=tiny_loss, steps=STEPS, change=lambda optimizer, number: None):
    """Train both, the second within backward, and hold it to the first bit for bit after every step."""
    with optimizers[1].attach_to_backward():
        for number in range(steps):
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.zero_grad()
                loss(model, number % 3).backward()
                optimizer.step()
            assert all(param.grad is None for param in members(optimizers[1]))
            assert_same_state(*optimizers)
            assert_same_readings(*optimizers)
            for optimizer in optimizers:
                change(optimizer, number + 1)
    train_on(models, optimizers, loss)


def train_on(models, optimizers, loss):
    """Take one whole step with each: what within backward left behind is what a whole step goes on with."""
    for model, optimizer in zip(models, optimizers, strict=True):
        optimizer.zero_grad()
        loss(model, 7).backward()
        optimizer.step()
    assert_same_state(*optimizers)


def assert_same_readings(optimizer, other):
    assert optimizer.recorded_steps == other.recorded_steps
    assert dict(optimizer.coeffs or {}) == dict(other.coeffs or {})
    if optimizer._gathers_stats:
        rows, others = optimizer.stats(), other.stats()
        assert set(rows) == set(others)
        for layer, row in rows.items():
            assert all(same_bits(value, others[layer][key]) for key, value in row.items()), layer
