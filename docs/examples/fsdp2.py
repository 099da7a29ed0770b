"""FSDP2: torchrun --nproc-per-node 2 docs/examples/fsdp2.py [folder]. Killed at any time, it goes on where it was."""

import gc
import inspect
import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from alr_kernels import AlrAdamW, Importance
from alr_kernels.integrations import param_groups
from alr_kernels.integrations.checkpoints import load_checkpoint, save_checkpoint

dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
SIZE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


def rows(text, count=512, length=48):  # a byte is a token
    return torch.tensor(list(text.encode()[: count * length])).view(-1, length)


def sharded():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=64, **SIZE))
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def train(model, optimizer, data, steps, home):
    begin = (load_checkpoint(home, model, optimizer) or {"step": 0})["step"]
    for step in range(begin, steps):
        batch = data[(step * ranks + rank) * 4 % 448 :][:4]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(json.dumps({"phase": home.name, "step": step + 1, "rank": rank, "loss": loss.item()}), flush=True)
        if (step + 1) % 5 == 0:
            save_checkpoint(home, step + 1, model, optimizer)


model = sharded()  # first sharded, then the optimizer
optimizer = AlrAdamW(param_groups(model), lr=5e-3, record=True)
train(model, optimizer, rows("".join(topics.values())), 20, folder / "general")
optimizer.save_importance(folder / "importance.safetensors", dtype="int8")  # every rank its rows, one plain file

importance = Importance.load(folder / "importance.safetensors")  # on 1 process or 1,000
optimizer = AlrAdamW(param_groups(model), importance, lr=2e-3, reg_lambda=0.3)
train(model, optimizer, rows(inspect.getsource(inspect)), 15, folder / "domain")
del model, optimizer  # they hold the process group, and torch aborts if they outlive it
gc.collect()
dist.destroy_process_group()
