"""Killed at any change of a file, or interrupted in any phase: nothing half counts as whole, the end is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import finetune_cases as cases
import pytest
import torch
from finetune_cases import record, tune

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="Trainer needs accelerate")
pytest.importorskip("datasets", reason="datasets is not installed")

from alr_kernels.finetune import phases
from alr_kernels.finetune.progress import Stopped

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("resumed")
    cases.model_folder(folder / "llama")
    cases.texts(folder)
    record(folder, folder / "importance.safetensors")
    record(folder, folder / "of-lora.safetensors", lora="r=4,targets=q_proj+v_proj+up_proj")
    return folder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize(("verb", "kills"), [("record", 4), ("tune", 5)])
def test_killed_anywhere(home, verb, kills):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    done = subprocess.run(
        [sys.executable, str(TESTS / "phases_killed_script.py"), str(home), verb, str(kills)],
        capture_output=True, text=True, env=environment, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert not found["wrong"], done.stderr[-3000:]
    assert found["total"] > 50
    assert found["resumed"] >= kills - 2, "most of the kills were before the run began"
    assert len(found["files"]) >= 3


def test_run_goes_on_in_every_phase(home, tmp_path):
    given = {"model": str(home / "llama"), "data": str(home / "domain.jsonl"), "general": str(home / "general.jsonl")}

    def run(name, progress=None, **how):
        settings = cases.settings("run", **given, out=str(tmp_path / name), baseline=True, start_from="recorded")
        return phases.run(settings, progress=progress, **how)

    whole = run("whole")
    for phase in ("record", "tune", "plain"):
        with pytest.raises(Stopped):
            run("again", cases.Interrupting(**{phase: 2}), resume=phase != "record")
    progress = cases.Interrupting()
    found = run("again", progress, resume=True)
    assert {name for name, _, _ in progress.steps} == {"plain"}
    for folder in ("recorded", "tuned", "plain"):
        assert cases.bytes_of(tmp_path / "again" / folder) == cases.bytes_of(tmp_path / "whole" / folder)
    importance = [(tmp_path / name / "importance.safetensors").read_bytes() for name in ("again", "whole")]
    assert importance[0] == importance[1]
    for key in ("before", "after", "plain", "summary", "movement", "coefficients"):
        assert found[key] == whole[key], key


@pytest.mark.parametrize("kind", ["full", "lora", "balanced"])
def test_tuning_resumes_with_the_same_bytes(home, tmp_path, kind):
    options = {
        "full": {"state_dtype": "bf16", "tune_importance_dtype": "int8", "batch": 16, "steps": 9},
        "lora": {
            "lora": "r=4,targets=q_proj+v_proj+up_proj,dropout=0.2",
            "importance": str(home / "of-lora.safetensors"),
        },
        "balanced": {"rebalance_every": 2, "dtype": "bf16", "accumulate": 2, "batch": 2, "max_grad_norm": 0.1},
    }[kind]
    whole = tune(home, tmp_path / "whole", **options)
    for step in (1, 4, 6):
        how = {"resume": (tmp_path / "again").exists()}
        with pytest.raises(Stopped):
            tune(home, tmp_path / "again", how=how, progress=cases.Interrupting(tune=step), **options)
        assert not (tmp_path / "again" / "config.json").exists()
    found = tune(home, tmp_path / "again", how={"resume": True}, **options)
    assert cases.bytes_of(tmp_path / "again") == cases.bytes_of(tmp_path / "whole")
    for key in ("before", "after", "coefficients", "movement", "summary", "importance"):
        assert found[key] == whole[key], key
    assert [x | {"seconds": 0} for x in found["curves"]["tune"]] == [
        x | {"seconds": 0} for x in whole["curves"]["tune"]
    ]
    assert found["log"] == whole["log"]
