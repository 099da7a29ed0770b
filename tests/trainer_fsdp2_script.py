"""Run by ``torchrun``: transformers' Trainer under FSDP2 with the optimizer factory, both phases, and a resumed one.

Prints a line of JSON from rank 0: what of it was equal. Argument: a folder.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from distributed_training_cases import llama

from alr_kernels import Importance
from alr_kernels.integrations.transformers import AlrCallback, alr_optimizer

LENGTH = 16
initialise = AcceleratorState.__init__


def on_processors(self, *args, **options):
    """Accelerate shards on accelerators alone; all but that test of the device's kind is the same on CPUs."""
    initialise(self, *args, **options)
    if PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
        self.fsdp_plugin = options.get("fsdp_plugin") or FullyShardedDataParallelPlugin(fsdp_version=2)
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP


def rows(seed, count=64):
    tokens = torch.randint(37, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in tokens]


def train(model, data, folder, resume=None, **options):
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=6, save_steps=3, per_device_train_batch_size=4, max_grad_norm=0.0, report_to="none",
        use_cpu=True, disable_tqdm=True, logging_steps=1, fsdp=True,
        fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    )  # fmt: skip
    factory = (alr_optimizer, {"lr": 1e-2, "stats": True, **options})
    trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizer_cls_and_kwargs=factory)
    trainer.add_callback(AlrCallback(trainer, xi=1e-3))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return {name: param.full_tensor() for name, param in trainer.model.named_parameters()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def main(folder):
    AcceleratorState.__init__ = on_processors
    torch.set_num_threads(1)
    general = train(llama(), rows(1), folder / "general", record=True)
    sharded = all(type(p).__name__ == "DTensor" for p in general.model.parameters())
    again = train(llama(), rows(1), folder / "general", str(folder / "general" / "checkpoint-3"), record=True)
    found = {"sharded": sharded, "recording resumed": same(weights(general), weights(again))}
    path = folder / "general" / "checkpoint-6" / "importance.safetensors"
    pull = {"importance": str(path), "reg_lambda": 0.3}
    domain = train(llama(), rows(2), folder / "domain", **pull)
    resumed = train(llama(), rows(2), folder / "domain", str(folder / "domain" / "checkpoint-3"), **pull)
    found["tuning resumed"] = same(weights(domain), weights(resumed))
    found["pulled"] = not same(weights(domain), weights(train(llama(), rows(2), folder / "plain")))
    found["importance"] = set(Importance.load(path)) == {name for name, _ in llama().named_parameters()}
    found["logged"] = any("alr/penalty" in entry for entry in domain.state.log_history)
    if dist.get_rank() == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    gc.collect()  # what holds the process group goes before it does, or torch may abort at exit
    dist.destroy_process_group()
