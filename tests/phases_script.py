"""Run by a launcher: a verb on the processes of a job. Arguments: verb, "resume" or "new", JSON of its options.

FSDP2 on CPUs: accelerate shards on accelerators alone; all but that test of the device's kind is the same.
"""

from __future__ import annotations

import gc
import json
import os
import sys

import finetune_cases as cases
import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState

initialise = AcceleratorState.__init__


def on_processors(self, *args, **options):
    initialise(self, *args, **options)
    if PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
        self.fsdp_plugin = options.get("fsdp_plugin") or FullyShardedDataParallelPlugin()
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP


def main(verb, how, options):
    from alr_kernels.finetune import phases

    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        AcceleratorState.__init__ = on_processors
    found = getattr(phases, verb)(cases.settings(verb, **options), resume=how == "resume")
    if torch.distributed.get_rank() == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
    gc.collect()  # what holds the process group goes before it does, or torch may abort at exit
    torch.distributed.destroy_process_group()
