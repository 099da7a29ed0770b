"""Tensor parallel, alone and below FSDP2: gradients that are sums not yet made, rows split twice, two meshes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from distributed_cases import importance_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from alr_kernels import AlrAdamW, Importance, ImportanceRecorder

OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "reg_lambda": 0.3, "record": True, "stats": True, "max_grad_norm": 0.01}
# Whose reductions are in another order, through Adam's first steps.
CLOSE = {"rtol": 1e-3, "atol": 1e-4}
SEQUENCE = {
    "norm": SequenceParallel(), "up": ColwiseParallel(input_layouts=Shard(1)),
    "down": RowwiseParallel(output_layouts=Shard(1)),
}  # fmt: skip
REPLICATED = {"up": ColwiseParallel(), "down": RowwiseParallel()}  # norm is left out: FSDP2 shards it on its own mesh


class Block(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, hidden), nn.Linear(hidden, 16)

    def forward(self, x):
        return self.down(torch.relu(self.up(self.norm(x))))


def parallel(plan, hidden, with_fsdp):
    """Return the model, its tensor-parallel mesh, and this rank's place in the other dimension and its size."""
    model, world = Block(hidden), dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, world // 2) if with_fsdp else (1, world), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], plan)
    if with_fsdp:
        fully_shard(model, mesh=mesh["dp"])
    return model, mesh["tp"], (mesh["dp"].get_local_rank(), mesh["dp"].size())


def loss_of(model, x, mesh, place, in_sequence):
    """The share of this rank in the mean over the whole batch."""
    mine = x.chunk(place[1])[place[0]]
    if in_sequence:
        mine = mine.chunk(mesh.size(), 1)[mesh.get_local_rank()]
        mine = DTensor.from_local(mine, mesh, [Shard(1)]).to_local()
        return model(mine).square().sum() / (x.numel() / place[1])
    return model(mine).square().mean()


def whole(tensor):
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def tensor_parallel(plan, hidden, with_fsdp, folder):
    """Weights, norm, statistics, penalty and the importance file are those of one process."""
    reference = Block(hidden)
    importance = importance_of(reference)
    model, mesh, place = parallel(plan, hidden, with_fsdp)
    runs = [AlrAdamW(m.named_parameters(), importance, **OPTIONS) for m in (reference, model)]
    for step in range(3):
        x = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(step))
        reference(x).square().mean().backward()
        loss_of(model, x, mesh, place, plan is SEQUENCE).backward()
        if plan is SEQUENCE and not with_fsdp:
            assert model.norm.weight.grad.placements == (Partial(),)  # which is the point
        for run in runs:
            run.step()
            run.zero_grad()
        for (name, p), (_, q) in zip(reference.named_parameters(), model.named_parameters(), strict=True):
            torch.testing.assert_close(whole(q), p.detach(), **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(runs[1].grad_norm, runs[0].grad_norm, rtol=1e-3, atol=0.0)
    torch.testing.assert_close(runs[1].penalty(), runs[0].penalty(), rtol=1e-2, atol=0.0)
    for layer, row in runs[0].stats().items():
        for key, value in row.items():
            torch.testing.assert_close(runs[1].stats()[layer][key], value, rtol=0.02, atol=1e-7, msg=f"{layer} {key}")
    path = folder / f"tensor-parallel-{hidden}-{with_fsdp}.safetensors"
    runs[1].save_importance(path, xi=1e-3)
    kept, loaded, expected = (
        runs[1].recorded_importance(xi=1e-3),
        Importance.load(path),
        runs[0].recorded_importance(xi=1e-3),
    )
    assert list(loaded) == list(expected)
    for name, omega in expected.items():
        assert torch.equal(whole(kept[name]), loaded[name])
        torch.testing.assert_close(loaded[name], omega, rtol=0.1, atol=0.02 * float(omega.max()))
        torch.testing.assert_close(loaded.stats[name].mean, expected.stats[name].mean, rtol=0.02, atol=0.0)
    dist.barrier()


def recorder(folder):
    """Around torch's own AdamW, which makes the sums for itself."""
    reference = Block(32)
    model, mesh, place = parallel(SEQUENCE, 32, False)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (reference, model)]
    recorders = [
        ImportanceRecorder(optimizer, m.named_parameters())
        for optimizer, m in zip(optimizers, (reference, model), strict=True)
    ]
    for step in range(2):
        x = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(step))
        reference(x).square().mean().backward()
        loss_of(model, x, mesh, place, True).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    expected, got = (run.finalise(xi=1e-3) for run in recorders)
    for name, omega in expected.items():
        torch.testing.assert_close(whole(got[name]), omega, rtol=0.1, atol=0.02 * float(omega.max()))


CASES = {
    "tensor parallel, sequence": (tensor_parallel, SEQUENCE, 32, False),
    "tensor parallel, replicated": (tensor_parallel, REPLICATED, 32, False),
    "tensor parallel and fsdp2, sequence": (tensor_parallel, SEQUENCE, 32, True),
    "tensor parallel and fsdp2, two meshes": (tensor_parallel, REPLICATED, 38, True),  # 19 rows, of which 10 and 9
    "tensor parallel, recorder": (recorder,),
}
