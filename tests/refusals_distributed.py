"""What distributed runs refuse: part of the table of tests/test_validation.py.

Each entry opens a process group of its own in this process and closes it again: one that only pretends to communicate
("fake", of any size), or gloo of one process. What another rank would answer is put in its mouth where it matters.
"""

from __future__ import annotations

import contextlib
import tempfile
from unittest import mock

import torch
import torch.distributed as dist
from cases import random_importance
from refusals import one, p
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from alr_kernels import (
    AlrAdamW,
    Importance,
    ImportanceRecorder,
    _ranks,
    fisher_importance,
    magnitude_gradient_importance,
    mas_importance,
)
from alr_kernels.importance import ImportanceWriter
from alr_kernels.importance.job import Job
from alr_kernels.integrations import checkpoints

ROWS, COLUMNS = (Shard(0),), (Shard(1),)


@contextlib.contextmanager
def job(world=2, rank=0, backend="fake"):
    """A process group that is gone afterwards."""
    store = FakeStore() if backend == "fake" else dist.HashStore()
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def within(function, *arguments, **options):
    """An entry of the table: the call within a job."""

    def call(c):
        with job(**options):
            function(*arguments)

    return call


def wide(dtype=torch.float32):
    return torch.ones(64, 128, dtype=dtype)


def placed(tensor, placements, mesh=None):
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def stepped(param, grad=None, **options):
    """Step one parameter, which must be as it was when that is refused; ``grad``: None is one like the parameter."""
    param = nn.Parameter(param)
    optimizer = one(param=param, **options)
    param.grad = torch.ones_like(param) if grad is None else grad
    before = local(param).clone()
    try:
        optimizer.step()
    finally:
        assert torch.equal(local(param), before)
        assert not any(optimizer.state.values())


def local(tensor):
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def partial(tensor):
    return DTensor.from_local(tensor, init_device_mesh("cpu", (dist.get_world_size(),)), [Partial()])


def on(placements, options, dtype=torch.float32, importance=None, grad=None):
    """Step a weight with placements (None: unsharded), importance and gradient of others."""

    def call():
        given = {} if importance is None else {"importance": {"w": importance()}}
        param = wide(dtype) if placements is None else placed(wide(dtype), placements)
        stepped(param, None if grad is None else grad(), **options, **given)

    return within(call)


def codes(kept):
    def call():
        importance = Importance({"w": wide()}).astype(kept)
        stepped(placed(wide(), COLUMNS), importance=importance)

    return within(call)


def anchored(placements, anchor):
    def call():
        param = wide() if placements is None else placed(wide(), placements)
        stepped(param, importance={"w": wide()}, anchor={"w": placed(wide(), anchor)})

    return within(call)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))


def fsdp1(use_orig_params, before):
    """A model wrapped by FSDP1, the optimizer built before or after that, and a real backward pass."""
    model = net()
    early = AlrAdamW(model.named_parameters()) if before else None
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    optimizer = early or AlrAdamW(wrapped.named_parameters())
    wrapped(torch.ones(1, 4)).sum().backward()
    optimizer.step()


def fsdp1_recorded():
    wrapped = flattened(net())
    ImportanceRecorder(torch.optim.AdamW(wrapped.parameters()), wrapped.named_parameters())


def sharded_late(importance):
    model = net()
    given = random_importance(model) if importance else None
    optimizer = AlrAdamW(model.named_parameters(), given)
    fully_shard(model)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()


def one_flat_tensor(model):
    """ZeRO-1 and ZeRO-2 put their part of one flat float32 tensor into the group, and give that a gradient."""
    optimizer = AlrAdamW(model.named_parameters())
    flat = nn.Parameter(torch.cat([param.detach().flatten() for param in model.parameters()]))
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    optimizer.step()


def partitioned():
    """ZeRO-3 leaves an empty tensor and marks it with a number."""
    param = nn.Parameter(torch.empty(0))
    param.ds_id = 7
    one(param=param)


def half_a_pair():
    up, down = p(6, 2), nn.Parameter(placed(torch.ones(2, 4), ROWS))
    optimizer = AlrAdamW([("b", up), ("a", down)], {"w": torch.ones(6, 4)}, lora=[("w", down, up, 1.0)])
    up.grad, down.grad = torch.ones_like(up), torch.ones_like(down)
    try:
        optimizer.step()
    finally:
        assert not any(optimizer.state.values())


