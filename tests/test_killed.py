"""SIGKILL of a rank in both phases and in the middle of a checkpoint: restarted, the job ends as if undisturbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

psutil = pytest.importorskip("psutil", reason="psutil is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="kills processes as Linux does"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed"),
]

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "docs" / "examples" / "fsdp2.py"
# Kills rank 1 while it writes its part of the second checkpoint, of step 10.
IN_A_CHECKPOINT = f"""
import os, runpy, signal, sys
import torch.distributed.checkpoint as dcp
write, calls = dcp.FileSystemWriter.write_data, []
def half(self, *arguments):
    calls.append(1)
    future = write(self, *arguments)
    if len(calls) == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return future
dcp.FileSystemWriter.write_data = half
sys.argv = sys.argv[1:]
runpy.run_path({str(EXAMPLE)!r}, run_name="__main__")
"""


def launch(folder, script=EXAMPLE, kill_at=None):
    """Run the job on two ranks; kill rank 1 once it has said (phase, step). Return its lines, and whether it ended."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(script)]
    command += [str(folder)] if script == EXAMPLE else ["example", str(folder)]
    lines, victim = [], None
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    ) as job:
        for text in job.stdout:
            for part in text.replace("}{", "}\n{").splitlines():
                if part.startswith("{"):
                    lines.append(json.loads(part))
            if kill_at and victim is None:  # known before it is needed: the job does not wait
                ranks = psutil.Process(job.pid).children(recursive=True)
                victim = next(p for p in ranks if p.environ().get("RANK") == "1")
            if kill_at and any((x["phase"], x["step"], x["rank"]) == (*kill_at, 1) for x in lines):
                victim.send_signal(signal.SIGKILL)
                kill_at = None
        errors = job.stderr.read()
    return lines, job.returncode == 0, errors


def begun(lines, phase):
    return min((line["step"] for line in lines if line["phase"] == phase), default=None)


def last_checkpoint(home):
    """Return the step of the last one that a killed job left; it may have taken some steps before the signal came."""
    return max(int(path.name.removeprefix("step-")) for path in home.glob("step-*"))


def everything(folder):
    """Return every tensor of both phases' last checkpoints, and the importance file's bytes."""
    found = {"importance": (folder / "importance.safetensors").read_bytes()}
    for phase in ("general/step-20", "domain/step-15"):
        path = folder / f"{phase.replace('/', '-')}.pt"
        dcp_to_torch_save(folder / phase, path)
        found[phase] = torch.load(path, weights_only=False)
    return found


def same(first, second):
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    lines, ended, errors = launch(folder)
    assert ended, errors
    assert (begun(lines, "general"), begun(lines, "domain")) == (1, 1)
    return everything(folder)


def test_a_rank_killed_in_each_phase(tmp_path, undisturbed):
    lines, ended, _ = launch(tmp_path, kill_at=("general", 6))
    assert not ended
    assert begun(lines, "domain") is None
    reached = last_checkpoint(tmp_path / "general")
    assert reached < 20
    lines, ended, errors = launch(tmp_path, kill_at=("domain", 6))
    assert not ended
    assert begun(lines, "general") == reached + 1, errors
    reached = last_checkpoint(tmp_path / "domain")
    assert reached < 15
    lines, ended, errors = launch(tmp_path)
    assert ended, errors
    assert (begun(lines, "general"), begun(lines, "domain")) == (None, reached + 1)
    assert same(everything(tmp_path), undisturbed)


def test_half_a_checkpoint_is_never_loaded(tmp_path, undisturbed):
    script = tmp_path / "killed_in_a_checkpoint.py"
    script.write_text(IN_A_CHECKPOINT, encoding="utf-8")
    folder = tmp_path / "run"
    folder.mkdir()
    _, ended, _ = launch(folder, script)
    assert not ended
    names = sorted(path.name for path in (folder / "general").iterdir())
    assert names == [".step-10.partial", "step-5"]
    assert list((folder / "general" / ".step-10.partial").iterdir()), "nothing was written: this tests nothing"
    lines, ended, errors = launch(folder)
    assert ended, errors
    assert begun(lines, "general") == 6
    assert same(everything(folder), undisturbed)
    assert not list((folder / "general").glob(".*"))
