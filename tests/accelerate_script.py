"""Run by ``accelerate launch`` with FSDP2: the optimizer is built before ``prepare``, which swaps its parameters.

Trains, saves a state in the middle, loads it into fresh objects and goes on; a whole run follows with the gathered
gradients and must take the same steps. Arguments: folder, "full" or "lora".
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import lora_models
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from distributed_cases import importance_of, same_state
from distributed_lora_cases import local_of, random_importance
from distributed_training_cases import OPTIONS, batch, llama, loss_of, whole_gradients

from alr_kernels import AlrAdamW, Importance, lora_pairs


def build(kind):
    if kind == "lora":
        model = lora_models.adapted(llama(), ["q_proj", "v_proj"], r=3)
        pairs = lora_pairs(model)
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        return model, AlrAdamW(trained, random_importance(pairs), lora=pairs, **OPTIONS)
    model = llama()
    return model, AlrAdamW(model.named_parameters(), importance_of(llama()), max_grad_norm=0.5, **OPTIONS)


def on_processors(accelerator):
    """Accelerate shards on accelerators alone; all but that test of the device's kind is the same on CPUs."""
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()  # as `accelerate launch` described it
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


def main(folder, kind):
    torch.set_num_threads(1)
    accelerator = on_processors(Accelerator(cpu=True))
    assert accelerator.is_fsdp2
    reference, straight = build(kind)
    model, optimizer = accelerator.prepare(*build(kind))
    assert all(type(p).__name__ == "DTensor" for group in optimizer.param_groups for p in group["params"])

    def advance(steps):
        for step in steps:
            accelerator.backward(loss_of(model, batch(step, accelerator.process_index)))
            grads = whole_gradients(model)
            for name, param in reference.named_parameters():
                param.grad = grads.get(name)
            optimizer.step()
            straight.step()
            optimizer.zero_grad()

    def compare():
        if kind == "lora" or optimizer.optimizer.max_grad_norm is not None:
            for (name, p), (_, q) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
                expected, got = local_of(q.detach(), p.detach())
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6, msg=name)
        else:
            same_state(straight, optimizer.optimizer, (reference, model))

    advance(range(2))
    compare()
    accelerator.save_state(folder / "state")
    accelerator.free_memory()  # forget the first objects
    model, optimizer = accelerator.prepare(*build(kind))
    accelerator.load_state(folder / "state")
    advance(range(2, 4))
    compare()
    assert optimizer.optimizer.recorded_steps == 4
    optimizer.optimizer.save_importance(folder / "importance.safetensors", xi=1e-3)
    recorded, expected = Importance.load(folder / "importance.safetensors"), straight.recorded_importance(xi=1e-3)
    assert list(recorded) == list(expected)
    for name in expected:
        torch.testing.assert_close(recorded[name], expected[name], rtol=1e-2, atol=1e-3 * float(expected[name].max()))
    if accelerator.is_main_process:
        print("the sharded run took the whole run's steps")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    gc.collect()  # what holds the process group goes before it does, or torch may abort at exit
    torch.distributed.destroy_process_group()
