"""Importance files for the tests of inspect, compare and convert, and independent readings of them in numpy."""

from __future__ import annotations

import contextlib
import math
import re
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alr_kernels import Importance
from alr_kernels.importance import TensorStats

ROOT = Path(__file__).parent.parent
FORMS = ("fp32", "bf16", "int8", "int4", "rank1")


def plain_reader():
    """Return ``read`` of docs/artifact.md: what the specification says, in numpy alone."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "artifact.md").read_text(encoding="utf-8"), re.DOTALL)
    code = next(block for block in blocks if "def read(path)" in block)
    scope: dict = {}
    exec(code[: code.index("\n\n\nfound")], scope)
    return scope["read"]


def tensors(seed=0, scale=1.0):
    """Return Ω by name as a model has it: blocks, vectors, odd rows, three dimensions, zeros, ten decades."""
    draw = torch.Generator().manual_seed(seed)

    def omega(*shape):
        values = torch.rand(shape, generator=draw).log().mul(-0.7).exp() * scale
        return torch.where(torch.rand(shape, generator=draw) < 0.2, 0.0, values - scale)

    return {
        "model.embed.weight": omega(70, 128),
        **{f"model.layers.{i}.attn.q_proj.weight": omega(64, 128) * (i + 1) for i in range(3)},
        **{f"model.layers.{i}.attn.q_proj.bias": omega(64) for i in range(3)},
        **{f"model.layers.{i}.mlp.up.weight": omega(40, 256) for i in range(3)},
        "model.experts.weight": omega(3, 20, 128),
        "head.weight": omega(50, 90),
        "scale": omega(),
    }


def importance(seed=0, scale=1.0, **options):
    """Return an importance of these, with sums of ω as a recording has them."""
    given = tensors(seed, scale)
    stats = {}
    for place, (name, omega) in enumerate(given.items()):
        signed = (1.0 + place, 0.25 * place)
        stats[name] = TensorStats.of(omega)._replace(path_integral_sum=signed[0], negative_mass=signed[1])
    about = {"method": "path_integral", "xi": 0.01, "relative": True, "steps": 30} | options
    return Importance(given, stats=stats, **about)


def saved(path, form="fp32", **options):
    """Save such a file in a form and return its path and what was saved."""
    kept = importance(**options)
    kept = kept if form == "fp32" else kept.astype(form)
    kept.save(path)
    return path, kept


def ranks(values):
    """Return ranks with ties shared, the slow way: how many are smaller, and half of the equal ones."""
    ordered = np.sort(values)
    below = np.searchsorted(ordered, values, "left")
    return (below + np.searchsorted(ordered, values, "right") + 1) / 2


def overlap(first, second, share):
    """Return the overlap of the largest ones by sorting; those at the bound count by their part."""
    count = math.ceil(share * first.size)
    weights = []
    for values in (first, second):
        bound = np.sort(values)[-count]
        above, there = values > bound, values == bound
        weights.append(above + there * ((count - above.sum()) / there.sum()))
    return np.minimum(*weights).sum() / count


class Largest(TorchDispatchMode):
    """Remember the largest tensor that was made anew, in elements; views of what is there do not count."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(found):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, x.numel())
        return found


@contextlib.contextmanager
def cut_into(monkeypatch, *modules, elements):
    """Let modules go through tensors in chunks of so many elements."""
    from alr_kernels.importance import chunks as source

    whole = source.chunks
    with monkeypatch.context() as patch:
        for module in modules:
            patch.setattr(module, "chunks", lambda entry, name="importance": whole(entry, name, elements))
        yield
