"""What each of eight ranks takes from an importance file, for a model that was on the meta device or not."""

from __future__ import annotations

import torch
import torch.distributed as dist
from distributed_cases import Weights, importance_of
from torch.distributed.fsdp import fully_shard

from alr_kernels import AlrAdamW, Importance


def load(kept, meta, folder):
    whole = importance_of(Weights()).astype(kept)
    path = folder / f"eight-{kept}-{meta}.safetensors"
    if dist.get_rank() == 0:
        whole.save(path)
    dist.barrier()
    with torch.device("meta" if meta else "cpu"):
        model = Weights()
    fully_shard(model)
    if meta:
        model.to_empty(device="cpu")
    optimizer = AlrAdamW(model.named_parameters(), Importance.load(path))
    for param in model.parameters():
        param.to_local().detach().fill_(1.0)
        param.grad = torch.zeros_like(param)
    optimizer.step()
    empty = 0
    for _, slot, param in optimizer._members():
        rows, expected = param.to_local().shape[0], whole.encoded(slot.name)
        begin = dist.get_rank() * -(-param.shape[0] // dist.get_world_size())
        for mine, all_of_it in ((slot.importance.values, expected.values), (slot.importance.scales, expected.scales)):
            assert (mine is None) is (all_of_it is None)
            assert mine is None or torch.equal(mine, all_of_it[begin : begin + rows]), slot.name
        empty += rows == 0
    assert empty == {0: 0, 7: 4}.get(dist.get_rank(), empty)
    assert dict(optimizer.coeffs) == dict(AlrAdamW(Weights().named_parameters(), whole).coeffs)


CASES = {
    "fp32 from the meta device": (load, "fp32", True),
    "int8": (load, "int8", False),
    "int4 from the meta device": (load, "int4", True),
}