def pair_by_columns():
    up, down = (nn.Parameter(placed(torch.ones(*shape), COLUMNS)) for shape in ((6, 2), (2, 4)))
    optimizer = AlrAdamW([("b", up), ("a", down)], {"w": torch.ones(6, 4)}, lora=[("w", down, up, 1.0)])
    up.grad, down.grad = torch.ones_like(up), torch.ones_like(down)
    optimizer.step()


def recorded_gradient(grad):
    param = nn.Parameter(placed(wide(), ROWS))
    optimizer = torch.optim.SGD([param], lr=0.1)
    ImportanceRecorder(optimizer, [("w", param)])
    param.grad = grad()
    optimizer.step()


def saved(mesh=None, **answers):
    """Save sharded importance; ``answers``: what a method of Job returns instead of asking the other ranks."""
    importance = Importance({"w": placed(wide(), ROWS, None if mesh is None else DeviceMesh("cpu", mesh))})
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(Job, name, answer))
        importance.save(f"{folder}/w.safetensors")


def written_alone():
    with (
        tempfile.TemporaryDirectory() as folder,
        ImportanceWriter(f"{folder}/w.safetensors", {"w": wide().shape}) as file,
    ):
        file.add("w", placed(wide(), ROWS))


def others_see(job, value):
    return [value, False]


def others_fail(job, value):
    """Everyone sees the folder; then the disk of rank 1 is full."""
    return [value, True] if isinstance(value, bool) else [value, "rank 1: [Errno 28] No space left on device"]


def told(job, value):
    return value


def loaded():
    """Rank 1 sees a later checkpoint than this one."""
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(_ranks, "of_all", lambda names: [names, [*names, "step-2"]]),
    ):
        model = net()
        checkpoints.load_checkpoint(folder, model, AlrAdamW(model.named_parameters()))


def estimated(function, wrap=fully_shard):
    function(wrap(net()), [{"input": torch.ones(1, 4)}])


def flattened(model):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


NO_GRADIENT = r"none of the 4 parameters \('0.bias'.*re-created.*fully_shard.*FSDP1.*Build the optimizer.*as it is"
FSDP1 = "was flattened by FSDP1.*neither rows nor.*FSDP2"
UNSHARDED = r"expected a whole model.*'0.weight' as a DTensor.*unsharded model.*record=True"
ALONE = r"\(Shard\(dim=0\),\) on DeviceMesh.*full_tensor"
APART = r"expected a tensor sharded as the parameter, \(Shard\(dim=0\),\).*got \(Shard\(dim=1\),\).*full_tensor"

