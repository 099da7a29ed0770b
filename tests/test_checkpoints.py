"""save_checkpoint and load_checkpoint in one process: what is kept, what is found, and what a killed run leaves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from alr_kernels import AlrAdamW, Importance
from alr_kernels.integrations.checkpoints import load_checkpoint, save_checkpoint


class Net(nn.Module):
    """One layer takes no part in the loss, as experts and heads do that a phase does not use."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)


def build(importance=None):
    model = Net()
    return model, AlrAdamW(model.named_parameters(), importance, lr=1e-2, record=True)


def train(model, optimizer, steps):
    for step in steps:
        model(torch.randn(3, 4, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("pulled", [False, True])
def test_parameters_that_never_had_a_gradient_load(tmp_path, pulled):
    """torch gives every parameter a state before it loads; the checkpoint has none of these."""
    importance = Importance({n: torch.rand(p.shape) for n, p in Net().named_parameters()}) if pulled else None
    model, optimizer = build(importance)
    train(model, optimizer, range(2))
    save_checkpoint(tmp_path, 2, model, optimizer)
    resumed, other = build(importance)
    assert load_checkpoint(tmp_path, resumed, other) == {"step": 2}
    assert "exp_avg" not in other.state[resumed.unused.weight]
    for run in ((model, optimizer), (resumed, other)):
        train(*run, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    assert other.recorded_steps == 4


def test_what_the_user_adds_is_read_back_before_it_counts(tmp_path):
    """A checkpoint that does not load is found out while the earlier one is still there."""
    model, optimizer = build()
    train(model, optimizer, range(1))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    save_checkpoint(tmp_path, 1, model, optimizer, keep=1, scheduler=scheduler.state_dict())
    for unreadable in (np.float64(3.0), print, lambda: 3):
        with pytest.raises(Exception, match=r"Weights only load failed|pickle"):
            save_checkpoint(tmp_path, 2, model, optimizer, keep=1, more=unreadable)
    assert names(tmp_path) == ["step-1"]
    assert load_checkpoint(tmp_path, model, optimizer)["scheduler"] == scheduler.state_dict()


def test_what_else_lies_there_is_left_alone(tmp_path):
    model, optimizer = build()
    train(model, optimizer, range(1))
    (tmp_path / "step-9").write_text("a file")
    (tmp_path / "step-8").mkdir()
    (tmp_path / "step-x").mkdir()
    for step in (5, 6, 7):
        save_checkpoint(tmp_path, step, model, optimizer)
    assert names(tmp_path) == ["step-6", "step-7", "step-8", "step-9", "step-x"]
    assert load_checkpoint(tmp_path, model, optimizer) == {"step": 7}
    assert save_checkpoint(tmp_path, 3, model, optimizer, keep=1).is_dir()  # of a run that began anew: it stays
    assert names(tmp_path) == ["step-3", "step-7", "step-8", "step-9", "step-x"]


@pytest.mark.parametrize("save_next", [False, True])
def test_killed_while_a_step_is_replaced(tmp_path, save_next):
    """Between two renames the only checkpoint has no name: it gets it back."""
    model, optimizer = build()
    train(model, optimizer, range(1))
    save_checkpoint(tmp_path, 4, model, optimizer, keep=1)
    (tmp_path / "step-4").rename(tmp_path / ".step-4.replaced")
    if save_next:
        save_checkpoint(tmp_path, 5, model, optimizer)
        assert names(tmp_path) == ["step-4", "step-5"]
    else:
        assert load_checkpoint(tmp_path, model, optimizer) == {"step": 4}


@pytest.mark.parametrize(("options", "message"), [({"keep": 0}, "keep.*got 0"), ({"step": -1}, "step.*got -1")])
def test_numbers_that_would_lose_checkpoints(tmp_path, options, message):
    model, optimizer = build()
    with pytest.raises(ValueError, match=message):
        save_checkpoint(tmp_path, **{"step": 1, **options}, model=model, optimizer=optimizer)
    assert not list(tmp_path.iterdir())
