"""Run by a launcher: verbs on the processes of a job, interrupted and gone on with as often as is asked for.

Argument: JSON of [verb, [phase, step] after which Ctrl-C is pressed ..., options] of each run. Prints their results.

FSDP2 on CPUs: accelerate shards on accelerators alone; all but that test of the device's kind is the same.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys

import finetune_cases as cases
import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState

from alr_kernels.finetune.progress import Progress, Stopped

initialise = AcceleratorState.__init__


def on_processors(self, *args, **options):
    initialise(self, *args, **options)
    if PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
        self.fsdp_plugin = options.get("fsdp_plugin") or FullyShardedDataParallelPlugin()
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP


class Interrupting(Progress):
    """Presses Ctrl-C on the last rank alone, after a step of a phase."""

    def __init__(self, phase, step):
        self.at = phase, step

    def phase(self, name, total, done=0):
        def tick(step, note=""):
            if (name, step) == self.at and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
                self.at = None
                os.kill(os.getpid(), signal.SIGINT)

        return tick


def gone_on(verb, stops, options):
    """Return the results of a verb that is interrupted so often."""
    from alr_kernels.finetune import phases

    settings = cases.settings(verb, **options)
    for index, (phase, step) in enumerate(stops):
        with contextlib.suppress(Stopped):
            getattr(phases, verb)(settings, resume=index > 0, progress=Interrupting(phase, step))
            raise AssertionError(f"it went on after step {step} of {phase}")
    return getattr(phases, verb)(settings, resume=bool(stops))


def main(runs):
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        AcceleratorState.__init__ = on_processors
    found = [gone_on(*run) for run in runs]
    if torch.distributed.get_rank() == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    gc.collect()  # what holds the process group goes before it does, or torch may abort at exit
    torch.distributed.destroy_process_group()