REFUSED = {
    **{
        f"fsdp1 use_orig_params={flag}, built after, rank {rank} of {world}": (
            within(fsdp1, flag, False, world=world, rank=rank), RuntimeError, FSDP1,
        )
        for flag in (False, True) for world, rank in ((1, 0), (2, 0), (2, 1))
    },
    **{
        f"fsdp1 use_orig_params, built before, rank {rank}": (
            within(fsdp1, True, True, rank=rank), RuntimeError, f"'0.weight' {FSDP1}",
        )
        for rank in (0, 1)
    },
    "fsdp1 built before": (within(fsdp1, False, True), RuntimeError, NO_GRADIENT),
    "fsdp1 recorded": (within(fsdp1_recorded), RuntimeError, f"'0.weight' {FSDP1}"),
    "fully_shard after the optimizer": (within(sharded_late, False), RuntimeError, NO_GRADIENT),
    "fully_shard after the optimizer, importance": (within(sharded_late, True), RuntimeError, NO_GRADIENT),
    "zero redundancy": (
        within(lambda: ZeroRedundancyOptimizer(net().parameters(), AlrAdamW, lr=1e-3), world=1, backend="gloo"),
        TypeError, "ZeroRedundancyOptimizer hands each rank some.*fully_shard",
    ),
    "zero 1": (
        within(lambda: one_flat_tensor(net())), RuntimeError, r"expected the 4.*'0.weight'.*got 1.*DeepSpeed.*FSDP2",
    ),
    "zero 1 of one parameter": (
        within(lambda: one_flat_tensor(nn.Linear(4, 6, bias=False))),
        RuntimeError, r"'weight': expected shape \(6, 4\).*got \(24,\).*flattened.*FSDP2",
    ),
    "zero 3": (lambda c: partitioned(), RuntimeError, "'w' was partitioned by DeepSpeed ZeRO-3.*FSDP2"),
    "partial": (
        within(lambda: stepped(partial(wide()))), RuntimeError, r"'w'.*sharded or replicated.*Partial\(sum\).*redistri",
    ),
    "int8 moments by columns": (
        on(COLUMNS, {"state_dtype": "int8"}), RuntimeError, r"'w'.*by rows.*int8 state.*dim=1.*state_dtype='fp32'",
    ),
    "bf16 moments by columns": (
        on(COLUMNS, {"state_dtype": "bf16"}), RuntimeError, r"'w'.*by rows.*bf16 state.*dim=1.*state_dtype='fp32'",
    ),
    "int4 importance by columns": (
        on(COLUMNS, {"importance_dtype": "int4"}, importance=wide),
        RuntimeError, "'w'.*by rows.*int4 importance.*dim=1.*fp32.*importance_dtype",
    ),
    **{
        f"{kept} codes by columns": (codes(kept), RuntimeError, rf"'w'.*by rows.*{kept} importance.*astype\('fp32'\)")
        for kept in ("int8", "rank1")
    },
    "random rounding by columns": (
        on(COLUMNS, {"master": "stochastic"}, torch.bfloat16),
        RuntimeError, "'w'.*by rows.*stochastic rounding.*dim=1.*master='split'",
    ),
    "sharded importance": (
        on(None, {}, importance=lambda: placed(wide(), ROWS)), ValueError, f"importance of w.*unsharded.*{ALONE}",
    ),
    "sharded anchor": (anchored(None, ROWS), ValueError, f"anchor of w.*unsharded.*{ALONE}"),
    "importance by columns": (
        on(ROWS, {}, importance=lambda: placed(wide(), COLUMNS)), ValueError, f"importance of w.*{APART}",
    ),
    "anchor by columns": (anchored(ROWS, COLUMNS), ValueError, f"anchor of w.*{APART}"),
    "whole gradient": (on(ROWS, {}, grad=wide), RuntimeError, "'w': expected a DTensor as.*got an unsharded tensor"),
    "sharded gradient": (
        on(None, {}, grad=lambda: placed(wide(), ROWS)), RuntimeError, "'w': expected an unsharded.*got a DTensor",
    ),
    "gradient on another mesh": (
        on(ROWS, {}, grad=lambda: placed(wide(), (Replicate(), *ROWS), DeviceMesh("cpu", [[0, 1]]))), RuntimeError,
        "'w': expected its gradient on the parameter's mesh, .*, got .*; shard the model before",
    ),
    "recorded gradient on another mesh": (
        within(lambda: recorded_gradient(wide)), RuntimeError, "'w': expected a DTensor as.*got an unsharded tensor",
    ),
    "a part for a file of one process": (
        within(written_alone), ValueError, "importance of 'w'.*whole tensor.*writes alone, got a DTensor.*full_tensor",
    ),
    "half a pair": (
        within(half_a_pair), RuntimeError, "pair 'w'.*both factors sharded alike, got None for B.*Shard.*for A",
    ),
    "pair by columns": (within(pair_by_columns), RuntimeError, "'w'.*by rows.*LoRA factor.*dim=1.*fully_shard"),
    "save on a part of the job": (
        within(saved, [0, 1], world=4), RuntimeError, "over all 4 processes, got a mesh of 2.*one file from each part",
    ),
    "save in a folder of one rank": (
        within(lambda: saved(all=others_see, told=told)),
        FileNotFoundError, r"w.safetensors'.*every process sees.*ranks \[1\].*shared file system",
    ),
    "save while a disk is full": (
        within(lambda: saved(all=others_fail, told=told)),
        OSError, r"w.safetensors'.*every rank.*rank 1: \[Errno 28\].*nothing was changed",
    ),
    "checkpoints that others do not see": (
        lambda c: loaded(), ValueError, "the same ones on every process, got rank 0: none; rank 1: 'step-2'.*shared",
    ),
    **{
        f"{estimator.__name__} of shards": (
            within(estimated, estimator), RuntimeError, f"{estimator.__name__}: {UNSHARDED}",
        )
        for estimator in (fisher_importance, mas_importance, magnitude_gradient_importance)
    },
    "estimate of FSDP1": (within(estimated, fisher_importance, flattened), RuntimeError, FSDP1),
    "estimate on meta": (
        lambda c: estimated(mas_importance, lambda model: model.to("meta")),
        RuntimeError, "mas_importance: parameter '0.weight' is on the meta.*load its weights",
    ),
}  # fmt: skip
