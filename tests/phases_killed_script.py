"""Run on its own: record, tune and run are killed at file events spread over all they do, and gone on with.

A process that has imported everything forks one that is killed and one that goes on, again and again: nothing that
trains runs in it, for torch's backward must not be forked. Arguments: a folder, the verb, how many events. Prints JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import finetune_cases as cases
import torch

from alr_kernels.finetune import callback, phases, trainer  # noqa: F401 - trainer: imported before forking

WRITES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
CHANGES = os.O_WRONLY | os.O_RDWR


def in_child(work):
    """Return how a forked process that does this work ended, as os.waitpid says."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        torch.set_num_threads(1)
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def watched(out, log, last):
    """Count what changes files under a name; die before the last-th of it, or write down what it was."""
    count = 0

    def hook(event, arguments):
        nonlocal count
        if event != "open" and event not in WRITES:
            return
        path, *more = arguments
        if event == "open" and not (isinstance(more[1], int) and more[1] & CHANGES):
            return
        if isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith(out):
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)
            if log:
                os.write(log, f"{event} {os.fsdecode(path)}\n".encode())

    sys.addaudithook(hook)


def run(verb, folder, name, how, last=0, log=None):
    """Return the work of a child: a verb in ``folder/name``, killed before its last-th change of a file."""

    def work():
        out = folder / name / ("out.safetensors" if verb == "record" else "out")
        out.parent.mkdir(exist_ok=True)
        watched(str(out.parent), log, last)
        given = {"model": str(folder / "llama"), "data": str(folder / "domain.jsonl"), "steps": 4, "out": str(out)}
        if verb != "record":
            given["general"] = str(folder / "general.jsonl")
        if verb == "tune":
            given["importance"] = str(folder / "importance.safetensors")
        if verb == "record":
            given["save_model"] = str(out.parent / "model")
        getattr(phases, verb)(cases.settings(verb, **given), **how)

    return work


def left(home):
    """Return the files of a result that count as such: what a reader would take for whole."""
    found = {}
    for path in home.rglob("*"):
        hidden = any(part.startswith(".") or part.endswith((".work", "checkpoints")) for part in path.parts)
        if hidden or not path.is_file():
            continue
        model = any((path.parent / name).exists() for name in ("config.json", "adapter_config.json"))
        if path.name.endswith(("out.safetensors", "importance.safetensors")) or (
            (model and path.suffix == ".safetensors") or (path.name in ("config.json", "tokenizer.json") and model)
        ):
            found[str(path.relative_to(home))] = path.read_bytes()
    return found


def main(folder, verb, events):
    log = os.open(folder / f"count-{verb}", os.O_CREAT | os.O_RDWR)
    assert in_child(run(verb, folder, f"whole-{verb}", {}, log=log)) == 0
    seen = (folder / f"count-{verb}").read_text().splitlines()
    whole = left(folder / f"whole-{verb}")
    wrong, resumed = [], 0
    moves = [i for i, line in enumerate(seen, 1) if line.startswith("os.rename") and "/.saving/" in line]
    chosen = {1 + round(index * (len(seen) - 1) / (events - 1)) for index in range(events)} | {moves[1], moves[-1]}
    for last in sorted(chosen):
        name = f"killed-{verb}-{last}"
        if os.WTERMSIG(in_child(run(verb, folder, name, {}, last))) != signal.SIGKILL:
            wrong.append(f"{last}: it was not killed")
        found = left(folder / name)
        folders = {os.path.dirname(file) for file in found}
        if found != {file: data for file, data in whole.items() if os.path.dirname(file) in folders}:
            wrong.append(f"{last}: something that is not whole can be taken for whole")
        begun = any(path.name in ("begun.yaml", "results.json", "out.run.yaml") for path in (folder / name).rglob("*"))
        if in_child(run(verb, folder, name, {"resume": begun})):
            wrong.append(f"{last}: it did not go on")
        resumed += begun
        if left(folder / name) != whole:
            wrong.append(f"{last}: the end is another")
        if any("checkpoint" in path.name or path.suffix == ".work" for path in (folder / name).rglob("*")):
            wrong.append(f"{last}: something was left behind")
    print(json.dumps({"total": len(seen), "files": sorted(whole), "resumed": resumed, "wrong": wrong}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
