"""Several processes for tests of distributed runs: one spawn runs many cases, each reports for itself."""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib
import json
import os
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = datetime.timedelta(seconds=60)  # of a collective: a rank that failed leaves the others waiting


def cases_of(modules):
    """Return name → (function, arguments) of all ``CASES`` of these modules."""
    return {name: case for module in modules for name, case in importlib.import_module(module).CASES.items()}


def _rank(rank, world, modules, names, folder, shared):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=TIMEOUT)
    cases = cases_of(modules)
    own = Path(shared, f"{world}-ranks")
    own.mkdir(exist_ok=True)
    for name in names:
        torch.manual_seed(0)
        began = time.perf_counter()
        try:
            function, *arguments = cases[name]
            function(*arguments, own)
            dist.barrier()
            found = ""
        except Exception:
            found = traceback.format_exc()
        seconds = time.perf_counter() - began
        Path(folder, f"{names.index(name)}.{rank}.json").write_text(json.dumps([found, seconds]), encoding="utf-8")
        if found:
            break  # the others stop at their next collective
    gc.collect()  # what holds the process group goes before it does, or torch may abort at exit
    dist.destroy_process_group()


def run(world, modules, names, shared):
    """Run these cases on ``world`` ranks, with a folder that all see in ``shared``; return name → '' or tracebacks.

    A case that fails on one rank ends the spawn; the rest goes on in a new one.
    """
    found = {}
    names = list(names)
    while names:
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.suppress(mp.ProcessExitedException):  # a rank that died has not reported
                mp.start_processes(_rank, (world, modules, names, folder, str(shared)), world, start_method="spawn")
            for i, name in enumerate(list(names)):
                reports = [Path(folder, f"{i}.{rank}.json") for rank in range(world)]
                texts = [json.loads(path.read_text(encoding="utf-8"))[0] for path in reports if path.exists()]
                if not texts and i > 0:
                    break  # for the next spawn
                found[name] = "\n".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text)
                if len(texts) < world and not found[name]:
                    found[name] = f"only {len(texts)} of {world} ranks came back"
        names = [name for name in names if name not in found]
    return found
