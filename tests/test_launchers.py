"""Accelerate's launcher and transformers' Trainer under FSDP2, on two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed"),
]

TESTS = Path(__file__).parent
FSDP2 = {
    "fsdp_version": "2",
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
    "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    "mixed_precision": "no",
    "dynamo_backend": "no",
}


def launch(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(TESTS)}
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, env=environment, cwd=TESTS.parent, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_accelerate_swaps_the_parameters(tmp_path, kind):
    """Built before ``prepare``, saved and loaded in the middle: the steps of a whole run with the same gradients."""
    options = [f"--{key}={value}" for key, value in FSDP2.items()]
    said = launch(
        "accelerate.commands.launch", "--use_fsdp", "--num_processes=2", "--num_machines=1", *options,
        str(TESTS / "accelerate_script.py"), str(tmp_path), kind,
    )  # fmt: skip
    assert "the sharded run took the whole run's steps" in said


def test_trainer_shards(tmp_path):
    """Both phases and a resumed one of each, through the optimizer factory."""
    said = launch(
        "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
        str(TESTS / "trainer_fsdp2_script.py"), str(tmp_path),
    )  # fmt: skip
    found = json.loads(said.strip().splitlines()[-1])
    assert found == dict.fromkeys(
        ("sharded", "recording resumed", "tuning resumed", "pulled", "importance", "logged"), True
    )
