"""What ``alr-kernels plan`` says of sharded and replicated training, against live tensors and messages of a step."""

from __future__ import annotations

import contextlib
from unittest import mock

import lora_models
import peft
import torch
import torch.distributed as dist
from distributed_cases import mesh_of
from plan_cases import counted, live_bytes, llama
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from alr_kernels import AlrAdamW, lora_pairs
from alr_kernels.planning import Lora, Setup, plan, read_model

TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16}


def setup_of(strategy, **options):
    """HSDP has two replicas where there are processes for two."""
    shard = {"shard": max(dist.get_world_size() // 2, 1)} if strategy == "hsdp" else {}
    return Setup(strategy, **shard, **options)


def spread(model, blocks, setup):
    if setup.strategy == "ddp":
        return DistributedDataParallel(model, gradient_as_bucket_view=setup.bucket_view)
    mesh = mesh_of(setup.strategy if setup.strategy == "hsdp" and dist.get_world_size() > 1 else "rows")[0]
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)  # gradients of bf16 weights are bf16 all the same
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    return model


def optimizer_of(model, setup, **options):
    """AlrAdamW as the setup says."""
    pairs = lora_pairs(model) if setup.lora else None
    named = {name: param.shape for name, param in model.named_parameters() if param.requires_grad}
    shapes = {pair.name: pair.shape for pair in pairs} if pairs is not None else named
    generator = torch.Generator().manual_seed(1)
    importance = {name: torch.rand(shape, generator=generator) + 0.1 for name, shape in shapes.items()}
    return AlrAdamW(
        [(name, param) for name, param in model.named_parameters() if param.requires_grad],
        importance if setup.penalised else None, lora=pairs, state_dtype=setup.state_dtype, mode=setup.mode,
        importance_dtype=setup.importance_dtype, anchor_dtype=setup.anchor_dtype, master=setup.master,
        record=setup.records, **options,
    )  # fmt: skip


def adapted_llama(setup):
    """The bare model of a plan, and the one that is trained."""
    bare = llama()
    if setup.lora is None:
        return bare, bare.to(TORCH[setup.dtype or "fp32"])
    weights = read_model(bare)
    config = peft.LoraConfig(r=setup.lora.rank, target_modules=[*setup.lora.targets])
    return weights, peft.get_peft_model(bare, config).to(TORCH[setup.dtype or "fp32"])


def memory(strategy, options, folder):
    """A real step of a real model holds what is planned, on the fullest rank and on the emptiest, to the byte."""
    setup = setup_of(strategy, **options)
    source, model = adapted_llama(setup)
    source = source if setup.lora else read_model(source)
    blocks = (model.base_model.model if setup.lora else model).model.layers
    model = spread(model, blocks, setup)
    optimizer = optimizer_of(model, setup)
    tokens = torch.randint(30, (2, 8), generator=torch.Generator().manual_seed(dist.get_rank()))
    for _ in range(3):  # DDP rebuilds its buckets
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    live = live_bytes(optimizer, model)
    if strategy == "ddp" and not setup.bucket_view:
        sizes = model._get_ddp_logging_data()["rebuilt_bucket_sizes"]
        live["buckets"] = sum(map(int, sizes.split(", ")))
    column = plan(source, [dist.get_world_size()], setup).columns[0]
    rank = dist.get_rank() % column.shards
    if rank == 0:
        assert live == counted(column.kept)
    if rank == column.shards - 1:
        assert live == counted(column.emptiest)


@contextlib.contextmanager
def bytes_sent(found):
    """Count what crosses ranks: ``gathered`` into whole tensors, as bits where most ranks have no row; ``reduced``."""
    gather, reduce = dist.all_gather, dist.all_reduce

    def counting_gather(tensors, *arguments, **options):
        found["gathered"] += sum(tensor.nbytes for tensor in tensors)
        return gather(tensors, *arguments, **options)

    def counting_reduce(tensor, *arguments, **options):
        found["reduced" if tensor.is_floating_point() else "gathered"] += tensor.nbytes
        return reduce(tensor, *arguments, **options)

    with mock.patch.object(dist, "all_gather", counting_gather), mock.patch.object(dist, "all_reduce", counting_reduce):
        yield


def sent(model, setup, **options):
    """Bytes that cross ranks in the second step of a sharded model, with gradients that are given."""
    fully_shard(model, mesh=mesh_of(setup.strategy if setup.strategy == "hsdp" else "rows")[0])
    optimizer = optimizer_of(model, setup, **options)
    found = {}
    for _ in range(2):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.randn_like(param)
        found = {"gathered": 0, "reduced": 0}
        with bytes_sent(found):
            optimizer.step()
    return found


MODELS = {
    "linear": (llama, ["q_proj", "v_proj"], 8), "uneven": (llama, ["o_proj", "down_proj"], 5),
    "one row": (llama, ["v_proj"], 1), "transposed": (lora_models.gpt2, ["c_attn", "wte"], 3),
    "every kind": (lora_models.Mixed, lora_models.MIXED, 2),
}  # fmt: skip


def messages(strategy, kind, phase, mode, folder):
    """A step of LoRA pairs gathers and sums what is planned, to the byte."""
    build, targets, rank = MODELS[kind]
    setup = setup_of(strategy, phase=phase, mode=mode, lora=Lora(rank, tuple(targets)))
    bare = build()
    source = read_model(bare)
    found = sent(lora_models.adapted(bare, targets, r=rank), setup)
    planned = plan(source, [dist.get_world_size()], setup).columns[0].communicated
    assert found == {"gathered": planned["gathered_factors"], "reduced": planned["reduced_pull"]}


def statistics(strategy, phase, lora, folder):
    """What clipping and statistics add."""
    bare = llama()
    targets = ["q_proj", "v_proj"]
    setup = setup_of(strategy, phase=phase, lora=Lora(4, tuple(targets)) if lora else None)
    source = read_model(bare)

    def model():
        return lora_models.adapted(llama(), targets, r=4) if lora else llama()

    without = sent(model(), setup)["reduced"]
    found = sent(model(), setup, max_grad_norm=1.0, stats=True)["reduced"]
    column = plan(source, [dist.get_world_size()], setup).columns[0]
    assert found - without == column.communicated["statistics"]


FORMATS = {
    "fp32": {"phase": "both"},
    "coupled": {"phase": "tune", "mode": "coupled"},
    "record": {"phase": "record"},
    "plain": {"phase": "plain"},
    "lean": {"phase": "tune", "state_dtype": "int8", "importance_dtype": "int4", "anchor_dtype": "bf16"},
    "lean, recorded": {"phase": "both", "state_dtype": "bf16", "importance_dtype": "int8", "anchor_dtype": "bf16"},
    "split": {
        "phase": "tune", "dtype": "bf16", "master": "split", "state_dtype": "int8", "importance_dtype": "int4",
    },
    "stochastic": {"phase": "both", "dtype": "bf16", "master": "stochastic", "importance_dtype": "bf16"},
    "lora": {"phase": "both", "lora": Lora(8), "importance_dtype": "int8"},
    "lora, few rows": {"phase": "record", "lora": Lora(3), "state_dtype": "int8"},
    "lora, bf16": {
        "phase": "tune", "lora": Lora(5, ("q_proj", "down_proj"), "bf16"), "dtype": "bf16", "master": "split",
    },
}  # fmt: skip
CASES = {
    **{f"plan fsdp2 {name}": (memory, "fsdp2", options) for name, options in FORMATS.items()},
    **{f"plan hsdp {name}": (memory, "hsdp", FORMATS[name]) for name in ("fp32", "lean", "lora")},
    **{f"plan ddp {name}": (memory, "ddp", FORMATS[name]) for name in ("fp32", "lean", "lora")},
    "plan ddp, bucket view": (memory, "ddp", {"phase": "both", "bucket_view": True}),
    **{
        f"plan sends {kind}, {phase} {mode}": (messages, "fsdp2", kind, phase, mode)
        for kind in MODELS for phase in ("tune", "both") for mode in ("proximal", "coupled")
    },
    **{f"plan sends {kind}, {phase}": (messages, "fsdp2", kind, phase, "proximal")
       for kind in ("uneven", "transposed") for phase in ("plain", "record")},
    "plan sends hsdp": (messages, "hsdp", "transposed", "both", "proximal"),
    **{f"plan statistics {phase}{' lora' * lora}": (statistics, "fsdp2", phase, lora)
       for phase, lora in (("plain", False), ("both", False), ("record", True))},
}  # fmt: skip
