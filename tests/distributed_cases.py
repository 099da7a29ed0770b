"""What every rank of test_distributed.py does: steps sharded parameters and compares with whole ones, after every step.

Gradients are given, the same to both, so that an element's update must be the same bits; what is summed over ranks
(norms, statistics) is compared within SUMS.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from alr_kernels import AlrAdamW, DynamicCoeffs, Importance

SUMS = {"rtol": 1e-12, "atol": 0.0}  # float64 sums of up to 10^4 numbers in another order
STATISTICS = {"rtol": 1e-5, "atol": 0.0}  # which begin as float32 sums of a few elements
# Rows over 2 and 4 ranks: uneven, fewer than ranks (empty shards), one; codes need 4,096 elements and whole blocks.
SHAPES = {
    "layers.0.even.weight": (64, 128), "layers.0.uneven.weight": (37, 256), "layers.1.few.weight": (3, 5),
    "layers.1.vector": (7,), "layers.2.one": (1,), "layers.2.kernel": (5, 4, 3),
}  # fmt: skip
STEPS = 4


class Weights(nn.Module):
    """Parameters of given shapes, named so."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, shape in SHAPES.items():
            *path, last = name.split(".")
            module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))


def importance_of(model, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return Importance({n: torch.rand(p.shape, generator=generator) ** 4 for n, p in model.named_parameters()})


def gradients(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def mesh_of(kind):
    world = dist.get_world_size()
    if kind == "hsdp":
        return init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")), (Replicate(), Shard(0))
    if kind == "nested":
        return init_device_mesh("cpu", (2, world // 2)), (Shard(0), Shard(0))
    if kind == "strided":  # as fully_shard makes of what is split for tensor parallelism already
        return init_device_mesh("cpu", (2, world // 2)), (_StridedShard(0, split_factor=world // 2), Shard(0))
    if kind == "replicate":
        return init_device_mesh("cpu", (world,)), (Replicate(),)
    if kind == "columns":
        return init_device_mesh("cpu", (world,)), (Shard(1),)
    return init_device_mesh("cpu", (world,)), (Shard(0),)


def shard(model, mesh, placements):
    """Make every parameter a DTensor."""
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            placed = placements if param.ndim > max(getattr(p, "dim", 0) or 0 for p in placements) else (Replicate(),)
            local = distribute_tensor(param.detach().clone(), mesh, placed, src_data_rank=None)
            module.register_parameter(name, nn.Parameter(local, requires_grad=param.requires_grad))
    return model


def part(whole, like):
    """The local part of a whole tensor that is sharded as ``like``."""
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def give(model, grads):
    for name, param in model.named_parameters():
        grad = grads[name]
        param.grad = part(grad, param) if isinstance(param, DTensor) else grad.clone()


def same_state(whole, sharded, models, exact=True):
    """Compare weights and everything that is kept, gathered from the state_dict, with the whole run's."""
    pairs = {
        name: (p.detach(), q.detach())
        for (name, p), (_, q) in zip(*(m.named_parameters() for m in models), strict=True)
    }
    saved = [optimizer.state_dict() for optimizer in (whole, sharded)]
    names = list(pairs)
    for index, state in saved[0]["state"].items():
        assert state.keys() == saved[1]["state"][index].keys(), names[index]
        pairs |= {f"{key} of {names[index]}": (v, saved[1]["state"][index][key]) for key, v in state.items()}
    for what, (expected, got) in pairs.items():
        if isinstance(got, DTensor):
            assert got.shape == expected.shape, what
            expected, got = part(expected, got).to_local(), got.to_local()
        assert got.dtype == expected.dtype, what
        if exact:
            assert torch.equal(got, expected), what
        else:
            message = lambda text, what=what: f"{what}: {text}"  # noqa: E731
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6, msg=message)


def same_numbers(first, second, tolerance=SUMS):
    assert first.keys() == second.keys()
    for layer, value in first.items():
        rows = value if isinstance(value, dict) else {"value": value}
        others = second[layer] if isinstance(value, dict) else {"value": second[layer]}
        for key, number in rows.items():
            torch.testing.assert_close(others[key], number, **tolerance)


def elementwise(kind, options, dtype, folder):
    """A sharded run equals the whole one after every step."""
    options = dict(options)
    clips = options.get("max_grad_norm") is not None or isinstance(options.get("coeffs"), DynamicCoeffs)
    models = Weights(dtype), shard(Weights(dtype), *mesh_of(kind))
    importance = importance_of(models[0])
    if given := options.pop("given", None):
        importance = importance.astype(given)
    skips = options.pop("skips", False)
    if options.pop("anchored", False):
        options["anchor"] = {name: value.add(0.1) for name, value in models[0].state_dict().items()}
    runs = [
        AlrAdamW(m.named_parameters(), importance, lr=1e-2, weight_decay=0.1, reg_lambda=0.3, record=True, stats=True,
                 **options)
        for m in models
    ]  # fmt: skip
    assert dict(runs[0].coeffs) == dict(runs[1].coeffs)
    same_numbers(*(run.penalty_by_layer() for run in runs))
    for step in range(STEPS):
        grads = gradients(step, dtype)
        for run in runs:  # as a GradScaler does: a skipped step leaves statistics as they are
            run.grad_scale, run.found_inf = torch.ones(()), torch.tensor(float(skips and step % 2))
        for model, run in zip(models, runs, strict=True):
            give(model, grads)
            run.step()
        same_state(*runs, models, exact=not clips)
        if not clips:
            same_numbers(*(run.stats() for run in runs), STATISTICS)
            same_numbers(*(run.penalty_by_layer() for run in runs))
        else:
            same_numbers(*({layer: torch.tensor(x) for layer, x in run.coeffs.items()} for run in runs), STATISTICS)
    kept = runs[1].importance_tensors()
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in kept)  # nothing holds the whole
    if options.get("max_grad_norm"):
        torch.testing.assert_close(runs[1].grad_norm, runs[0].grad_norm, rtol=1e-6, atol=0)
        assert float(runs[0].grad_norm) > 2 * options["max_grad_norm"]


PLAIN = {}
LEAN = {"importance_dtype": "int4", "anchor_dtype": "bf16", "state_dtype": "int8"}
CASES = {
    "proximal": (elementwise, "rows", PLAIN, torch.float32),
    "coupled": (elementwise, "rows", {"mode": "coupled"}, torch.float32),
    "clipped": (elementwise, "rows", {"max_grad_norm": 1.0}, torch.float32),
    "balanced": (elementwise, "rows", {"coeffs": DynamicCoeffs("uniform", every=2)}, torch.float32),
    "float64": (elementwise, "rows", PLAIN, torch.float64),
    "int8 importance": (elementwise, "rows", {"importance_dtype": "int8"}, torch.float32),
    "int4 importance given": (elementwise, "rows", {"given": "int4"}, torch.float32),
    "rank1 importance given": (elementwise, "rows", {"given": "rank1"}, torch.float32),
    "lean": (elementwise, "rows", LEAN, torch.float32),
    "split": (elementwise, "rows", LEAN | {"master": "split"}, torch.bfloat16),
    "stochastic": (elementwise, "rows", {"master": "stochastic", "state_dtype": "bf16"}, torch.bfloat16),
    "replicated": (elementwise, "replicate", LEAN, torch.float32),
    "columns": (elementwise, "columns", PLAIN, torch.float32),
    "columns, clipped": (elementwise, "columns", {"max_grad_norm": 1.0}, torch.float32),
    "anchored": (elementwise, "rows", {"anchored": True}, torch.float32),
    "skipped": (elementwise, "rows", {"skips": True}, torch.float32),
    "nested": (elementwise, "nested", PLAIN, torch.float32),
    "strided": (elementwise, "strided", PLAIN, torch.float32),
    "hsdp": (elementwise, "hsdp", {"mode": "coupled"}, torch.float32),
}
