"""What the tests of compiled steps share: a function that counts its compilations, and two equal optimizers."""

from __future__ import annotations

import pytest
import torch
from cases import set_grads, tiny_model, tiny_optimizer
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._dynamo.variables.constant import CONSTANT_VARIABLE_NONE

STEPS = 4


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """Import it: every test of the module then starts with nothing compiled, and backward may be traced."""
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
